"""RigL: drop small weights, grow where the gradient is large."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Method, Schedule
from .masks import apply_masks, count_for, global_masks, total


@dataclass
class RigL(Method):
    """Evci et al., "Rigging the Lottery: Making All Tickets Winners" (ICML 2020).

    The number of living weights of every layer is constant. Every `interval` steps until `end` of all steps, each layer
    drops a share f(t) = alpha / 2 * (1 + cos(t * pi / T_end)) of its living weights, those of the smallest magnitude,
    and grows as many where the gradient of the dense loss is largest in magnitude, among those that are dead then, the
    dropped ones included. Grown weights start at zero; one that is dropped and grown at once keeps its value. The
    defaults of `interval`, `alpha` and `end` are the paper's.

    The paper starts from random masks (ERK) of random weights. Starting from a trained network, as all methods of the
    table do, the first mask is that of the largest magnitudes over all layers, and so are the layers' shares.
    """

    interval: int = 100
    alpha: float = 0.3
    end: float = 0.75

    def start(self, model: nn.Module, layers: dict[str, nn.Module], target: float, schedule: Schedule) -> None:
        super().start(model, layers, target, schedule)
        self.masks = global_masks(self.weights, count_for(target, total(self.weights)))
        apply_masks(self.weights, self.masks)

    def after_backward(self, step: int) -> None:
        last = self.end * self.schedule.steps
        if step % self.interval == 0 and step < last:
            share = update_share(step, last, self.alpha)
            for index, parameter in enumerate(self.parameters):
                assert parameter.grad is not None
                weight, mask = parameter.detach(), self.masks[index]
                self.masks[index] = drop_and_grow(weight, parameter.grad, mask, round(share * int(mask.sum())))
                weight.masked_fill_(~(mask & self.masks[index]), 0.0)
        apply_masks([parameter.grad for parameter in self.parameters if parameter.grad is not None], self.masks)

    def after_step(self, step: int) -> None:
        apply_masks(self.weights, self.masks)  # Adam moves a dropped weight on by its momentum


def update_share(step: int, last: float, alpha: float) -> float:
    """f_decay(t; alpha, T_end) = alpha / 2 * (1 + cos(t * pi / T_end))."""
    return alpha / 2 * (1 + math.cos(step * math.pi / last))


def drop_and_grow(weight: Tensor, grad: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask after `count` living weights are dropped and as many grown; both are limited by what there is."""
    flat = mask.flatten()
    living = int(flat.sum())
    count = min(count, living, flat.numel() - living)
    magnitude = weight.abs().flatten().masked_fill(~flat, -1.0)
    after = torch.zeros_like(flat)
    after[torch.topk(magnitude, living - count).indices] = True
    gradient = grad.abs().flatten().masked_fill(after, -1.0)
    after[torch.topk(gradient, count).indices] = True
    return after.view_as(mask)
