"""Programs made of a graph's operations, one by one."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import (
    ADD,
    JOIN,
    LEAKY,
    MUL,
    PARTS,
    RELU,
    SAME,
    SUB,
    CannotStreamError,
    argument,
    function_of,
    is_numbered_part,
    joined,
    places_of_parts,
    repeats,
    sliced_channels,
    whole_scale,
)
from .operations import Operations, as_channels
from .program import Program, Window


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
            if channels is None or function_of(node) in PARTS:
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
        elif function_of(node) not in PARTS:  # whose parts are taken by the nodes that follow
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
            return self._repeat(source, whole_scale(module.scale_factor, module.mode))
        return source

    def _function(self, function: Any, node: torch.fx.Node) -> int:
        if function in SAME:
            return self._source(node.args[0])
        if function in RELU:
            return self._combine(self._source(node.args[0]), slope=torch.zeros(1, device="cpu"))
        if function in LEAKY:
            slope = argument(node, 1, "negative_slope", 0.01)
            if not isinstance(slope, (int, float)):
                raise CannotStreamError
            return self._combine(self._source(node.args[0]), slope=torch.tensor([float(slope)], device="cpu"))
        if function is F.pixel_shuffle:
            scale = argument(node, 1, "upscale_factor")
            if not isinstance(scale, int):
                raise CannotStreamError
            return self._shuffle(self._source(node.args[0]), scale)
        if function is F.interpolate:
            return self._repeat(self._source(argument(node, 0, "input")), repeats(node))
        if function in JOIN:
            return self._join([self._source(source) for source in joined(node) or ()])
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
        if function in ADD:
            return self._combine(source, summand=constant)
        if function in SUB:
            return self._combine(source, summand=-constant)
        return self._combine(source, factor=constant if function in MUL else 1 / constant)

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
        if is_numbered_part(node):
            assert isinstance(source, torch.fx.Node) and isinstance(index, int)
            whole = self._source(source.args[0])
            parts = places_of_parts(source, self.program.values[whole].channels)
            if not -len(parts) <= index < len(parts):
                raise CannotStreamError
            first, count = parts[index]
        else:
            whole, channels = self._source(source), sliced_channels(node)
            assert channels is not None
            first, end, _ = channels.indices(self.program.values[whole].channels)
            count = end - first
        if count < 1:
            raise CannotStreamError
        return self.program.channels_of(whole, first, count)

    def _check_alike(self, *values: int) -> None:
        if not self.program.are_alike(*values):
            raise CannotStreamError
