"""Packed weights under `torch.compile`, which cannot look into how they are unpacked: sizes there depend on data.

For it, making a dense weight is one operation, `torch.ops.iks_plugin.dense_weight`, of a known result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import entries

_library = torch.library.Library("iks_plugin", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "dense_weight(Tensor values, Tensor index, Tensor? counts, Tensor? scales, int[] shape, ScalarType dtype, "
    "int block, int? axis, int[]? order) -> Tensor"
)  # type: ignore[no-untyped-call]


is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", torch._utils.is_compiling)
"""Whether `torch.compile` is looking at what runs. torch 2.1 has it elsewhere."""


def register(unpack: Callable[..., Tensor]) -> None:
    """Let `unpack`, which takes the operation's arguments, make the dense weights."""
    for device in ("CPU", "CUDA"):
        _library.impl("dense_weight", unpack, device)  # type: ignore[no-untyped-call]


def _without_data(
    values: Tensor,
    index: Tensor,
    counts: Tensor | None,
    scales: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    block: int,
    axis: int | None,
    order: list[int] | None,
) -> Tensor:
    dense = torch.empty(shape, dtype=dtype, device=values.device)
    return entries.in_order(dense, None if order is None else tuple(order))


_library.impl("dense_weight", _without_data, "Meta")  # type: ignore[no-untyped-call]
