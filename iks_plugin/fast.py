"""Packed models that run row by row where that is faster: the model's class gets a forward of its own in front."""

from __future__ import annotations

import importlib.util
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import IksWarning
from .runtime import Packed
from .swap import Swapped, original_class, swapped_class

_STRIP = (64, 256)
"""Height and width of the part of an image on which the two ways are compared."""

_PLAIN = (bool, int, float, str, type(None))

_told = False


class Streamed(Swapped):
    """Mixin, first base of the class of a packed model. Whatever its streams are not made for goes the usual way."""

    swapped_prefix = "Streamed"
    _iks_streams: Streams

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        usual: Callable[..., Any] = super().forward
        if len(args) == 1 and not kwargs and _is_plain_inference(self, args[0]):
            result = self._iks_streams.run(self, usual, args[0])
            if result is not None:
                return result
        return usual(*args, **kwargs)


class Streams:
    """The steps of one model, found when it first runs, and which way has been the faster one for which images.

    Copies and pickles of a model find their own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: Any = None
        self._settings: Any = None
        self._faster: dict[tuple[int, ...], bool] = {}

    def __reduce__(self) -> tuple[type[Streams], tuple[()]]:
        return Streams, ()

    def run(self, model: nn.Module, usual: Callable[[Tensor], Any], image: Tensor) -> Tensor | None:
        """The model's output of `image`; None where the usual way is faster or the only one."""
        from . import tracing

        settings = _settings(model)
        with self._lock:
            if settings != self._settings:
                self._steps, self._settings = tracing.trace(model), settings
                self._faster.clear()
            steps = self._steps
            if steps is None:
                return None
            modules = dict(model.named_modules())
            height, width = (min(size, most) for size, most in zip(image.shape[2:], _STRIP, strict=True))
            key = (torch.get_num_threads(), height, width)
            if key not in self._faster:
                strip = image[:1, :, :height, :width].contiguous()
                try:
                    _seconds(lambda: tracing.run(steps, modules, strip))  # compiles, makes plans and memory
                    ours = _seconds(lambda: tracing.run(steps, modules, strip))
                    theirs = _seconds(lambda: usual(strip))
                    if theirs < 2 * ours:  # its first run is slower than others, and this is near
                        theirs = min(theirs, _seconds(lambda: usual(strip)))
                        ours = min(ours, _seconds(lambda: tracing.run(steps, modules, strip)))
                    self._faster[key] = ours < theirs
                except RuntimeError:  # a part of an image is no input for every network
                    self._faster[key] = False
            is_faster = self._faster[key]
        return tracing.run(steps, modules, image) if is_faster else None

    def streamed(self) -> set[nn.Module]:
        """The layers that run in streams, for one size of images at least; empty before the first run."""
        from . import tracing

        return tracing.streamed_layers(self._steps or []) if any(self._faster.values()) else set()


def paths(model: nn.Module) -> dict[str, str]:
    """By name, how each packed layer of a model that has run goes: "stream" or "torch"."""
    streamed = model._iks_streams.streamed() if isinstance(model, Streamed) else set()
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    return {name: "stream" if module in streamed else "torch" for name, module in packed.items()}


def _settings(model: nn.Module) -> tuple[Any, ...]:
    """Equal as long as a graph of the model, which has its settings and small tensors in it, is still right."""
    plain = tuple(
        (id(module), tuple(item for item in module.__dict__.items() if _is_plain(item[1])))
        for module in model.modules()
    )
    tensors = (*model.parameters(), *model.buffers())
    return plain, tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def speed_up(model: nn.Module) -> None:
    """Let a packed model run row by row where it can, in place."""
    global _told
    if isinstance(model, Swapped):  # a single packed layer, or done already
        return
    if importlib.util.find_spec("numba") is None:
        if not _told:
            warnings.warn(
                "packed layers run without their fast kernels, which need the package numba: pip install numba",
                IksWarning,
                stacklevel=3,
            )
        _told = True
        return
    model._iks_streams = Streams()  # type: ignore[assignment]
    model.__class__ = swapped_class(Streamed, type(model))


def slow_down(model: nn.Module) -> None:
    """Undo `speed_up`."""
    if isinstance(model, Streamed):
        model.__class__ = original_class(model)  # type: ignore[assignment]
        del model.__dict__["_iks_streams"]


def _is_plain_inference(model: nn.Module, image: Any) -> bool:
    """Whether what is asked for is just the output of a batch of float32 images on the CPU."""
    if type(image) is not Tensor or torch.is_grad_enabled() or model.training or _is_traced():
        return False
    if image.ndim != 4 or image.dtype != torch.float32 or image.device.type != "cpu" or not image.numel():
        return False
    if _autocasts():
        return False
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if isinstance(module, Packed):
            weight = module.packed_weight
            if weight.dtype != torch.float32 or weight.values.device.type != "cpu":
                return False
    return all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())


def _autocasts() -> bool:
    try:
        return bool(torch.is_autocast_enabled("cpu"))
    except TypeError:  # torch before 2.4
        return bool(torch.is_autocast_cpu_enabled())


def _is_traced() -> bool:
    compiling = getattr(torch.compiler, "is_compiling", torch._dynamo.is_compiling)
    return bool(compiling() or torch._C._is_tracing())
