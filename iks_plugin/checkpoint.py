"""State dicts out of the checkpoints of training frameworks, and back into one. Nothing in a checkpoint is executed."""

from __future__ import annotations

import io
import os
import pickle
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .container import is_compact
from .errors import IksError
from .files import whole_file
from .gate import soft_threshold

_KEYS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "network", "net")
"""Where frameworks keep weights, best first. BasicSR keeps averaged ones apart, MMEngine has them in `state_dict`."""


@dataclass(frozen=True)
class Checkpoint:
    """A state dict, the key that it stood under (None where the checkpoint is the state dict), and how many of its
    weights have had thresholds beside them, which are applied now."""

    state: dict[str, Tensor]
    key: str | None
    gated: int

    @property
    def restored_key(self) -> str | None:
        """The key under which its framework finds it in a checkpoint of its own: BasicSR looks for "params" at last."""
        return "params" if self.key == "params_ema" else self.key


def read_checkpoint(
    path: str | os.PathLike[str],
    key: str | None = None,
    prefix: str = "",
    is_gate: Callable[[str], bool] = lambda name: True,
) -> Checkpoint:
    """The weights in a checkpoint of BasicSR, MMagic or Lightning, of `torch.save(model.state_dict())` or safetensors.

    Thresholds beside the weights, as a training with gates may have left them, are applied to them. The prefix
    "module." of parallel training is taken off. What is no tensor with a name, such as a counter, is passed over.

    Args:
        path: a file that torch.save has written, or a safetensors file, whose name ends in ".safetensors".
        key: which of the state dicts to take; default the first of those that frameworks use.
        prefix: take only entries whose names begin with it, and take it off.
        is_gate: whether an entry "<layer>.threshold" beside "<layer>.weight", by its name without the prefix, is of a
            training with gates, and not the network's own.

    Raises:
        IksError: it is not such a file, or has no (such) state dict.
    """
    content = _load(Path(path))
    if not isinstance(content, Mapping):
        got = "an object of another kind" if isinstance(content, _Inert) else f"a {type(content).__name__}"
        raise IksError(
            f"{path}: expected a checkpoint with a state dict, got {got}. Of a whole model save the state dict: "
            "torch.save(model.state_dict(), path)"
        )
    if key is None:
        key = next((name for name in _KEYS if _is_state(content.get(name))), None)
    state: Any = content if key is None else content.get(key)
    if not _is_state(state):
        listed = [name for name, value in content.items() if _is_state(value)]
        hint = f"choose one of {listed} with --key" if listed else "it holds none"
        if key is not None and _is_state(content):
            hint = "the checkpoint is a state dict by itself, so leave --key out"
        raise IksError(
            f"{path}: expected a state dict {f'under {key!r}' if key else 'in the checkpoint'}, got none: {hint}"
        )
    tensors = {name: value for name, value in state.items() if _is_named_tensor(name, value)}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    chosen = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    if not chosen:
        firsts = sorted({name.split(".")[0] + "." for name in tensors})
        raise IksError(f"{path}: no name begins with {prefix!r}: the names begin with {', '.join(firsts[:8])}")
    state = apply_gates(chosen, is_gate)
    return Checkpoint(state, key, gated=len(chosen) - len(state))


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Tensor], key: str | None) -> None:
    """Write what `read_checkpoint` reads: `state`, under `key` if there is one; whole or not at all.

    A path that ends in ".safetensors" gets a file of that kind, which holds one state dict and has no keys.

    Raises:
        IksError: it cannot be written; a file that was there before is still there.
    """
    try:
        with whole_file(path) as unfinished:
            if is_safetensors(path):
                unfinished.write_bytes(_safetensors_bytes(path, state))
            else:
                torch.save(OrderedDict(state) if key is None else {key: OrderedDict(state)}, unfinished)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeErrors where it cannot write
        raise IksError(f"{os.fspath(path)}: cannot be written ({error}). What was there before is unchanged") from error


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether `path` has the name of a safetensors file."""
    return Path(path).suffix.lower() == ".safetensors"


def _safetensors_bytes(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    # Tensors that share memory are refused; each gets its own.
    apart = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    try:
        result: bytes = save(apart)
    except Exception as error:  # of a type that it does not know, a KeyError
        types = ", ".join(sorted({str(tensor.dtype) for tensor in apart.values()}))
        raise IksError(f"{os.fspath(path)}: safetensors cannot hold all of {types} ({error}): write a .pth") from error
    return result


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(_is_named_tensor(name, tensor) for name, tensor in value.items())


def _is_named_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def apply_gates(state: dict[str, Tensor], is_gate: Callable[[str], bool]) -> dict[str, Tensor]:
    """`state` with the thresholds in it that are gates' applied to the weights beside them, see `read_checkpoint`."""
    result = dict(state)
    for name in filter(is_gate, state):
        weight = name.removesuffix("threshold") + "weight"
        if name.split(".")[-1] != "threshold" or weight not in state or state[name].ndim != state[weight].ndim:
            continue
        threshold = result.pop(name)
        try:
            result[weight] = soft_threshold(state[weight], threshold)
        except RuntimeError:
            shapes = f"{tuple(threshold.shape)} and {tuple(state[weight].shape)}"
            raise IksError(
                f"{name} does not fit {weight} (shapes {shapes}): finalize the model, then save it"
            ) from None
    return result


def _load(path: Path) -> Any:
    if not path.is_file():
        raise IksError(
            f"{path}: expected a checkpoint, found {'a folder' if path.is_dir() else 'nothing'}: check the path"
        )
    if path.suffix == ".iks":
        raise IksError(f"{path}: expected a checkpoint, got a compact file: it is what `iks restore` is for")
    try:
        if is_safetensors(path):
            return _load_safetensors(path)
        data = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise IksError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.1 warns of its own TypedStorage
            return _load_weights(data)
    except Exception as error:  # torch raises about anything for what is no file of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise IksError(
            f"{path}: expected a checkpoint that torch.save has written, got something else ({reason})"
        ) from None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with open(path, "rb"):  # an error of the system's own, if any
        pass
    try:
        with safe_open(path, framework="pt") as file:
            if not is_compact(file.metadata()):
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except Exception as error:  # safetensors raises errors of its own, of the system and of Python's JSON
        raise IksError(f"{path}: expected a safetensors file, got another kind or a damaged one ({error})") from None
    raise IksError(f"{path}: expected a checkpoint, got a compact file by another name: rename it to *.iks")


def _load_weights(data: io.BytesIO) -> Any:
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it holds more than weights, such as the logs of MMEngine
        data.seek(0)
        return torch.load(data, map_location="cpu", weights_only=False, pickle_module=_inert_pickle)


_MADE = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


class _Inert:
    """Stands for an object of any class in a checkpoint but tensors: takes whatever it is given, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


class _InertUnpickler(pickle.Unpickler):
    """Makes tensors and plain containers; everything else becomes `_Inert`, so that no code of a file's choice runs."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _MADE else _Inert


def _inert_load(file: Any, **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


_inert_pickle = types.ModuleType("inert_pickle")
_inert_pickle.Unpickler = _InertUnpickler  # type: ignore[attr-defined]
_inert_pickle.load = _inert_load  # type: ignore[attr-defined]
