"""Our own methods, through the public names of the package alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

import iks_plugin

from .base import Method, Schedule


@dataclass
class IKS(Method):
    """`sparsify` with its default law, along a ramp of the given length, and `finalize`.

    Any option of `sparsify` may be given: "iks:interval=5", "iks:granularity=kernel".
    """

    has_ramp: ClassVar[bool] = True
    options: dict[str, Any] = field(default_factory=dict)

    def start(self, model: nn.Module, layers: dict[str, nn.Module], target: float, schedule: Schedule) -> None:
        super().start(model, layers, target, schedule)
        self.controller = iks_plugin.sparsify(model, target, **self.law_options())

    def law_options(self) -> dict[str, Any]:
        """The options of `sparsify` for this schedule; those that the user gives win."""
        return {"total_steps": self.schedule.steps, "ramp_steps": self.schedule.ramp_steps, **self.options}

    def parameter_groups(self) -> Iterable[Any]:
        return self.controller.param_groups()

    def finish(self) -> None:
        iks_plugin.finalize(self.model)


@dataclass
class IKSPaper(IKS):
    """The published law of "Individual Kernel Sparsity" (ACM MM 2022): `law="paper"`.

    D is the steps between two actions, and the length of the rest at the end: 10 epochs of hundreds in the paper. Here
    it is what gives the law room for `actions` actions in the steps that there are.
    """

    has_ramp: ClassVar[bool] = False
    actions: int = 20

    def law_options(self) -> dict[str, Any]:
        interval = max(1, self.schedule.steps // self.actions)
        return {"law": "paper", "total_steps": self.schedule.steps, "interval": interval, **self.options}
