"""The block of options for this package in the option file of a training framework, for the adapters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .errors import OptionError
from .options import check_options

_OWN_KEYS = ("network", "export")


@dataclass(frozen=True)
class Block:
    """The networks that become sparse, by the framework's names for them, and keywords of `sparsify`."""

    networks: tuple[str, ...]
    options: dict[str, Any]

    def keywords(self, steps: int, length: str) -> dict[str, Any]:
        """The keywords of `sparsify` for a training of `steps` optimizer steps.

        Args:
            steps: how many there are in the whole training.
            length: the framework's option that sets the length of a training, for messages.

        Raises:
            OptionError: they do not go together with that length, or with each other.
        """
        wanted = self.options.get("total_steps", steps)
        if isinstance(wanted, int) and wanted > steps:
            raise OptionError(
                f"total_steps is {wanted}, and the training has {steps} steps: leave it out, and it follows from "
                f"{length}"
            )
        keywords = {**self.options, "total_steps": wanted}
        check_options(**keywords)
        return keywords


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
    networks = options.pop("network", network)
    if isinstance(networks, str):
        networks = (networks,)
    if not isinstance(networks, (list, tuple)) or not networks or not all(isinstance(name, str) for name in networks):
        raise OptionError(
            f"network must be the name of a network or a list of them, such as {network!r}, got {networks!r}"
        )
    if options.pop("export", False):
        raise OptionError("export needs the compact file format, which this version does not have yet: leave it out")
    for name in options:
        near = difflib.get_close_matches(str(name), _OWN_KEYS, n=1, cutoff=0.7)
        if near:
            raise OptionError(f"there is no option {name!r}: did you mean {near[0]!r}?")
    check_options(**options)
    return Block(tuple(dict.fromkeys(networks)), options)
