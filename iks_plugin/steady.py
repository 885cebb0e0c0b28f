"""Whether a model does the same with each image, found out on a copy, so that the model itself knows nothing of it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .runtime import Packed, PackedWeight, version_of
from .settings import SMALL, settings_of
from .swap import Swapped, original_class
from .trust import is_same


def copy_to_try(model: nn.Module) -> nn.Module:
    """A copy of a packed model that has the same weights, but for itself whatever a run or a trace may change.

    Raises:
        Exception: whatever a model raises that cannot be copied.
    """
    weights = [module for module in model.modules() if isinstance(module, PackedWeight)]
    large = [parameter for parameter in model.parameters() if parameter.numel() > SMALL]
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode do not tell of changes
        copied = copy.deepcopy(model, {id(one): one for one in (*weights, *large)})
    if copied is model:
        raise TypeError(f"{type(model).__name__} gives itself for a copy")
    if isinstance(copied, Swapped) and not isinstance(copied, Packed):
        copied.__class__ = original_class(copied)  # type: ignore[assignment]  # it runs the usual way
    return copied


def versions_of_tensors(model: nn.Module) -> list[int]:
    """Equal as long as nothing writes to a parameter or buffer in place."""
    return [version_of(tensor) for tensor in (*model.parameters(), *model.buffers())]


def is_steady(copied: nn.Module, image: Tensor) -> bool:
    """Whether a model gives the same for the same image, draws nothing, and is the same afterwards.

    What it keeps of a first image, such as a mask of that size, may stay.

    Args:
        copied: by `copy_to_try`; it is run twice.
    """
    held: list[Any] = []
    with torch.inference_mode(False), torch.no_grad(), _Draws() as draws:  # type: ignore[no-untyped-call]
        first = copied(image.clone())
        settings = settings_of(copied, held)
        second = copied(image.clone())
        return not draws.any and settings == settings_of(copied) and is_same(first, second)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether this thread draws random numbers of torch."""

    any = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which is what torch would load its compiler for, at a second's cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


@contextmanager
def generators_kept() -> Iterator[SimpleNamespace]:
    """Afterwards the generators of random numbers are as before, unless `.restore` of what this yields is cleared.

    Other threads draw from them too, and get the same numbers twice then: clear it where nothing was drawn here.
    """
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    kept = SimpleNamespace(restore=True)
    try:
        yield kept
    finally:
        if kept.restore:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
