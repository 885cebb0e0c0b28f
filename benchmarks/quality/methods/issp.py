"""ISS-P: iterative soft shrinkage by percentage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .base import Method, Schedule
from .masks import apply_masks, count_for, global_masks, total


@dataclass
class ISSP(Method):
    """Wang et al., "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution" (ICCV 2023).

    Pruning stage, here the ramp: after every optimizer step the weights are sorted by magnitude, and those that the
    target would cut are shrunk rather than zeroed,

        w <- w * shrink    where |w| is below the magnitude that keeps the target's share,    w <- w    elsewhere,

    so that a weight may still grow back across the line. Fine-tuning stage: the mask of the last sort is frozen.

    `shrink` is constant, as in the authors' code; 0 is iterative hard thresholding. Of 0.8, 0.95 and 0.99 the default
    did best, by less than seeds differ. The paper sorts every layer by itself and prunes networks from random
    initialisation; here all layers are sorted together, as for every method of the table, from a trained network.
    """

    has_ramp: ClassVar[bool] = True
    shrink: float = 0.95

    def start(self, model: nn.Module, layers: dict[str, nn.Module], target: float, schedule: Schedule) -> None:
        super().start(model, layers, target, schedule)
        self.zeros = count_for(target, total(self.weights))
        self.masks: list[Tensor] | None = None

    def after_step(self, step: int) -> None:
        if self.masks is None:
            masks = global_masks(self.weights, self.zeros)
            shrink_unimportant(self.weights, masks, self.shrink)
            if step >= self.schedule.ramp_steps:
                self.masks = masks
        if self.masks is not None:
            apply_masks(self.weights, self.masks)


def shrink_unimportant(weights: list[Tensor], masks: list[Tensor], shrink: float) -> None:
    """Multiply, in place, the weights under the masks by `shrink`."""
    for weight, mask in zip(weights, masks, strict=True):
        weight.mul_(mask + shrink * ~mask)
