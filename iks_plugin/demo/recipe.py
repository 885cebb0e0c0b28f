"""How the demo's networks are trained: the numbers, and the checks of those that a user can set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ..errors import OptionError

STEPS = 3000
QUICK_STEPS = 60
FEWEST_STEPS = 20
WARMUP = 0.04
"""Share of the steps over which the learning rate rises."""
BRANCH = 0.2
"""Share of the steps that the two networks have in common."""


@dataclass(frozen=True)
class Recipe:
    """How the networks are trained. All of them by the same recipe.

    Attributes:
        steps: optimizer steps that each network gets in total.
        branch: the step from which on the dense and the sparse network train apart.
        seed: of the initial weights and of all batches.
        channels, blocks: the size of the network.
        batch: patches in a batch.
        patch: side of a patch in the small image, in pixels.
        lr: the peak learning rate of Adam.
    """

    steps: int
    branch: int
    seed: int
    channels: int = 64
    blocks: int = 4
    batch: int = 8
    patch: int = 16
    lr: float = 1.5e-3

    def lr_at(self, step: int) -> float:
        """The learning rate of the 0-based `step`: a linear warm-up, then a cosine down to 1 % of the peak."""
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / (self.steps - warmup)
        return self.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def make_recipe(steps: int | None, seed: int, quick: bool) -> Recipe:
    """The recipe for the default network, or for a tiny one that trains in seconds if `quick`.

    Args:
        steps: optimizer steps per network, at least `FEWEST_STEPS`; None means the default for `quick` or not.
        seed: in [0, 2**63).

    Raises:
        OptionError: `steps` or `seed` has a wrong type or value.
    """
    if steps is None:
        steps = QUICK_STEPS if quick else STEPS
    check_count("steps", steps, FEWEST_STEPS)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise OptionError(f"seed must be a whole number in [0, 2**63), got {seed!r}")
    branch = round(BRANCH * steps)
    if quick:
        return Recipe(steps, branch, seed, channels=16, blocks=2, batch=4, patch=24)
    return Recipe(steps, branch, seed)


def check_count(name: str, value: Any, least: int) -> None:
    """Raise an OptionError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise OptionError(f"{name} must be a whole number of at least {least}, got {value!r}")
