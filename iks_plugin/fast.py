"""Packed models that run row by row where that is faster: the model's class gets a forward of its own in front."""

from __future__ import annotations

import functools
import importlib.util
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import is_compiling
from .curvature import CurvatureWatcher
from .errors import warn_user
from .program import UnexpectedInputError
from .runtime import Packed, PackedWeight
from .settings import SMALL, settings_of
from .state import unwrapped
from .swap import Swapped, original_class, swapped_class

_STRIP = (64, 256)
"""Height and width of the part of an image on which the ways are compared."""
_MOST_KEPT = 64 << 20
"""Bytes of dense weights that may be kept where the dense layers are the fastest way."""
_SHORT = 0.02
"""Seconds: a way whose first run takes less gets a second one in any case."""
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

_CHANGES = 3
"""Calls in a row with other settings each, after which a model is no longer taken for one with a graph."""

_TRACES = 4
"""Shapes of images for which the graph of a model is kept that has shapes in it."""
_ANY: tuple[int, ...] = ()

_told = False


class Streamed(Swapped):
    """Mixin, first base of the class of a packed model. Whatever its streams are not made for goes the usual way."""

    swapped_prefix = "Streamed"
    _iks_streams: Streams

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        usual: Callable[..., Any] = super().forward
        if len(args) == 1 and not kwargs and not is_compiling():
            streams, image = self._iks_streams, args[0]
            if streams.is_usual(image):
                return _usual_result(usual, image)
            if _is_plain_inference(self, image):
                return streams.run(self, usual, image)
        return usual(*args, **kwargs)


class Streams:
    """The ways in which one model can run, and which has been the fastest for images of which size.

    "stream": row by row, along steps that are found when it first runs; "contiguous" and "channels_last": the usual way
    with dense weights that are kept in that layout; "torch": the usual way, with dense weights made for each run.
    Copies and pickles of a model find their own.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._traces: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._settings: Any = None
        self._held: list[Any] = []
        self._changes = 0
        self._ways: dict[tuple[int, ...], str] = {}
        self._kept = "torch"
        self._weights: list[PackedWeight] = []

    def __reduce__(self) -> tuple[type[Streams], tuple[()]]:
        return Streams, ()

    def is_usual(self, image: Any) -> bool:
        """Whether such an image is known to go the usual way, with what is kept now."""
        if not isinstance(image, Tensor) or image.ndim != 4:
            return False
        way = self._ways.get(_key(image))
        return way == "torch" or (way == self._kept and all(weight.is_kept for weight in self._weights))

    def run(self, model: nn.Module, usual: Callable[[Tensor], Any], image: Tensor) -> Any:
        """The model's output of `image`."""
        key = _key(image)
        try:
            self._take_up_settings(model)
        except Exception:  # what another thread changes meanwhile, or an object that does not let itself be looked at
            return _usual_result(usual, image)
        way = self._ways.get(key)
        if way is None:
            with self._lock:
                way = self._ways.get(key) or self._choose(model, image, key)
        try:
            return self._run(way, model, usual, image)
        except UnexpectedInputError:  # a whole image has led to another one than its part
            self._ways[key] = "torch"
            return _usual_result(usual, image)

    def _run(self, way: str, model: nn.Module, usual: Callable[[Tensor], Any], image: Tensor) -> Any:
        self._keep(way, model)
        steps = self._trace(model, image).steps if way == "stream" else None
        if steps is None:
            return _usual_result(usual, image)
        from . import tracing

        return tracing.run(steps, dict(model.named_modules()), image)

    def _keep(self, way: str, model: nn.Module) -> None:
        if way in _LAYOUTS:
            self._weights = _packed_weights(model)
            for weight in self._weights:
                weight.keep(_LAYOUTS[way])
            self._kept = way

    def _take_up_settings(self, model: nn.Module) -> None:
        """Forget graphs that were made for other settings."""
        held: list[Any] = []
        settings = settings_of(model, held)
        with self._lock:
            if settings == self._settings:
                if self._changes < _CHANGES:
                    self._changes = 0
                return
            self._changes += self._settings is not None
            self._settings = settings
            # Kept alive, so that no other can be taken for one that is gone.
            self._held = [one for one in held if not isinstance(one, Tensor) or one.numel() <= SMALL]
            self._traces.clear()
            self._ways = {key: way for key, way in self._ways.items() if way != "stream"}

    def _trace(self, model: nn.Module, image: Tensor) -> Any:
        from . import tracing

        shape = tuple(image.shape)
        with self._lock:
            key = _ANY if _ANY in self._traces else shape
            if key not in self._traces:
                trace = tracing.trace(model, image.shape)
                key = shape if trace.is_sized else _ANY
                self._traces[key] = trace
                while len(self._traces) > _TRACES:
                    self._traces.popitem(last=False)
            self._traces.move_to_end(key)
            return self._traces[key]

    def _choose(self, model: nn.Module, image: Tensor, key: tuple[int, ...]) -> str:
        """Find the fastest way by trying them on a part of the image; the model and the image stay as they are."""
        from . import steady

        layout = torch.channels_last if _is_channels_last(image) else torch.contiguous_format
        strip = image[:1, :, : _STRIP[0], : _STRIP[1]].clone(memory_format=layout)
        try:
            with steady.generators_kept() as generators:
                self._ways[key] = self._fastest_way(model, generators, strip)
        except Exception:  # not every network takes a part of an image, or one of any channels
            self._ways[key] = "torch"
        finally:
            if not set(self._ways.values()) & set(_LAYOUTS):
                for weight in self._weights:
                    weight.drop()
                self._kept = "torch"
        return self._ways[key]

    def _fastest_way(self, model: nn.Module, generators: Any, strip: Tensor) -> str:
        from . import steady, tracing

        fits = sum(weight.shape.numel() * weight.dtype.itemsize for weight in _packed_weights(model)) <= _MOST_KEPT
        layouts = [way for way in _LAYOUTS if way in self._ways.values()] or list(_LAYOUTS)  # one is kept at a time
        steps = self._trace(model, strip).steps if self._changes < _CHANGES else None
        try:
            copied = steady.copy_to_try(model)
        except Exception:  # whatever a model raises that cannot be copied: it is not tried, but may keep its weights
            generators.restore = False
            return layouts[0] if fits else "torch"
        if steady.is_steady(copied, strip):
            generators.restore = False
        else:
            steps = None
        names = [*(["stream"] if steps is not None else []), *(layouts if fits else ["torch"])]
        results: dict[str, Any] = {}

        def run(name: str) -> None:
            image = strip.clone(memory_format=torch.preserve_format)  # a model may change its input in place
            if name == "stream":
                assert steps is not None
                results[name] = tracing.run(steps, dict(model.named_modules()), image)
            else:
                self._keep(name, model)
                results[name] = _usual_result(copied, image)

        ways: dict[str, Callable[[], object]] = {name: functools.partial(run, name) for name in names}
        try:
            way = _fastest(ways)
        except UnexpectedInputError:
            del ways["stream"]
            way = _fastest(ways)
        if way == "stream" and not _agree(results):  # what no graph tells
            del ways["stream"]
            way = _fastest(ways)
        return way

    def streamed(self) -> set[nn.Module]:
        """The layers that run in streams, for one size of images at least; empty before the first run."""
        from . import tracing

        if "stream" not in self._ways.values():
            return set()
        return {layer for trace in self._traces.values() for layer in tracing.streamed_layers(trace.steps or [])}


def _agree(results: dict[str, Any]) -> bool:
    """Whether a stream has given what the usual ways have."""
    from .trust import is_same

    return all(is_same(results["stream"], other) for name, other in results.items() if name != "stream")


def _key(image: Tensor) -> tuple[int, ...]:
    _, channels, height, width = image.shape
    last = _is_channels_last(image)
    return torch.get_num_threads(), channels, min(height, _STRIP[0]), min(width, _STRIP[1]), last


def _is_channels_last(image: Tensor) -> bool:
    return not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last)


def _usual_result(usual: Callable[[Tensor], Any], image: Tensor) -> Any:
    """What the usual way gives, in the layout of `image` whatever that of the kept weights is."""
    result = usual(image)
    is_plain = isinstance(result, Tensor) and result.ndim == 4 and not _suggests_channels_last(image)
    return result.contiguous() if is_plain else result


def _suggests_channels_last(image: Tensor) -> bool:
    """Whether torch's convolutions give channels_last for such an image: its strides rise along C, W, H and N."""
    least, strides = 0, image.stride()
    for dim in (1, 3, 2, 0):
        if strides[dim] < least or (dim == 0 and least == strides[1]) or not strides[1]:
            return False
        least = strides[dim] * image.shape[dim]
    return True


def _fastest(ways: dict[str, Callable[[], object]]) -> str:
    """The name of the way that takes the least time: in turn, so that what else goes on meets them all."""
    times: dict[str, float] = {}
    for name, act in ways.items():
        times[name] = _seconds(act)  # compiles, makes plans and memory
        if len(times) == 1 or times[name] < max(2.5 * min(times.values()), _SHORT):
            times[name] = _seconds(act)
    for _ in range(4):
        rivals = [name for name in ways if times[name] < min(0.5, 1.5 * min(times.values()))]
        for name in rivals if len(rivals) > 1 else ():
            times[name] = min(times[name], _seconds(ways[name]))
    return min(times, key=times.__getitem__)


def _packed_weights(model: nn.Module) -> list[PackedWeight]:
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


def paths(model: nn.Module) -> dict[str, str]:
    """By name, how each packed layer of a model that has run goes: "stream" or "torch"."""
    network = unwrapped(model)
    streamed = network._iks_streams.streamed() if isinstance(network, Streamed) else set()
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    return {name: "stream" if module in streamed else "torch" for name, module in packed.items()}


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
            warn_user(
                "packed layers run without their fast kernels, which need the package numba: pip install numba",
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
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False  # somebody wants to see each operation
    if type(image) is not Tensor or torch.is_grad_enabled() or model.training or torch._C._is_tracing():
        return False
    if image.ndim != 4 or image.dtype != torch.float32 or image.device.type != "cpu" or not image.numel():
        return False
    if _autocasts() or _global_hooks_are_set():
        return False
    for module in model.modules():
        if module.training or module._forward_hooks or module._forward_pre_hooks:
            return False
        if isinstance(module, Packed):
            weight = module.packed_weight
            if weight.dtype != torch.float32 or weight.values.device.type != "cpu":
                return False
    return all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())


def _global_hooks_are_set() -> bool:
    """Whether anybody looks at all modules, but for the law "obs", which looks at those in training alone."""
    hooks = nn.modules.module._global_forward_hooks
    everybodys = bool(hooks) and not all(CurvatureWatcher.owns(hook) for hook in hooks.values())
    return everybodys or bool(nn.modules.module._global_forward_pre_hooks)


def _autocasts() -> bool:
    try:
        return bool(torch.is_autocast_enabled("cpu"))
    except TypeError:  # torch before 2.4
        return bool(torch.is_autocast_cpu_enabled())
