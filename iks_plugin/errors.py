"""What the package raises and warns with on purpose."""

from __future__ import annotations

from collections.abc import Sequence


class IksError(Exception):
    """Root of every exception that iks_plugin raises on purpose."""


class OptionError(IksError, ValueError):
    """An option has a wrong name, type or value."""


class IksWarning(UserWarning):
    """Something works, but probably not as its user meant it."""


def first_of(names: Sequence[str]) -> str:
    """The first three of `names` for a message, and dots for the others."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
