"""Which operations of a graph (torch.fx) run row by row, and what a program does for each."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .program import Program, Window
from .runtime import Packed
from .shapes import shape_of, value_of

Constant = Tensor | float
_ADD = {operator.add, operator.iadd, torch.add}
_SUB = {operator.sub, operator.isub, torch.sub}
_MUL = {operator.mul, operator.imul, torch.mul}
_DIV = {operator.truediv, operator.itruediv, torch.div}
_RELU = {F.relu, F.relu_, torch.relu, torch.relu_}
_LEAKY = {F.leaky_relu, F.leaky_relu_}
_JOIN = {torch.cat, torch.concat, torch.concatenate}
_PARTS = {torch.split, torch.chunk}
_FUNCTIONS = (
    _ADD | _SUB | _MUL | _DIV | _RELU | _LEAKY | _JOIN | _PARTS | {F.pixel_shuffle, F.interpolate, operator.getitem}
)
_SAME = {"contiguous", "clone", "detach", "float"}
_METHODS = {
    "add": operator.add,
    "add_": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mul_": operator.mul,
    "div": operator.truediv,
    "relu": F.relu,
    "relu_": F.relu,
    "split": torch.split,
    "chunk": torch.chunk,
}
AUGMENTED = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.ifloordiv, operator.imod),
    *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)
"""`x += y` and its like, which work in place on tensors."""


class CannotStreamError(Exception):
    """A run of nodes cannot be one program after all."""


def function_of(node: torch.fx.Node) -> Any:
    """The function, or the name of the method, that a node calls, if it can stream."""
    if node.op == "call_function":
        return node.target if node.target in _FUNCTIONS else None
    if node.op == "call_method":
        return node.target if node.target in _SAME else _METHODS.get(str(node.target))
    return None


def is_in_place(node: torch.fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node overwrites what it reads."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    return (
        node.target in AUGMENTED
        or (name.endswith("_") and not name.endswith("__"))
        or bool({"inplace", "out"} & {key for key, value in node.kwargs.items() if value})
        or (node.target in (F.relu, F.leaky_relu) and True in node.args[1:])
    )


def may_be_a_view(node: torch.fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the value of a node that streams may lie in the memory of what it is made of."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d) or bool(getattr(module, "inplace", False))
    return function_of(node) in _SAME or takes_channels(node) or is_in_place(node, modules)


def takes_channels(node: torch.fx.Node) -> bool:
    """Whether a node gives some channels of another one's value: in torch a view, in a stream a copy."""
    function = function_of(node)
    return function in _PARTS or function is operator.getitem


def as_channels(value: Constant | None) -> Tensor | None:
    """A constant as one number for each channel, or a single one; None if it is neither."""
    if isinstance(value, (int, float)):
        return torch.tensor([float(value)], device="cpu")
    if value is not None and (value.numel() == 1 or (value.ndim in (3, 4) and value.numel() == value.shape[-3])):
        return value.detach().reshape(-1)
    return None


class Operations:
    """What is known of a graph's nodes: the modules that they call, and which of them are constants."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.constants: dict[torch.fx.Node, Tensor] = {}

    def constant(self, argument: Any) -> Constant | None:
        """A number or a tensor of one value or of one for each channel; None for anything else."""
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return float(argument)
        return self.constants.get(argument) if isinstance(argument, torch.fx.Node) else None

    def stream(self, node: torch.fx.Node) -> bool:
        """Whether a node can be a part of a stream."""
        if not all(map(_may_be_an_image, (node, *node.all_input_nodes))):
            return False
        if node.op == "call_module":
            is_plain = len(node.args) == 1 and not node.kwargs
            return is_plain and _streaming_module(self.modules[str(node.target)])
        function = function_of(node)
        if function is None:
            return False
        if function in _SAME:
            return len(node.args) == 1 and not node.kwargs
        if function in _RELU or function is F.pixel_shuffle:
            return bool(node.args)
        if function in _LEAKY:
            return bool(node.args) and not set(node.kwargs) - {"negative_slope", "inplace"}
        if function is F.interpolate:
            return _repeats(node) is not None
        if function in _JOIN:
            return _joined(node) is not None
        if function in _PARTS:
            return (
                bool(node.args) and _sections(node) is not None and all(_is_numbered_part(user) for user in node.users)
            )
        if function is operator.getitem:
            return self._is_part(node) or (len(node.args) == 2 and _sliced_channels(node) is not None)
        if node.kwargs or len(node.args) != 2:
            return False
        one, other = node.args
        if function in _ADD:
            if not isinstance(one, torch.fx.Node) or self.constant(one) is not None:
                return False
            return self.constant(other) is not None or _may_be_alike(one, other)
        if function in _SUB or function in _DIV:
            return isinstance(one, torch.fx.Node) and self.constant(one) is None and self.constant(other) is not None
        return function in _MUL and (self.constant(one) is None) != (self.constant(other) is None)

    def _is_part(self, node: torch.fx.Node) -> bool:
        source = node.args[0] if node.args else None
        return isinstance(source, torch.fx.Node) and _is_numbered_part(node) and self.stream(source)

    def input_channels(self, node: torch.fx.Node, run: set[torch.fx.Node]) -> int | None:
        """How many channels a value that comes from outside a run has; if need be by the convolution that reads it."""
        shape = shape_of(node)
        return self._input_channels(node, run, set()) if shape is None else shape[1]

    def _input_channels(self, node: torch.fx.Node, run: set[torch.fx.Node], seen: set[torch.fx.Node]) -> int | None:
        seen.add(node)
        for user in node.users:
            if user not in run or user in seen:
                continue
            module = self.modules.get(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, nn.Conv2d):
                return int(module.in_channels)
            function = function_of(user)
            changes = function is F.pixel_shuffle or function in _JOIN or takes_channels(user)
            if changes or isinstance(module, nn.PixelShuffle):
                continue
            found = self._input_channels(user, run, seen)
            if found is not None:
                return found
        return None


def _may_be_an_image(node: torch.fx.Node) -> bool:
    """Whether the value of a node may be (N, C, H, W) float32, or the parts of such a one; or is a constant."""
    value = value_of(node)
    is_other = isinstance(value, Tensor) and (value.ndim != 4 or value.dtype != torch.float32)
    return node.op == "get_attr" or not is_other


def _may_be_alike(one: Any, other: Any) -> bool:
    """Whether two values may have the same shape."""
    shapes = [shape_of(node) if isinstance(node, torch.fx.Node) else None for node in (one, other)]
    return None in shapes or shapes[0] == shapes[1]


def _argument(node: torch.fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _joined(node: torch.fx.Node) -> list[torch.fx.Node] | None:
    """What `torch.cat` joins, if it joins channels."""
    tensors, dim = _argument(node, 0, "tensors"), _argument(node, 1, "dim", 0)
    is_list = isinstance(tensors, (list, tuple)) and len(tensors) > 0
    if not is_list or dim not in (1, -3) or not all(isinstance(tensor, torch.fx.Node) for tensor in tensors):
        return None
    return list(tensors) if not set(node.kwargs) - {"tensors", "dim"} else None


def _sections(node: torch.fx.Node) -> int | list[int] | None:
    """How many channels the parts of `torch.split` have, or how many parts `torch.chunk` makes."""
    is_split = function_of(node) is torch.split
    names = ("split_size_or_sections", "split_size") if is_split else ("chunks",)
    given: Any = [*node.args[1:2], *(node.kwargs[name] for name in names if name in node.kwargs), None][0]
    if _argument(node, 2, "dim", 0) not in (1, -3) or set(node.kwargs) - {*names, "dim"}:
        return None
    if isinstance(given, (list, tuple)):
        return [int(size) for size in given] if all(type(size) is int and size > 0 for size in given) else None
    return given if type(given) is int and given > 0 else None


def _parts(node: torch.fx.Node, channels: int) -> list[tuple[int, int]]:
    """The first channel of each part of `torch.split` or `torch.chunk`, and how many there are."""
    sections = _sections(node)
    if isinstance(sections, int):
        size = sections if function_of(node) is torch.split else -(-channels // sections)
        sections = [min(size, channels - first) for first in range(0, channels, size)]
    if sections is None or sum(sections) != channels:
        raise CannotStreamError
    return [(sum(sections[:number]), size) for number, size in enumerate(sections)]


def _is_numbered_part(node: torch.fx.Node) -> bool:
    """Whether a node takes one part of a value that has been split."""
    if function_of(node) is not operator.getitem or type(node.args[1]) is not int:
        return False
    source = node.args[0]
    return isinstance(source, torch.fx.Node) and function_of(source) in _PARTS and _sections(source) is not None


def _sliced_channels(node: torch.fx.Node) -> slice | None:
    """The channels that `x[:, a:b]` takes."""
    index: Any = node.args[1]
    if not isinstance(index, tuple) or not 2 <= len(index) <= 4 or not all(type(one) is slice for one in index):
        return None
    channels: slice = index[1]
    is_plain = all(type(end) in (int, type(None)) for end in (channels.start, channels.stop))
    others_whole = all(one == slice(None) for one in (index[0], *index[2:]))
    return channels if is_plain and others_whole and channels.step in (None, 1) else None


def _repeats(node: torch.fx.Node) -> int | None:
    """How many times `F.interpolate` repeats each row and column."""
    others = {name for name, value in node.kwargs.items() if value} - {"input", "scale_factor", "mode"}
    if others or len(node.args) > 4 or _argument(node, 1, "size") is not None:
        return None
    return _whole_scale(_argument(node, 2, "scale_factor"), _argument(node, 3, "mode", "nearest"))


def _whole_scale(scale: Any, mode: Any) -> int | None:
    scales = scale if isinstance(scale, (list, tuple)) else [scale]
    is_whole = all(isinstance(one, (int, float)) and one == int(one) >= 1 for one in scales) and len(set(scales)) == 1
    return int(scales[0]) if is_whole and mode in ("nearest", "nearest-exact") else None


def _streaming_module(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        is_plain = (type(module).__bases__[1] if isinstance(module, Packed) else type(module)) is nn.Conv2d
        hooks = module._forward_hooks or module._forward_pre_hooks
        return is_plain and not hooks and Window.of(module) is not None
    if isinstance(module, nn.Upsample):
        return module.size is None and _whole_scale(module.scale_factor, module.mode) is not None
    if type(module) in (nn.Dropout, nn.Dropout2d):
        return not module.training
    return type(module) in (nn.PReLU, nn.ReLU, nn.LeakyReLU, nn.Identity, nn.PixelShuffle)


class Builder:
    """Makes a program of nodes that stream."""

    def __init__(self, operations: Operations) -> None:
        self.program = Program()
        self._operations = operations
        self._values: dict[torch.fx.Node, int] = {}

    def read(self, inputs: list[torch.fx.Node], run: list[torch.fx.Node]) -> None:
        """Take in the values of nodes before the `run`."""
        for node in inputs:
            channels = self._operations.input_channels(node, set(run))
            if channels is None or function_of(node) in _PARTS:
                raise CannotStreamError
            self._values[node] = self.program.read(channels)

    def write(self, outputs: list[torch.fx.Node]) -> None:
        """Give out the values of nodes."""
        for node in outputs:
            number = self._source(node)
            if number in self.program.inputs or number in self.program.outputs:
                raise CannotStreamError
            self.program.write(number)

    def add(self, node: torch.fx.Node) -> None:
        if node.op == "call_module":
            self._values[node] = self._module(self._operations.modules[str(node.target)], self._source(node.args[0]))
        elif function_of(node) not in _PARTS:  # whose parts are taken by the nodes that follow
            self._values[node] = self._function(function_of(node), node)

    def _source(self, argument: Any) -> int:
        if not isinstance(argument, torch.fx.Node) or argument not in self._values:
            raise CannotStreamError
        return self._values[argument]

    def _module(self, module: nn.Module, source: int) -> int:
        if isinstance(module, nn.Conv2d):
            window = Window.of(module)
            if window is None or module.in_channels != self.program.values[source].channels:
                raise CannotStreamError
            return self.program.convolve(module, window, source)
        if isinstance(module, nn.ReLU):
            return self._combine(source, slope=torch.zeros(1, device="cpu"))
        if isinstance(module, nn.LeakyReLU):
            return self._combine(source, slope=torch.tensor([module.negative_slope], device="cpu"))
        if isinstance(module, nn.PReLU):
            return self._combine(source, slope=module.weight.detach())
        if isinstance(module, nn.PixelShuffle):
            return self._shuffle(source, int(module.upscale_factor))
        if isinstance(module, nn.Upsample):
            return self._repeat(source, _whole_scale(module.scale_factor, module.mode))
        return source

    def _function(self, function: Any, node: torch.fx.Node) -> int:
        if function in _SAME:
            return self._source(node.args[0])
        if function in _RELU:
            return self._combine(self._source(node.args[0]), slope=torch.zeros(1, device="cpu"))
        if function in _LEAKY:
            slope = _argument(node, 1, "negative_slope", 0.01)
            if not isinstance(slope, (int, float)):
                raise CannotStreamError
            return self._combine(self._source(node.args[0]), slope=torch.tensor([float(slope)], device="cpu"))
        if function is F.pixel_shuffle:
            scale = _argument(node, 1, "upscale_factor")
            if not isinstance(scale, int):
                raise CannotStreamError
            return self._shuffle(self._source(node.args[0]), scale)
        if function is F.interpolate:
            return self._repeat(self._source(_argument(node, 0, "input")), _repeats(node))
        if function in _JOIN:
            return self._join([self._source(source) for source in _joined(node) or ()])
        if function is operator.getitem:
            return self._part(node)
        return self._arithmetic(function, *node.args)

    def _arithmetic(self, function: Any, one: Any, other: Any) -> int:
        constants = self._operations.constant(one), self._operations.constant(other)
        if constants == (None, None):
            first, second = self._source(one), self._source(other)
            if self.program.values[first].channels != self.program.values[second].channels:
                raise CannotStreamError
            self._check_alike(first, second)
            return self._combine(first, second)
        source = self._source(other if constants[0] is not None else one)
        constant = as_channels(constants[0] if constants[0] is not None else constants[1])
        if constant is None:
            raise CannotStreamError
        constant = constant.float().cpu()
        if function in _ADD:
            return self._combine(source, summand=constant)
        if function in _SUB:
            return self._combine(source, summand=-constant)
        return self._combine(source, factor=constant if function in _MUL else 1 / constant)

    def _combine(self, source: int, other: int = -1, **numbers: Tensor) -> int:
        value = self.program.values[source]
        neutral = {"factor": 1.0, "summand": 0.0, "slope": 1.0}
        if other < 0 and all(bool((number == neutral[name]).all()) for name, number in numbers.items()):
            return source
        spread: dict[str, Any] = {}
        for name, number in numbers.items():
            if number.numel() not in (1, value.channels):
                raise CannotStreamError
            spread[name] = number.float().expand(value.channels).contiguous()
        return self.program.combine(source, other, **spread)

    def _shuffle(self, source: int, scale: int) -> int:
        from ._kernels import SHUFFLE

        value = self.program.values[source]
        if value.channels % (scale * scale):
            raise CannotStreamError
        return self.program.enlarge(SHUFFLE, source, value.channels // (scale * scale), scale)

    def _repeat(self, source: int, scale: int | None) -> int:
        from ._kernels import REPEAT

        if scale is None:
            raise CannotStreamError
        channels = self.program.values[source].channels
        return source if scale == 1 else self.program.enlarge(REPEAT, source, channels, scale)

    def _join(self, sources: list[int]) -> int:
        self._check_alike(*sources)
        return self.program.concatenate(sources)

    def _part(self, node: torch.fx.Node) -> int:
        """Some channels of a value: one part of a split, or a slice."""
        source, index = node.args
        if _is_numbered_part(node):
            assert isinstance(source, torch.fx.Node) and isinstance(index, int)
            whole = self._source(source.args[0])
            parts = _parts(source, self.program.values[whole].channels)
            if not -len(parts) <= index < len(parts):
                raise CannotStreamError
            first, count = parts[index]
        else:
            whole, channels = self._source(source), _sliced_channels(node)
            assert channels is not None
            first, end, _ = channels.indices(self.program.values[whole].channels)
            count = end - first
        if count < 1:
            raise CannotStreamError
        return self.program.channels_of(whole, first, count)

    def _check_alike(self, *values: int) -> None:
        if not self.program.are_alike(*values):
            raise CannotStreamError
