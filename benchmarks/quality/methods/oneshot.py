"""One-shot magnitude pruning, then fine-tuning."""

from __future__ import annotations

from torch import nn

from .base import Method, Schedule
from .masks import apply_masks, count_for, global_masks, total


class OneShot(Method):
    """All zeros at once, the smallest magnitudes over all layers, and every step is left for the survivors.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (NeurIPS 2015), section 3, without
    its iterations: prune connections whose weights lie below a threshold, then retrain those that remain.
    """

    def start(self, model: nn.Module, layers: dict[str, nn.Module], target: float, schedule: Schedule) -> None:
        super().start(model, layers, target, schedule)
        self.masks = global_masks(self.weights, count_for(target, total(self.weights)))
        apply_masks(self.weights, self.masks)

    def after_step(self, step: int) -> None:
        apply_masks(self.weights, self.masks)
