"""Which network of a file of BasicSR goes into the compact file beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_PREFERRED = "params_ema"
"""What BasicSR validates where there is an EMA copy, and what its inference scripts load."""


def preferred(content: Any, networks: Sequence[nn.Module]) -> Any:
    """Of what `save_network` has written: the EMA copy where the file has one, otherwise the first network.

    Args:
        content: the dictionary that it has saved.
        networks: those that it was called with.

    Returns:
        The network, or a state dict where a class has put something else than its networks into the file; what is no
        state dict either, `iks_plugin.save` refuses.
    """
    if not isinstance(content, Mapping) or not content:
        return content
    keys = list(content)
    key = _PREFERRED if _PREFERRED in keys else keys[0]
    return networks[keys.index(key)] if len(keys) == len(networks) else content[key]
