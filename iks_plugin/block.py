"""The block of options for this package in the option file of a training framework, for the adapters.

All of its keys are keywords of `sparsify` but two: `network`, and `export`, which asks for compact files.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from .errors import OptionError
from .laws import DENSE_SHARE, schedule_of
from .options import Options, check_options, did_you_mean, option_names
from .quantize import VALUE_DTYPES, check_value_dtype
from .selection import check_patterns, matching, names_of_layers, near_layers

_OWN_KEYS = ("network", "export")


@dataclass(frozen=True)
class Block:
    """The networks that become sparse, by the framework's names for them, and keywords of `sparsify`.

    And `export`, the type of the values in the compact files beside the framework's checkpoints; None for no files.
    """

    networks: tuple[str, ...]
    options: dict[str, Any]
    export: str | None = None

    def keywords(self, steps: int | None, length: str, *, from_scratch: bool) -> dict[str, Any]:
        """The keywords of `sparsify` for a training of `steps` optimizer steps.

        Args:
            steps: how many there are in the whole training; None if that is to be seen, and `schedule` follows.
            length: the framework's option that sets the length of a training, for messages.
            from_scratch: whether the network has random weights: it is dense for the first fifth of the training then,
                or as much of that as the ramp leaves, unless the block says otherwise.

        Raises:
            OptionError: they do not go together with that length, or with each other.
        """
        wanted = self.options.get("total_steps", steps)
        if steps is not None and isinstance(wanted, int) and wanted > steps:
            raise OptionError(
                f"total_steps is {wanted}, and the training has {steps} steps: leave it out, and it follows from "
                f"{length}"
            )
        keywords = {**self.options, "total_steps": wanted}
        check_options(**keywords)
        if from_scratch and wanted is not None and self.options.get("law") != "paper":
            room = wanted - self.options.get("ramp_steps", 1)
            keywords.setdefault("ramp_start", min(round(DENSE_SHARE * wanted), room))
        return keywords

    def schedule(self, steps: int, length: str, *, from_scratch: bool) -> dict[str, int | None]:
        """What a controller's state says of the schedule for such a training; for one made before that was known.

        Raises:
            OptionError: as `keywords` does.
        """
        keywords = self.keywords(steps, length, from_scratch=from_scratch)
        return schedule_of(Options.check(**keywords).make_law())


class Patterns:
    """`include` and `exclude` where a block has several networks: each gets the patterns that match in it.

    Args:
        networks: those of the block, which may come to be one after another.
    """

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = networks
        self._layers: dict[str, list[list[str]]] = {}

    def keywords_for(self, name: str, network: nn.Module, keywords: dict[str, Any]) -> dict[str, Any]:
        """The `keywords` of `sparsify` for the `network` called `name`, of those for all; a single one takes them all.

        Raises:
            OptionError: no pattern of `include` matches in it; or, for the last network, a pattern has matched in none.
        """
        if len(self._networks) == 1:
            return keywords
        options = Options.check(**keywords)
        own = self._layers[name] = names_of_layers(network, options.layer_types)
        if self._layers.keys() == set(self._networks):
            whose = " and ".join(f"{other}'s" for other in self._networks)
            check_patterns(options, [layer for layers in self._layers.values() for layer in layers], whose)
        taken = {**keywords, "exclude": matching(options.exclude, own)}
        if options.include is not None:
            taken["include"] = matching(options.include, own)
            if not taken["include"]:
                raise OptionError(
                    f"none of the patterns of include, {', '.join(map(repr, options.include))}, matches one of its "
                    f"{len(own)} layers of the chosen layer_types: add one that does (the others go to the other "
                    f"networks of the block), or take it out of network; {near_layers(options.include[0], own)}"
                )
        return taken


def parse_block(content: Any, *, network: str, example: str) -> Block:
    """Read what a user has written: a mapping of options, or a bare number for the target.

    Args:
        content: what stands in the option file.
        network: the network that becomes sparse if the block names none.
        example: a block as a user would write it, for messages.

    Raises:
        OptionError: it is neither, or something is wrong with an option that does not depend on the training.
    """
    if content is None:
        raise OptionError(f"it is empty: name the sparsity that you want, such as{example}")
    if isinstance(content, Real) and not isinstance(content, bool):
        content = {"target_sparsity": content}
    if isinstance(content, str):
        check_options(target_sparsity=content)  # raises, and says how to write the number that was meant
    if not isinstance(content, Mapping):
        raise OptionError(f"expected options, got {content!r}: write{example}")
    unnamed = [name for name in content if not isinstance(name, str)]
    if unnamed:
        raise OptionError(f"expected names of options, got {unnamed[0]!r}: write{example}")
    options = {name: value for name, value in content.items() if value is not None}
    named = options.pop("network", network)
    networks = (named,) if isinstance(named, str) else named
    if (
        not isinstance(networks, (list, tuple))
        or not networks
        or not all(isinstance(name, str) and name.strip() for name in networks)
    ):
        raise OptionError(
            f"network must be the name of a network or a list of them, such as {network!r}, got {named!r}"
        )
    export = _take_export(options.pop("export", False), options)
    known = option_names().union(_OWN_KEYS)
    for name in options:
        if name not in known:
            raise OptionError(f"there is no option {name!r}{did_you_mean(name, known)}")
    check_options(**options)
    return Block(tuple(dict.fromkeys(networks)), options, export)


def _take_export(value: Any, options: dict[str, Any]) -> str | None:
    """The type of the values in the files that are asked for; a size that `options` limit is that of these files."""
    if value is False:
        return None
    if value is True:
        return _dtype_name(options.get("value_dtype", "float32"))
    try:
        export = _dtype_name(value)
    except OptionError:
        names = ", ".join(map(repr, VALUE_DTYPES))
        raise OptionError(
            f"export must be true, false or the type that the files' values have (one of {names}), got {value!r}: "
            f"{_export_meant(value)}"
        ) from None
    if options.get("max_bytes") is not None and _dtype_name(options.setdefault("value_dtype", export)) != export:
        raise OptionError(
            f"export is {export!r}, and max_bytes counts for values of another type, value_dtype="
            f"{options['value_dtype']!r}: write export: true, and the files have that"
        )
    return export


def _dtype_name(value: Any) -> str:
    return str(check_value_dtype(value)).removeprefix("torch.")


def _export_meant(value: Any) -> str:
    text = str(value).lower()
    if text in ("true", "false"):
        return f"write {text}, without quotation marks"
    text = {"half": "float16", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(text, text)
    near = difflib.get_close_matches(text, VALUE_DTYPES, n=1)
    return f"did you mean {near[0]!r}?" if near else "write true for float32 values, which lose nothing"


def is_meant_as_block(key: str, value: Any) -> bool:
    """Whether what stands under `key`, which is not "iks", was meant as the block.

    By its name and its content: option files of other codebases have blocks of their own.
    """
    known = option_names().union(_OWN_KEYS)
    if isinstance(value, Mapping) and {"target_sparsity", "max_bytes"} & set(value) and set(value) <= known:
        return True
    name = key.lower().replace("-", "").replace("_", "")
    near = bool(difflib.get_close_matches(name, ["iks", "iksplugin", "iksbasicsr", "targetsparsity"], n=1, cutoff=0.75))
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return name == "iks" or ((near or sorted(name) == sorted("iks")) and (value is None or is_number))
