"""Modules change what they do by a swap of their class: to a subclass of the one they had, with a mixin in front.

Module and parameter objects stay the same, so hooks, aliases, optimizers, deep copies and pickles go on working.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import nn


class Swapped(nn.Module):
    """Base of the mixins. A class made of one has two bases: the mixin, and the class that the module had before.

    A mixin says in `swapped_prefix` how the names of these classes begin.
    """

    swapped_prefix: ClassVar[str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By mixin and original class, because a class that was made here has no importable name.
        reduced: Any = super().__reduce_ex__(2)
        return (_rebuild, type(self).__bases__, *reduced[2:])


Mixin = TypeVar("Mixin", bound=Swapped)

_classes: dict[tuple[type[Swapped], type[nn.Module]], type[Any]] = {}


def swapped_class(mixin: type[Mixin], cls: type[nn.Module]) -> type[Mixin]:
    """The subclass of `mixin` and `cls`, always the same one."""
    if (mixin, cls) not in _classes:
        name = f"{mixin.swapped_prefix}{cls.__name__}"
        _classes[mixin, cls] = type(name, (mixin, cls), {"__module__": cls.__module__})
    return _classes[mixin, cls]


def register(swapped: type[Mixin]) -> type[Mixin]:
    """Have `swapped_class` give `swapped`, a class that is written out, for the two that it is made of."""
    mixin, cls = swapped.__bases__
    _classes[mixin, cls] = swapped
    return swapped


def original_class(module: Swapped) -> type[nn.Module]:
    """The class that `module` had before the swap."""
    cls: type[nn.Module] = type(module).__bases__[1]
    return cls


def _rebuild(mixin: type[Swapped], cls: type[nn.Module]) -> Swapped:
    swapped = swapped_class(mixin, cls)
    return swapped.__new__(swapped)
