"""Which weights live: masks over all layers together, and the cubic ramp that several methods climb."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def count_for(sparsity: float, weights: int) -> int:
    """How many of `weights` are zero at `sparsity`."""
    return round(sparsity * weights)


def total(weights: Sequence[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def global_masks(weights: Sequence[Tensor], zeros: int) -> list[Tensor]:
    """A mask for each tensor; they are False for exactly the `zeros` smallest magnitudes over all of them."""
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    kept = torch.topk(magnitudes, magnitudes.numel() - zeros, sorted=False).indices
    flat = torch.zeros_like(magnitudes, dtype=torch.bool)
    flat[kept] = True
    parts = torch.split(flat, [weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def apply_masks(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Put zeros, in place, where the masks are False."""
    for weight, mask in zip(weights, masks, strict=True):
        weight.masked_fill_(~mask, 0.0)


def cubic_sparsity(step: int, ramp_steps: int, target: float, start: float = 0.0) -> float:
    """s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (n * dt))^3 with t_0 = 0 and n * dt = ramp_steps, then s_f.

    Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression" (2017), eq. 1.
    """
    left = max(0.0, 1 - step / ramp_steps)
    return target + (start - target) * left**3
