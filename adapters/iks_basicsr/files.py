"""Files that are either whole or not there: what BasicSR saves while a training may be killed at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_UNFINISHED = ".iks-unfinished"


@contextmanager
def whole_files(extra: dict[str, Any] | None = None) -> Iterator[None]:
    """While it lasts, `torch.save` to a path writes beside it and moves what is complete into its place.

    A process that is killed meanwhile leaves the file that was there before, or none. An error leaves it as well, and
    is raised as ever.

    Args:
        extra: entries to add to every dictionary that is saved.
    """
    save = torch.save

    def save_whole(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, (str, os.PathLike)):
            save(obj, f, *args, **kwargs)
            return
        path = Path(f)
        # Hidden, and with an ending of its own, so that BasicSR's search for the newest state does not see it.
        unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
        try:
            save({**obj, **extra} if extra else obj, unfinished, *args, **kwargs)
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    torch.save = save_whole
    try:
        yield
    finally:
        torch.save = save


def remove_unfinished(folders: Iterable[str | os.PathLike[str]]) -> None:
    """Delete what a killed process has left half-written in `folders`; those that do not exist are passed over."""
    for folder in folders:
        for path in Path(folder).glob(f".*{_UNFINISHED}"):
            path.unlink(missing_ok=True)
