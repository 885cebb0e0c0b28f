"""Files that are either whole or not there, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".iks-unfinished"
_KEPT = 48
"""So many characters of a name are in that of the file beside: no name may take more than 255 bytes."""


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a file beside `path` to write to, and move it into place of `path` when that has gone well.

    A process that is killed meanwhile leaves the file that was there before, or none; so does an error, which is raised
    as ever. The file beside is hidden and has an ending of its own, so that nobody takes it for a finished one. Each
    writer has another: where several write `path` at a time, the file of the last one stays. A link stays one, to the
    new file, and a file that is replaced keeps its permissions.

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
    # torch.save writes the name up to the last dot into its files: the writer's own part stands behind that.
    unfinished = path.with_name(f".{path.name[:_KEPT]}{_UNFINISHED}-{secrets.token_hex(4)}")
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
        for path in Path(folder).glob(f".*{_UNFINISHED}*"):
            path.unlink(missing_ok=True)
