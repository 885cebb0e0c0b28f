"""Whether a graph says all that a model does: what torch.fx does not see, or takes for a constant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .calls import says_in_place
from .settings import NO_SETTINGS, plain_settings


class UnsafeGraphError(Exception):
    """A graph would not do what the model does."""


def is_conversion(node: torch.fx.Node) -> bool:
    """Whether it is `constant.to(image)` or the like."""
    return node.op == "call_method" and node.target in ("type_as", "to")


def check_writes_no_constant(target: Any, args: Any, kwargs: Any, root: nn.Module) -> None:
    """Refuse what writes to a tensor that forward has made itself, of sizes alone: the graph would hold only one.

    Raises:
        UnsafeGraphError: it does.
    """
    written = [kwargs["out"]] if "out" in kwargs else list(args[:1]) if says_in_place(target) else []
    for tensor in written:
        owned = any(tensor is one for one in (*root.parameters(), *root.buffers()))
        if isinstance(tensor, Tensor) and not isinstance(tensor, torch.fx.Proxy) and not owned:
            raise UnsafeGraphError(f"{target} writes to a tensor that forward makes")


def is_all(graph: torch.fx.Graph, model: nn.Module) -> bool:
    """Whether what a graph takes and gives is what `model` does."""
    owned = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    outputs = [given for node in graph.nodes if node.op == "output" for given in node.all_input_nodes]
    return (
        not any(node.users for node in placeholders[1:])
        # A tensor that forward has made would be the same one each time.
        and not any(node.op == "get_attr" and node.target not in owned for node in outputs)
    )


def leaves_something(shell: nn.Module, model: nn.Module) -> bool:
    """Whether the forward of the `shell`, a copy of `model`, has left anything in it, but for constants it converts."""
    originals = dict(model.named_modules())
    for name, module in shell.named_modules():
        before = originals[name].__dict__
        for key, value in module.__dict__.items():
            if any(not is_conversion(proxy.node) for proxy in _proxies(value)):
                return True
            if key not in NO_SETTINGS and plain_settings(value) != plain_settings(before.get(key)):
                return True
    return False


def _proxies(value: Any) -> Iterator[torch.fx.Proxy]:
    if isinstance(value, torch.fx.Proxy):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _proxies(one)
    elif isinstance(value, dict):
        yield from _proxies(list(value.values()))


def as_given(result: Any) -> Any:
    """Lists and dictionaries as a model gives them: torch.fx has some of its own, which cannot be changed."""
    if type(result).__name__ == "immutable_list":
        return [as_given(one) for one in result]
    if type(result).__name__ == "immutable_dict":
        return {name: as_given(one) for name, one in result.items()}
    return tuple(map(as_given, result)) if type(result) is tuple else result


def is_same(result: Any, expected: Any, tolerance: float = 1e-4) -> bool:
    """Whether two outputs of a model are equal, but for rounding."""
    if isinstance(expected, Tensor):
        if not isinstance(result, Tensor) or result.shape != expected.shape or result.dtype != expected.dtype:
            return False
        if not expected.is_floating_point() or not expected.numel():
            return torch.equal(result, expected)
        largest = float(expected.abs().nan_to_num(posinf=0.0).max())
        return torch.allclose(result, expected, rtol=0, atol=tolerance * largest, equal_nan=True)
    if type(result) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        fits = len(result) == len(expected)
        return fits and all(is_same(one, other, tolerance) for one, other in zip(result, expected, strict=True))
    if isinstance(expected, dict):
        fits = result.keys() == expected.keys()
        return fits and all(is_same(result[key], expected[key], tolerance) for key in expected)
    return bool(result == expected)
