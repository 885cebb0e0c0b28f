"""What the nodes of a graph (torch.fx) call, and with what."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

ADD = {operator.add, operator.iadd, torch.add}
SUB = {operator.sub, operator.isub, torch.sub}
MUL = {operator.mul, operator.imul, torch.mul}
DIV = {operator.truediv, operator.itruediv, torch.div}
RELU = {F.relu, F.relu_, torch.relu, torch.relu_}
LEAKY = {F.leaky_relu, F.leaky_relu_}
JOIN = {torch.cat, torch.concat, torch.concatenate}
PARTS = {torch.split, torch.chunk}
_FUNCTIONS = ADD | SUB | MUL | DIV | RELU | LEAKY | JOIN | PARTS | {F.pixel_shuffle, F.interpolate, operator.getitem}
SAME = {"contiguous", "clone", "detach", "float"}
METHODS = {
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
_WRITING = {"setitem", *(function.__name__ for function in AUGMENTED)}


class CannotStreamError(Exception):
    """A run of nodes cannot be one program after all."""


def function_of(node: torch.fx.Node) -> Any:
    """The function, or the name of the method, that a node calls, if it can stream."""
    if node.op == "call_function":
        return node.target if node.target in _FUNCTIONS else None
    if node.op == "call_method":
        return node.target if node.target in SAME else METHODS.get(str(node.target))
    return None


def says_in_place(target: Any) -> bool:
    """Whether a function, or the method of that name, works in place by what it is called."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.strip("_") in _WRITING or (name.endswith("_") and not name.endswith("__"))


def is_in_place(node: torch.fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node overwrites what it reads."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return (
        says_in_place(node.target)
        or bool({"inplace", "out"} & {key for key, value in node.kwargs.items() if value})
        or (node.target in (F.relu, F.leaky_relu) and True in node.args[1:])
    )


def may_be_a_view(node: torch.fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the value of a node that streams may lie in the memory of what it is made of."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d) or bool(getattr(module, "inplace", False))
    return function_of(node) in SAME or takes_channels(node) or is_in_place(node, modules)


def takes_channels(node: torch.fx.Node) -> bool:
    """Whether a node gives some channels of another one's value: in torch a view, in a stream a copy."""
    function = function_of(node)
    return function in PARTS or function is operator.getitem


def argument(node: torch.fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def joined(node: torch.fx.Node) -> list[torch.fx.Node] | None:
    """What `torch.cat` joins, if it joins channels."""
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    is_list = isinstance(tensors, (list, tuple)) and len(tensors) > 0
    if not is_list or dim not in (1, -3) or not all(isinstance(tensor, torch.fx.Node) for tensor in tensors):
        return None
    return list(tensors) if not set(node.kwargs) - {"tensors", "dim"} else None


def sections_of(node: torch.fx.Node) -> int | list[int] | None:
    """How many channels the parts of `torch.split` have, or how many parts `torch.chunk` makes."""
    is_split = function_of(node) is torch.split
    names = ("split_size_or_sections", "split_size") if is_split else ("chunks",)
    given: Any = [*node.args[1:2], *(node.kwargs[name] for name in names if name in node.kwargs), None][0]
    if argument(node, 2, "dim", 0) not in (1, -3) or set(node.kwargs) - {*names, "dim"}:
        return None
    if isinstance(given, (list, tuple)):
        return [int(size) for size in given] if all(type(size) is int and size > 0 for size in given) else None
    return given if type(given) is int and given > 0 else None


def places_of_parts(node: torch.fx.Node, channels: int) -> list[tuple[int, int]]:
    """The first channel of each part of `torch.split` or `torch.chunk`, and how many there are."""
    sections = sections_of(node)
    if isinstance(sections, int):
        size = sections if function_of(node) is torch.split else -(-channels // sections)
        sections = [min(size, channels - first) for first in range(0, channels, size)]
    if sections is None or sum(sections) != channels:
        raise CannotStreamError
    return [(sum(sections[:number]), size) for number, size in enumerate(sections)]


def is_numbered_part(node: torch.fx.Node) -> bool:
    """Whether a node takes one part of a value that has been split."""
    if function_of(node) is not operator.getitem or type(node.args[1]) is not int:
        return False
    source = node.args[0]
    return isinstance(source, torch.fx.Node) and function_of(source) in PARTS and sections_of(source) is not None


def sliced_channels(node: torch.fx.Node) -> slice | None:
    """The channels that `x[:, a:b]` takes."""
    index: Any = node.args[1]
    if not isinstance(index, tuple) or not 2 <= len(index) <= 4 or not all(type(one) is slice for one in index):
        return None
    channels: slice = index[1]
    is_plain = all(type(end) in (int, type(None)) for end in (channels.start, channels.stop))
    others_whole = all(one == slice(None) for one in (index[0], *index[2:]))
    return channels if is_plain and others_whole and channels.step in (None, 1) else None


def repeats(node: torch.fx.Node) -> int | None:
    """How many times `F.interpolate` repeats each row and column."""
    others = {name for name, value in node.kwargs.items() if value} - {"input", "scale_factor", "mode"}
    if others or len(node.args) > 4 or argument(node, 1, "size") is not None:
        return None
    return whole_scale(argument(node, 2, "scale_factor"), argument(node, 3, "mode", "nearest"))


def whole_scale(scale: Any, mode: Any) -> int | None:
    scales = scale if isinstance(scale, (list, tuple)) else [scale]
    is_whole = all(isinstance(one, (int, float)) and one == int(one) >= 1 for one in scales) and len(set(scales)) == 1
    return int(scales[0]) if is_whole and mode in ("nearest", "nearest-exact") else None
