"""The soft threshold against the published formula, written out with plain differentiable operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iks_plugin.gate import soft_threshold


def published(weight: Tensor, threshold: Tensor) -> Tensor:
    return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(threshold))


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


SHAPES = {
    "weight": ((6, 4, 3, 3), (6, 4, 3, 3)),
    "kernel": ((6, 4, 3, 3), (6, 4, 1, 1)),
    "filter": ((6, 4, 3, 3), (6, 1, 1, 1)),
    "transposed filter": ((6, 4, 3, 3), (1, 4, 1, 1)),
    "layer": ((6, 4, 3, 3), (1, 1, 1, 1)),
    "1d": ((6, 4, 3), (6, 4, 1)),
    "linear": ((6, 4), (6, 1)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("center", [-12.0, -3.0, -1.0, 0.5])
def test_value_and_gradients_are_the_published_ones(shapes, center):
    weight, threshold = torch.randn(shapes[0]).double(), (torch.randn(shapes[1]) + center).double()
    ours, theirs = (leaf(weight), leaf(threshold)), (leaf(weight), leaf(threshold))
    upstream = torch.randn(shapes[0]).double()
    value, expected = soft_threshold(*ours), published(*theirs)
    value.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=0, atol=0)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, rtol=1e-12, atol=1e-15)


def test_gradcheck_first_and_second_order():
    weight, threshold = leaf(torch.randn(3, 2, 3).double()), leaf(torch.randn(3, 2, 1).double() - 2)
    assert torch.autograd.gradcheck(soft_threshold, (weight, threshold))
    assert torch.autograd.gradgradcheck(soft_threshold, (weight, threshold))


def test_a_weight_at_its_threshold_is_zero_and_gets_no_gradient():
    threshold = torch.tensor([-1.0, -1.0], requires_grad=True)
    weight = torch.sigmoid(threshold.detach()) * torch.tensor([1.0, -1.0])
    weight.requires_grad_()
    value = soft_threshold(weight, threshold)
    value.sum().backward()
    assert value.tolist() == [0, 0] and weight.grad.tolist() == [0, 0] and threshold.grad.tolist() == [0, 0]


def test_at_the_initial_threshold_the_weight_changes_by_less_than_a_hundred_thousandth():
    weight = torch.randn(1000)
    assert (soft_threshold(weight, torch.full((1000,), -12.0)) - weight).abs().max() < 7e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    weight, threshold = torch.randn(64, 8).to(dtype), (torch.randn(64, 8) - 2).to(dtype)
    value = soft_threshold(weight, threshold)
    assert value.dtype == dtype
    assert torch.equal(value, soft_threshold(weight.float(), threshold.float()).to(dtype))


def test_autocast_leaves_the_gate_in_float32():
    weight, threshold = leaf(torch.randn(8, 8)), leaf(torch.full((8, 8), -2.0))
    expected = soft_threshold(weight, threshold)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = soft_threshold(weight, threshold)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_channels_last_is_kept():
    weight = torch.randn(8, 8, 3, 3).to(memory_format=torch.channels_last)
    threshold = torch.full_like(weight, -2)
    assert soft_threshold(weight, threshold).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("frozen", ["weight", "threshold"])
def test_only_what_requires_a_gradient_gets_one(frozen):
    tensors = {"weight": leaf(torch.randn(4, 4)), "threshold": leaf(torch.full((4, 4), -2.0))}
    tensors[frozen].requires_grad_(False)
    soft_threshold(**tensors).sum().backward()
    assert tensors[frozen].grad is None
    assert all(tensor.grad is not None for name, tensor in tensors.items() if name != frozen)


@settings(deadline=None, max_examples=200)
@given(
    weight=st.floats(-2, 2, width=32),
    threshold=st.floats(-30, 30, width=32),
)
def test_shrinks_towards_zero_and_never_beyond(weight, threshold):
    value = soft_threshold(torch.tensor([weight]), torch.tensor([threshold])).item()
    assert value * weight >= 0
    assert abs(value) <= abs(weight)
    assert (value == 0) == (abs(torch.tensor(weight)) <= torch.sigmoid(torch.tensor(threshold))).item()
