"""Which operations of a graph (torch.fx) can run row by row."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import (
    ADD,
    DIV,
    JOIN,
    LEAKY,
    MUL,
    PARTS,
    RELU,
    SAME,
    SUB,
    function_of,
    is_numbered_part,
    joined,
    repeats,
    sections_of,
    sliced_channels,
    takes_channels,
    whole_scale,
)
from .program import Window
from .runtime import class_unpacked
from .shapes import shape_of, value_of

Constant = Tensor | float


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
        if function in SAME:
            return len(node.args) == 1 and not node.kwargs
        if function in RELU or function is F.pixel_shuffle:
            return bool(node.args)
        if function in LEAKY:
            return bool(node.args) and not set(node.kwargs) - {"negative_slope", "inplace"}
        if function is F.interpolate:
            return repeats(node) is not None
        if function in JOIN:
            return joined(node) is not None
        if function in PARTS:
            return (
                bool(node.args) and sections_of(node) is not None and all(is_numbered_part(user) for user in node.users)
            )
        if function is operator.getitem:
            return self._is_part(node) or (len(node.args) == 2 and sliced_channels(node) is not None)
        if node.kwargs or len(node.args) != 2:
            return False
        one, other = node.args
        if function in ADD:
            if not isinstance(one, torch.fx.Node) or self.constant(one) is not None:
                return False
            return self.constant(other) is not None or _may_be_alike(one, other)
        if function in SUB or function in DIV:
            return isinstance(one, torch.fx.Node) and self.constant(one) is None and self.constant(other) is not None
        return function in MUL and (self.constant(one) is None) != (self.constant(other) is None)

    def _is_part(self, node: torch.fx.Node) -> bool:
        source = node.args[0] if node.args else None
        return isinstance(source, torch.fx.Node) and is_numbered_part(node) and self.stream(source)

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
            changes = function is F.pixel_shuffle or function in JOIN or takes_channels(user)
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


def _streaming_module(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        hooks = module._forward_hooks or module._forward_pre_hooks
        return class_unpacked(module) is nn.Conv2d and not hooks and Window.of(module) is not None
    if isinstance(module, nn.Upsample):
        return module.size is None and whole_scale(module.scale_factor, module.mode) is not None
    if type(module) in (nn.Dropout, nn.Dropout2d):
        return not module.training
    return type(module) in (nn.PReLU, nn.ReLU, nn.LeakyReLU, nn.Identity, nn.PixelShuffle)
