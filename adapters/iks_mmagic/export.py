"""Compact files beside the checkpoints of a runner, which come and go with them.

A checkpoint holds a model with all that its training needs, discriminators and feature extractors of losses too; the
compact file holds one network, under its own names, which is what an application loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from iks_plugin.block import Block
from iks_plugin.export import compact_path, export_beside

from .checkpoints import checkpoint_folder


class CompactFiles:
    """Writes and deletes them.

    Args:
        runner: MMEngine's runner, whose checkpoints are whole files already.
        block: the entry `iks` of its config. It asks for the files, one for each of its networks.
    """

    def __init__(self, runner: Any, block: Block) -> None:
        self._runner = runner
        self._value_dtype = block.export or "float32"
        self._labels = {name: name if len(block.networks) > 1 else "" for name in block.networks}
        self._next: dict[str, tuple[str, nn.Module]] = {}
        runner.save_checkpoint = partial(self._save, runner.save_checkpoint)

    def put_into_next(self, networks: dict[str, tuple[str, nn.Module]]) -> None:
        """Take what goes beside the checkpoint that is being saved.

        Args:
            networks: by the block's names for them, the names in the checkpoint, and the networks, which nobody else
                uses.
        """
        self._next = networks

    def _save(
        self, original: Callable[..., None], out_dir: str | Path, filename: str, *args: Any, **kwargs: Any
    ) -> None:
        self._next = {}
        original(out_dir, filename, *args, **kwargs)
        networks, self._next = self._next, {}
        if networks and "://" in str(out_dir):
            self._runner.logger.warning(
                f"iks: export writes into local folders alone, not to {out_dir}: save the networks of {filename} with "
                "iks_plugin.save, or leave iks.export out"
            )
            return
        logger = self._runner.logger
        for name, (present, network) in networks.items():
            export_beside(
                Path(out_dir, filename),
                network,
                self._value_dtype,
                network=self._labels[name],
                prefix=f"{present}.",
                tell=logger.info,
                warn=logger.warning,
            )

    def follow(self, hooks: Iterable[Any]) -> None:
        """Delete a compact file when one of the `hooks` deletes its checkpoint, an old one or what was the best."""
        from mmengine.hooks import CheckpointHook

        for hook in hooks:
            folder = checkpoint_folder(self._runner, hook) if isinstance(hook, CheckpointHook) else None
            if folder is not None:
                for method in ("before_train", "_save_checkpoint", "_save_best_checkpoint"):
                    setattr(hook, method, partial(self._delete_with, getattr(hook, method), folder))

    def _delete_with(self, original: Callable[..., None], folder: Path, *args: Any, **kwargs: Any) -> None:
        from mmengine.dist import is_main_process

        before = _names(folder)
        original(*args, **kwargs)
        if is_main_process():
            for name in before - _names(folder):
                for label in self._labels.values():
                    compact_path(folder / name, label).unlink(missing_ok=True)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
