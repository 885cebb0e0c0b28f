"""Gradual magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .base import Method, Schedule
from .masks import apply_masks, count_for, cubic_sparsity, global_masks, total


@dataclass
class GMP(Method):
    """Zhu & Gupta, "To prune, or not to prune" (2017): sparsity along their cubic ramp (eq. 1), by magnitude.

    Every `interval` steps of the ramp the mask is taken anew: the smallest magnitudes, here over all layers together,
    which does better than the paper's equal share of every layer. Weights under the mask are zero. After the ramp
    the mask stays.
    """

    has_ramp: ClassVar[bool] = True
    interval: int = 10

    def start(self, model: nn.Module, layers: dict[str, nn.Module], target: float, schedule: Schedule) -> None:
        super().start(model, layers, target, schedule)
        self.masks: list[Tensor] | None = None

    def after_step(self, step: int) -> None:
        if self.masks is not None:
            apply_masks(self.weights, self.masks)
        ramp = self.schedule.ramp_steps
        if step <= ramp and (step % self.interval == 0 or step == ramp):
            wanted = cubic_sparsity(step, ramp, self.target)
            self.masks = global_masks(self.weights, count_for(wanted, total(self.weights)))
            apply_masks(self.weights, self.masks)
