"""The shapes of a graph's values, found while it is traced by computing each one on tensors without data ("meta")."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from .runtime import Packed, PackedWeight
from .swap import original_class

_KEY = "iks_plugin"


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
            return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        if node.op == "call_function":
            return node.target(*arguments, **keywords)  # type: ignore[operator]
        return None

    def _known(self, node: torch.fx.Node) -> Any:
        if node.op == "get_attr" and _KEY not in node.meta:  # torch.fx puts buffers into the graph by itself
            self.note(node)
        return node.meta[_KEY]

    def _call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        module = self._root.get_submodule(name)
        if isinstance(module, Packed):
            return _call_packed(module, *arguments, **keywords)
        if name not in self._modules:
            tensors = (*module.parameters(), *module.buffers())
            memo: dict[int, Any] = {id(tensor): _without_data(tensor) for tensor in tensors}
            self._modules[name] = copy.deepcopy(module, memo)
        return self._modules[name](*arguments, **keywords)


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
