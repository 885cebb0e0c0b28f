"""The `iks:` block of an option file, read and checked before BasicSR touches a folder."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any

import iks_plugin
from iks_plugin import OptionError
from iks_plugin.block import Block, parse_block

EXAMPLE = "\n\n  iks:\n    target_sparsity: 0.9\n"


def read_block(opt: Mapping[str, Any], where: str = "the option file") -> Block | None:
    """The `iks:` block of BasicSR's options, or None where there is none.

    Args:
        opt: the options as BasicSR parses them.
        where: the name of the file they come from, for messages.

    Raises:
        OptionError: the block is empty, misspelt or out of place, or one of its keys or values is wrong.
    """
    _look_for_a_misplaced_block(opt, where)
    if "iks" not in opt:
        return None
    try:
        block = parse_block(opt["iks"], network="network_g", example=EXAMPLE)
        if opt.get("is_train"):
            _check_networks(block.networks, opt)
            for network in block.networks:
                keywords(block, network, opt)
    except OptionError as error:
        raise OptionError(f"{where}, block iks: {error}") from None
    return block


def keywords(block: Block, network: str, opt: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `sparsify` for `network`, with the length of its training out of the `train:` block."""
    return block.keywords(optimizer_steps(network, opt), "train: total_iter")


def optimizer_steps(network: str, opt: Mapping[str, Any]) -> int:
    """How many steps the optimizer of `network` makes in `train: total_iter` iterations.

    BasicSR's GAN models step the generator in every `net_d_iters`-th iteration after the first `net_d_init_iters`.

    Raises:
        OptionError: it makes none, or the length is missing.
    """
    train = opt.get("train") or {}
    try:
        total = int(train["total_iter"])
    except (KeyError, TypeError, ValueError):
        raise OptionError(
            f"train: total_iter must be the number of iterations, got {train.get('total_iter')!r}: the schedule of the "
            "sparsity follows from it"
        ) from None
    if network.startswith("network_d"):
        return total
    every, idle = int(train.get("net_d_iters") or 1), int(train.get("net_d_init_iters") or 0)
    steps = total // every - min(idle, total) // every
    if steps < 1:
        raise OptionError(
            f"{network} is never trained: of {total} iterations (train: total_iter) the first {idle} "
            f"(net_d_init_iters) and all but every {every}. (net_d_iters) train the discriminator alone"
        )
    return steps


def _check_networks(names: tuple[str, ...], opt: Mapping[str, Any]) -> None:
    known = [key for key in opt if str(key).startswith("network_")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or known[:1]
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"network: the option file has no {name!r} (it has {', '.join(known) or 'none'}){hint}")


def _look_for_a_misplaced_block(opt: Mapping[str, Any], where: str) -> None:
    for key, value in opt.items():
        if key != "iks" and _is_meant_as_block(str(key), value):
            raise OptionError(f"{where}: there is no block {key!r}: did you mean 'iks'? Write{EXAMPLE}")
        if key != "iks" and isinstance(value, Mapping) and "iks" in value:
            raise OptionError(f"{where}: the block iks lies within {key!r}: move it to the top level:{EXAMPLE}")


def _is_meant_as_block(key: str, value: Any) -> bool:
    """By its name and its content: option files of other codebases have blocks of their own."""
    ours = set(inspect.signature(iks_plugin.sparsify).parameters) - {"model", "unknown"}
    if (
        isinstance(value, Mapping)
        and {"target_sparsity", "max_bytes"} & set(value)
        and set(value) <= ours | {"network", "export"}
    ):
        return True
    name = key.lower().replace("-", "").replace("_", "")
    near = bool(difflib.get_close_matches(name, ["iks", "iksplugin", "iksbasicsr", "targetsparsity"], n=1, cutoff=0.75))
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return name == "iks" or ((near or sorted(name) == sorted("iks")) and (value is None or is_number))
