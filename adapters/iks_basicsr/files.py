"""What BasicSR saves becomes whole files, while a training may be killed at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from iks_plugin.files import whole_file


@contextmanager
def whole_files(extra: dict[str, Any] | None = None) -> Iterator[None]:
    """While it lasts, `torch.save` to a path replaces the file there when the new one is complete, and not before.

    Args:
        extra: entries to add to every dictionary that is saved.
    """
    save = torch.save

    def save_whole(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, (str, os.PathLike)):
            save(obj, f, *args, **kwargs)
            return
        with whole_file(f) as unfinished:
            save({**obj, **extra} if extra else obj, unfinished, *args, **kwargs)

    torch.save = save_whole
    try:
        yield
    finally:
        torch.save = save
