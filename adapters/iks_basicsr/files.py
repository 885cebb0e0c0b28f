"""What BasicSR saves becomes whole files, while a training may be killed at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from iks_plugin.files import whole_file


@contextmanager
def whole_files(extra: dict[str, Any] | None = None) -> Iterator[list[tuple[Path, Any]]]:
    """While it lasts, `torch.save` to a path replaces the file there when the new one is complete, and not before.

    Args:
        extra: entries to add to every dictionary that is saved.

    Yields:
        The files that were written, and what was saved there; BasicSR itself lets a file be missing.
    """
    save = torch.save
    written: list[tuple[Path, Any]] = []

    def save_whole(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, (str, os.PathLike)):
            save(obj, f, *args, **kwargs)
            return
        with whole_file(f) as unfinished:
            save({**obj, **extra} if extra else obj, unfinished, *args, **kwargs)
        written.append((Path(f), obj))

    torch.save = save_whole
    try:
        yield written
    finally:
        torch.save = save
