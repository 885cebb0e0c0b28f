"""One BasicSR model whose networks become sparse: what its methods do differently from those of other models.

The methods are wrapped on the model object itself, around whatever its class has made of them. BasicSR's own code does
the work; the wrappers show it plain networks where it validates and saves, and put back what it does not know of.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

import iks_plugin
from iks_plugin import IksError, SparsityController
from iks_plugin.block import Block
from iks_plugin.export import export_beside, refuse_compact
from iks_plugin.files import remove_unfinished
from iks_plugin.optimizers import groups_without_decay
from iks_plugin.progress import aim_anew, beside_validation, changes, fault_at_end, ramp_end, resumed_state, rise_of

from .block import is_from_scratch, optimizer_steps
from .export import preferred
from .files import whole_files
from .networks import Networks
from .state import STATE_VERSION, check_state

_ITERATIONS_WATCHED = 200
"""After so many, the adapter has seen how many steps of the optimizer an iteration makes."""

_THRESHOLDS_AT_FAULT = re.compile(r'expected \(.*\(granularity=|Unexpected key\(s\).*threshold"')
"""What of a failed loading is due to thresholds: their shapes, or layers that have some in the file alone.

Where weights are missing, thresholds are as well.
"""

Original = Callable[..., Any]


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
        self._first_iteration: int | None = None
        self._validates = False
        self._delivery = ExitStack()
        wrappers: dict[str, Callable[..., Any]] = {
            "_print_different_keys_loading": self._print_different_keys_loading,
            "get_current_log": self._get_current_log,
            "get_optimizer": self._get_optimizer,
            "load_network": self._load_network,
            "model_ema": self._model_ema,
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
        self._networks = Networks(model, block, self._tell_layers)
        if self._is_master():
            paths = model.opt["path"]
            remove_unfinished(paths[key] for key in ("models", "training_states") if key in paths)

    # Building

    def _print_network(self, original: Original, net: nn.Module) -> None:
        original(net)
        if iks_plugin.is_sparsified(net):
            weights = iks_plugin.report(net).model_weights
            thresholds = sum(p.numel() for p in net.parameters()) - weights
            self._log(f"iks: {thresholds:,} of these parameters are thresholds, which no file has: {weights:,} without")

    def _get_optimizer(self, original: Original, optim_type: str, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Put thresholds into groups of their own where there is weight decay, which must not touch them."""
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        groups = [{**group, "params": list(group["params"])} for group in groups]
        groups = groups_without_decay(groups, self._networks.thresholds(), kwargs.get("weight_decay", 0.0))
        return original(optim_type, groups, *args, **kwargs)

    # Loading and resuming

    def _load_network(self, original: Original, net: nn.Module, load_path: str, *args: Any, **kwargs: Any) -> None:
        refuse_compact(load_path)
        try:
            original(net, load_path, *args, **kwargs)
        except RuntimeError as error:
            if not iks_plugin.is_sparsified(net) or not _THRESHOLDS_AT_FAULT.search(str(error)):
                raise
            raise IksError(f"{load_path} does not fit the block iks of the option file. {error}") from error

    def _print_different_keys_loading(
        self, original: Original, crt_net: nn.Module, load_net: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> None:
        """Complete a file without thresholds by the network's own, so that BasicSR does not warn of each of them."""
        thresholds = self._networks.thresholds()
        for name, parameter in self._model.get_bare_model(crt_net).named_parameters():
            if id(parameter) in thresholds and f"{name.removesuffix('threshold')}weight" in load_net:
                loaded = load_net.setdefault(name, parameter.detach())
                if loaded.numel() != parameter.numel():
                    raise IksError(
                        f"the file does not fit the block iks of the option file: {name} expected "
                        f"{tuple(parameter.shape)}, got {tuple(loaded.shape)}: give the granularity of the training "
                        "that made it"
                    )
        original(crt_net, load_net, *args, **kwargs)

    def _resume_training(self, original: Original, resume_state: dict[str, Any]) -> None:
        """After BasicSR has loaded the plain weights: put back the weights before the gate, thresholds, controllers."""
        check_state(resume_state, self._block)
        saved = resume_state["iks"]["networks"]
        ignored = self._model.opt["path"].get("ignore_resume_networks") or ()
        for attribute, module in self._networks.attributes().items():
            key, controller = self._networks.within(module) or (None, None)
            # An EMA copy that the saved training did not have starts as the network, as in BasicSR.
            own = saved.get(attribute) or saved.get(attribute.removesuffix("_ema"))
            if own is None:
                raise IksError(
                    f"the training state has no {attribute}, it has {', '.join(saved)}: resume with its model_type"
                )
            if key not in ignored:
                net = self._model.get_bare_model(module)
                self._restore(attribute, net, controller, own)
                if attribute not in saved and iks_plugin.is_sparsified(net):
                    with iks_plugin.gates_applied(net):  # as it is averaged from now on
                        average = copy.deepcopy(net.state_dict())
                    net.load_state_dict(average)
        original(resume_state)
        resume_state.pop("iks")  # BasicSR keeps the state as long as it trains
        for key, _, controller in self._networks.trained():
            self._log(f"iks: {key}: resumed after {controller.steps} steps, at a sparsity of {controller.sparsity:.4f}")
        self._warn_of_a_short_rest()

    def _restore(
        self, attribute: str, net: nn.Module, controller: SparsityController | None, saved: dict[str, Any]
    ) -> None:
        progress = saved["controller"]
        try:
            if controller is not None and progress is not None:
                self._restore_controller(attribute, controller, progress)
            net.load_state_dict(saved["network"])
            if controller is not None and progress is not None:
                aim_anew(controller, progress)
        except (IksError, RuntimeError) as error:
            raise IksError(
                f"the training state does not fit {attribute} as the option file describes it: {error}"
            ) from error

    def _restore_controller(self, attribute: str, controller: SparsityController, saved: dict[str, Any]) -> None:
        """Take up the saved progress; what the option file says of target and schedule goes before what was saved."""
        state = resumed_state(self._block, saved, controller.state_dict())
        for change in changes(saved, state, "the option file"):
            self._log(f"iks: {attribute}: {change}")
        controller.load_state_dict(state)

    def _warn_of_a_short_rest(self) -> None:
        for key, _, controller in self._networks.trained():
            end, ramp = optimizer_steps(key, self._model.opt), ramp_end(controller)
            if ramp is not None and end < ramp:
                self._warn(
                    f"iks: {key}: the resumed training is to raise the sparsity until step {ramp}, and train: "
                    f"total_iter ends it at step {end}: the target is not reached by training. Raise total_iter, or "
                    "give ramp_steps"
                )

    # Training

    def _update_learning_rate(self, original: Original, current_iter: int, *args: Any, **kwargs: Any) -> None:
        """Called at the start of every iteration."""
        original(current_iter, *args, **kwargs)
        if self._first_iteration is None:
            missing = self._networks.missing()
            if missing:
                raise IksError(
                    f"block iks: {type(self._model).__name__} does not train the {', '.join(missing)} that BasicSR's "
                    "build_network has built for it, so that nothing would become sparse: name other networks "
                    "(network: ...), or call iks_plugin.sparsify in the model's own code"
                )
            self._first_iteration = current_iter
        elif current_iter - self._first_iteration == _ITERATIONS_WATCHED:
            self._warn_of_few_steps(current_iter - 1)

    def _model_ema(self, original: Original, *args: Any, **kwargs: Any) -> None:
        """Average what the networks are: a mean weight behind a mean threshold is another network."""
        with ExitStack() as stack:
            for _, net, _ in self._networks.trained():
                if iks_plugin.is_sparsified(net):
                    stack.enter_context(iks_plugin.gates_applied(net))
            original(*args, **kwargs)

    def _get_current_log(self, original: Original) -> dict[str, Any]:
        log = OrderedDict(original())
        for key, _, controller in self._networks.trained():
            log[self._label(key)] = controller.sparsity
        return log

    def _label(self, key: str) -> str:
        return "sparsity" if len(self._block.networks) == 1 else f"sparsity_{key.removeprefix('network_')}"

    # Validating and saving

    def _validation(
        self,
        original: Original,
        dataloader: Any,
        current_iter: Any,
        tb_logger: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Validate what would be saved now: all networks as `finalize` makes them."""
        self._validates = True
        try:
            self._deliver(self._networks.attributes().values())
            result = original(dataloader, current_iter, tb_logger, *args, **kwargs)
            trained = [(key, controller, iks_plugin.report(net)) for key, net, controller in self._networks.trained()]
        finally:
            self._validates = False
            self._delivery.close()
        data = getattr(getattr(dataloader, "dataset", None), "opt", {}).get("name", "")
        for key, controller, report in trained:
            label = self._label(key)
            self._log(
                f"Validation {data}\n\t # {label}: {report.sparsity:.4f}\t{report.zeros:,} of {report.weights:,} "
                f"weights of {key} are zero, in what was validated as in what is saved"
                + beside_validation(controller.sparsity, report.sparsity)
            )
            if tb_logger:
                tb_logger.add_scalar(f"metrics/{data}/{label}", report.sparsity, current_iter)
                controller.log(_Tagged(tb_logger, key) if len(trained) > 1 else tb_logger, current_iter)
        return result

    def _deliver(self, modules: Iterable[nn.Module], stack: ExitStack | None = None) -> None:
        """Until `stack` is closed, let `modules` be plain; those that are so already stay as they are."""
        for module in modules:
            if iks_plugin.is_sparsified(module):
                (stack or self._delivery).enter_context(iks_plugin.finalized(module))

    def _save_network(self, original: Original, net: Any, *args: Any, **kwargs: Any) -> None:
        self._delivery.close()  # a class may save within its validation
        networks = net if isinstance(net, list) else [net]
        with ExitStack() as stack, whole_files() as written:
            if self._is_master():
                self._deliver(networks, stack)
            original(net, *args, **kwargs)
        if self._block.export and self._is_master() and any(map(iks_plugin.is_sparsified, networks)):
            for path, content in written:
                export_beside(
                    path,
                    preferred(content, networks),
                    self._block.export,
                    checkpoint_key="params",
                    tell=self._log,
                    warn=self._warn,
                )
        if self._validates:
            self._deliver(self._networks.attributes().values())

    def _save_training_state(
        self, original: Original, epoch: int, current_iter: int, *args: Any, **kwargs: Any
    ) -> None:
        if current_iter == -1:  # the end
            self._warn_of_a_missed_target()
        self._delivery.close()  # as in _save_network
        attributes = self._networks.attributes()
        networks = {}
        for attribute, module in attributes.items():
            _, controller = self._networks.within(module) or (None, None)
            networks[attribute] = {
                "network": self._model.get_bare_model(module).state_dict(),
                "controller": None if controller is None else controller.state_dict(),
            }
        entry = {"version": STATE_VERSION, "keys": list(self._block.networks), "networks": networks}
        with whole_files({"iks": entry}):
            original(epoch, current_iter, *args, **kwargs)
        if self._validates:
            self._deliver(attributes.values())

    # Telling

    def _tell_layers(self, key: str, report: iks_plugin.Report, controller: SparsityController) -> None:
        rewritten = sum(layer.rewritten for layer in report.layers)
        self._log(
            f"iks: {key}: {rewritten} of {len(report.layers)} layers are rewritten; of their {report.weights:,} "
            f"weights {report.target_sparsity:.2%} become zero.\n{report}"
        )
        rise = rise_of(controller)
        if rise is not None:
            waits = is_from_scratch(key, self._model.opt) and "ramp_start" not in self._block.options
            why = f" (it trains from scratch, without path: pretrain_{key}; ramp_start: 0 lets it rise at once)"
            self._log(f"iks: {key}: {rise}{why if waits else ''}")

    def _warn_of_few_steps(self, iterations: int) -> None:
        """The ramp is laid out for as many steps as BasicSR's own models make: others may make fewer."""
        for key, _, controller in self._networks.trained():
            until_now = {**self._model.opt, "train": {**self._model.opt["train"], "total_iter": iterations}}
            try:
                expected = optimizer_steps(key, until_now)
            except IksError:  # the discriminator's time
                continue
            made, total = controller.steps, optimizer_steps(key, self._model.opt)
            if made == 0:
                self._warn(
                    f"iks: {key}: no optimizer has made a step with it in {iterations} iterations, so that it does not "
                    "become sparse"
                )
            elif made < 0.9 * expected and "total_steps" not in self._block.options:
                self._warn(
                    f"iks: {key}: {made} steps of the optimizer in {iterations} iterations, and {expected} were "
                    "expected: at that pace the training ends before the target is reached. Add to the block iks, and "
                    f"resume: total_steps: {max(1, total * made // expected)}"
                )

    def _warn_of_a_missed_target(self) -> None:
        for key, net, controller in self._networks.trained():
            if iks_plugin.is_sparsified(net):
                fault = fault_at_end(net, controller, "files", "train: total_iter", "iks: ramp_steps")
                if fault is not None:
                    self._warn(f"iks: {key}: {fault}")

    def _is_master(self) -> bool:
        return int(self._model.opt.get("rank", 0)) == 0

    def _log(self, message: str) -> None:
        if self._is_master():
            _logger().info(message)

    def _warn(self, message: str) -> None:
        if self._is_master():
            _logger().warning(message)


class _Tagged:
    """A writer for TensorBoard that puts the name of a network into its tags, after their group."""

    def __init__(self, writer: Any, network: str) -> None:
        self._writer = writer
        self._network = network

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        group, name = tag.split("/", 1)
        self._writer.add_scalar(f"{group}/{self._network}/{name}", value, step)


def _logger() -> Any:
    from basicsr.utils import get_root_logger

    return get_root_logger()
