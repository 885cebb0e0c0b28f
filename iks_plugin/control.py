"""The controller: it moves the thresholds of a rewritten model, step by step, until the target sparsity is reached."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import laws, surgeon
from .budget import RESOLVE_STEPS, RESOLVE_TIMES, refuse_idle, sparsity_for
from .curvature import CurvatureWatcher
from .errors import IksError, first_of, warn_user
from .layers import Gated, Goal
from .measure import all_shifts, count_raw_zeros, count_weights, count_zeros, unique
from .optimizers import OptimizerWatcher
from .options import Options, check_leaves_some, check_sparsity
from .quantize import check_value_dtype
from .sizes import Budget, check_size

_STATE_VERSION = 1
GOAL = ("target_sparsity", "max_bytes", "value_dtype")
"""What a controller's state says of where it goes."""
_GONE = "the controller's model is gone: keep a reference to the model that was rewritten"

_controllers: weakref.WeakKeyDictionary[nn.Module, SparsityController] = weakref.WeakKeyDictionary()


class SparsityController:
    """Drives the sparsity of one rewritten model; `iks_plugin.sparsify` makes it.

    It counts the steps of the optimizer that trains the thresholds and acts by itself. It holds the layers weakly, and
    they keep it alive, so its return value may be ignored.
    """

    def __init__(self, model: nn.Module, layers: dict[str, Gated], goal: Goal, options: Options) -> None:
        self._model = weakref.ref(model)
        self._layers = {name: weakref.ref(layer) for name, layer in layers.items()}
        self._goal = goal
        self._granularity = options.granularity
        self._law_name = options.law
        self._law = options.make_law()
        self._steps = 0
        self._start: float | None = None
        self._curvature = CurvatureWatcher(self._gated_left)
        self._before: list[tuple[nn.Parameter, Tensor, float]] = []
        self._factors: dict[str, float] | None = None
        self._postponed_to: int | None = None
        self._warned_of_missed_layers = False
        self._warned_of_lasting_zeros = False
        self._watcher = OptimizerWatcher(self._watched, self._remember, self._lengthen, self._on_optimizer_step)
        self._watched_a_step = False
        self._watcher.start()
        self._measure_if_due()
        for layer in layers.values():
            _controllers[layer] = self
            weakref.finalize(layer, self._lose_a_layer).atexit = False

    @property
    def steps(self) -> int:
        """Optimizer steps counted so far."""
        return self._steps

    @property
    def sparsity(self) -> float:
        """The fraction of the rewritten layers' weights that are zero now, in [0, 1]; counted when it is read."""
        layers = self._layers_alive().values()
        return count_zeros(layers) / count_weights(layers)

    @property
    def target_sparsity(self) -> float:
        """The fraction of the rewritten layers' weights that are to be zero, in [0, 1).

        May be set at any time. During the ramp it changes where the ramp leads; after it (or after the training, for
        the law "paper" with total_steps) the thresholds move at once, so that it dials any sparsity without training.
        Under `max_bytes` it is what follows from that now; setting it ends the budget.
        """
        return self._goal.target_sparsity

    @target_sparsity.setter
    def target_sparsity(self, value: float) -> None:
        target = check_sparsity(value)
        check_leaves_some(target, count_weights(self._gated().values()))  # raises where there is nothing left to drive
        self._goal.budget = None
        self._aim_at(target)

    def _aim_at(self, target: float) -> None:
        if self._law.has_arrived(self._steps):
            self._shift_to(target)
        self._goal.target_sparsity = target

    @property
    def max_bytes(self) -> int | None:
        """The size that the compact file may have, from which the target follows; None for a target of its own.

        May be set at any time, to a number of bytes or a text such as "500KB"; the target follows at once.
        """
        return None if self._goal.budget is None else self._goal.budget.max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int | str) -> None:
        present = self._goal.budget or Budget(0)
        self._aim_at_budget(replace(present, max_bytes=check_size(value)))

    def _aim_at_budget(self, budget: Budget) -> None:
        target = self._target_under(budget)
        if budget != self._goal.budget:
            refuse_idle(target, budget)
        self._goal.budget = budget
        self._aim_at(target)

    def _target_under(self, budget: Budget) -> float:
        model = self._model()
        if model is None:
            raise IksError(_GONE)
        return sparsity_for(model, self._gated(), budget, guess=self.target_sparsity)

    def aim_when_measured(self) -> None:
        """Take up the present goal in a training that goes on after its ramp, resumed with another goal than before.

        Under the law "obs" the thresholds move after 12 further steps (or the last, if that comes first), in which it
        measures: a resumed training has no measurement that setting a goal could go by. Else they move at once.
        """
        if self._goal.budget is not None:
            self._goal.target_sparsity = self._target_under(self._goal.budget)
        if not self._law.has_arrived(self._steps):
            return
        last = self._law.total_steps
        if isinstance(self._law, laws.SurgeonLaw) and (last is None or last > self._steps):
            measured = self._steps + laws.MEASURED_STEPS
            self._postponed_to = measured if last is None else min(measured, last)
            self._measure_if_due()
        else:
            self._shift_to(self.target_sparsity)

    def step(self) -> None:
        """Count one optimizer step and act if the law says so.

        It happens by itself after each step of a torch optimizer that holds the thresholds; call it by hand only after
        `detach()`, or where something other than a torch optimizer trains the model.

        Raises:
            IksError: a weight or threshold is not finite; the step is counted, but no threshold changes.

        Warns:
            IksWarning: it has seen the optimizer's step already, so that this call counts it a second time.
        """
        if self._watched_a_step:
            self._watched_a_step = False
            warn_user(
                "controller.step() counts a step that the controller has counted by itself: leave the call out, or "
                "call controller.detach() before the loop",
            )
        self._count_step()

    def _remember(self, weights: Container[int]) -> None:
        """Before a step of an optimizer that holds `weights`: keep those whose step is to become longer."""
        self._before.clear()
        law = self._law
        if isinstance(law, laws.SurgeonLaw):
            layers = self._gated_left()
            if self._factors is None:
                self._factors = {name: law.update_factor(1 - _share_of_zeros(layer)) for name, layer in layers.items()}
            for name, layer in layers.items():
                if self._factors[name] != 1 and id(layer.raw_weight) in weights:
                    self._before.append((layer.raw_weight, layer.raw_weight.detach().clone(), self._factors[name]))

    @torch.no_grad()
    def _lengthen(self) -> None:
        for weight, before, factor in self._before:
            weight.lerp_(before, 1 - factor)  # before + factor * (after - before)
        self._before.clear()

    def _on_optimizer_step(self) -> None:
        self._watched_a_step = True
        self._count_step()

    def _count_step(self) -> None:
        self._steps += 1
        self._act_if_due()
        self._measure_if_due()

    def _measure_if_due(self) -> None:
        if isinstance(self._law, laws.SurgeonLaw):
            if self._postponed_to is not None or self._law.measures_at(self._steps):
                self._curvature.start()
            else:
                self._curvature.stop()

    def _act_if_due(self) -> None:
        due = self._law.acts_at(self._steps) if self._postponed_to is None else self._steps >= self._postponed_to
        if not due:
            return
        self._postponed_to = None
        if self._goal.budget is not None and self._steps % self._resolve_steps() < self._law.interval:
            self._aim_at_budget(self._goal.budget)
        if isinstance(self._law, laws.PaperLaw):
            all_shifts(self._gated())  # raises where something is not finite
            ratio = self._law.ratio(self.sparsity, self.target_sparsity)
            self._change_thresholds(lambda threshold: threshold.mul_(ratio))
        else:
            if self._start is None:
                self._start = self.sparsity
            self._warn_of_missed_layers()
            self._shift_to(self._law.wanted(self._steps, self._start, self.target_sparsity))

    def _resolve_steps(self) -> int:
        total = self._law.total_steps
        return RESOLVE_STEPS if total is None else min(RESOLVE_STEPS, max(1, total // RESOLVE_TIMES))

    def _warn_of_missed_layers(self) -> None:
        missed = self._curvature.missed()
        if missed and not self._warned_of_missed_layers:
            self._warned_of_missed_layers = True
            warn_user(
                f"{len(missed)} rewritten layers ({first_of(missed)}) were trained in eval mode, got their input by "
                'keyword, or change it or their output by themselves: the law "obs" cannot measure what the loss needs '
                "of them, and their weights go by magnitude alone. Where it is one of the first two, call "
                "model.train() before the training (and eval() on normalisation layers alone, where their statistics "
                "are to stay), and pass inputs by position",
            )

    def _warn_of_lasting_zeros(self, zeros: int, weights: int) -> None:
        if zeros > laws.count_for(self.target_sparsity, weights) and not self._warned_of_lasting_zeros:
            self._warned_of_lasting_zeros = True
            warn_user(
                f"{zeros:,} of {weights:,} weights were zero before the training and stay zero, more than the target "
                f"of {self.target_sparsity:.2%} asks for: the network was pruned already. Start from a dense one, or "
                "ask for a higher target",
            )

    def detach(self) -> None:
        """Stop acting by itself; thresholds stay as they are, and `step()` still works by hand."""
        self._watcher.stop()
        self._curvature.stop()
        self._watched_a_step = False

    def _lose_a_layer(self) -> None:
        """A layer is gone: alone or, if the model lives on, replaced. Copies count over the same weights then."""
        gated = self._gated_left()
        self._factors = None  # of tied layers another one may be the first now
        if gated and self._model() is not None:
            self._goal.weights = count_weights(gated.values())
        if not self._layers_left():
            self._watcher.stop()
            self._curvature.stop()

    def param_groups(self, **options: Any) -> list[dict[str, Any]]:
        """Two optimizer groups: every other parameter of the model, and the thresholds without weight decay.

        Args:
            options: options of the threshold group, such as lr=1e-3; the other group takes the optimizer's defaults.
        """
        model = self._model()
        if model is None:
            raise IksError(_GONE)
        thresholds = [layer.threshold for layer in self._gated().values()]
        mine = {id(threshold) for threshold in thresholds}
        others = [parameter for parameter in model.parameters() if id(parameter) not in mine]
        return [{"params": others}, {"params": thresholds, "weight_decay": 0.0, **options}]

    def log(self, writer: Any, step: int | None = None) -> None:
        """Write the sparsity to TensorBoard: the total and its target, and each layer's own.

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar(tag, value, step)`.
            step: the step on the time axis; the controller's own count if left out.
        """
        step = self._steps if step is None else step
        writer.add_scalar("iks/sparsity", self.sparsity, step)
        writer.add_scalar("iks/target_sparsity", self.target_sparsity, step)
        for name, layer in self._layers_alive().items():
            writer.add_scalar(f"iks_layers/{name or 'model'}", _share_of_zeros(layer), step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the model's and the optimizer's state.

        Plain numbers and strings, but for the steps in which the law "obs" measures the curvature: what it has measured
        so far is in it then, n^2 numbers for a layer of n inputs x taps.
        """
        return {
            "version": _STATE_VERSION,
            "law": self._law_name,
            "granularity": self._granularity,
            "weights": count_weights(self._layers_alive().values()),
            "target_sparsity": self.target_sparsity,
            "max_bytes": self.max_bytes,
            "value_dtype": None if self._goal.budget is None else self._goal.budget.value_dtype,
            "steps": self._steps,
            "start_sparsity": self._start,
            "update_factors": None if self._factors is None else dict(self._factors),
            "postponed_to": self._postponed_to,
            "measured": self._curvature.unfinished(),
            **laws.schedule_of(self._law),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the controller that made `state` was; its target and schedule replace the present ones.

        Raises:
            IksError: the state is incomplete, of another version, or of a differently rewritten model; then nothing
                changes.

        Warns:
            IksWarning: the state's goal is another one than the present.
        """
        if not isinstance(state, Mapping):
            raise IksError(
                f"controller state: expected what controller.state_dict() gave, got {type(state).__name__}: save it "
                "beside the model's and the optimizer's state"
            )
        own = self.state_dict()
        if "ramp_start" not in state:  # saved when every ramp began at once
            state = {**state, "ramp_start": None if own["ramp_start"] is None else 0}
        missing = sorted(own.keys() - state.keys())
        if missing:
            raise IksError(f"controller state expected the keys {sorted(own)}, got none for {missing}")
        for key in ("version", "law", "granularity", "weights"):
            if state[key] != own[key]:
                raise IksError(
                    f"controller state: {key} expected {own[key]!r}, got {state[key]!r}: "
                    "rewrite the model with the options of the run that saved the state"
                )
        target = check_sparsity(state["target_sparsity"], "target_sparsity in the controller state")
        for key, expected in self._expected_numbers().items():
            if type(state[key]) not in (int, float, type(None)) or not expected(state[key]):
                raise IksError(
                    f"controller state: {key} has the impossible value {state[key]!r}: the state is damaged, "
                    "take the one of another checkpoint"
                )
        self._refuse_other_layers(state)
        budget = None
        if state["max_bytes"] is not None:
            dtype = str(check_value_dtype(state["value_dtype"])).removeprefix("torch.")
            budget = Budget(check_size(state["max_bytes"], "max_bytes in the controller state"), dtype)
        law = type(self._law)(**{name: state[name] for name in laws.SCHEDULE if hasattr(self._law, name)})
        if budget != self._goal.budget or (budget is None and target != self._goal.target_sparsity):
            _warn_of_replaced_goal(own, state)
        self._goal.target_sparsity, self._goal.budget = target, budget
        self._law = law
        self._steps = state["steps"]
        self._start = state["start_sparsity"]
        self._factors = state["update_factors"]
        self._postponed_to = state["postponed_to"]
        self._measure_if_due()
        self._curvature.resume(state["measured"])

    def _refuse_other_layers(self, state: dict[str, Any]) -> None:
        factors, measured = state["update_factors"], state["measured"]
        known = self._layers_left().keys()
        fits = (
            (factors is None or (isinstance(factors, dict) and factors.keys() == known))
            and all(isinstance(factor, float) and 1 <= factor < math.inf for factor in (factors or {}).values())
            and isinstance(measured, dict)
            and measured.keys() <= known
            and all(isinstance(part, Tensor) for pair in measured.values() for part in pair)
        )
        if not fits:
            raise IksError(
                f"controller state: update_factors or measured do not belong to the layers {', '.join(known)}: the "
                "state is damaged, take the one of another checkpoint"
            )

    def _expected_numbers(self) -> dict[str, Callable[[Any], bool]]:
        has_ramp = isinstance(self._law, laws.ExactLaw)
        return {
            "steps": lambda value: type(value) is int and value >= 0,
            "start_sparsity": lambda value: value is None or 0 <= value <= 1,
            "postponed_to": lambda value: value is None or (type(value) is int and value >= 1),
            "total_steps": lambda value: value is None or (type(value) is int and value >= 1),
            "ramp_start": lambda value: type(value) is int and value >= 0 if has_ramp else value is None,
            "ramp_steps": lambda value: type(value) is int and value >= 1 if has_ramp else value is None,
            "interval": lambda value: type(value) is int and value >= 1,
        }

    def __deepcopy__(self, memo: Any) -> SparsityController:
        return self  # it drives the model it was made for; a copy of that gets one of its own by sparsify

    def __reduce__(self) -> Any:
        raise IksError(
            "a SparsityController cannot be pickled, nor a module that has it as an attribute: keep it outside of the "
            "module, save controller.state_dict() instead, and where it is loaded call sparsify and load_state_dict"
        )

    def __repr__(self) -> str:
        return (
            f"SparsityController(target_sparsity={self.target_sparsity}, law={self._law_name!r}, "
            f"layers={len(self._layers)}, steps={self._steps})"
        )

    def _shift_to(self, sparsity: float) -> None:
        layers = self._gated()
        shifts = all_shifts(layers)  # raises where something is not finite
        lasting = count_raw_zeros(layers.values())
        self._warn_of_lasting_zeros(lasting, shifts.numel())
        # Raw zeros stay zero at any threshold: aiming below them would only drive the thresholds to nowhere.
        wanted = max(laws.count_for(sparsity, shifts.numel()), lasting)
        if isinstance(self._law, laws.SurgeonLaw):
            surgeon.prune(layers, self._curvature.found(), wanted, self._law.score)
            self._factors = None
            return
        shift = laws.shift_for(shifts, count_zeros(layers.values()), wanted)
        if shift:
            self._change_thresholds(lambda threshold: threshold.add_(shift))

    @torch.no_grad()
    def _change_thresholds(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self._gated().values():
            change(layer.threshold)

    def _gated_left(self) -> dict[str, Gated]:
        return {name: layer for name, layer in self._layers_left().items() if isinstance(layer, Gated)}

    def _layers_left(self) -> dict[str, nn.Module]:
        """Those that there are still, tied ones once."""
        layers: dict[str, nn.Module] = {}
        for name, reference in self._layers.items():
            layer = reference()
            if layer is not None:
                layers[name] = layer
        return unique(layers)

    def _layers_alive(self) -> dict[str, nn.Module]:
        layers = self._layers_left()
        if not layers:
            raise IksError(_GONE)
        return layers

    def _gated(self) -> dict[str, Gated]:
        layers = {name: layer for name, layer in self._layers_alive().items() if isinstance(layer, Gated)}
        if not layers:
            raise IksError("the controller's model has been finalized: rewrite it with sparsify to train it on")
        return layers

    def _watched(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        for name, layer in self._gated_left().items():
            yield name, layer.raw_weight, layer.threshold


def _share_of_zeros(layer: nn.Module) -> float:
    return count_zeros([layer]) / count_weights([layer])


def _warn_of_replaced_goal(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    replaced = {key: own[key] for key in GOAL if own[key] != state[key]}
    warn_user(
        f"the controller state's goal ({', '.join(f'{key} {state[key]}' for key in replaced)}) replaces that of this "
        f"controller ({', '.join(f'{key} {value}' for key, value in replaced.items())}). To go for the latter: "
        f"load_state_dict({{**state, **{replaced}}}), and once the model has its weights aim_when_measured()"
    )


def controllers_of(layers: Iterable[nn.Module]) -> set[SparsityController]:
    """The controllers that drive any of `layers`."""
    return {_controllers[layer] for layer in layers if layer in _controllers}
