"""What a training state says under `iks`, and whether it can be resumed with the block of an option file.

Beside BasicSR's own content a state holds `{"iks": {"version": 1, "keys": [...], "networks": {attribute: saved}}}`: the
block's networks, and by the model's attributes (net_g, net_g_ema, ...) the `network` before its gates and the state of
its `controller`, None for a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iks_plugin import IksError
from iks_plugin.block import Block
from iks_plugin.options import default_law

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
    try:
        if saved["version"] != STATE_VERSION:
            raise IksError(f"{where}: expected version {STATE_VERSION} of its entry iks, got {saved['version']!r}")
        if set(saved["keys"]) != set(block.networks):
            raise IksError(
                f"{where} is of a training that made {', '.join(saved['keys'])} sparse, and the block iks names "
                f"{', '.join(block.networks)}: give the state's (network: ...)"
            )
        controllers = [network["controller"] for network in saved["networks"].values()]
        granularity = block.options.get("granularity", "weight")
        law = block.options.get("law") or default_law(granularity)
        for key, wanted in (("granularity", granularity), ("law", law)):
            for got in {controller[key] for controller in controllers if controller is not None} - {wanted}:
                raise IksError(
                    f"{where}: expected {key} {wanted!r} as in the block iks, got {got!r}: write {key}: {got}"
                )
    except (KeyError, TypeError, AttributeError) as error:
        raise IksError(f"{where}: its entry iks is damaged ({error!r}): resume from another state") from None
