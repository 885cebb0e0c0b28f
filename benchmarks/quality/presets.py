"""Tables by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .methods import METHODS
from .plan import Plan

EVERY_METHOD = tuple(name for name in METHODS if name != "iks-without")


@dataclass(frozen=True)
class Preset:
    """A plan, and what of the budget differs from the usual one."""

    about: str
    plan: Plan
    budget: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    "small": Preset(
        "EDSR 8 x 32 at 0.9, every method, three seeds: 0.5 to 2.3 hours on two cores with --jobs 2",
        Plan(("edsr-8x32-x2",), EVERY_METHOD, (0.9,), (0, 1, 2), lrs=(2e-3, 4e-3), ramps=(0.6,)),
    ),
    "full": Preset(
        "five networks at five sparsities, every method, three seeds: days on a CPU",
        Plan(
            ("edsr-8x32-x2", "edsr-16x64-x2", "rcan-2x4x32-x2", "imdn-4x32-x2", "edsr-8x32-x4"),
            EVERY_METHOD,
            (0.5, 0.8, 0.9, 0.95, 0.99),
            (0, 1, 2),
            lrs=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
            ramps=(0.3, 0.6),
        ),
    ),
    "quick": Preset(
        "a tiny network for seconds, to see that everything works",
        Plan(("edsr-1x8-x2",), EVERY_METHOD, (0.9,), (0,), lrs=(1e-3,), ramps=(0.6,)),
        {"dense_steps": 60, "steps": 60, "batch": 2, "patch": 16},
    ),
}
