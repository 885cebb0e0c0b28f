"""Our law without one of its parts, to see what that is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from iks_plugin import IksError, laws
from iks_plugin.curvature import Curvature
from iks_plugin.surgeon import damped_each

from .base import Schedule
from .iks import IKS


class EqualSteps(laws.SurgeonLaw):
    """All layers step as far as the optimizer says."""

    def update_factor(self, density: float) -> float:
        return 1.0


class LossAlone(laws.SurgeonLaw):
    """Those weights go without which the loss grows least, whatever their magnitude."""

    def score(self, magnitude: Tensor, sensitivity: Tensor) -> Tensor:
        return magnitude * sensitivity


def on_their_own(known: Curvature) -> Curvature:
    """H made diagonal with the same 1 / [H^-1]_ii: the same scores, and nothing for the others to take over."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped_each(known.inputs)))
    return Curvature(torch.diag_embed(inverse.diagonal(dim1=-2, dim2=-1).reciprocal()), known.gradients)


def by_magnitude(known: Curvature) -> Curvature:
    """H the identity and E[g^2] one everywhere: |w| as the score, and nothing for the others to take over."""
    identity: Tensor = torch.eye(known.inputs.shape[-1], device=known.inputs.device).expand_as(known.inputs).clone()
    return Curvature(identity, torch.ones_like(known.gradients))


LAWS = {"steps": EqualSteps, "magnitude": LossAlone}
CHANGES: dict[str, Callable[[Curvature], Curvature]] = {"takeover": on_their_own, "curvature": by_magnitude}
PARTS = (*LAWS, *CHANGES)


@dataclass
class IKSWithout(IKS):
    """`iks` without a part: "steps" of different length, "magnitude" in the score (the loss alone), the others'
    "takeover", or all "curvature" (by magnitude, nothing taken over)."""

    part: str = "steps"

    def start(self, model: nn.Module, layers: dict[str, nn.Module], target: float, schedule: Schedule) -> None:
        if self.part not in PARTS:
            raise IksError(f"iks-without: expected part={', '.join(PARTS[:-1])} or {PARTS[-1]}, got {self.part!r}")
        super().start(model, layers, target, schedule)
        if self.part in LAWS:
            self.controller._law = LAWS[self.part](**asdict(self.controller._law))
            return
        change, found = CHANGES[self.part], self.controller._curvature.found
        self.controller._curvature.found = lambda: {name: change(known) for name, known in found().items()}  # type: ignore[method-assign]
