"""Weights in narrower types: float16 and bfloat16 by rounding, int8 with one scale per output channel."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import OptionError

VALUE_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""The types that non-zero weights can be stored in, by the name of the option `value_dtype`."""

_LARGEST = 127
_CLIPPING = (1.0, 0.98, 0.95, 0.92, 0.88, 0.84, 0.8)
"""Shares of a channel's largest weight that are tried as the largest that its scale can express."""
_CACHED = 1 << 16
"""So many weights are worked on at once: what a processor's cache holds."""


def check_value_dtype(value_dtype: object) -> torch.dtype:
    """The type called `value_dtype`, or an `OptionError`. A `torch.dtype` of that name will do as well."""
    name = str(value_dtype).removeprefix("torch.") if isinstance(value_dtype, torch.dtype) else value_dtype
    if not isinstance(name, str) or name not in VALUE_DTYPES:
        raise OptionError(f"value_dtype must be one of {', '.join(map(repr, VALUE_DTYPES))}, got {value_dtype!r}")
    return VALUE_DTYPES[name]


def stored_dtype(own: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """What weights of the floating type `own` are stored in: `wanted`, unless their own is narrower already."""
    return own if own.itemsize < wanted.itemsize else wanted


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in a floating type, to nearest.

    Raises:
        OptionError: a finite weight would become infinite.
    """
    if dtype == weight.dtype:
        return weight
    result = weight.to(dtype)
    if not torch.equal(torch.isfinite(result), torch.isfinite(weight)):
        largest = float(weight[torch.isfinite(weight)].abs().max())
        name = str(dtype).removeprefix("torch.")
        raise OptionError(
            f"expected weights that {name} can hold (up to {torch.finfo(dtype).max:g}), got one of size "
            f"{largest:g}: choose value_dtype='{'bfloat16' if largest < 3e38 else 'float32'}'"
        )
    return result


def channels_of(positions: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """The index along `axis` of each of the flat `positions` in a tensor of `shape`."""
    return positions.div(shape[axis + 1 :].numel(), rounding_mode="floor") % shape[axis]


def to_int8(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes in [-127, 127] of `weight`'s shape, and a float32 scale for each index along `axis`.

    The weight is code * scale. For each channel some ways to clip its largest weights are tried. With the codes that a
    clipping gives, the scale of the least squared error is sum(weight * code) / sum(code ** 2), and the clipping with
    the smallest error is kept. Scales are rounded to bfloat16, which takes half the bytes in a file.

    Raises:
        OptionError: a weight is not finite.
    """
    if not torch.isfinite(weight).all():
        raise OptionError("expected finite weights, which int8 values can stand for, got nan or inf")
    channels = weight.movedim(axis, 0).flatten(1)
    scales = torch.empty(len(channels))
    codes = torch.empty(channels.shape, dtype=torch.int8)
    step = max(1, _CACHED // max(1, channels.shape[1]))
    for start in range(0, len(channels), step):
        chunk = channels[start : start + step].float()
        scales[start : start + step] = best = _best_scales(chunk)
        codes[start : start + step] = _codes(chunk, best)
    moved = [weight.shape[axis], *(size for dimension, size in enumerate(weight.shape) if dimension != axis)]
    return codes.view(moved).movedim(0, axis), scales


def _best_scales(channels: Tensor) -> Tensor:
    largest = channels.abs().amax(dim=1)
    scales = torch.zeros_like(largest)
    errors = torch.full_like(largest, torch.inf)
    for share in _CLIPPING:
        codes = _codes(channels, largest * (share / _LARGEST))
        fitted = (channels * codes).sum(dim=1) / codes.square().sum(dim=1).clamp_(min=1)
        fitted = fitted.bfloat16().float()
        error = codes.mul_(fitted.unsqueeze(1)).sub_(channels).square_().sum(dim=1)
        better = error < errors
        scales = torch.where(better, fitted, scales)
        errors = torch.where(better, error, errors)
    return scales


def _codes(channels: Tensor, scales: Tensor) -> Tensor:
    """`channels` in units of their scales, whole numbers in [-127, 127]; all zero where a scale is zero."""
    units = torch.where(scales > 0, scales, torch.inf).unsqueeze(1)
    return (channels / units).round_().clamp_(-_LARGEST, _LARGEST)
