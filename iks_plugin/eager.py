"""Compiled models run uncompiled for a while: a compiled graph knows nothing of hooks that came after it."""

from __future__ import annotations

from typing import Any

import torch

_holders: set[int] = set()
_stance: Any = None


def hold(holder: object) -> None:
    """Run what `torch.compile` made as if it were not there, until `holder` and all others let go.

    torch before 2.6 has no such switch: 2.1 notices the hooks by itself.
    """
    global _stance
    if _stance is None and hasattr(torch.compiler, "set_stance"):
        _stance = torch.compiler.set_stance("force_eager")
    _holders.add(id(holder))


def let_go(holder: object) -> None:
    """End what `hold` began; without it, nothing happens."""
    global _stance
    _holders.discard(id(holder))
    if not _holders and _stance is not None:
        _stance.__exit__(None, None, None)  # back to the stance that was there before
        _stance = None
