"""What every method of the table is: hooks into one and the same training loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of the sparse phase, and how many of them the rise of the sparsity may take."""

    steps: int
    ramp_steps: int


@dataclass
class Method:
    """One way to a sparse network; this one leaves it dense.

    The training loop calls, in this order: `start` once, `parameter_groups` once, then for each step, counted from 1,
    `after_backward` (gradients are there, weights not yet changed) and `after_step`, and `finish` at the end. Fields of
    a subclass are options that a user may give: "gmp:interval=5".
    """

    has_ramp: ClassVar[bool] = False
    """Whether the ramp's length matters, so that a grid over it makes sense."""

    def start(self, model: nn.Module, layers: dict[str, nn.Module], target: float, schedule: Schedule) -> None:
        """Take over `model`, in training order of events; `layers` by name are those whose weights count."""
        self.model = model
        self.layers = layers
        self.target = target
        self.schedule = schedule

    def parameter_groups(self) -> Iterable[Any]:
        """What the optimizer trains."""
        return self.model.parameters()

    def after_backward(self, step: int) -> None:
        """Look at the gradients, or change them."""

    def after_step(self, step: int) -> None:
        """Look at the weights, or change them."""

    def finish(self) -> None:
        """Leave a plain model with exact zeros behind."""

    @property
    def weights(self) -> list[Tensor]:
        """The weights that count, without their history of gradients."""
        return [weight.detach() for weight in self.parameters]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The same as parameters, with their gradients."""
        return [layer.weight for layer in self.layers.values()]  # type: ignore[misc]


class Dense(Method):
    """The reference: the same further steps without any sparsity."""
