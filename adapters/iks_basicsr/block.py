"""The `iks:` block of an option file, read and checked before BasicSR touches a folder."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import iks_plugin
from iks_plugin import OptionError

EXAMPLE = "\n\n  iks:\n    target_sparsity: 0.9\n"
_OWN_KEYS = ("network", "export")
_SIMILAR_NAMES = ("iks_plugin", "iks_basicsr", "iks_options", "sparsify", "sparsity", "target_sparsity")


@dataclass(frozen=True)
class Block:
    """The `iks:` block of one option file: which networks become sparse, and the keywords of `sparsify`."""

    networks: tuple[str, ...]
    options: dict[str, Any]

    def keywords(self, network: str, opt: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of `sparsify` for `network`, with the length of its training out of the `train:` block."""
        available = optimizer_steps(network, opt)
        wanted = self.options.get("total_steps", available)
        if isinstance(wanted, int) and wanted > available:
            raise OptionError(
                f"total_steps is {wanted}, and {network} is trained for {available} steps: leave it out, and it "
                "follows from train: total_iter"
            )
        return {**self.options, "total_steps": wanted}


def read_block(opt: Mapping[str, Any], where: str = "the option file") -> Block | None:
    """The `iks:` block of BasicSR's options, or None where there is none.

    Args:
        opt: the options as BasicSR parses them.
        where: the name of the file they come from, for messages.

    Raises:
        OptionError: the block is empty, misspelt or out of place, or one of its keys or values is wrong.
    """
    if "iks" not in opt:
        _look_for_a_misplaced_block(opt, where)
        return None
    try:
        block = _parse(opt["iks"], opt)
        for network in block.networks:
            iks_plugin.check_options(**(block.keywords(network, opt) if opt.get("is_train") else block.options))
    except OptionError as error:
        raise OptionError(f"{where}, block iks: {error}") from None
    return block


def optimizer_steps(network: str, opt: Mapping[str, Any]) -> int:
    """How many steps the optimizer of `network` makes in `train: total_iter` iterations.

    BasicSR's GAN models step the generator in every `net_d_iters`-th iteration after the first `net_d_init_iters`.

    Raises:
        OptionError: it makes none.
    """
    train = opt["train"]
    total = int(train["total_iter"])
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


def _parse(content: Any, opt: Mapping[str, Any]) -> Block:
    if content is None:
        raise OptionError(f"it is empty: name the sparsity that you want, such as{EXAMPLE}")
    if isinstance(content, Real) and not isinstance(content, bool):
        content = {"target_sparsity": content}  # iks: 0.9
    if not isinstance(content, Mapping):
        raise OptionError(f"expected options, got {content!r}: write{EXAMPLE}")
    options = dict(content)
    networks = _check_networks(options.pop("network", "network_g"), opt)
    if options.pop("export", False):
        raise OptionError("export needs the compact file format, which this version does not have yet: leave it out")
    for name in options:
        near = difflib.get_close_matches(str(name), _OWN_KEYS, n=1, cutoff=0.7)
        if near:
            raise OptionError(f"there is no option {name!r}: did you mean {near[0]!r}?")
    return Block(networks, options)


def _check_networks(value: Any, opt: Mapping[str, Any]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    known = [key for key in opt if str(key).startswith("network_")]
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise OptionError(f"network must be the key of a network or a list of them ({', '.join(known)}), got {value!r}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or known[:1]
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"network: the option file has no {name!r} (it has {', '.join(known) or 'none'}){hint}")
    return tuple(dict.fromkeys(names))


def _look_for_a_misplaced_block(opt: Mapping[str, Any], where: str) -> None:
    for key, value in opt.items():
        name = str(key).lower().replace("-", "_")
        if sorted(name) == sorted("iks") or name in _SIMILAR_NAMES:
            raise OptionError(f"{where}: there is no block {key!r}: did you mean 'iks'? Write{EXAMPLE}")
        if isinstance(value, Mapping) and "iks" in value:
            raise OptionError(f"{where}: the block iks lies within {key!r}: move it to the top level:{EXAMPLE}")
