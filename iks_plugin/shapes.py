"""The shapes of a graph's values, found while it is traced by computing each one on tensors without data ("meta")."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from .calls import ADD, DIV, JOIN, LEAKY, METHODS, MUL, RELU, SUB
from .runtime import Packed, PackedWeight, class_unpacked
from .swap import original_class

_KEY = "iks_plugin"
_ARITHMETIC = ADD | SUB | MUL | DIV
_LIKE_THE_FIRST = RELU | LEAKY | {F.prelu, F.gelu, F.silu, torch.sigmoid, torch.tanh}
_LIKE_THE_INPUT = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout)


def value_of(node: torch.fx.Node) -> Any:
    """A stand-in of the same shape and dtype for what `node` gives; None where that is not known."""
    return node.meta.get(_KEY)


def shape_of(node: torch.fx.Node) -> torch.Size | None:
    """The shape of the tensor that `node` gives; None where it is not known, or is none."""
    value = value_of(node)
    return value.shape if isinstance(value, Tensor) else None


class Shapes:
    """Computes the values of nodes one by one, as they are put into the graph of `root`."""

    def __init__(self, root: nn.Module, image: torch.Size) -> None:
        self._root, self._image = root, image
        self._modules: dict[str, nn.Module] = {}

    def note(self, node: torch.fx.Node) -> None:
        """Compute a node's value; whatever cannot be computed without data stays unknown."""
        try:
            with torch.no_grad():
                node.meta[_KEY] = self._computed(node)
        except Exception:  # what operations without data raise is not said anywhere
            node.meta.pop(_KEY, None)

    def _computed(self, node: torch.fx.Node) -> Any:
        if node.op == "placeholder":
            return torch.empty(self._image, dtype=torch.float32, device="meta")
        if node.op == "get_attr":
            return _without_data(operator.attrgetter(str(node.target))(self._root))
        arguments: Any = torch.fx.node.map_arg(node.args, self._known)
        keywords: Any = torch.fx.node.map_arg(node.kwargs, self._known)
        if node.op == "call_module":
            return self._call(str(node.target), *arguments, **keywords)
        if node.op == "call_method":
            method = getattr(type(arguments[0]), str(node.target))
            return _call_function(METHODS.get(str(node.target), method), *arguments, **keywords)
        if node.op == "call_function":
            return _call_function(node.target, *arguments, **keywords)
        return None

    def _known(self, node: torch.fx.Node) -> Any:
        if node.op == "get_attr" and _KEY not in node.meta:  # torch.fx puts buffers into the graph by itself
            self.note(node)
        return node.meta[_KEY]

    def _call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        module = self._root.get_submodule(name)
        plain = class_unpacked(module)
        if plain is nn.Conv2d and isinstance(module, nn.Conv2d):
            return _convolved(module, *arguments, **keywords)
        if plain is nn.PixelShuffle:
            return _call_function(F.pixel_shuffle, *arguments, int(module.upscale_factor))  # type: ignore[arg-type]
        if isinstance(module, Packed):
            return _call_packed(module, *arguments, **keywords)
        if type(module) in _LIKE_THE_INPUT:
            return _empty_like(*arguments, **keywords)
        if name not in self._modules:
            tensors = (*module.parameters(), *module.buffers())
            memo: dict[int, Any] = {id(tensor): _without_data(tensor) for tensor in tensors}
            self._modules[name] = copy.deepcopy(module, memo)
        return self._modules[name](*arguments, **keywords)


def _call_function(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """What a function gives: without torch's own way for the common ones, which imports its compiler for a second."""
    if function in _LIKE_THE_FIRST:
        return _empty_like(arguments[0])
    if function in _ARITHMETIC and len(arguments) == 2 and not keywords and isinstance(arguments[0], Tensor):
        one, other = arguments
        shape = np.broadcast_shapes(one.shape, other.shape if isinstance(other, Tensor) else ())
        dtype = torch.result_type(one, other)
        if dtype.is_floating_point:
            return torch.empty(shape, dtype=dtype, device="meta")
    if function is F.pixel_shuffle and len(arguments) == 2:
        (*others, channels, height, width), scale = arguments[0].shape, arguments[1]
        shape = (*others, channels // scale**2, height * scale, width * scale)
        return torch.empty(shape, dtype=arguments[0].dtype, device="meta")
    if function is F.interpolate:
        return _interpolated(*arguments, **keywords)
    if function in JOIN and len(arguments) == 2 and not keywords:
        return _joined(*arguments)
    return function(*arguments, **keywords)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _interpolated(image: Tensor, size: Any = None, scale_factor: Any = None, *_: Any, **__: Any) -> Tensor:
    sizes = image.shape[2:]
    if size is None:
        scales = scale_factor if isinstance(scale_factor, (tuple, list)) else [scale_factor] * len(sizes)
        size = [int(old * scale) for old, scale in zip(sizes, scales, strict=True)]
    elif isinstance(size, int):
        size = [size] * len(sizes)
    return torch.empty((*image.shape[:2], *size), dtype=image.dtype, device="meta")


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    shape, dtype = list(tensors[0].shape), tensors[0].dtype
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
        others = [size for place, size in enumerate(tensor.shape) if place != dim % len(shape)]
        if others != [size for place, size in enumerate(shape) if place != dim % len(shape)]:
            raise ValueError("tensors that do not fit")
    return torch.empty(shape, dtype=dtype, device="meta")


def _convolved(layer: nn.Conv2d, image: Tensor) -> Tensor:
    *batch, channels, height, width = image.shape
    sizes = [height, width]
    if channels != layer.in_channels:
        raise ValueError("other channels than a convolution has")
    for place, size in enumerate(sizes):
        span = layer.dilation[place] * (layer.kernel_size[place] - 1)
        padding = (
            {"same": span, "valid": 0}[layer.padding] if isinstance(layer.padding, str) else 2 * layer.padding[place]
        )
        sizes[place] = (size + padding - span - 1) // layer.stride[place] + 1
    return torch.empty((*batch, layer.out_channels, *sizes), dtype=image.dtype, device="meta")


def _call_packed(module: Packed, image: Tensor) -> Tensor:
    packed: PackedWeight = module.packed_weight
    weight = torch.empty(packed.shape, dtype=packed.dtype, device="meta")
    bias: Any = None if module.bias is None else _without_data(module.bias)
    plain = original_class(module)
    if plain is nn.Linear:
        return F.linear(image, weight, bias)
    result: Tensor = plain._conv_forward(module, image, weight, bias)  # type: ignore[attr-defined]
    return result


def _without_data(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
    return value.detach().to("meta") if isinstance(value, Tensor) else value
