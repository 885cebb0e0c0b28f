"""Which parts of a model are chains of layers that can run row by row, found in its graph (torch.fx)."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .builder import Builder
from .calls import AUGMENTED, CannotStreamError, is_in_place, may_be_a_view, takes_channels
from .operations import Operations, as_channels
from .runtime import Packed, PackedWeight
from .shapes import Shapes, shape_of, value_of
from .steady import copy_to_try, versions_of_tensors
from .streams import Stream
from .trust import as_given, check_writes_no_constant, is_all, is_conversion, leaves_something

_tracing = threading.Lock()
"""torch.fx changes torch.nn.Module while it traces, and knows of no other thread that does."""


class _Proxy(torch.fx.Proxy):
    """Unlike torch.fx's own, knows its shape, so that code may ask for it, and that `x += y` works in place."""

    tracer: Tracer

    def __getattr__(self, name: str) -> Any:
        value = value_of(self.node)
        if isinstance(value, Tensor) and name in ("shape", "ndim", "dtype"):
            self.tracer.is_sized |= name != "dtype"
            return getattr(value, name)
        return super().__getattr__(name)

    def size(self, *dim: int, **named: int) -> Any:
        return self._ask("size", *dim, **named)

    def dim(self) -> Any:
        return self._ask("dim")

    def numel(self) -> Any:
        return self._ask("numel")

    def _ask(self, method: str, *given: Any, **named: Any) -> Any:
        value = value_of(self.node)
        if isinstance(value, Tensor):
            self.tracer.is_sized = True
            return getattr(value, method)(*given, **named)
        return self.tracer.create_proxy("call_method", method, (self, *given), named)

    def __iter__(self) -> Iterator[Any]:
        value = value_of(self.node)
        if isinstance(value, (tuple, list)):
            self.tracer.is_sized = True  # of another image there may be more or fewer
            return iter([operator.getitem(self, number) for number in range(len(value))])
        return iter(super().__iter__())

    def __len__(self) -> int:
        value = value_of(self.node)
        if not isinstance(value, (Tensor, tuple, list)):
            return int(super().__len__())  # which says what cannot be traced
        self.tracer.is_sized = True
        return len(value)


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[_Proxy, Any], Any]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _function in AUGMENTED:
    setattr(_Proxy, f"__{_function.__name__}__", _in_place(_function))


class Tracer(torch.fx.Tracer):
    """Convolutions, packed or not, and what else has a meaning here, stay whole.

    While it traces, torch.fx has hold of every module in the process: those that other threads run meanwhile go their
    own way.
    """

    def __init__(self, root: nn.Module, image: torch.Size) -> None:
        super().__init__()
        self.is_sized = False
        self._thread = threading.get_ident()
        self._shapes, self._computes = Shapes(root, image), False

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *given: Any, **options: Any) -> Any:
        if kind == "placeholder" and args and not str(target).startswith("*"):
            return args[0]  # the model is called with an image alone, so that others have their defaults
        if kind in ("call_function", "call_method"):
            check_writes_no_constant(target, args, kwargs, self.root)
        proxy = super().create_proxy(kind, target, args, kwargs, *given, **options)
        self._computes = True
        self._shapes.note(proxy.node)
        self._computes = False
        return proxy

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._computes or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._computes or threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (Packed, PackedWeight)) or super().is_leaf_module(module, name)


@dataclass
class Step:
    """A node of the graph that torch runs or that has a value already, or a stream that stands for several.

    `last` are the nodes whose values nobody needs after it.
    """

    node: torch.fx.Node | None = None
    is_given: bool = False
    value: Any = None
    stream: Stream | None = None
    inputs: list[torch.fx.Node] = field(default_factory=list)
    outputs: list[torch.fx.Node] = field(default_factory=list)
    last: list[torch.fx.Node] = field(default_factory=list)

    def reads(self) -> list[torch.fx.Node]:
        return self.inputs if self.node is None else self.node.all_input_nodes


@dataclass
class Trace:
    """A model's graph.

    Attributes:
        steps: what computes the model; None where its graph cannot be had, or nothing in it is packed and streams.
        is_sized: whether the graph may be right for images of one shape only.
    """

    steps: list[Step] | None
    is_sized: bool


def trace(model: nn.Module, image: torch.Size) -> Trace:
    """The graph of `model` for images of one shape, (N, C, H, W).

    It is that of the forward that the model had before it was packed, by a copy, as tracing may leave marks in it.
    """
    steps, is_sized = None, False
    try:
        shell = copy_to_try(model)
        versions = versions_of_tensors(shell)
        tracer = Tracer(shell, image)
        try:
            with _tracing:
                graph = tracer.trace(shell)
        finally:
            is_sized = tracer.is_sized
        has_state = versions != versions_of_tensors(shell) or leaves_something(shell, model)
        if not has_state and is_all(graph, model):
            steps = _Splitter(shell, dict(model.named_modules())).split(graph)
    except Exception:  # whatever a model's Python code makes of a stand-in for a tensor
        steps = None
    return Trace(steps, is_sized)


class _Splitter:
    def __init__(self, shell: nn.Module, originals: dict[str, nn.Module]) -> None:
        self._shell, self._modules = shell, originals
        self._operations = Operations(originals)
        self._given: dict[torch.fx.Node, Any] = {}

    def split(self, graph: torch.fx.Graph) -> list[Step] | None:
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        if any(self._changes_what_is_given(node) for node in graph.nodes):
            return None
        steps: list[Step] = []
        run: list[torch.fx.Node] = []
        worth = False
        for node in graph.nodes:
            if node.op == "get_attr" or self._is_converted_constant(node):
                self._note_value(node)
                continue
            if self._operations.stream(node) and not self._shares_what_changes(node):
                run.append(node)
                continue
            if node.op == "placeholder":
                steps.append(Step(node))
                continue
            worth |= self._close(run, steps)
            run = []
            steps.append(Step(node))
        steps = [Step(node, is_given=True, value=value) for node, value in self._given.items()] + steps
        needed: set[torch.fx.Node] = set()
        for step in reversed(steps):
            step.last = [node for node in step.reads() if node not in needed]
            needed.update(step.last)
        return steps if worth else None

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
        value = value_of(node)
        return (
            is_conversion(node)
            and node.args[0] in self._operations.constants
            and isinstance(value, Tensor)
            and value.dtype == torch.float32
        )

    def _note_value(self, node: torch.fx.Node) -> None:
        """Note what a node stands for that does not depend on the input."""
        if node.op == "get_attr":
            find = operator.attrgetter(str(node.target))
            try:
                value = find(self._modules[""])  # not the copy's: `self.mean = self.mean.to(x)` left a stand-in there
            except AttributeError:
                value = find(self._shell)  # a tensor that forward makes, which tracing has put there
                if value.untyped_storage().nbytes() > value.nbytes:  # a part of the copy's, which shall not stay for it
                    value = value.clone()
        else:
            value = self._operations.constants[node.args[0]].float()  # type: ignore[index]
        self._given[node] = value
        if isinstance(value, Tensor) and as_channels(value) is not None:
            self._operations.constants[node] = value.detach()

    def _shares_what_changes(self, node: torch.fx.Node) -> bool:
        """Whether an operation works in place on memory that is read afterwards by another name.

        Or whether it makes a view of channels, in memory that is overwritten afterwards.
        """
        source = node.args[0] if node.args else None
        if not isinstance(source, torch.fx.Node):
            return False
        if is_in_place(node, self._modules):
            shared = {one for one in self._sharing(source) if self._order[one] < self._order[node]}
            return any(self._order[user] > self._order[node] for one in shared for user in one.users)
        if takes_channels(node):
            users = {user for one in self._sharing(node) for user in one.users}
            return any(is_in_place(user, self._modules) and self._order[user] > self._order[node] for user in users)
        return False

    def _changes_what_is_given(self, node: torch.fx.Node) -> bool:
        """Whether it works in place on the model's input, which whoever called may look at, or on a buffer."""
        source = node.args[0] if node.args else None
        if not isinstance(source, torch.fx.Node) or not is_in_place(node, self._modules):
            return False
        return any(one.op in ("placeholder", "get_attr") for one in self._sharing(source))

    def _sharing(self, source: torch.fx.Node) -> set[torch.fx.Node]:
        """The nodes whose values may lie in the memory of that of `source`."""
        shared, waiting = {source}, [source]
        while waiting:  # whatever was made of it may be a view of it, and it a view of what it was made of
            one = waiting.pop()
            for other in (*one.all_input_nodes, *one.users):
                if other not in shared and self._may_share(other if other in one.users else one):
                    shared.add(other)
                    waiting.append(other)
        return shared

    def _may_share(self, node: torch.fx.Node) -> bool:
        """Whether the value of a node may lie in the memory of what it is made of."""
        if not self._operations.stream(node):
            return node.op not in ("placeholder", "get_attr", "output")
        return may_be_a_view(node, self._modules)

    def _stream_of(self, run: list[torch.fx.Node]) -> Step | None:
        inside = set(run)
        inputs = [
            argument
            for node in run
            for argument in node.all_input_nodes
            if argument not in inside and argument not in self._operations.constants
        ]
        inputs = list(dict.fromkeys(inputs))
        if len({shape[2:] for shape in map(shape_of, inputs) if shape is not None}) > 1:
            return None
        outputs = [node for node in run if any(user not in inside for user in node.users)]
        builder = Builder(self._operations)
        try:
            builder.read(inputs, run)
            for node in run:
                builder.add(node)
            builder.write(outputs)
        except CannotStreamError:
            return None
        return Step(stream=Stream(builder.program), inputs=inputs, outputs=outputs)


def streamed_layers(steps: list[Step]) -> set[nn.Module]:
    """The layers that run in streams."""
    ops = [op for step in steps if step.stream is not None for op in step.stream.program.ops]
    return {op.layer for op in ops if op.layer is not None}


def _forget(known: dict[torch.fx.Node, Any], step: Step) -> None:
    for node in step.last:
        del known[node]


def run(steps: list[Step], modules: dict[str, nn.Module], image: Tensor) -> Any:
    """Compute the model's output of `image` along `steps`."""
    known: dict[torch.fx.Node, Any] = {}
    for step in steps:
        if step.stream is not None:
            results = step.stream.run([known[node] for node in step.inputs])
            known.update(zip(step.outputs, results, strict=True))
            _forget(known, step)
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
            return as_given(arguments[0])
        if node.op == "call_module":
            known[node] = modules[str(node.target)](*arguments, **keywords)
        elif node.op == "call_function":
            known[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
        else:
            known[node] = getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        del arguments, keywords
        _forget(known, step)
    raise AssertionError("a graph ends with its output")
