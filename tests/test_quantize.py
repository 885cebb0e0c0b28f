"""Weights in narrower types."""

from __future__ import annotations

import pytest
import torch

from iks_plugin import OptionError
from iks_plugin.quantize import check_value_dtype, rounded, stored_dtype, to_int8


def plainly_quantized(weight: torch.Tensor) -> torch.Tensor:
    """Each output channel's largest weight as 127, which most tools do."""
    scales = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    return (weight / scales).round() * scales


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_int8_is_codes_times_scales_along_its_axis(axis: int) -> None:
    weight = torch.randn(8, 6, 3, 5)
    codes, scales = to_int8(weight, axis)
    assert codes.shape == weight.shape
    assert codes.dtype == torch.int8
    assert scales.shape == (weight.shape[axis],)
    assert codes.abs().max() <= 127
    spread = scales.view([-1 if dimension == axis else 1 for dimension in range(4)])
    assert (codes * spread - weight).norm() < 0.01 * weight.norm()


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_int8_errs_no_more_than_the_largest_weight_as_127(kind: str) -> None:
    shape = (64, 64, 3, 3)
    weight = torch.randn(shape) if kind == "normal" else torch.distributions.Laplace(0.0, 1.0).sample(shape)
    weight[torch.rand(shape) < 0.9] = 0
    codes, scales = to_int8(weight, 0)
    error = (codes * scales.view(-1, 1, 1, 1) - weight).square().sum()
    assert error < (plainly_quantized(weight) - weight).square().sum()


def test_channels_of_zeros_and_of_one_value() -> None:
    weight = torch.zeros(3, 4, 1, 1)
    weight[1, 2], weight[2, 0], weight[2, 1] = 0.5, -3.0, 3.0
    codes, scales = to_int8(weight, 0)
    assert not codes[0].any()
    assert torch.allclose(codes * scales.view(-1, 1, 1, 1), weight, rtol=0.005)


def test_scales_take_two_bytes() -> None:
    _, scales = to_int8(torch.randn(16, 8, 3, 3), 0)
    assert torch.equal(scales, scales.bfloat16().float())


def test_no_channels() -> None:
    codes, scales = to_int8(torch.zeros(0, 4, 3, 3), 0)
    assert codes.shape == (0, 4, 3, 3)
    assert scales.shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_of_what_is_not_finite(bad: float) -> None:
    with pytest.raises(OptionError, match="expected finite weights, which int8 values can stand for"):
        to_int8(torch.tensor([[1.0, bad]]), 0)


@pytest.mark.parametrize(
    ("own", "wanted", "stored"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.int8, torch.int8),
    ],
)
def test_a_weight_is_never_stored_wider_than_it_is(own: torch.dtype, wanted: torch.dtype, stored: torch.dtype) -> None:
    assert stored_dtype(own, wanted) == stored


def test_rounding_that_would_overflow() -> None:
    with pytest.raises(OptionError, match=r"float16 can hold \(up to 65504\), got one of size 100000.*'bfloat16'"):
        rounded(torch.tensor([1.0, 1e5]), torch.float16)
    with pytest.raises(OptionError, match="choose value_dtype='float32'"):
        rounded(torch.tensor([3.4e38]), torch.bfloat16)


def test_rounding_keeps_what_is_not_finite() -> None:
    assert rounded(torch.tensor([float("inf"), 1.0]), torch.float16)[0] == float("inf")


@pytest.mark.parametrize("value", ["float8", 16, None, torch.int32, ["float16"]])
def test_value_dtypes_that_do_not_exist(value: object) -> None:
    with pytest.raises(OptionError, match="value_dtype must be one of 'float32', 'float16', 'bfloat16', 'int8', got"):
        check_value_dtype(value)


def test_value_dtypes_by_name_and_by_torch_dtype() -> None:
    assert check_value_dtype("bfloat16") == check_value_dtype(torch.bfloat16) == torch.bfloat16
