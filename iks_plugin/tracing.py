"""Which parts of a model are chains of layers that can run row by row, found in its graph (torch.fx)."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .runtime import Packed, PackedWeight
from .streams import Program, Stream
from .swap import Swapped, original_class

_ADD = {operator.add, operator.iadd, torch.add}
_SUB = {operator.sub, operator.isub, torch.sub}
_MUL = {operator.mul, operator.imul, torch.mul}
_DIV = {operator.truediv, operator.itruediv, torch.div}
_RELU = {F.relu, F.relu_, torch.relu, torch.relu_}
_LEAKY = {F.leaky_relu, F.leaky_relu_}
_FUNCTIONS = _ADD | _SUB | _MUL | _DIV | _RELU | _LEAKY | {F.pixel_shuffle}
_SAME = {"contiguous", "clone", "detach", "float"}
_METHODS = {"add": operator.add, "add_": operator.add, "sub": operator.sub, "mul": operator.mul, "mul_": operator.mul,
            "div": operator.truediv, "relu": F.relu, "relu_": F.relu}  # fmt: skip


_INPLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, F.relu_, torch.relu_, F.leaky_relu_}
_tracing = threading.Lock()
"""torch.fx changes torch.nn.Module while it traces, and knows of no other thread that does."""


class _Proxy(torch.fx.Proxy):
    """Notes that `x += y` works in place, which torch.fx takes for `x = x + y`."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class Tracer(torch.fx.Tracer):
    """Convolutions, packed or not, and what else has a meaning here, stay whole.

    While it traces, torch.fx has hold of every module in the process: those that other threads run meanwhile go their
    own way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (Packed, PackedWeight)) or super().is_leaf_module(module, name)


@dataclass
class Step:
    """A node of the graph that torch runs or that has a value already, or a stream that stands for several."""

    node: torch.fx.Node | None = None
    is_given: bool = False
    value: Any = None
    stream: Stream | None = None
    inputs: list[torch.fx.Node] = field(default_factory=list)
    outputs: list[torch.fx.Node] = field(default_factory=list)


def trace(model: nn.Module) -> list[Step] | None:
    """The steps that compute `model`; None where its graph cannot be had, or nothing in it is packed and streams.

    The graph is that of a copy without weights of its own, as tracing may leave marks in a module.
    """
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shell = copy.deepcopy(model, dict(weights))  # the copy holds the same tensors
    if isinstance(shell, Swapped) and not isinstance(shell, Packed):
        # The graph is of the forward that the model had before it was packed.
        shell.__class__ = original_class(shell)  # type: ignore[assignment]
    try:
        with _tracing:
            graph = Tracer().trace(shell)
    except Exception:  # whatever a model's Python code makes of a stand-in for a tensor
        return None
    originals = dict(model.named_modules())
    return _Splitter(shell, originals).split(graph)


class _Splitter:
    def __init__(self, shell: nn.Module, originals: dict[str, nn.Module]) -> None:
        self._shell, self._modules = shell, originals
        self._given: dict[torch.fx.Node, Any] = {}
        self._constants: dict[torch.fx.Node, Tensor] = {}

    def constant(self, argument: Any) -> Tensor | float | None:
        """A number or a tensor of one value or of one for each channel; None for anything else."""
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return float(argument)
        return self._constants.get(argument) if isinstance(argument, torch.fx.Node) else None

    def split(self, graph: torch.fx.Graph) -> list[Step] | None:
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        steps: list[Step] = []
        run: list[torch.fx.Node] = []
        worth = False
        for node in graph.nodes:
            if node.op == "get_attr" or self._is_converted_constant(node):
                self._note_value(node)
                continue
            if self._streams(node) and not self._overwrites_what_is_read_later(node):
                run.append(node)
                continue
            if node.op == "placeholder":
                steps.append(Step(node))
                continue
            worth |= self._close(run, steps)
            run = []
            steps.append(Step(node))
        given = [Step(node, is_given=True, value=value) for node, value in self._given.items()]
        return given + steps if worth else None

    def _close(self, run: list[torch.fx.Node], steps: list[Step]) -> bool:
        """Turn a run of nodes into a stream, or leave it to torch where nothing in it is packed."""
        if not any(isinstance(self._modules.get(str(node.target)), Packed) for node in run if node.op == "call_module"):
            steps.extend(Step(node) for node in run)
            return False
        step = self._stream_of(run)
        if step is None:
            steps.extend(Step(node) for node in run)
            return False
        steps.append(step)
        return True

    def _is_converted_constant(self, node: torch.fx.Node) -> bool:
        return node.op == "call_method" and node.target in ("type_as", "to") and node.args[0] in self._constants

    def _note_value(self, node: torch.fx.Node) -> None:
        """Note what a node stands for that does not depend on the input."""
        if node.op == "get_attr":
            find = operator.attrgetter(str(node.target))
            try:
                value = find(self._modules[""])  # not the copy's: `self.mean = self.mean.to(x)` left a stand-in there
            except AttributeError:
                value = find(self._shell)  # a tensor that forward makes, which tracing has put there
        else:
            value = self._constants[node.args[0]].float()  # type: ignore[index]
        self._given[node] = value
        if isinstance(value, Tensor) and _per_channel(value) is not None:
            self._constants[node] = value.detach()

    def _streams(self, node: torch.fx.Node) -> bool:
        if node.op == "call_module":
            return _streaming_module(self._modules[str(node.target)])
        function = self._function(node)
        if function is None:
            return False
        if function in _SAME:
            return len(node.args) == 1 and not node.kwargs
        if function in _RELU:
            return True
        if function in _LEAKY:
            return not set(node.kwargs) - {"negative_slope", "inplace"}
        if function is F.pixel_shuffle:
            return True
        if node.kwargs or len(node.args) != 2:
            return False
        one, other = node.args
        if function in _ADD:
            return isinstance(one, torch.fx.Node)
        if function in _SUB or function in _DIV:
            return isinstance(one, torch.fx.Node) and self.constant(one) is None and self.constant(other) is not None
        return function in _MUL and (self.constant(one) is None) != (self.constant(other) is None)

    def _overwrites_what_is_read_later(self, node: torch.fx.Node) -> bool:
        """Whether an operation works in place on memory that is read afterwards by another name."""
        source = node.args[0] if node.args else None
        if not isinstance(source, torch.fx.Node) or not self._is_in_place(node):
            return False
        shared, waiting = {source}, [source]
        while waiting:  # whatever was made of it may be a view of it, and it a view of what it was made of
            one = waiting.pop()
            for other in (*one.all_input_nodes, *one.users):
                if other not in shared and self._may_share(other if other in one.users else one):
                    shared.add(other)
                    waiting.append(other)
        shared = {one for one in shared if self._order[one] < self._order[node]}
        return any(self._order[user] > self._order[node] for one in shared for user in one.users)

    def _may_share(self, node: torch.fx.Node) -> bool:
        """Whether the value of a node may lie in the memory of what it is made of."""
        if not self._streams(node):
            return node.op not in ("placeholder", "get_attr", "output")
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            return type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d) or bool(getattr(module, "inplace", False))
        return self._function(node) in _SAME or self._is_in_place(node)

    def _is_in_place(self, node: torch.fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self._modules[str(node.target)], "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_")
        return (
            node.target in _INPLACE
            or bool(node.kwargs.get("inplace"))
            or (node.target in (F.relu, F.leaky_relu) and True in node.args[1:])
        )

    def _function(self, node: torch.fx.Node) -> Any:
        if node.op == "call_function":
            return (
                node.target if node.target in _ADD | _SUB | _MUL | _DIV | _RELU | _LEAKY | {F.pixel_shuffle} else None
            )
        if node.op == "call_method":
            return node.target if node.target in _SAME else _METHODS.get(str(node.target))
        return None

    def _stream_of(self, run: list[torch.fx.Node]) -> Step | None:
        inside = set(run)
        inputs = [
            argument
            for node in run
            for argument in node.all_input_nodes
            if argument not in inside and argument not in self._constants
        ]
        inputs = list(dict.fromkeys(inputs))
        outputs = [node for node in run if any(user not in inside for user in node.users)]
        builder = _Builder(self, self._modules)
        try:
            builder.read(inputs, run)
            for node in run:
                builder.add(node)
            builder.write(outputs)
        except _CannotStreamError:
            return None
        return Step(stream=Stream(builder.program), inputs=inputs, outputs=outputs)


class _CannotStreamError(Exception):
    pass


def _per_channel(value: Tensor) -> Tensor | None:
    """`value` as one number for each channel, or a single one; None if it is neither."""
    if value.numel() == 1:
        return value.detach().reshape(1)
    if value.ndim in (3, 4) and value.numel() == value.shape[-3]:
        return value.detach().reshape(-1)
    return None


def _streaming_module(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return _streaming_convolution(module)
    if isinstance(module, nn.PReLU):
        return type(module) is nn.PReLU
    if type(module) in (nn.Dropout, nn.Dropout2d):
        return not module.training
    return type(module) in (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.PixelShuffle)


def _streaming_convolution(module: nn.Conv2d) -> bool:
    """A convolution of odd kernel that keeps the size of the image, with zeros around it."""
    if (type(module).__bases__[1] if isinstance(module, Packed) else type(module)) is not nn.Conv2d:
        return False
    high, wide = module.kernel_size
    padding = tuple(d * (k // 2) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    same = module.padding in (padding, "same")
    hooks = module._forward_hooks or module._forward_pre_hooks
    fits = high % 2 == 1 and wide % 2 == 1 and high * wide <= 144 and module.dilation[0] == module.dilation[1]
    return bool(same and fits and module.stride == (1, 1) and module.padding_mode == "zeros" and not hooks)


class _Builder:
    """Makes a program of nodes that stream."""

    def __init__(self, splitter: _Splitter, modules: dict[str, nn.Module]) -> None:
        self.program = Program()
        self._splitter, self._modules = splitter, modules
        self._values: dict[torch.fx.Node, int] = {}

    def read(self, inputs: list[torch.fx.Node], run: list[torch.fx.Node]) -> None:
        from ._kernels import READ
        from .streams import Op

        for node in inputs:
            channels = self._channels_of(node, run, set())
            if channels is None:
                raise _CannotStreamError
            number = self.program.value(channels, 1)
            self.program.ops.append(Op(READ, target=number))
            self.program.inputs.append(number)
            self._values[node] = number

    def _channels_of(self, node: torch.fx.Node, run: list[torch.fx.Node], seen: set[torch.fx.Node]) -> int | None:
        """How many channels a value that comes from outside has, by the first convolution that reads it."""
        seen.add(node)
        for user in node.users:
            if user not in run or user in seen:
                continue
            module = self._modules.get(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, nn.Conv2d):
                return int(module.in_channels)
            if isinstance(module, nn.PixelShuffle) or self._splitter._function(user) is F.pixel_shuffle:
                continue
            found = self._channels_of(user, run, seen)
            if found is not None:
                return found
        return None

    def write(self, outputs: list[torch.fx.Node]) -> None:
        from ._kernels import WRITE
        from .streams import Op

        for node in outputs:
            number = self._values[node]
            if number in self.program.inputs or number in self.program.outputs:
                raise _CannotStreamError
            self.program.ops.append(Op(WRITE, number))
            self.program.outputs.append(number)

    def add(self, node: torch.fx.Node) -> None:
        if node.op == "call_module":
            self._values[node] = self._module(self._modules[str(node.target)], self._source(node.args[0]))
        else:
            self._values[node] = self._function(self._splitter._function(node), node)

    def _source(self, argument: Any) -> int:
        if not isinstance(argument, torch.fx.Node) or argument not in self._values:
            raise _CannotStreamError
        return self._values[argument]

    def _module(self, module: nn.Module, source: int) -> int:
        from ._kernels import CONVOLVE

        if isinstance(module, nn.Conv2d):
            if module.in_channels != self.program.values[source].channels:
                raise _CannotStreamError
            return self.program.add(CONVOLVE, source, int(module.out_channels), layer=module)
        if isinstance(module, nn.ReLU):
            return self._combine(source, slope=torch.zeros(1, device="cpu"))
        if isinstance(module, nn.LeakyReLU):
            return self._combine(source, slope=torch.tensor([module.negative_slope], device="cpu"))
        if isinstance(module, nn.PReLU):
            return self._combine(source, slope=module.weight.detach())
        if isinstance(module, nn.PixelShuffle):
            return self._shuffle(source, int(module.upscale_factor))
        return source

    def _function(self, function: Any, node: torch.fx.Node) -> int:
        if function in _SAME:
            return self._source(node.args[0])
        if function in _RELU:
            return self._combine(self._source(node.args[0]), slope=torch.zeros(1, device="cpu"))
        if function in _LEAKY:
            slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
            if not isinstance(slope, (int, float)):
                raise _CannotStreamError
            return self._combine(self._source(node.args[0]), slope=torch.tensor([float(slope)], device="cpu"))
        if function is F.pixel_shuffle:
            scale = node.kwargs.get("upscale_factor", node.args[1] if len(node.args) > 1 else None)
            if not isinstance(scale, int):
                raise _CannotStreamError
            return self._shuffle(self._source(node.args[0]), scale)
        one, other = node.args
        constants = self._splitter.constant(one), self._splitter.constant(other)
        if constants == (None, None):
            first, second = self._source(one), self._source(other)
            if self.program.values[first] != self.program.values[second]:
                raise _CannotStreamError
            return self._combine(first, second)
        source = self._source(other if constants[0] is not None else one)
        constant = _as_channels(constants[0] if constants[0] is not None else constants[1])
        if function in _ADD:
            return self._combine(source, summand=constant)
        if function in _SUB:
            return self._combine(source, summand=-constant)
        return self._combine(source, factor=constant if function in _MUL else 1 / constant)

    def _combine(self, source: int, other: int = -1, **numbers: Tensor) -> int:
        from ._kernels import COMBINE

        value = self.program.values[source]
        neutral = {"factor": 1.0, "summand": 0.0, "slope": 1.0}
        if other < 0 and all(bool((number == neutral[name]).all()) for name, number in numbers.items()):
            return source
        spread: dict[str, Any] = {}
        for name, number in numbers.items():
            if number.numel() not in (1, value.channels):
                raise _CannotStreamError
            spread[name] = number.float().expand(value.channels).contiguous()
        return self.program.add(COMBINE, source, value.channels, other=other, **spread)

    def _shuffle(self, source: int, scale: int) -> int:
        from ._kernels import SHUFFLE

        value = self.program.values[source]
        if value.channels % (scale * scale):
            raise _CannotStreamError
        channels = value.channels // (scale * scale)
        return self.program.add(SHUFFLE, source, channels, times=scale, scale=scale)


def _as_channels(constant: Tensor | float | None) -> Tensor:
    if isinstance(constant, Tensor):
        channels = _per_channel(constant)
        if channels is None:
            raise _CannotStreamError
        return channels.float().cpu()
    return torch.tensor([float(constant or 0.0)], device="cpu")


def streamed_layers(steps: list[Step]) -> set[nn.Module]:
    """The layers that run in streams."""
    ops = [op for step in steps if step.stream is not None for op in step.stream.program.ops]
    return {op.layer for op in ops if op.layer is not None}


def run(steps: list[Step], shell_modules: dict[str, nn.Module], image: Tensor) -> Tensor:
    """Compute the model's output of `image` along `steps`."""
    known: dict[torch.fx.Node, Any] = {}
    for step in steps:
        if step.stream is not None:
            results = step.stream.run([known[node] for node in step.inputs])
            known.update(zip(step.outputs, results, strict=True))
            continue
        node = step.node
        assert node is not None
        if node.op == "placeholder":
            known[node] = image
            continue
        if step.is_given:
            known[node] = step.value
            continue
        arguments = torch.fx.node.map_arg(node.args, known.__getitem__)
        keywords = torch.fx.node.map_arg(node.kwargs, known.__getitem__)
        if node.op == "output":
            result: Tensor = arguments[0]  # type: ignore[assignment]
            return result
        if node.op == "call_module":
            known[node] = shell_modules[str(node.target)](*arguments, **keywords)
        elif node.op == "call_function":
            known[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
        else:
            known[node] = getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
    raise AssertionError("a graph ends with its output")
