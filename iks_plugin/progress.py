"""Where a training that a framework runs stands: how it is taken up again, and told of in logs; for the adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .block import Block
from .control import GOAL, SparsityController
from .laws import SCHEDULE
from .layers import gated_layers
from .measure import count_raw_zeros, count_weights, unique
from .report import report
from .rewrite import FAR, finalized


def resumed_state(block: Block, saved: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """A controller's `saved` state as a resumed training takes it up, whose controller is still in its `present` one.

    The goal is that of the `block`, and so is the schedule if the block says anything of it. Under the same `max_bytes`
    as before the target goes on from where it was, as it follows the weights.
    """
    same_budget = all(saved.get(key) == present[key] for key in ("max_bytes", "value_dtype"))
    taken: tuple[str, ...] = () if present["max_bytes"] is not None and same_budget else GOAL
    if set(SCHEDULE) & set(block.options):
        taken += SCHEDULE
    return {**saved, **{key: present[key] for key in taken}}


def changes(saved: Mapping[str, Any], resumed: Mapping[str, Any], by: str) -> Iterator[str]:
    """What a log is to tell of a `resumed` state, a sentence each.

    Args:
        by: what has the present block, such as "the option file".
    """
    for name, value in resumed.items():
        if saved.get(name) != value:
            yield f"by {by}, {name} is {value} from now on, and no longer {saved.get(name)}"


def aim_anew(controller: SparsityController, saved: Mapping[str, Any]) -> None:
    """Once a resumed network has its weights: go for the present goal if it has changed.

    In a distributed training it takes all processes.

    Args:
        saved: the controller's state as it was saved.
    """
    present = controller.state_dict()
    if any(present[key] != saved.get(key) for key in GOAL):
        controller.aim_when_measured()


def ramp_end(controller: SparsityController) -> int | None:
    """The step at which the target is reached; None for a law without a ramp."""
    state = controller.state_dict()
    return None if state["ramp_steps"] is None else int(state["ramp_start"] + state["ramp_steps"])


def rise_of(controller: SparsityController) -> str | None:
    """What a log is to tell of the ramp, a sentence without a full stop; None for a law without one."""
    start, end = controller.state_dict()["ramp_start"], ramp_end(controller)
    return None if end is None else f"the sparsity rises from step {start} of the optimizer to step {end}"


def beside_validation(reached: float, validated: float) -> str:
    """What to add to the log of a validation: nothing where training is as far as what was validated."""
    if abs(reached - validated) <= FAR:
        return ""
    untrained = ", and what is zero beyond that has not been trained for yet" if validated > reached else ""
    return f"; training itself is at {reached:.2%}{untrained}"


def fault_at_end(net: nn.Module, controller: SparsityController, files: str, length: str, ramp: str) -> str | None:
    """What is to be warned of at the end of a training, in a sentence and what to do; None if all is well.

    Args:
        net: the network that was trained, with its gates.
        controller: its controller.
        files: what the framework calls the files that it has written.
        length: the option that makes the training longer.
        ramp: the option that makes the sparsity rise faster.
    """
    layers = unique(gated_layers(net)).values()
    reached, target = controller.sparsity, controller.target_sparsity
    if count_raw_zeros(layers) > (target + FAR) * count_weights(layers):
        return (
            f"training ended at {reached:.1%} zeros, and not at the target's {target:.1%}: the others were zero before "
            "it and stay zero, as the network was pruned already. Start from a dense one"
        )
    with finalized(net):
        delivered = report(net).sparsity
    if abs(reached - delivered) <= FAR:
        return None
    ended = f"training ended at {reached:.1%} zeros, and the {files} have the target's {delivered:.1%}"
    if delivered < reached:
        return f"{ended}: the others came back without training, as good as zero. Train longer ({length})"
    return (
        f"{ended}: the rest was made zero without training, which costs quality. Train longer ({length}), or raise the "
        f"sparsity faster ({ramp})"
    )
