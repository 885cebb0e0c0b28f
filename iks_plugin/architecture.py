"""Networks for the command line: of the architecture that the user names, with the weights of a file.

A class is imported only where the user has named it: a file says which class it was made of, and that is shown, but
importing runs code, and who has written the file may not be who wrote the code.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import apply_gates, read_checkpoint
from .contents import inspect as inspect_file
from .errors import IksError, IksWarning, OptionError
from .model_file import load
from .packing import pack
from .runtime import is_packed

AUTO = "auto"


def load_network(
    path: str | os.PathLike[str],
    arch: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    packed: bool | None = None,
    device: str = "cpu",
    key: str | None = None,
) -> tuple[nn.Module, str]:
    """A network with the weights in the file `path`, in eval mode, and what it is called.

    Args:
        path: a compact file (`*.iks`), or a checkpoint that `read_checkpoint` reads.
        arch: a class, as "package.module:Class" or "package.module.Class"; the name of one of BasicSR's architectures;
            or "auto", to let spandrel find the architecture by the weights' names and shapes. None: "auto" where
            spandrel is installed.
        arguments: keyword arguments of the class.
        packed: keep sparse weights packed in memory; by default those of a compact file.
        device: where the network goes.
        key: which of a checkpoint's state dicts to take, as for `read_checkpoint`.

    Raises:
        IksError: there is no such architecture, it does not take the arguments or the weights, or the file is no file
            of weights.
    """
    place, path = _device(device), Path(path)
    compact = path.suffix.lower() == ".iks"
    if compact and key is not None:
        raise OptionError(f"--key is for checkpoints, and the compact file {path} holds one network: leave it out")
    model_class = inspect_file(path).info.model_class if compact else None
    wanted = compact if packed is None else packed
    if arch is None and importlib.util.find_spec("spandrel") is None:
        raise IksError(
            f"which network is {path} of? Name it with --arch, or install spandrel, which knows many by their weights "
            f"(pip install spandrel){_hint(model_class)}"
        )
    if arch is None or arch == AUTO:
        if arguments:
            raise OptionError("arguments of a network need its class: name it with --arch, or leave --arch-args out")
        model, name = _found_by_weights(path, load(path) if compact else read_checkpoint(path, key).state, model_class)
    else:
        model, name = build_network(arch, arguments or {}), arch
        if compact:
            _load_compact(path, model, wanted)
        else:
            _load_checkpoint(path, model, key)
    if wanted and not is_packed(model):
        with warnings.catch_warnings():
            if packed is None:
                warnings.simplefilter("ignore", IksWarning)  # nothing is sparse enough, and nobody has asked for it
            pack(model)
    return model.to(place).eval(), name


def build_network(arch: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A network of the class that `arch` names, see `load_network`, made with `arguments`.

    Raises:
        IksError: there is no such class, or it does not take them.
    """
    cls = _imported(arch) if "." in arch or ":" in arch else _of_basicsr(arch)
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    try:
        model = cls(**arguments)
    except Exception as error:  # a class may raise anything
        raise IksError(
            f"{arch}({given}) fails: {_first_line(error)}. It takes {_signature(cls)}: see --arch-args"
        ) from error
    if not isinstance(model, nn.Module):
        raise IksError(f"{arch} must be a class of networks (torch.nn.Module), but it makes a {type(model).__name__}")
    return model


def parsed_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments out of texts `key=value` or JSON objects; a value that is no JSON is taken as text.

    Raises:
        OptionError: a text is neither.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if text.lstrip().startswith("{"):
            parsed = _json(text)
            if not isinstance(parsed, dict):
                raise OptionError(f"--arch-args: expected a JSON object, got {text!r}")
            arguments.update(parsed)
        elif equals and key.isidentifier():
            arguments[key] = _json(value, value)
        else:
            raise OptionError(f"--arch-args: expected key=value, such as num_feat=64, or a JSON object, got {text!r}")
    return arguments


def _json(text: str, default: Any = None) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, default)


def _imported(arch: str) -> Callable[..., Any]:
    module_name, _, name = arch.partition(":") if ":" in arch else arch.rpartition(".")
    if module_name.split(".")[0] == "basicsr":
        _require_basicsr(arch)
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a network beside the images is found; nothing installed is hidden by it
    try:
        value: Any = importlib.import_module(module_name)
        for part in name.split("."):
            value = getattr(value, part)
    except Exception as error:  # importing runs code
        raise IksError(
            f"--arch {arch} cannot be imported: {_first_line(error)}. Expected package.module:Class"
        ) from error
    if not callable(value):
        raise IksError(f"--arch {arch} must name a class of networks, got a {type(value).__name__}")
    return value  # type: ignore[no-any-return]


def _of_basicsr(name: str) -> Callable[..., Any]:
    _require_basicsr(name)
    importlib.import_module("basicsr.archs")  # it registers them
    registry = importlib.import_module("basicsr.utils.registry").ARCH_REGISTRY
    if name not in registry:
        known = ", ".join(sorted(key for key in registry.keys() if "Discriminator" not in key))  # noqa: SIM118
        raise IksError(f"--arch {name}: expected package.module:Class or one of BasicSR's architectures: {known}")
    cls: Callable[..., Any] = registry.get(name)
    return cls


def _require_basicsr(name: str) -> None:
    try:
        importlib.import_module("iks_basicsr")  # without it BasicSR cannot be imported beside a new torchvision
    except ImportError as error:
        raise IksError(
            f"--arch {name} needs BasicSR ({_first_line(error)}). A class of your own is named package.module:Class"
        ) from error


def _found_by_weights(path: Path, state: Mapping[str, Tensor], model_class: str | None) -> tuple[nn.Module, str]:
    try:
        spandrel = importlib.import_module("spandrel")
    except ImportError as error:
        raise IksError(
            f"--arch auto needs spandrel ({error}): pip install spandrel, or name the class{_hint(model_class)}"
        ) from error
    try:
        found = spandrel.ModelLoader().load_from_state_dict(dict(state))
    except Exception as error:  # beside its own, whatever a class raises that is given strange weights
        known = isinstance(error, spandrel.UnsupportedModelError)
        reason = "spandrel knows no such architecture" if known else f"spandrel fails: {_first_line(error)}"
        raise IksError(f"{path}: {reason}. Name the network with --arch{_hint(model_class)}") from error
    return found.model, f"{found.architecture.name}, as spandrel finds"


def _load_compact(path: Path, model: nn.Module, packed: bool) -> None:
    try:
        load(path, model, packed=packed)
    except IksError as error:
        first, *faults = str(error).splitlines()
        if not faults:
            raise
        listed = "; ".join(fault.strip() for fault in faults[:3])
        prefixes = _prefixes(model, [entry.name for entry in inspect_file(path).entries])
        advice = (
            f"The network's names stand there behind {' and '.join(prefixes)}: export the checkpoint once more, with "
            f"iks export --prefix {prefixes[0]}"
            if prefixes
            else "Give the arguments that it was trained with: --arch-args"
        )
        raise IksError(f"{first} {listed}; ... {advice}") from error


def _load_checkpoint(path: Path, model: nn.Module, key: str | None) -> None:
    state = read_checkpoint(path, key, is_gate=lambda name: False).state
    prefixes = _prefixes(model, state)
    if len(prefixes) > 1:
        raise IksError(
            f"{path} has weights for the network behind each of {', '.join(prefixes)}: make a file of those that you "
            f"want, with iks export --prefix {prefixes[0]}, and take that"
        )
    if prefixes:
        state = read_checkpoint(path, key, prefixes[0], is_gate=lambda name: False).state
    own = model.state_dict()
    state = apply_gates(state, is_gate=lambda name: name not in own)
    faults = [f"{name} is not in it" for name in own if name not in state]
    faults += [f"{name} is not in the network" for name in state if name not in own]
    faults += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if faults:
        raise IksError(
            f"{path} does not fit the network: {'; '.join(faults[:3])}{'; ...' if len(faults) > 3 else ''}. Give the "
            "arguments that it was trained with: --arch-args"
        )
    model.load_state_dict(state)


def _prefixes(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What all names of the network's weights stand behind in `names`, such as "generator." in MMagic's checkpoints."""
    own, there = list(model.state_dict()), set(names)
    if not own or own[0] in there:
        return []
    candidates = sorted({name.removesuffix(own[0]) for name in there if name.endswith(f".{own[0]}")})
    return [prefix for prefix in candidates if all(f"{prefix}{name}" in there for name in own)]


def _hint(model_class: str | None) -> str:
    return f". The file says it is of {model_class}: pass --arch {model_class} if you trust it" if model_class else ""


def _device(device: str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {device} cannot be used: {_first_line(error)}") from error
    return place


def _signature(cls: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(cls))
    except (TypeError, ValueError):
        return "other arguments"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
