"""What watches the optimizers: counts their steps, refuses stale ones, keeps weight decay off thresholds.

A watcher hears of every step of every torch optimizer through torch's global step hooks, so a training loop needs no
line of its own. Gradient accumulation, steps that a GradScaler skips, and a second optimizer for a discriminator thus
count as they should: only a step of the optimizer that holds the first threshold in training counts. A step may run
within another one, of a subclass or a wrapper such as SAM: the innermost is the one. And it may fail on the way: what
was begun then is begun anew by the next one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .errors import IksError, first_of, warn_user

_watchers: weakref.WeakSet[OptimizerWatcher] = weakref.WeakSet()
_hooks: list[Any] = []
_unprotected: weakref.WeakKeyDictionary[Optimizer, list[list[Parameter]]] = weakref.WeakKeyDictionary()
"""The groups as they are between steps, of optimizers whose thresholds are kept from weight decay within a step."""
_protected: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that were so once."""


@dataclass(frozen=True)
class _Holding:
    """What an optimizer holds, as long as its groups and the watched layers look the same.

    Attributes:
        signature: how they look.
        weights: the ids of the watched weights in it.
        counts: whether its steps count.
        decays: whether they would decay thresholds.
    """

    signature: object
    weights: frozenset[int]
    counts: bool
    decays: bool


class OptimizerWatcher:
    """Calls back around each step of the optimizers that hold watched weights.

    Args:
        pairs: returns (name, weight, threshold) of every watched layer.
        on_begin: called before a step, with the ids of the watched weights that the optimizer holds.
        on_end: called without arguments after it.
        on_count: called without arguments after that, if it was the optimizer that holds the first threshold that
            requires a gradient; where none does, the first weight.
    """

    def __init__(
        self,
        pairs: Callable[[], Iterable[tuple[str, Parameter, Parameter]]],
        on_begin: Callable[[Container[int]], None],
        on_end: Callable[[], None],
        on_count: Callable[[], None],
    ) -> None:
        self._pairs = pairs
        self._on_begin = on_begin
        self._on_end = on_end
        self._on_count = on_count
        self._seen: weakref.WeakKeyDictionary[Optimizer, _Holding] = weakref.WeakKeyDictionary()
        self._warned_of_decay = False
        self._looked_for_idle_layers = False
        self._count_begun = False

    def start(self) -> None:
        if not _hooks:
            _keep_hooks_through_compile()
            untraced: Any = torch.compiler.disable  # as a training step may be compiled as a whole
            _hooks.append(register_optimizer_step_pre_hook(untraced(_before_step)))
            _hooks.append(register_optimizer_step_post_hook(untraced(_after_step)))
        _watchers.add(self)

    def stop(self) -> None:
        _watchers.discard(self)

    def before_step(self, optimizer: Optimizer) -> None:
        holding = self._inspect(optimizer)
        if holding.weights:
            self._on_begin(holding.weights)
        if holding.counts:
            self._count_begun = True
            if not self._looked_for_idle_layers:
                self._warn_of_idle_layers(optimizer)

    def after_step(self, optimizer: Optimizer) -> None:
        holding = self._inspect(optimizer)
        if holding.weights:
            self._on_end()
        if holding.counts and self._count_begun:
            self._count_begun = False
            self._on_count()

    def _inspect(self, optimizer: Optimizer) -> _Holding:
        groups = optimizer.param_groups
        lead = next((id(t) for _, _, t in self._pairs() if t.requires_grad), None)
        lead = lead or next((id(w) for _, w, _ in self._pairs() if w.requires_grad), None)
        signature = (lead, *((len(group["params"]), bool(group.get("weight_decay"))) for group in groups))
        seen = self._seen.get(optimizer)
        if seen is None or seen.signature != signature:
            pairs = list(self._pairs())
            held = {id(p): bool(group.get("weight_decay")) for group in groups for p in group["params"]}
            stale = [name for name, w, t in pairs if id(w) in held and t.requires_grad and id(t) not in held]
            if stale:
                raise IksError(_stale_message(optimizer, stale))
            weights = frozenset(id(w) for _, w, _ in pairs if id(w) in held)
            decays = any(held.get(id(t), False) for _, _, t in pairs)
            seen = self._seen[optimizer] = _Holding(signature, weights, lead in held, decays)
        return seen

    def protect(self, optimizer: Optimizer) -> None:
        """For the length of one step, move the decayed thresholds into a group of their own without decay.

        Whatever form of decay the optimizer has does not touch them so, while its groups look the same as ever to
        learning-rate schedulers and in its state dict. Called after `before_step` of every watcher.
        """
        if not self._seen[optimizer].decays:
            return
        if not self._warned_of_decay:
            self._warned_of_decay = True
            warn_user(
                f"{type(optimizer).__name__} has weight decay on the thresholds, which would pull them towards 0 and "
                "close the gates of whole layers: the decay is kept off them at every step. To be rid of this warning, "
                "build the optimizer from controller.param_groups() instead of model.parameters()",
            )
        thresholds = {id(t) for _, _, t in self._pairs()}
        groups = optimizer.param_groups
        if optimizer not in _protected:
            _protected.add(optimizer)
            optimizer.register_state_dict_pre_hook(_restore)  # a step may fail, and a state be saved after that
        _unprotected.setdefault(optimizer, [group["params"] for group in groups])
        for group in list(groups):
            mine = [p for p in group["params"] if id(p) in thresholds]
            if mine and group.get("weight_decay"):
                group["params"] = [p for p in group["params"] if id(p) not in thresholds]
                groups.append({**group, "params": mine, "weight_decay": 0.0})

    def _warn_of_idle_layers(self, optimizer: Optimizer) -> None:
        """Look once, at the first step, for layers that the training does not reach."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = [(name, t) for name, _, t in self._pairs() if id(t) in held and t.requires_grad]
        idle = [name for name, t in mine if t.grad is None]
        frozen = [name for name, w, t in self._pairs() if not (w.requires_grad or t.requires_grad)]
        self._looked_for_idle_layers = True
        if frozen:
            warn_user(
                f"{len(frozen)} rewritten layers do not require a gradient in the first step: they get zeros without "
                "being trained. If they stay frozen, freeze them before sparsify, which leaves frozen layers alone, or "
                f"leave them out: sparsify(..., exclude={frozen})",
            )
        if idle and len(idle) < len(mine):
            warn_user(
                f"{len(idle)} rewritten layers got no gradient in the first step: they do not learn, yet their zeros "
                "count towards the target. And where a block writes a merged kernel into such a layer in eval mode "
                "(re-parametrisation), what it writes is lost and its output wrong. If they are idle in every step, "
                f"leave them out: sparsify(..., exclude={idle})",
            )


def _restore(optimizer: Optimizer) -> None:
    """Undo what `protect` did, by however many watchers."""
    original = _unprotected.pop(optimizer, None)
    if original is not None:
        del optimizer.param_groups[len(original) :]
        for group, params in zip(optimizer.param_groups, original, strict=True):
            group["params"] = params


def groups_without_decay(
    groups: Iterable[dict[str, Any]], thresholds: Container[int], default: float = 0.0
) -> list[dict[str, Any]]:
    """An optimizer's `groups`, where none decays thresholds: those that did are followed by one without decay.

    Args:
        groups: their "params" are lists.
        thresholds: the ids of thresholds.
        default: the weight decay of groups that do not say.
    """
    apart: list[dict[str, Any]] = []
    for group in groups:
        mine = [p for p in group["params"] if id(p) in thresholds]
        if mine and group.get("weight_decay", default):
            others = [p for p in group["params"] if id(p) not in thresholds]
            if others:
                apart.append({**group, "params": others})
            apart.append({**group, "params": mine, "weight_decay": 0.0})
        else:
            apart.append(group)
    return apart


def _keep_hooks_through_compile() -> None:
    """Let step hooks outlive `torch.compile`, which in torch 2.1 and 2.2 strips them off every optimizer class.

    It does so once, at its first use in a process. So have that over with now, and put the hooks back afterwards.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 3):
        return
    from torch._dynamo.eval_frame import TorchPatcher

    TorchPatcher.patch()
    for cls in vars(torch.optim).values():
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer:
            cls.step = Optimizer.profile_hook_step(cls.step)  # type: ignore[assignment]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _restore(optimizer)  # the step before, or one that this one runs in, may not have come to its end
    watchers = list(_watchers)
    for watcher in watchers:
        watcher.before_step(optimizer)
    for watcher in watchers:
        watcher.protect(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _restore(optimizer)
    for watcher in list(_watchers):
        watcher.after_step(optimizer)


def _stale_message(optimizer: Optimizer, stale: list[str]) -> str:
    return (
        f"{type(optimizer).__name__} holds the weights but not the thresholds of {len(stale)} rewritten layers "
        f"({first_of([name or 'the model itself' for name in stale])}): it was built before sparsify, or the "
        "thresholds were left out or given to another optimizer. Build it after sparsify, with both of each layer, "
        "from model.parameters() or controller.param_groups(). Or, where no optimizer holds thresholds yet, add them: "
        "optimizer.add_param_group(controller.param_groups()[1]). Nothing has been changed by this step"
    )
