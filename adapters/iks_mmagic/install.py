"""Where the adapter enters MMEngine: the method of its runner that builds the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from iks_plugin import OptionError
from iks_plugin.block import Block, is_meant_as_block, parse_block

from .checkpoints import refuse_sparse
from .training import SparseTraining

EXAMPLE = "\n\n  iks = dict(target_sparsity=0.9)\n"


def install() -> None:
    """Enter MMEngine, once in a process."""
    from mmengine.runner import Runner

    Runner.build_model = _build_model(Runner.build_model)


def _build_model(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The runner builds its model before it wraps it for distributed training and before it builds optimizers."""

    def build_model(self: Any, model: Any) -> nn.Module:
        block = read_block(self.cfg)
        built = original(self, model)
        if block is None:
            self.load_checkpoint = partial(refuse_sparse, self.load_checkpoint, self)
        elif self._train_loop is not None:
            SparseTraining(self, built, block)
        return built

    return build_model


def read_block(cfg: Any) -> Block | None:
    """The entry `iks` of a config, or None where there is none.

    Raises:
        OptionError: its name, or one of its keys or values, is wrong.
    """
    if "iks" not in cfg:
        meant = next((key for key, value in cfg.items() if is_meant_as_block(key, value)), None)
        if meant is not None:
            raise OptionError(f"there is no config key {meant!r}: did you mean 'iks'? Write{EXAMPLE}")
        return None
    content = cfg["iks"]
    try:
        return parse_block(
            content.to_dict() if hasattr(content, "to_dict") else content, network="generator", example=EXAMPLE
        )
    except OptionError as error:
        raise OptionError(f"config key iks: {error}") from None
