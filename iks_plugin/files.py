"""Files that are either whole or not there, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".iks-unfinished"


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a file beside `path` to write to, and move it into place of `path` when that has gone well.

    A process that is killed meanwhile leaves the file that was there before, or none; so does an error, which is raised
    as ever. The file beside is hidden and has an ending of its own, so that nobody takes it for a finished one. A link
    stays one, to the new file, and a file that is replaced keeps its permissions.

    Raises:
        OSError: `path` is there and no file (a folder, a device), or its folder is not there.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir() or not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there and no ordinary file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {path.parent}", str(path))
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        yield unfinished
        with open(unfinished, "r+b") as file:  # Windows syncs only what may be written to
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(folders: Iterable[str | os.PathLike[str]]) -> None:
    """Delete what killed processes have left half-written in `folders`; those that do not exist are passed over."""
    for folder in folders:
        for path in Path(folder).glob(f".*{_UNFINISHED}"):
            path.unlink(missing_ok=True)
