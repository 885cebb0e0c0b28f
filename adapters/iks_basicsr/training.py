"""One BasicSR model whose networks become sparse: what its methods do differently from those of other models.

The methods are wrapped on the model object itself, around whatever its class has made of them. BasicSR's own code does
the work; the wrappers show it plain networks where it validates and saves, and put back what it does not know of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

import iks_plugin
from iks_plugin import IksError, SparsityController

from .block import Block, optimizer_steps
from .files import remove_unfinished, whole_files
from .state import STATE_VERSION, check_state

_FAR = 0.01
"""From this distance to the target on, a log line says where the training stands."""
_ITERATIONS_WATCHED = 200
"""After so many, the adapter has seen how many steps of the optimizer an iteration makes."""


class SparseType(str):
    """The name of an architecture, equal to the plain string, that also knows which network of which model it is for.

    It replaces `type` in the options of a network, so that BasicSR's registry can tell the networks that become sparse
    from others of the same architecture.
    """

    made_sparse: Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]

    def __deepcopy__(self, memo: Any) -> SparseType:
        return self  # build_network copies the options


@dataclass(frozen=True)
class _Build:
    """One network that was built for a key of the options: the trained one, or its EMA copy."""

    net: nn.Module
    controller: SparsityController


class SparseTraining:
    """Makes the networks of one BasicSR model sparse; attached to the model before its networks are built.

    Args:
        model: a BasicSR model whose `BaseModel.__init__` has just run.
        block: the checked `iks:` block of its options.

    Raises:
        IksError: the model lacks a method that BasicSR's models have.
    """

    def __init__(self, model: Any, block: Block) -> None:
        self._model = model
        self._block = block
        self._builds: dict[str, list[_Build]] = {key: [] for key in block.networks}
        self._first_iteration: int | None = None
        wrappers: dict[str, Callable[..., Any]] = {
            "_print_different_keys_loading": self._print_different_keys_loading,
            "get_current_log": self._get_current_log,
            "get_optimizer": self._get_optimizer,
            "load_network": self._load_network,
            "print_network": self._print_network,
            "resume_training": self._resume_training,
            "save_network": self._save_network,
            "save_training_state": self._save_training_state,
            "update_learning_rate": self._update_learning_rate,
            "validation": self._validation,
        }
        missing = [name for name in wrappers if not hasattr(model, name)]
        if missing:
            raise IksError(f"{type(model).__name__} has no {', '.join(missing)}: expected a model of BasicSR 1.4.2")
        for name, wrapper in wrappers.items():
            setattr(model, name, partial(wrapper, getattr(model, name)))
        for key in block.networks:
            kind = SparseType(model.opt[key]["type"])
            kind.made_sparse = partial(self._made_sparse, key)
            model.opt[key]["type"] = kind
        if self._is_master():
            paths = model.opt["path"]
            remove_unfinished(paths[key] for key in ("models", "training_states") if key in paths)

    # Building

    def _made_sparse(self, key: str, architecture: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """`architecture`, but for networks that are rewritten as soon as they are built."""
        return partial(self._build, key, architecture)

    def _build(self, key: str, architecture: Callable[..., nn.Module], **options: Any) -> nn.Module:
        net = architecture(**options)
        try:
            controller = iks_plugin.sparsify(net, **self._block.keywords(key, self._model.opt))
        except IksError as error:
            raise type(error)(f"block iks, {key} ({type(net).__name__}): {error}") from None
        if not self._builds[key]:
            report = iks_plugin.report(net)
            rewritten = sum(layer.rewritten for layer in report.layers)
            self._log(
                f"iks: {key}: {rewritten} of {len(report.layers)} layers are rewritten; of their {report.weights:,} "
                f"weights {controller.target_sparsity:.2%} become zero.\n{report}"
            )
        self._builds[key].append(_Build(net, controller))
        return net

    def _trained(self) -> Iterator[tuple[str, _Build]]:
        """The build of each network that an optimizer trains; at first, the one that was built first."""
        for key, builds in self._builds.items():
            if builds:
                yield key, max(builds, key=lambda build: build.controller.steps)

    def _build_of(self, net: nn.Module) -> _Build | None:
        bare = self._model.get_bare_model(net)
        return next((build for builds in self._builds.values() for build in builds if build.net is bare), None)

    def _print_network(self, original: Callable[..., Any], net: nn.Module) -> None:
        original(net)
        build = self._build_of(net)
        if build is not None:
            weights = iks_plugin.report(build.net).model_weights
            thresholds = sum(p.numel() for p in build.net.parameters()) - weights
            self._log(f"iks: {thresholds:,} of these parameters are thresholds, which no file has: {weights:,} without")

    def _get_optimizer(
        self, original: Callable[..., Any], optim_type: str, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Put thresholds into groups of their own where there is weight decay, which must not touch them."""
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        thresholds = {id(p) for builds in self._builds.values() for build in builds for p in _thresholds(build)}
        split: list[dict[str, Any]] = []
        for group in groups:
            members = list(group["params"])
            mine = [p for p in members if id(p) in thresholds]
            if mine and group.get("weight_decay", kwargs.get("weight_decay")):
                others = [p for p in members if id(p) not in thresholds]
                split += [{**group, "params": others}, {**group, "params": mine, "weight_decay": 0.0}]
            else:
                split.append({**group, "params": members})
        return original(optim_type, given if len(split) == len(groups) else split, *args, **kwargs)

    # Loading and resuming

    def _load_network(
        self, original: Callable[..., Any], net: nn.Module, load_path: str, *args: Any, **kwargs: Any
    ) -> None:
        try:
            original(net, load_path, *args, **kwargs)
        except RuntimeError as error:
            if self._build_of(net) is None or "threshold" not in str(error):
                raise
            raise IksError(f"{load_path} does not fit the block iks of the option file. {error}") from error

    def _print_different_keys_loading(
        self, original: Callable[..., Any], net: nn.Module, loaded: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> None:
        """Complete a file without thresholds by the network's own, so that BasicSR does not warn of each of them."""
        build = self._build_of(net)
        if build is not None:
            mine = {id(p) for p in _thresholds(build)}
            for name, parameter in build.net.named_parameters():
                if id(parameter) in mine and f"{name.removesuffix('threshold')}weight" in loaded:
                    loaded.setdefault(name, parameter.detach())
        original(net, loaded, *args, **kwargs)

    def _resume_training(self, original: Callable[..., Any], state: Mapping[str, Any]) -> None:
        """After BasicSR has loaded the plain weights: put back the weights before the gate, thresholds, controllers."""
        check_state(state, self._block)
        for key, builds in self._builds.items():
            saved = state["iks"]["networks"][key]
            for position, build in enumerate(builds):
                # An EMA copy that the saved training did not have starts as the network, as in BasicSR.
                self._restore(key, build, saved[min(position, len(saved) - 1)])
        original(state)
        self._warn_of_a_short_rest()

    def _restore(self, key: str, build: _Build, saved: Mapping[str, Any]) -> None:
        wanted = build.controller.target_sparsity
        try:
            build.controller.load_state_dict(saved["controller"])
            if key not in (self._model.opt["path"].get("ignore_resume_networks") or ()):
                build.net.load_state_dict(saved["network"])
        except (IksError, RuntimeError) as error:
            raise IksError(f"the training state does not fit {key} as the option file describes it: {error}") from error
        if build.controller.target_sparsity != wanted:
            self._log(
                f"iks: {key}: the option file's target_sparsity, {wanted}, replaces that of the state, "
                f"{build.controller.target_sparsity}"
            )
            build.controller.target_sparsity = wanted

    def _warn_of_a_short_rest(self) -> None:
        for key, build in self._trained():
            end, ramp = optimizer_steps(key, self._model.opt), build.controller.state_dict()["ramp_steps"]
            if ramp is not None and end < ramp:
                self._warn(
                    f"iks: {key}: the resumed training is to raise the sparsity until step {ramp}, and train: "
                    f"total_iter ends it at step {end}: the target is not reached by training. Raise total_iter"
                )

    # Training

    def _update_learning_rate(self, original: Callable[..., Any], current_iter: int, *args: Any, **kwargs: Any) -> None:
        """Called at the start of every iteration."""
        original(current_iter, *args, **kwargs)
        if self._first_iteration is None:
            unbuilt = [key for key, builds in self._builds.items() if not builds]
            if unbuilt:
                raise IksError(
                    f"block iks: {type(self._model).__name__} has not built {', '.join(unbuilt)} with BasicSR's "
                    "build_network, so it would be trained without becoming sparse: name other networks "
                    "(network: ...), or call iks_plugin.sparsify in the model's own code"
                )
            self._first_iteration = current_iter
        elif current_iter - self._first_iteration == _ITERATIONS_WATCHED:
            self._warn_of_few_steps(current_iter)

    def _get_current_log(self, original: Callable[..., Any]) -> dict[str, Any]:
        log = OrderedDict(original())
        for key, build in self._trained():
            log[self._label(key)] = build.controller.sparsity
        return log

    def _label(self, key: str) -> str:
        return "sparsity" if len(self._builds) == 1 else f"sparsity_{key.removeprefix('network_')}"

    # Validating and saving

    @staticmethod
    @contextmanager
    def _delivered(builds: Iterable[_Build]) -> Iterator[None]:
        """While it lasts, the networks are what `finalize` makes of them, and so what an untouched BasicSR loads."""
        with ExitStack() as stack:
            for build in builds:
                stack.enter_context(iks_plugin.finalized(build.net))
            yield

    def _validation(
        self,
        original: Callable[..., Any],
        dataloader: Any,
        current_iter: Any,
        tb_logger: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        with self._delivered(build for builds in self._builds.values() for build in builds):
            result = original(dataloader, current_iter, tb_logger, *args, **kwargs)
            reports = [(key, build, iks_plugin.report(build.net)) for key, build in self._trained()]
        data = getattr(getattr(dataloader, "dataset", None), "opt", {}).get("name", "")
        for key, build, report in reports:
            label, reached = self._label(key), build.controller.sparsity
            on_its_way = abs(reached - report.sparsity) > _FAR
            self._log(
                f"Validation {data}\n\t # {label}: {report.sparsity:.4f}\t{report.zeros:,} of {report.weights:,} "
                f"weights of {key} are zero, in what was validated as in what is saved"
                + (f"; training is on its way at {reached:.4f}" if on_its_way else "")
            )
            if tb_logger:
                tb_logger.add_scalar(f"metrics/{data}/{label}", report.sparsity, current_iter)
                build.controller.log(tb_logger, current_iter)
        return result

    def _save_network(self, original: Callable[..., Any], net: Any, *args: Any, **kwargs: Any) -> None:
        if self._is_master():
            builds = [self._build_of(each) for each in (net if isinstance(net, list) else [net])]
            with self._delivered(build for build in builds if build), whole_files():
                original(net, *args, **kwargs)

    def _save_training_state(self, original: Callable[..., Any], epoch: int, current_iter: int) -> None:
        if not self._is_master():
            return
        if current_iter == -1:  # the end
            self._warn_of_a_missed_target()
        networks = {
            key: [{"network": b.net.state_dict(), "controller": b.controller.state_dict()} for b in builds]
            for key, builds in self._builds.items()
        }
        with whole_files({"iks": {"version": STATE_VERSION, "networks": networks}}):
            original(epoch, current_iter)

    # Telling

    def _warn_of_few_steps(self, current_iter: int) -> None:
        """The ramp is laid out for as many steps as BasicSR's own models make: others may make fewer."""
        for key, build in self._trained():
            whole = {**self._model.opt, "train": {**self._model.opt["train"], "total_iter": current_iter - 1}}
            try:
                expected = optimizer_steps(key, whole)
            except IksError:  # the discriminator's time
                continue
            made, total = build.controller.steps, optimizer_steps(key, self._model.opt)
            if 0 < made < 0.9 * expected and "total_steps" not in self._block.options:
                self._warn(
                    f"iks: {key}: {made} steps of the optimizer in {current_iter - 1} iterations, and {expected} were "
                    "expected: at that pace the training ends before the target is reached. Add to the block iks: "
                    f"total_steps: {max(1, total * made // expected)}"
                )

    def _warn_of_a_missed_target(self) -> None:
        for key, build in self._trained():
            reached, target = build.controller.sparsity, build.controller.target_sparsity
            if abs(reached - target) > _FAR:
                self._warn(
                    f"iks: {key}: training ended at {reached:.1%} zeros, and the files have the target's {target:.1%}: "
                    "the rest was made zero without training, which costs quality. Train longer (train: total_iter), "
                    "or raise the sparsity faster (iks: ramp_steps)"
                )

    def _is_master(self) -> bool:
        return int(self._model.opt.get("rank", 0)) == 0

    def _log(self, message: str) -> None:
        if self._is_master():
            _logger().info(message)

    def _warn(self, message: str) -> None:
        if self._is_master():
            _logger().warning(message)


def _thresholds(build: _Build) -> list[nn.Parameter]:
    thresholds: list[nn.Parameter] = build.controller.param_groups()[1]["params"]
    return thresholds


def _logger() -> Any:
    from basicsr.utils import get_root_logger

    return get_root_logger()
