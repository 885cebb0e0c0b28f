"""What the package raises and warns with on purpose."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

_PASSED_OVER = ("iks_plugin", "torch", "contextlib")


class IksError(Exception):
    """Root of every exception that iks_plugin raises on purpose."""


class OptionError(IksError, ValueError):
    """An option has a wrong name, type or value."""


class IksWarning(UserWarning):
    """Something works, but probably not as its user meant it."""


def first_of(names: Sequence[str]) -> str:
    """The first three of `names` for a message, and dots for the others."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def warn_user(message: str) -> None:
    """Warn with an `IksWarning` of the line of the user's code that led here, past our own and torch's wrappers."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, IksWarning, stacklevel=level)
