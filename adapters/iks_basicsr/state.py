"""Whether a training state can be resumed: what it says under `iks`, against the block of the option file.

Beside BasicSR's own content a state holds `{"iks": {"version": 1, "networks": {key: [build, ...]}}}`: for each network
its builds in their order, the trained one and then its EMA copy, and of each the `network` before its gates and the
state of its `controller`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iks_plugin import IksError

from .block import Block

STATE_VERSION = 1


def check_state(state: Mapping[str, Any], block: Block, where: str = "the training state") -> None:
    """Raise an `IksError` unless `state` is of a training with such a block.

    Args:
        state: the content of a `.state` file.
        block: the block of the training that is to be resumed.
        where: the name of the file, for messages.
    """
    saved = state.get("iks")
    if saved is None:
        raise IksError(
            f"{where} is of a training without the block iks, which has no thresholds to go on with. To make its "
            "network sparse, start a new training from its weights: path: pretrain_network_g: ...net_g_*.pth, without "
            "resume_state and --auto_resume, under another name"
        )
    if saved.get("version") != STATE_VERSION:
        raise IksError(f"{where}: expected version {STATE_VERSION} of its entry iks, got {saved.get('version')!r}")
    if set(saved["networks"]) != set(block.networks):
        raise IksError(
            f"{where} is of a training that made {', '.join(saved['networks'])} sparse, and the block iks names "
            f"{', '.join(block.networks)}: give the state's (network: ...)"
        )
    defaults = {"granularity": "weight", "law": "exact"}
    for key, default in defaults.items():
        wanted = block.options.get(key, default)
        for builds in saved["networks"].values():
            got = builds[0]["controller"][key]
            if got != wanted:
                raise IksError(
                    f"{where}: expected {key} {wanted!r} as in the block iks, got {got!r}: write {key}: {got}"
                )
