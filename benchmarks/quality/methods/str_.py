"""STR: soft thresholds, one for each layer, learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .base import Method, Schedule
from .masks import apply_masks, count_for, cubic_sparsity, global_masks, total


class SoftThreshold(nn.Module):
    """S_g(w, s) = sign(w) * relu(|w| - g(s)) with g the logistic function and one learned s (STR, eq. 4)."""

    def __init__(self, s_init: float, like: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(like.new_tensor(s_init))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with, for the one that is trained."""
        return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(self.s))


@dataclass
class STR(Method):
    """Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity" (ICML 2020).

    Every layer computes with S_g(w, s), and its s is trained beside its weights: by the gradient of the loss, which
    tells layers apart, and by weight decay, which multiplies every s by the same factor below 1. As s < 0, that raises
    the thresholds. In the paper the decay is a constant, and the sparsity follows from it and from s_init by trial.

    To meet a target without trials, the decay is steered here: every `interval` steps it is the factor q for which the
    sparsity is what the cubic ramp of Zhu & Gupta asks for. A weight is zero iff |w| <= g(q s), that is
    q <= logit(|w|) / s, so q is an order statistic of these ratios. It may exceed 1 where the loss has closed the gates
    further than asked. Differences from the paper: Adam, so the decay is decoupled (coupled, Adam would divide it out);
    no decay on the weights, as none of the methods here has any; s_init = -12 instead of one so low that nothing
    happens for epochs. What the last factor leaves open, a few weights, is cut by magnitude.
    """

    has_ramp: ClassVar[bool] = True
    interval: int = 10
    s_init: float = -12.0

    def start(self, model: nn.Module, layers: dict[str, nn.Module], target: float, schedule: Schedule) -> None:
        super().start(model, layers, target, schedule)
        self.gates = {name: SoftThreshold(self.s_init, layer.weight) for name, layer in layers.items()}  # type: ignore[arg-type]
        for name, layer in layers.items():
            parametrize.register_parametrization(layer, "weight", self.gates[name])

    def after_step(self, step: int) -> None:
        if step % self.interval == 0 or step in (self.schedule.ramp_steps, self.schedule.steps):
            self.steer(cubic_sparsity(step, self.schedule.ramp_steps, self.target))

    @torch.no_grad()
    def steer(self, sparsity: float) -> None:
        """Decay every s by the one factor that gives `sparsity`."""
        raw = [layer.parametrizations["weight"].original for layer in self.layers.values()]  # type: ignore[index, union-attr]
        scales = [gate.s for gate in self.gates.values()]
        zeros = count_for(sparsity, total(raw))
        if zeros:
            factor = decay_for(raw, scales, zeros)
            for scale in scales:
                scale.mul_(factor)

    @torch.no_grad()
    def finish(self) -> None:
        for layer in self.layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        weights = self.weights
        apply_masks(weights, global_masks(weights, count_for(self.target, total(weights))))


def decay_for(raw: Sequence[Tensor], scales: Sequence[Tensor], zeros: int) -> float:
    """The factor q after which `zeros` of all weights are at most g(q s) of their layer, up to rounding."""
    ratios = torch.cat(
        [
            (torch.logit(weight.abs().double().clamp(1e-30, 1 - 1e-12)) / scale.double()).flatten()
            for weight, scale in zip(raw, scales, strict=True)
        ]
    )
    largest = torch.topk(ratios, zeros, sorted=False).values
    return float(largest.min()) * (1 + 1e-7)
