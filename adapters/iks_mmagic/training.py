"""One runner of MMEngine whose generator becomes sparse.

The model is rewritten as soon as it is built, before the runner wraps it for distributed training, builds optimizers or
lets hooks copy it. Two hooks do the rest: one that comes before all others and one that comes after them, so that EMA
hooks, which swap the weights of two copies, only ever see gated networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import iks_plugin
from iks_plugin import IksError, OptionError, SparsityController
from iks_plugin.block import Block, Patterns
from iks_plugin.optimizers import groups_without_decay
from iks_plugin.progress import aim_anew, beside_validation, changes, fault_at_end, resumed_state, rise_of

from . import checkpoints, compat
from .export import CompactFiles
from .hooks import FirstHook, LastHook
from .schedule import is_from_scratch, iterations_of, optimizer_steps


class SparseTraining:
    """Makes the named networks of a runner's model sparse.

    Args:
        runner: MMEngine's runner, which has just built `model`.
        model: its model, not wrapped yet.
        block: the checked entry `iks` of its config.

    Raises:
        OptionError: the model has no such network, or an option does not fit it.
        IksError: the network cannot be rewritten.
    """

    def __init__(self, runner: Any, model: nn.Module, block: Block) -> None:
        self._runner = runner
        self._model = model
        self._block = block
        self._trains = False
        self._validation = ExitStack()
        self._reached: dict[str, float] = {}
        self._resumed: dict[str, dict[str, Any]] = {}
        self._loaded_gated: set[str] = set()
        networks = {name: _find(model, name) for name in block.networks}
        iterations = iterations_of(runner)
        steps = {
            name: None if iterations is None else optimizer_steps(runner, model, name, iterations) for name in networks
        }
        try:
            keywords = {
                name: block.keywords(steps[name], "train_cfg", from_scratch=is_from_scratch(runner, model, network))
                for name, network in networks.items()
            }
        except OptionError as error:
            raise OptionError(f"config key iks: {error}") from None
        _initialise_now(runner, model)
        patterns = Patterns(block.networks)
        self._controllers: dict[str, SparsityController] = {}
        for name, network in networks.items():
            try:
                given = patterns.keywords_for(name, network, keywords[name])
                self._controllers[name] = iks_plugin.sparsify(network, **given)
            except IksError as error:
                raise type(error)(f"config key iks, {name} ({type(network).__name__}): {error}") from None
            self._tell_layers(name, network)
            if steps[name] is not None:
                self._tell_ramp(name)
            _copy_anew(model, name, network)
        self._unscheduled = [name for name in networks if steps[name] is None]
        runner.build_train_loop = partial(self._build_train_loop, runner.build_train_loop)
        runner.build_optim_wrapper = partial(self._build_optim_wrapper, runner.build_optim_wrapper)
        runner.wrap_model = partial(compat.wrap_model, runner.wrap_model, runner=runner)
        runner.register_hooks = partial(self._register_hooks, runner.register_hooks)
        checkpoints.protect(runner)
        self._compact = CompactFiles(runner, block) if block.export else None

    def _build_train_loop(self, original: Callable[..., Any], loop: Any) -> Any:
        """The loop has read the training data, which tell how long an epoch is."""
        built = original(loop)
        for name in self._unscheduled:
            controller = self._controllers[name]
            steps = optimizer_steps(self._runner, self._model, name, int(built.max_iters))
            try:
                from_scratch = is_from_scratch(self._runner, self._model, _find(self._model, name))
                schedule = self._block.schedule(steps, "train_cfg", from_scratch=from_scratch)
            except OptionError as error:
                raise OptionError(f"config key iks: {error}") from None
            controller.load_state_dict({**controller.state_dict(), **schedule})
            self._tell_ramp(name)
        self._unscheduled.clear()
        return built

    def _build_optim_wrapper(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Give the thresholds no weight decay, in every optimizer that has some."""
        from mmengine.optim import OptimWrapperDict

        built = original(*args, **kwargs)
        thresholds = {id(p) for c in self._controllers.values() for p in c.param_groups()[1]["params"]}
        for wrapper in built.values() if isinstance(built, OptimWrapperDict) else [built]:
            groups = wrapper.optimizer.param_groups
            groups[:] = groups_without_decay(groups, thresholds)
        return built

    def _register_hooks(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        averaging: list[Any] = [hook for hook in self._runner.hooks if isinstance(hook, _ema_hooks())]
        for hook in averaging:
            hook.after_train_iter = partial(self._average, hook.after_train_iter)
        self._runner.register_hook(FirstHook(self))
        self._runner.register_hook(LastHook(self))
        if self._compact is not None:
            self._compact.follow(self._runner.hooks)

    def _average(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Let an EMA hook average what the networks are: a mean weight behind a mean threshold is another network."""
        with ExitStack() as stack:
            for name in self._controllers:
                stack.enter_context(iks_plugin.gates_applied(_find(self._model, name)))
            original(*args, **kwargs)

    def _networks(self) -> dict[str, nn.Module]:
        """The gated networks by their present names in the model: the trained ones, and EMA copies beside them."""
        names = [name + suffix for name in self._controllers for suffix in ("", "_ema")]
        found = [_locate(self._model, name) for name in names]
        return {name: network for name, network in filter(None, found) if iks_plugin.is_sparsified(network)}

    def _delivered(self, checkpoint: dict[str, Any]) -> dict[str, tuple[str, nn.Module]]:
        """What compact files get of a checkpoint with gates: of each network its EMA copy, or itself, and its name."""
        networks = self._networks()
        result = {}
        for name in self._controllers:
            located = _locate(self._model, f"{name}_ema")
            if located is None or located[0] not in networks:
                located = _locate(self._model, name)
            if located is not None:
                result[name] = located[0], checkpoints.network_in(checkpoint, *located)
        return result

    # What the hooks call

    def begin(self) -> None:
        self._trains = True
        for name, saved in self._resumed.items():
            aim_anew(self._controllers[name], saved)
        self._resumed.clear()

    def begin_iteration(self) -> None:
        self._validation.close()  # an error in a validation may have left it open

    def end(self) -> None:
        self._trains = False
        for name, controller in self._controllers.items():
            network = _find(self._model, name)
            fault = fault_at_end(network, controller, "checkpoints", "train_cfg", "iks.ramp_steps")
            if fault is not None:
                self._runner.logger.warning(f"iks: {name}: {fault}")

    def log_iteration(self, number: int) -> None:
        """Leave the sparsity where MMEngine's logger finds it, in iterations that are logged.

        Args:
            number: that of the iteration in its loop or, in a loop of epochs, in its epoch; from 0.
        """
        if self._runner.iter + 1 in (1, self._runner.max_iters) or self._is_logged(number):
            for name, controller in self._controllers.items():
                self._runner.message_hub.update_scalar(f"train/{self._label(name)}", controller.sparsity)

    def _is_logged(self, number: int) -> bool:
        from mmengine.hooks import LoggerHook

        loggers = [hook for hook in self._runner.hooks if isinstance(hook, LoggerHook)]
        return any(
            hook.every_n_inner_iters(number, hook.interval) or hook.end_of_epoch(self._runner.train_dataloader, number)
            for hook in loggers
        )

    def note_sparsity(self) -> None:
        """Where training stands, while its own weights are still in place."""
        self._reached = {name: controller.sparsity for name, controller in self._controllers.items()}

    def open_validation(self) -> None:
        """Until it is closed, the networks are what a checkpoint of now would hold; or, untrained, what was loaded."""
        trained = self._trains or any(controller.steps for controller in self._controllers.values())
        for name, network in self._networks().items():
            if trained or name not in self._loaded_gated:
                self._validation.enter_context(iks_plugin.finalized(network, None if trained else 0))

    def close_validation(self, mode: str) -> None:
        reports = {name: iks_plugin.report(_find(self._model, name)) for name in self._controllers}
        self._validation.close()
        for name, report in reports.items():
            self._runner.message_hub.update_scalar(f"{mode}/{self._label(name)}", report.sparsity)
            note = beside_validation(self._reached.get(name, report.sparsity), report.sparsity)
            if self._trains and note:
                self._runner.logger.info(
                    f"iks: {name} was validated as it is saved, with {report.sparsity:.2%} zeros{note}"
                )

    def save(self, checkpoint: dict[str, Any]) -> None:
        from mmengine.model import is_model_wrapper

        if "ema_state_dict" not in checkpoint:  # MMEngine swaps the two by their names
            wrapped = [name for name, child in self._model.named_children() if is_model_wrapper(child)]
            checkpoints.drop_wrappers(checkpoint, wrapped)
        if self._compact is not None:
            self._compact.put_into_next(self._delivered(checkpoint))
        gated = checkpoints.take_gates_out(checkpoint, self._networks())
        states = {name: controller.state_dict() for name, controller in self._controllers.items()}
        checkpoint["iks"] = {"version": checkpoints.VERSION, "controllers": states, "gated": gated}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint that is resumed from; look at one that is loaded."""
        where = f"the checkpoint {checkpoint.get('filename') or self._runner._load_from or 'to resume from'}"
        networks = self._networks()
        if not self._runner._resume:
            state = checkpoint.get("state_dict", checkpoint)
            checkpoints.check_fit(state, networks, where)
            self._loaded_gated = checkpoints.gated_in(state, networks)
            return
        states = checkpoints.put_gates_in(checkpoint, networks, where, self._instead_of_resuming())
        if states.keys() != self._controllers.keys():
            raise IksError(f"{where}: expected iks.network {sorted(states)}, got {sorted(self._controllers)}")
        for name, controller in self._controllers.items():
            saved = states[name]
            state = resumed_state(self._block, saved, controller.state_dict())
            try:
                controller.load_state_dict(state)
            except IksError as error:
                raise IksError(f"{where} does not fit the config key iks, {name}: {error}") from None
            for change in changes(saved, state, "the config"):
                self._runner.logger.warning(f"iks: {name}: {change}")
            self._resumed[name] = saved

    def _instead_of_resuming(self) -> str:
        """What to do where the checkpoint is of a dense training; it is load_from's where there is one."""
        work = self._runner.work_dir
        if self._runner._load_from is not None and Path(work, "last_checkpoint").exists():
            return f"To go on with the training in {work} give load_from = None (--resume --cfg-options load_from=None)"
        return "To make its network sparse, start a new training from its weights: load_from = ..., resume = False"

    # Telling

    def _label(self, name: str) -> str:
        return "sparsity" if len(self._controllers) == 1 else f"sparsity_{name}"

    def _tell_layers(self, name: str, network: nn.Module) -> None:
        report = iks_plugin.report(network)
        rewritten = sum(layer.rewritten for layer in report.layers)
        self._runner.logger.info(
            f"iks: {name}: {rewritten} of {len(report.layers)} layers are rewritten; of their {report.weights:,} "
            f"weights {report.target_sparsity:.2%} become zero.\n{report}"
        )

    def _tell_ramp(self, name: str) -> None:
        rise = rise_of(self._controllers[name])
        if rise is not None:
            from_scratch = is_from_scratch(self._runner, self._model, _find(self._model, name))
            waits = from_scratch and "ramp_start" not in self._block.options
            why = " (it trains from scratch, without load_from; ramp_start=0 lets it rise at once)"
            self._runner.logger.info(f"iks: {name}: {rise}{why if waits else ''}")


def _ema_hooks() -> tuple[type, ...]:
    from mmagic.engine.hooks import ExponentialMovingAverageHook
    from mmengine.hooks import EMAHook

    return EMAHook, ExponentialMovingAverageHook


def _find(model: nn.Module, name: str) -> nn.Module:
    located = _locate(model, name)
    if located is None:
        children = [child for child, module in model.named_children() if next(module.parameters(), None) is not None]
        raise OptionError(
            f"config key iks.network: {type(model).__name__} has no network {name!r}, "
            f"it has {', '.join(children) or 'none'}"
        )
    whole, dot, part = name.partition(".")
    if dot:  # optimizers and EMA copies are those of whole networks
        pattern = f"{part}.*" if any(located[1].children()) else part
        raise OptionError(
            f"config key iks.network: expected a whole network of {type(model).__name__}, got {name!r}, a part of one: "
            f"write network={whole!r} and include=[{pattern!r}]"
        )
    return located[1]


def _locate(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """The network called `name` out of the wrappers it may be in, and its name in checkpoints."""
    from mmengine.model import is_model_wrapper

    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        return None
    while is_model_wrapper(module) or hasattr(module, "avg_parameters"):
        if not is_model_wrapper(module):  # an average's keys tell of it, those of a wrapper for distribution do not
            name = f"{name}.module"
        module = module.module
    return name, module


def _initialise_now(runner: Any, model: nn.Module) -> None:
    """What the runner does before it trains: in-place initialisation through gates would be lost.

    Where it fails, as weights to start from cannot be reached, a test does without it, and a training raises that.
    """
    from mmengine.dist import broadcast

    failure: Exception | None = None
    if hasattr(model, "init_weights"):
        try:
            model.init_weights()  # type: ignore[operator]
        except Exception as error:  # whatever a model makes of it
            failure = error

    def share() -> None:
        if failure is not None:
            raise failure
        for value in model.state_dict().values():
            broadcast(value)

    runner._init_model_weights = share


def _copy_anew(model: nn.Module, name: str, network: nn.Module) -> None:
    """Let the EMA copy that a model has made of its generator have gates as well: copy it once more."""
    copied: Any = getattr(model, f"{name}_ema", None)
    if type(copied) is type(network):
        setattr(model, f"{name}_ema", copy.deepcopy(network))
    elif hasattr(copied, "avg_parameters") and type(copied.module) is type(network):  # MMEngine's averaged model
        copied.module = copy.deepcopy(network).requires_grad_(False)
        copied.avg_parameters = (
            copied.module.state_dict() if copied.update_buffers else dict(copied.module.named_parameters())
        )
