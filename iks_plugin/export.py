"""Compact files beside the checkpoints of a training framework, for the adapters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from .errors import IksError
from .model_file import save


def compact_path(checkpoint: str | os.PathLike[str], network: str = "") -> Path:
    """The compact file beside `checkpoint`; `network` is for checkpoints of which several files are made."""
    path = Path(checkpoint)
    return path.with_name(".".join(filter(None, (path.name.removesuffix(".pth"), network, "iks"))))


def export_beside(
    checkpoint: str | os.PathLike[str],
    model: nn.Module | Mapping[str, Tensor],
    value_dtype: str,
    *,
    network: str = "",
    prefix: str = "",
    checkpoint_key: str | None = None,
    tell: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Write `model` to the compact file beside `checkpoint`, which has just been written. It never raises.

    A compact file is made of a checkpoint at any time, and a training that took days is not ended for one that cannot
    be written: `warn` gets a line that says what happened, and no file is left that belongs to an older checkpoint.

    Args:
        checkpoint: the framework's file, in a local folder.
        model: what goes into the file, as for `save`.
        value_dtype, checkpoint_key: as for `save`.
        network: as for `compact_path`.
        prefix: what the names of the model's weights begin with in the checkpoint.
        tell: called with a line that says what was written.
        warn: called with a line that says what was not.
    """
    path = compact_path(checkpoint, network)
    with suppress(OSError):  # what stays in the way, `save` cannot replace either
        path.unlink(missing_ok=True)
    try:
        save(model, path, value_dtype, checkpoint_key=checkpoint_key)
        sizes = path.stat().st_size, os.stat(checkpoint).st_size
    except Exception as error:  # whatever it is, the training is worth more
        options = "" if value_dtype == "float32" else f" --value-dtype {value_dtype}"
        options += f" --prefix {prefix}" if prefix else ""
        warn(
            f"iks: {path.name} is not written, and training goes on: {type(error).__name__}: {error}. "
            f"To make it later: iks export {checkpoint} {path}{options}"
        )
    else:
        tell(f"iks: {path.name} has {sizes[0]:,} bytes, {Path(checkpoint).name} {sizes[1]:,}")


def refuse_compact(path: str | os.PathLike[str]) -> None:
    """Raise an `IksError` if `path`, of which a framework is to load a checkpoint, has the name of a compact file."""
    path = Path(path)
    if path.suffix.lower() == ".iks":
        checkpoint = path.with_suffix(".pth")
        raise IksError(
            f"{path} is a compact file, and a checkpoint is expected: make one with iks restore {path} {checkpoint} "
            "(of a network of MMagic with --key state_dict --prefix generator.)"
        )
