"""The two changes to a user's model: `sparsify` puts gates before its convolutions, `finalize` takes them out again.

`finalized` takes them out for a while, `gates_applied` writes their outcome into the weights for a while. All check
everything first and change the model afterwards, so a call that fails leaves it as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .budget import first_sparsity_for, sparsity_for
from .control import SparsityController, controllers_of
from .errors import IksError, OptionError, warn_user
from .laws import count_for, project
from .layers import (
    Gated,
    GateSettings,
    Goal,
    gated_layers,
    lent,
    new_threshold,
    open_gate,
    refuse_lent,
    remove_gate,
)
from .measure import all_shifts, count_weights, unique, zeros_in
from .options import Options, check_leaves_some, check_sparsity
from .runtime import is_packed
from .selection import select

FAR = 0.01
"""A projection that changes more than this share of the weights is worth a warning."""

_IDLE = -60.0
"""A threshold that takes 9e-27 off a weight: less than float32 can tell."""

LEFT_ALONE = "_iks_left_alone"
"""Attribute, a plain string, that tells on a module why it was not rewritten."""
REWRITTEN = "_iks_rewritten"
"""Attribute, True, of the layers that were rewritten; it stays after `finalize`, for the report."""
TRAINED_FOR = "_iks_trained_for"
"""Attribute of layers that were finalized: the target sparsity, a float, that they met together."""


def sparsify(
    model: nn.Module,
    target_sparsity: float | None = None,
    *,
    max_bytes: int | str | None = None,
    value_dtype: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    layer_types: Iterable[type[nn.Module] | str] | None = None,
    granularity: str = "weight",
    law: str | None = None,
    total_steps: int | None = None,
    ramp_start: int = 0,
    ramp_steps: int | None = None,
    epoch_steps: int | None = None,
    interval: int | None = None,
    threshold_init: float = -12.0,
    **unknown: Any,
) -> SparsityController:
    """Rewrite `model` in place so that it becomes sparse while it trains.

    Call it before the optimizer is built and before the model is wrapped for distributed training; then train as
    ever. The returned controller steps itself with the optimizer and need not be kept.

    Args:
        model: any module; its convolutions get gates and keep their weights, names, hooks and everything else. A
            deep copy of a rewritten model, or one that was unpickled, has gates but no controller: it gets a new one,
            and its layers and thresholds stay as they are (`include`, `exclude` and `layer_types` do not matter).
        target_sparsity: the fraction of the rewritten layers' weights that shall be zero, in [0, 1).
        max_bytes: instead of a target, the size that the compact file may have, in bytes or as a text such as "500KB"
            (1000 bytes each) or "500KiB" (1024). The target follows from it, also as the weights change: after
            `finalize(model)` the file that `save` writes has at most this size and at least 97 % of it. It is the file
            of this `model`, whatever it is a part of.
        value_dtype: with `max_bytes`, the type of the values in that file, as `save` takes it; default "float32".
        include: shell patterns over qualified module names; only matching layers are rewritten. A pattern that
            matches a container covers all layers in it. Default: every layer of `layer_types` but those that face
            the image (4 channels or fewer in or out).
        exclude: shell patterns of layers to leave alone.
        layer_types: layer classes or their names; default all convolutions (1d, 2d, 3d and transposed). "Linear" on
            request.
        granularity: what shares a threshold: "weight" (each has its own), "kernel" (a k x k slice), "filter" (an
            output channel) or "layer". Zeros are single weights with any of them.
        law: "obs" reaches the target along a cubic ramp: the weights go that are small and that the loss needs little,
            and the others take over their work; it decides for each weight by itself. "exact" takes the same ramp by
            magnitude, with any granularity. "paper" is the published law. Default: "obs", and "exact" where thresholds
            are shared.
        total_steps: optimizer steps of the whole training, counted from now. The ramp then takes 60 % of them.
        ramp_start: laws "exact" and "obs": steps before the ramp begins. A network that is trained from scratch loses
            less if it is dense for a fifth of `total_steps`; one that is trained already needs none. The ramp then
            takes 60 % of the others.
        ramp_steps: laws "exact" and "obs": length of the ramp in steps; default 1000 where `total_steps` is not given.
        epoch_steps: law "paper": optimizer steps of one epoch.
        interval: steps between two actions of the law; default 10 ("exact"), a 25th of the ramp ("obs") or 10 epochs
            ("paper").
        threshold_init: where thresholds start, in [-60, 0); -12 takes 6e-6 off each weight.

    Returns:
        The controller: `.sparsity`, `.target_sparsity`, `.state_dict()` and so on.

    Raises:
        OptionError: an option has a wrong name, type or value, or a pattern matches nothing.
        IksError: the model cannot be rewritten: the message says why and what to do. It is unchanged.
    """
    options = Options.check(
        target_sparsity=target_sparsity,
        max_bytes=max_bytes,
        value_dtype=value_dtype,
        include=include,
        exclude=exclude,
        layer_types=layer_types,
        granularity=granularity,
        law=law,
        total_steps=total_steps,
        ramp_start=ramp_start,
        ramp_steps=ramp_steps,
        epoch_steps=epoch_steps,
        interval=interval,
        threshold_init=threshold_init,
        **unknown,
    )
    if isinstance(model, nn.Module):
        if is_packed(model):
            raise IksError(
                "the model is packed: call iks_plugin.unpack(model) before sparsify, which trains dense weights"
            )
        refuse_lent(model, "sparsify")
        orphans = gated_layers(model)
        if orphans and not controllers_of(orphans.values()):
            return _adopt(model, orphans, options)
    selection = select(model, options)
    weights = {id(layer._parameters["weight"]): layer for layer in selection.chosen.values()}  # tied ones once
    target = options.target_sparsity
    if options.budget is not None:
        parameters = [layer._parameters["weight"] for layer in weights.values()]
        target = first_sparsity_for(model, parameters, options.budget)  # type: ignore[arg-type]
    assert target is not None
    goal = Goal(target, count_weights(weights.values()), options.budget)
    check_leaves_some(goal.target_sparsity, goal.weights)
    settings = GateSettings(options.granularity, options.threshold_init, goal)
    thresholds = {weight: new_threshold(layer, settings) for weight, layer in weights.items()}

    for module in model.modules():
        module.__dict__.pop(REWRITTEN, None)
        module.__dict__.pop(TRAINED_FOR, None)
        module.__dict__.pop(LEFT_ALONE, None)
    for module, reason in selection.left_alone.values():
        module.__dict__[LEFT_ALONE] = reason
    for layer in selection.chosen.values():
        open_gate(layer, thresholds[id(layer._parameters["weight"])], settings)
        layer.__dict__[REWRITTEN] = True
    _forget_compiled_graphs()
    return SparsityController(model, gated_layers(model), goal, options)


def _adopt(model: nn.Module, layers: dict[str, Gated], options: Options) -> SparsityController:
    """A controller for layers that are gated already and have none: a copy, or a model out of a file or a process."""
    granularities = {layer._iks.granularity for layer in layers.values()}
    if granularities != {options.granularity}:
        raise OptionError(
            f"the model is rewritten already, with granularity {' and '.join(map(repr, sorted(granularities)))}, "
            f"got {options.granularity!r}: give that, or finalize(model) before a new sparsify"
        )
    target = options.target_sparsity
    if options.budget is not None:
        target = sparsity_for(model, unique(layers), options.budget, guess=0.9)
    assert target is not None
    goal = Goal(target, count_weights(unique(layers).values()), options.budget)
    check_leaves_some(goal.target_sparsity, goal.weights)
    for layer in layers.values():
        layer._iks = replace(layer._iks, goal=goal)
    return SparsityController(model, layers, goal, options)


def _forget_compiled_graphs() -> None:
    """Have `torch.compile` trace again: in old versions it does not notice that the class of a module has changed."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def finalize(model: nn.Module, target_sparsity: float | None = None) -> nn.Module:
    """Make `model` plain again, in place: original module types and state-dict keys, exactly the target's zeros.

    The weights of the rewritten layers become the gated ones, of which round(target * weights) are zero over all
    rewritten layers together. Where training has reached that already, the output does not change by a bit.

    Args:
        model: a rewritten model, or a copy of one such as an EMA model, on its own or within a wrapper.
        target_sparsity: any other fraction in [0, 1) than the one trained for; 0 gives the weights before the gate.

    Returns:
        The same object.

    Raises:
        OptionError: the target is not in [0, 1), or leaves no weight.
        IksError: the model is not rewritten, only a part of a rewritten model, within `gates_applied`, or its weights
            are not finite. It is unchanged.

    Warns:
        IksWarning: training ended far from the target, or cannot have reached it. A mean of gated weights is always far
            from it, and not warned of: see `gates_applied`.
    """
    layers = _layers_to_finalize(model)
    refuse_lent(model, "finalize")
    target = _checked(target_sparsity)
    projected = projected_weights(model, layers, target, warn=True)

    for controller in controllers_of(layers.values()):
        controller.detach()
    with torch.no_grad():
        for layer, weight in projected.items():
            layer.raw_weight.copy_(weight)
    met = {goal: _share_met(goal, projected) for goal in {layer._iks.goal for layer in layers.values()}}
    for layer in layers.values():
        layer.__dict__[TRAINED_FOR] = met[layer._iks.goal] if target is None else target
        remove_gate(layer)
    _forget_compiled_graphs()
    return model


def _share_met(goal: Goal, projected: Mapping[Gated, Tensor]) -> float:
    """The target of `goal`; under a budget, which target its weights came to."""
    if goal.budget is None:
        return goal.target_sparsity
    return zeros_in(weight for layer, weight in projected.items() if layer._iks.goal is goal) / goal.weights


def trained_for(model: nn.Module) -> float | None:
    """The target sparsity of a model that is rewritten or was finalized; None where there is none, or more than one."""
    targets = {module.__dict__.get(TRAINED_FOR) for module in model.modules()} - {None}
    targets |= {layer._iks.goal.target_sparsity for layer in gated_layers(model).values()}
    return targets.pop() if len(targets) == 1 else None


def is_sparsified(model: nn.Module) -> bool:
    """Whether `model`, or anything in it, has gates now: from `sparsify` to `finalize`, and not within `finalized`."""
    return bool(gated_layers(model))


@contextmanager
def gates_applied(model: nn.Module) -> Iterator[nn.Module]:
    """While it lasts, the parameters of `model` hold what its layers compute with: gated weights, and idle thresholds.

        with iks_plugin.gates_applied(model):
            ema.update_parameters(model)  # averages what the network is, and not weights and thresholds apart

    For averages of weights (EMA, SWA) over a training: a mean weight behind a mean threshold is another network than
    the mean of gated weights. The average is not sparse by itself; `finalize` and `finalized` make it so, as they cut
    any copy to the target. The copy's thresholds take nothing off its weights.

    Raises:
        IksError: the model is not rewritten.
    """
    layers = unique(_layers_to_finalize(model)).values()
    parameters = [parameter for layer in layers for parameter in (layer.raw_weight, layer.threshold)]
    before = [parameter.data for parameter in parameters]
    with torch.no_grad():
        applied = [value for layer in layers for value in (layer.weight, torch.full_like(layer.threshold, _IDLE))]
    try:
        for parameter, value in zip(parameters, applied, strict=True):
            parameter.data = value
        with lent(layers, "gates_applied"):
            yield model
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data = value


@contextmanager
def finalized(model: nn.Module, target_sparsity: float | None = None) -> Iterator[nn.Module]:
    """While it lasts, `model` is what `finalize` would make of it; afterwards it trains on as if nothing had been.

        with iks_plugin.finalized(model):
            torch.save(model.state_dict(), "plain.pth")  # plain keys, exactly the target's zeros
            score = validate(model)                      # of what has just been saved

    The module and parameter objects stay the same ones, so it works within any wrapper and beside any optimizer. What
    is loaded into the model meanwhile is lost, and it must not be trained; `pack` and `sparsify` take only a copy.

    Args:
        model: as for `finalize`, a copy such as an EMA model too.
        target_sparsity: as for `finalize`. Early in a training the target is far off yet, and reaching it costs
            quality; `controller.sparsity` is where the training stands.

    Raises:
        OptionError, IksError: as `finalize` does; the model is unchanged.
    """
    layers = _layers_to_finalize(model)
    projected = projected_weights(model, layers, _checked(target_sparsity), warn=False)
    gates = [(layer, layer.threshold, layer._iks) for layer in layers.values()]
    weights = [(layer.raw_weight, layer.raw_weight.data) for layer in projected]
    try:
        for layer, weight in projected.items():
            layer.raw_weight.data = torch.empty_like(layer.raw_weight.data).copy_(weight)  # keeps the memory format
        for layer in layers.values():
            remove_gate(layer)
        _forget_compiled_graphs()
        with lent(layers.values(), "finalized"):
            yield model
    finally:
        for layer, threshold, settings in gates:
            if not isinstance(layer, Gated):
                open_gate(layer, threshold, settings)
        for parameter, data in weights:
            parameter.data = data
        _forget_compiled_graphs()


def _checked(target_sparsity: float | None) -> float | None:
    return None if target_sparsity is None else check_sparsity(target_sparsity)


def _layers_to_finalize(model: nn.Module) -> dict[str, Gated]:
    layers = gated_layers(model)
    if not layers:
        raise IksError("the model is not rewritten: it has no sparse layers. Call iks_plugin.sparsify before finalize")
    return layers


@torch.no_grad()
def projected_weights(
    model: nn.Module, layers: dict[str, Gated], target_sparsity: float | None, *, warn: bool
) -> dict[Gated, Tensor]:
    """The gated weights of `layers` of `model` with exactly round(target * weights) zeros; the layers stay as they are.

    Layers that were rewritten together reach their target together; of layers that share a weight only the first is
    in the result. `target_sparsity` None means each goal's own, or what its budget asks for with these weights; `warn`
    tells of what a user may not expect.
    """
    by_goal: dict[Goal, dict[str, Gated]] = {}
    for name, layer in unique(layers).items():
        by_goal.setdefault(layer._iks.goal, {})[name] = layer
    result: dict[Gated, Tensor] = {}
    for goal, members in by_goal.items():
        target = goal.target_sparsity if target_sparsity is None else target_sparsity
        weights = count_weights(members.values())
        if weights != goal.weights:
            raise IksError(
                f"this is only a part of a rewritten model ({weights:,} of {goal.weights:,} weights), and the target "
                "counts over all of it: finalize the whole. Where layers were replaced since sparsify, delete what "
                "still refers to the old ones first"
            )
        if target_sparsity is not None:
            check_leaves_some(target_sparsity, weights)
        elif goal.budget is not None:
            target = sparsity_for(model, members, goal.budget, guess=goal.target_sparsity, trains_on=False)
        shifts = all_shifts(members)
        gated = [layer.weight for layer in members.values()]
        raw = [layer.raw_weight.detach() for layer in members.values()]
        zeros = count_for(target, shifts.numel())
        projected = raw if target_sparsity == 0 else project(gated, raw, shifts, zeros)
        if warn:
            _warn_if_short(zeros_in(projected), zeros)
        if warn and target_sparsity is None and not _is_mean(members.values()):
            _warn_if_far(zeros_in(gated), zeros_in(projected), zeros, goal)
        result.update(zip(members.values(), projected, strict=True))
    return result


def _is_mean(layers: Collection[Gated]) -> bool:
    """Whether they are, or hold, an average of models taken within `gates_applied`, which lets all thresholds fall."""
    fallen = (layer.threshold < max(layer._iks.threshold_init - 1, _IDLE + 1) for layer in layers)
    return all(bool(each.all()) for each in fallen)


def _warn_if_far(trained: int, met: int, zeros: int, goal: Goal) -> None:
    if abs(trained - met) > FAR * goal.weights:
        wanted = "the target is" if goal.budget is None else f"for {goal.budget.max_bytes:,} bytes these weights need"
        schedule = ", or pass total_steps (or a shorter ramp_steps) to sparsify" if goal.budget is None else ""
        warn_user(
            f"training ended at {trained / goal.weights:.1%} zeros, and {wanted} {zeros / goal.weights:.1%}: to meet "
            f"it, {abs(trained - met):,} of {goal.weights:,} weights are changed without training, which costs "
            f"quality. Train longer{schedule}",
        )


def _warn_if_short(reached: int, zeros: int) -> None:
    if reached > zeros:
        warn_user(
            f"{reached - zeros:,} more weights are zero than the target asks for: they were zero before the gate and "
            "have no value to come back to",
        )
