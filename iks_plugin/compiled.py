"""Packed weights under `torch.compile`, which cannot look into how they are unpacked: sizes there depend on data.

For it, making a dense weight is one operation, `torch.ops.iks_plugin.dense_weight`, of a known result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import entries

_library = torch.library.Library("iks_plugin", "FRAGMENT")  # type: ignore[no-untyped-call]
_is_known = hasattr(torch.ops.iks_plugin, "dense_weight")
"""Where the package is imported anew, the operation is there already."""
if not _is_known:
    _library.define(
        "dense_weight(Tensor values, Tensor index, Tensor? counts, Tensor? scales, int[] shape, ScalarType dtype, "
        "int block, int? axis, int[]? order) -> Tensor"
    )  # type: ignore[no-untyped-call]

is_compiling: Callable[[], bool] = (
    torch.compiler.is_compiling if hasattr(torch.compiler, "is_compiling") else torch._utils.is_compiling
)
"""Whether `torch.compile` is looking at what runs. torch 2.1 has it elsewhere."""


@dataclass(frozen=True)
class Parts:
    """What the operation is given: the tensors and the settings of a `PackedWeight`."""

    values: Tensor
    index: Tensor
    counts: Tensor | None
    scales: Tensor | None
    shape: list[int]
    dtype: torch.dtype
    block: int
    axis: int | None
    order: list[int] | None


def register(unpack: Callable[[Parts], Tensor]) -> None:
    """Let `unpack` make the dense weights."""
    if not _is_known:
        for device in ("CPU", "CUDA"):
            _library.impl("dense_weight", lambda *given: unpack(Parts(*given)), device)  # type: ignore[no-untyped-call]


def _empty(*given: Any) -> Tensor:
    parts = Parts(*given)
    dense = torch.empty(parts.shape, dtype=parts.dtype, device=parts.values.device)
    return entries.in_order(dense, None if parts.order is None else tuple(parts.order))


if not _is_known:
    _library.impl("dense_weight", _empty, "Meta")  # type: ignore[no-untyped-call]
