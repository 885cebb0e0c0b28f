"""Counts over a set of layers: their weights, their zeros, and the critical shifts of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import IksError, first_of
from .laws import critical_shifts
from .layers import Gated

Layer = TypeVar("Layer", bound=nn.Module)


def unique(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Gated or plain `layers` without those that share the weight of an earlier one."""
    first: dict[int, tuple[str, Layer]] = {}
    for name, layer in layers.items():
        first.setdefault(id(layer._parameters.get("weight", layer)), (name, layer))
    return dict(first.values())


def count_weights(layers: Iterable[nn.Module]) -> int:
    weights = (layer._parameters["weight"] for layer in layers)
    return sum(weight.numel() for weight in weights if weight is not None)


@torch.no_grad()
def count_zeros(layers: Iterable[nn.Module]) -> int:
    """How many weights of gated or plain layers are exactly zero where the layers compute with them."""
    return zeros_in(layer.weight for layer in layers)  # type: ignore[misc]


@torch.no_grad()
def count_raw_zeros(layers: Iterable[Gated]) -> int:
    """How many weights are zero even without the gate, and will be so at any threshold."""
    return zeros_in(layer.raw_weight for layer in layers)


def zeros_in(tensors: Iterable[Tensor]) -> int:
    """How many entries of `tensors` are exactly zero."""
    counts = [tensor.numel() - torch.count_nonzero(tensor) for tensor in tensors]
    if not counts:
        return 0
    return int(torch.stack([count.to(counts[0].device) for count in counts]).sum())  # one transfer for all layers


@torch.no_grad()
def all_shifts(layers: Mapping[str, Gated]) -> Tensor:
    """The critical shifts of all layers' weights in one flat tensor.

    Raises:
        IksError: a weight or a threshold is not finite; the message names the layers.
    """
    shifts = [critical_shifts(layer.raw_weight, layer.spread_threshold()) for layer in layers.values()]
    flat = torch.cat([shift.to(shifts[0].device) for shift in shifts])
    if not torch.isfinite(flat).all():
        bad = [name for name, layer in layers.items() if not _is_finite(layer)]
        raise IksError(
            f"weights or thresholds of {len(bad)} layers are not finite ({first_of(bad)}): expected finite numbers, "
            "got nan or inf. No threshold was changed. The training has diverged: go back to the last good checkpoint "
            "and lower the learning rate"
        )
    return flat


def _is_finite(layer: Gated) -> bool:
    return bool(torch.isfinite(layer.raw_weight).all() and torch.isfinite(layer.threshold).all())
