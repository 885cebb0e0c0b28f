"""Checkpoints that an untouched MMagic loads, and that a sparse training resumes from.

A checkpoint's `state_dict`, and its `ema_state_dict` where there is one, hold plain networks with exactly the target's
zeros. Its entry `iks`, `{"version": 1, "controllers": {name: state}, "gated": {part: {key: tensor}}}`, holds what they
lack: `gated` has the weights before the gates, and the thresholds, under the keys of a gated network.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import iks_plugin
from iks_plugin import IksError
from iks_plugin.export import refuse_compact
from iks_plugin.files import remove_unfinished, whole_file

VERSION = 1
PARTS = {"state_dict": "", "ema_state_dict": "module."}
"""The entries of a checkpoint that hold networks, and what their keys begin with."""


def take_gates_out(checkpoint: dict[str, Any], networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Make the networks in `checkpoint` plain, in place. Returns what was lost by that, as the module describes it.

    Args:
        checkpoint: as MMEngine is about to save it.
        networks: gated networks by their names in the model, for their structure; their weights do not matter.
    """
    gated: dict[str, dict[str, Tensor]] = {}
    for part, lead in PARTS.items():
        for name, network in networks.items():
            state = checkpoint.get(part, {})
            prefix = _prefix(state, lead, name, network)
            inside = _within(state, prefix)
            if not inside:
                continue
            plain = _finalized(network, inside)
            thresholds = inside.keys() - plain.keys()
            kept = thresholds | {f"{key.removesuffix('threshold')}weight" for key in thresholds}
            gated.setdefault(part, {}).update({f"{prefix}{key}": inside[key].cpu() for key in inside if key in kept})
            for key in thresholds:
                del state[f"{prefix}{key}"]
            state.update({f"{prefix}{key}": plain[key] for key in plain if key in kept})
    return gated


def network_in(checkpoint: Mapping[str, Any], name: str, network: nn.Module) -> nn.Module:
    """A copy of the gated `network` called `name`, on the CPU, as it is in a `checkpoint` that is about to be saved.

    Out of `state_dict`, which with MMEngine's EMAHook holds the average and not what is trained.
    """
    state = checkpoint["state_dict"]
    return _copy_with(network, _within(state, _prefix(state, "", name, network)))


def _within(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _prefix(state: Mapping[str, Any], lead: str, name: str, network: nn.Module) -> str:
    """What the keys of `network` begin with in `state`, where it may be wrapped for distribution."""
    wrapped = f"{lead}{name}.module."
    if any(key.startswith(wrapped) for key in state) and not hasattr(network, "module"):
        return wrapped
    return f"{lead}{name}."


def drop_wrappers(checkpoint: dict[str, Any], children: Iterable[str]) -> None:
    """Name what is in `children` of a model, wrapped each on its own, as without the wrappers.

    MMEngine saves such a child as `name.module`, but looks for it as `name` when it loads, and leaves it out.
    """
    state = checkpoint["state_dict"]
    for name in children:
        prefix = f"{name}.module."
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{name}.{key[len(prefix) :]}"] = state.pop(key)


def _finalized(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain state of a gated `network` that had this `state`, on the CPU."""
    scratch = _copy_with(network, state)
    with iks_plugin.finalized(scratch):
        return dict(scratch.state_dict())


def _copy_with(network: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    scratch = copy.deepcopy(network).cpu()
    scratch.load_state_dict(state)
    return scratch


def put_gates_in(
    checkpoint: dict[str, Any], networks: Mapping[str, nn.Module], where: str, instead: str
) -> dict[str, Any]:
    """Undo `take_gates_out` in a checkpoint that is resumed from. Returns the states of the controllers.

    An EMA copy beside a network, which MMagic's hook makes, may be new, and then starts as the network; or be gone.

    Args:
        checkpoint: as it was loaded.
        networks: gated networks by their names in the model.
        where: the name of the checkpoint, for messages.
        instead: what to do where it is of a training without `iks`, for messages.

    Raises:
        IksError: it is of a training without `iks`, or of one with other layers or another granularity; then it is
            unchanged.
    """
    saved = checkpoint.get("iks")
    if saved is None:
        raise IksError(
            f"{where} is of a training without the config key iks, which has no thresholds to go on with. {instead}"
        )
    if saved.get("version") != VERSION:
        raise IksError(f"{where}: expected version {VERSION} of its entry iks, got {saved.get('version')!r}")
    gated = {part: _for_present_copies(checkpoint, part, networks) for part in saved["gated"]}
    for part, tensors in gated.items():
        check_fit(tensors, networks, where, lead=PARTS[part], complete=True)
    for part, tensors in gated.items():
        checkpoint[part].update(tensors)
    states: dict[str, Any] = saved["controllers"]
    return states


def _for_present_copies(
    checkpoint: Mapping[str, Any], part: str, networks: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """What is gated in a `part`, without an EMA copy that the model has no more, and with all of one that is new."""
    lead, state, gated = PARTS[part], checkpoint[part], dict(checkpoint["iks"]["gated"][part])
    for name in checkpoint["iks"]["controllers"]:
        copied = next((other for other in networks if other in (f"{name}_ema", f"{name}_ema.module")), None)
        if copied is None:
            gated = {key: value for key, value in gated.items() if not key.startswith(f"{lead}{name}_ema.")}
        elif name in networks and not _within(checkpoint["state_dict"], f"{name}_ema."):
            trained = _copy_with(
                networks[name], _within({**state, **gated}, _prefix(state, lead, name, networks[name]))
            )
            with iks_plugin.gates_applied(trained):  # as it is averaged
                gated.update({f"{lead}{copied}.{key}": value for key, value in trained.state_dict().items()})
    return gated


def check_fit(
    state: Mapping[str, Tensor],
    networks: Mapping[str, nn.Module],
    where: str,
    *,
    lead: str = "",
    complete: bool = False,
) -> None:
    """Raise an `IksError` if `state` has thresholds that do not fit; MMEngine would only warn and load the rest.

    Args:
        complete: the thresholds must be there for every gated layer, and for no other.
    """
    own = {
        f"{_prefix(state, lead, name, network)}{key}": value
        for name, network in networks.items()
        for key, value in network.state_dict().items()
        if key == "threshold" or key.endswith(".threshold")
    }
    found = {key: value for key, value in state.items() if key.endswith("threshold")}
    wrong = [key for key in found if key in own and found[key].numel() != own[key].numel()]
    if wrong:
        key = wrong[0]
        raise IksError(
            f"{where} does not fit the config key iks: {key} expected {tuple(own[key].shape)}, got "
            f"{tuple(found[key].shape)}: give iks.granularity (and layers) as in the training that made it"
        )
    if complete and found.keys() != own.keys():
        only = sorted(found.keys() ^ own.keys())
        raise IksError(
            f"{where} does not fit the config key iks: {only[0]} and {len(only) - 1} more are of layers that only one "
            "of the two rewrites: give iks.include, iks.exclude and iks.layer_types as in the training that made it"
        )


def gated_in(state: Mapping[str, Tensor], networks: Mapping[str, nn.Module]) -> set[str]:
    """The names of those of the gated `networks` of which `state` has thresholds."""
    return {
        name
        for name, network in networks.items()
        if any(key.endswith("threshold") for key in _within(state, _prefix(state, "", name, network)))
    }


def refuse_sparse(original: Callable[..., Any], runner: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint for a training without `iks`, but do not resume one with it."""
    checkpoint = original(filename, *args, **kwargs)
    if runner._resume and isinstance(checkpoint, Mapping) and "iks" in checkpoint:
        raise IksError(f"{filename} is of a sparse training, and the config has no key iks: add that training's")
    return checkpoint


def protect(runner: Any) -> None:
    """Let the checkpoints of `runner` be whole files, and a killed training find the last of them."""
    runner.save_checkpoint = partial(_save_whole, runner.save_checkpoint)
    runner.load_or_resume = partial(_resume_from_whole, runner.load_or_resume, runner)


def _save_whole(original: Callable[..., None], out_dir: str | Path, filename: str, *args: Any, **kwargs: Any) -> None:
    from mmengine.dist import is_main_process

    if "://" in str(out_dir) or not is_main_process():
        original(out_dir, filename, *args, **kwargs)
        return
    Path(out_dir).mkdir(parents=True, exist_ok=True)  # as MMEngine does, but only when it writes
    with whole_file(Path(out_dir, filename)) as unfinished:
        original(out_dir, unfinished.name, *args, **kwargs)


def _resume_from_whole(original: Callable[[], None], runner: Any) -> None:
    """MMEngine writes the name of the last checkpoint in place: mend it where a process was killed meanwhile."""
    from mmengine.dist import barrier, is_main_process

    if runner._load_from is not None:
        refuse_compact(runner._load_from)
    folders = _checkpoint_folders(runner)
    if is_main_process():
        remove_unfinished(folders)
        if runner._resume and runner._load_from is None:
            _mend_last_checkpoint(runner, folders)
    barrier()
    original()


def _checkpoint_folders(runner: Any) -> list[Path]:
    from mmengine.hooks import CheckpointHook

    folders = [checkpoint_folder(runner, hook) for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    return [Path(runner.work_dir), *(folder for folder in folders if folder is not None)]


def checkpoint_folder(runner: Any, hook: Any) -> Path | None:
    """Where a CheckpointHook is going to save, None if that is not a local folder. To be asked before it trains.

    Within an `out_dir` of its own it makes a folder named like the runner's.
    """
    if hook.out_dir is None or hook.out_dir == runner.work_dir:
        return Path(runner.work_dir)
    return None if "://" in str(hook.out_dir) else Path(hook.out_dir, Path(runner.work_dir).name)


def _mend_last_checkpoint(runner: Any, folders: list[Path]) -> None:
    record = Path(runner.work_dir, "last_checkpoint")
    if not record.exists():
        return
    named = record.read_text().strip()
    if named and ("://" in named or Path(named).exists()):
        return
    numbered = [
        (int(found[1]), path)
        for folder in folders
        for path in folder.glob("*.pth")
        if (found := re.fullmatch(r"(?:iter|epoch)_(\d+)\.pth", path.name))
    ]
    if numbered:
        newest = max(numbered)[1]
        runner.logger.warning(
            f"iks: {record} names {named or 'nothing'}: resuming from {newest}, the newest checkpoint"
        )
        with whole_file(record) as unfinished:
            unfinished.write_text(str(newest))
    else:
        record.unlink()
