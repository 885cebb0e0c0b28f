"""Whether a model does the same with each image: its settings, and what a run of it leaves behind."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .runtime import Packed, PackedWeight, version_of
from .swap import Swapped, original_class
from .trust import is_same

_PLAIN = (bool, int, float, str, type(None))
_OTHER = {*nn.Module().__dict__, "_kept", "_iks_streams"} - {"training"}
"""Attributes that are no settings. Whether a dense weight is kept changes no graph."""
_DEEPEST = 6
"""How deep settings are looked for in lists, dictionaries and objects."""


def settings_of(model: nn.Module) -> tuple[Any, ...]:
    """Equal as long as a graph of the model, which has its settings and small tensors in it, is still right."""
    plain = tuple(
        (id(module), tuple((name, _state(value)) for name, value in module.__dict__.items() if name not in _OTHER))
        for module in model.modules()
    )
    tensors = (*model.parameters(), *model.buffers())
    return plain, _settings_of_classes(model), tuple(map(_state, tensors))


def _settings_of_classes(model: nn.Module) -> tuple[Any, ...]:
    classes = {base for cls in {type(module) for module in model.modules()} for base in cls.__mro__}
    own = [cls for cls in classes if not cls.__module__.startswith(("torch.", "iks_plugin.", "builtins"))]
    settings = [(id(cls), name, value) for cls in own for name, value in vars(cls).items() if type(value) in _PLAIN]
    return tuple(sorted(settings, key=lambda setting: setting[:2]))


def _state(value: Any, depth: int = 0) -> Any:
    """Something equal as long as a setting, or what is in it, is the same."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return id(value), version_of(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.dtype.str, value.shape, value.tobytes()
    if depth == _DEEPEST:
        return id(value)
    if isinstance(value, (tuple, list, deque)):
        return tuple(_state(one, depth + 1) for one in value)
    if isinstance(value, dict):
        return tuple((name, _state(one, depth + 1)) for name, one in value.items())
    inside = getattr(value, "__dict__", None)  # of a namespace of options, say
    is_object = type(inside) is dict and not isinstance(value, (type, nn.Module, FunctionType))
    return id(value), _state(inside, depth) if is_object else None


def copy_to_try(model: nn.Module) -> nn.Module:
    """A copy of a packed model that has the same weights, but for itself whatever a run or a trace may change.

    Raises:
        Exception: whatever a model raises that cannot be copied.
    """
    weights = [module for module in model.modules() if isinstance(module, PackedWeight)]
    shared = {id(one): one for one in (*weights, *model.parameters())}
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode do not tell of changes
        copied = copy.deepcopy(model, shared)
    if isinstance(copied, Swapped) and not isinstance(copied, Packed):
        copied.__class__ = original_class(copied)  # type: ignore[assignment]  # it runs the usual way
    return copied


def is_steady(copied: nn.Module, image: Tensor) -> bool:
    """Whether a model gives the same for the same image, and is the same afterwards. What it keeps of the first stays.

    Args:
        copied: by `copy_to_try`; it is run twice.
    """
    with generators_kept() as before:
        first = copied(image.clone())
        settings = settings_of(copied)
        second = copied(image.clone())
        drawn = _generators() != before
    return not drawn and settings == settings_of(copied) and is_same(first, second)


def versions_of_buffers(model: nn.Module) -> list[int]:
    """Equal as long as nothing writes to a buffer in place."""
    return [version_of(buffer) for buffer in model.buffers()]


@contextmanager
def generators_kept() -> Iterator[Any]:
    """Whatever draws random numbers meanwhile, afterwards the generators are as before, which is what this yields."""
    before = _generators()
    try:
        yield before
    finally:
        if _generators() != before:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(torch.frombuffer(bytearray(before[2]), dtype=torch.uint8))


def _generators() -> tuple[Any, ...]:
    name, numbers, *rest = np.random.get_state()
    return random.getstate(), (name, tuple(numbers), *rest), torch.get_rng_state().numpy().tobytes()
