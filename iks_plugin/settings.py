"""What a graph of a model has in it without saying so: settings in attributes of modules and classes, and tensors."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch.fx
from torch import Tensor, nn

from .runtime import version_of

_PLAIN = (bool, int, float, str, type(None))
_OPAQUE = (
    *(type, ModuleType, FunctionType, MethodType, BuiltinFunctionType),
    *(nn.Module, torch.fx.Proxy, logging.Logger),
)
"""What counts as the object that it is, whatever is in it."""
_CONTAINERS = (tuple, list, deque, set, frozenset, dict)
NO_SETTINGS = {*nn.Module().__dict__, "_kept", "_iks_streams"} - {"training"}
"""Attributes that are none. Whether a dense weight is kept changes no graph."""
SMALL = 1 << 16
"""Tensors of at most so many elements may hold what a model counts or is set to; larger ones are its weights."""
_DEEPEST, _MOST = 6, 300
"""How deep lists, dictionaries and objects are looked into, and how many values of a module's; the others count as the
objects that they are."""


def settings_of(model: nn.Module, held: list[Any] | None = None) -> tuple[Any, ...]:
    """Equal as long as a graph of the model, which has its settings and small tensors in it, is still right.

    Args:
        held: gets the objects that count as such, and keeps them alive: a new one might take the place of one that is
            gone.
    """

    def identity(value: Any) -> Any:
        if held is not None:
            held.append(value)
        return (id(value), version_of(value)) if isinstance(value, Tensor) else id(value)

    look = _Look(identity)
    return tuple(_settings_of_module(module, look) for module in model.modules()), _settings_of_classes(model, look)


def plain_settings(value: Any) -> Any:
    """Equal where two values are, but for tensors and whatever else is no number and no text."""
    return _Look(lambda other: None).at(value)


def _settings_of_module(module: nn.Module, look: _Look) -> tuple[Any, ...]:
    look.left = _MOST
    return (
        id(module),
        tuple((name, look.at(value)) for name, value in module.__dict__.items() if name not in NO_SETTINGS),
        tuple((name, id(child)) for name, child in module._modules.items()),
        tuple((name, look.leaf(tensor)) for name, tensor in module._parameters.items()),
        tuple((name, look.leaf(tensor)) for name, tensor in module._buffers.items()),
    )


def _settings_of_classes(model: nn.Module, look: _Look) -> tuple[Any, ...]:
    classes = {base for cls in {type(module) for module in model.modules()} for base in cls.__mro__}
    own = [cls for cls in classes if not cls.__module__.startswith(("torch.", "iks_plugin.", "builtins"))]
    look.left = _MOST
    return tuple(
        (id(cls), name, look.at(value))
        for cls in sorted(own, key=id)
        for name, value in vars(cls).items()
        if isinstance(value, (*_PLAIN, tuple, list, dict, Tensor)) and not name.startswith("__")
    )


class _Look:
    """Makes something equal of values that are the same, and looks at each list and object once."""

    def __init__(self, leaf: Callable[[Any], Any]) -> None:
        self.leaf, self.left = leaf, _MOST
        self._seen: set[int] = set()

    def at(self, value: Any, depth: int = 0) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, (np.generic, np.ndarray)):
            return value.dtype.str, value.shape, value.tobytes()
        if isinstance(value, (Tensor, *_OPAQUE)) or depth == _DEEPEST or id(value) in self._seen or self.left <= 0:
            return self.leaf(value)
        if not isinstance(value, tuple):
            self._seen.add(id(value))
        if isinstance(value, _CONTAINERS) and len(value) > self.left:
            return len(value), self.leaf(value)
        if isinstance(value, (tuple, list, deque)):
            return self._length(value), tuple(self.at(one, depth + 1) for one in value)
        if isinstance(value, (set, frozenset)):
            return self._length(value), frozenset(self.at(one, depth + 1) for one in value)
        if isinstance(value, dict):
            return self._items(value, depth)
        inside = dict(_attributes(value))
        return self.leaf(value), self._items(inside, depth)

    def _items(self, values: dict[Any, Any], depth: int) -> Any:
        return self._length(values), tuple((self._key(key), self.at(one, depth + 1)) for key, one in values.items())

    def _key(self, key: Any) -> Any:
        return key if type(key) in _PLAIN else self.leaf(key)

    def _length(self, values: Any) -> int:
        self.left -= len(values)
        return len(values)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Those of an object, such as a namespace of options, whether it has a dictionary of them or slots."""
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                yield name, getattr(value, name)
