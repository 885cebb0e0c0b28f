"""The `iks:` block of an option file, read and checked before BasicSR touches a folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from iks_plugin import OptionError
from iks_plugin.block import Block, is_meant_as_block, parse_block

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
    steps = optimizer_steps(network, opt)
    return block.keywords(steps, "train: total_iter", from_scratch=is_from_scratch(network, opt))


def is_from_scratch(network: str, opt: Mapping[str, Any]) -> bool:
    """Whether the options name no file that `network` gets its first weights from."""
    return not (opt.get("path") or {}).get(f"pretrain_{network}")


def optimizer_steps(network: str, opt: Mapping[str, Any]) -> int:
    """How many steps the optimizer of `network` makes in `train: total_iter` iterations.

    BasicSR's GAN models, which have a `network_d`, step the generator in every `net_d_iters`-th iteration after the
    first `net_d_init_iters`.

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
    if network.startswith("network_d") or not opt.get("network_d"):
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
        if key != "iks" and is_meant_as_block(str(key), value):
            raise OptionError(f"{where}: there is no block {key!r}: did you mean 'iks'? Write{EXAMPLE}")
    for path, key in _nested(opt):
        if path and path[0] != "iks" and (key == "iks" or (key == "target_sparsity" and "iks" not in opt)):
            kind = "the block iks" if key == "iks" else "target_sparsity, of the block iks,"
            raise OptionError(f"{where}: {kind} lies within {': '.join(path)!r}: move it to the top level:{EXAMPLE}")


def _nested(options: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """All keys of the options, with the keys of the blocks that they lie in."""
    for key, value in options.items():
        yield path, str(key)
        if isinstance(value, Mapping):
            yield from _nested(value, (*path, str(key)))
