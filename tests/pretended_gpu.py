"""A pretended GPU: tensors in the CPU's memory that say they are on `cuda:0`, and refuse to be mixed with others.

It finds what would fail on a GPU though there is none: a tensor that was made or left on the CPU and meets one of the
GPU, or a tensor that goes to NumPy from there. Of CUDA's kernels, their rounding and their speed it tells nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")

_aten = torch.ops.aten
_BETWEEN_DEVICES = {_aten.copy_.default, _aten._to_copy.default}
_BY_INDEX = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """`device="cuda"`, `.to("cuda")` and `.cuda()` give such tensors, `.cpu()` and `.to("cpu")` plain ones."""
    future = torch.__future__
    converting = "swap" if hasattr(future, "set_swap_module_params_on_conversion") else "overwrite"  # torch 2.1
    convert = getattr(future, f"set_{converting}_module_params_on_conversion")
    before = getattr(future, f"get_{converting}_module_params_on_conversion")()
    with pytest.MonkeyPatch.context() as patch, _Devices():
        patch.setattr(torch.autograd.Variable, "_execution_engine", _Engine)
        patch.setattr(torch, "load", partial(_load, torch.load))
        convert(True)  # as a plain parameter's memory cannot become the GPU's
        try:
            yield
        finally:
            convert(before)


def _load(original: Callable[..., Any], file: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """Tensors of a file come to the CPU, and from there to where they are asked for."""
    if not isinstance(map_location, (str, torch.device)):
        return original(file, map_location, **kwargs)
    return moved(original(file, "cpu", **kwargs), map_location)


def moved(state: Any, device: str | torch.device) -> Any:
    """The same with every tensor, at any depth of dictionaries and lists, on `device`."""
    target = torch.device(device)
    return tree_map(lambda value: _moved(value, target) if isinstance(value, Tensor) else value, state)


class _Engine:
    """The backward pass, with the mode: torch switches it off for what it calls."""

    _engine = torch.autograd.Variable._execution_engine
    queue_callback = _engine.queue_callback

    @classmethod
    def run_backward(cls, *args: Any, **kwargs: Any) -> Any:
        with _Devices():
            return cls._engine.run_backward(*args, **kwargs)


class OnGpu(Tensor):
    """A tensor of the pretended GPU.

    Args:
        inner: a plain tensor, which holds the values from now on.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        assert not isinstance(inner, OnGpu)
        geometry = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        kind = {"dtype": inner.dtype, "layout": inner.layout, "device": CPU, "requires_grad": inner.requires_grad}
        made: OnGpu = Tensor._make_wrapper_subclass(cls, inner.size(), **geometry, **kind)
        made.inner = inner.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)

    @property
    def data(self) -> OnGpu:
        return OnGpu(self.inner)

    @data.setter
    def data(self, other: OnGpu) -> None:
        assert isinstance(other, OnGpu) and other.shape == self.shape
        self.inner = other.inner

    def get_device(self) -> int:
        return 0

    def cpu(self) -> Tensor:
        return _moved(self, CPU)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def __repr__(self, **kwargs: Any) -> str:
        return f"{self.inner!r} on {CUDA}"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        if id(self) not in memo:
            copied = OnGpu(self.inner.clone())
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
            if self.grad is not None:
                copied.grad = self.grad.clone()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # a file does not know of it

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_mixed(func, args, [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)])
        plain, named = tree_map(_inner, args), tree_map(_inner, kwargs)
        result = func(*plain, **{name: CPU if isinstance(x, torch.device) else x for name, x in named.items()})
        if "out" in kwargs:
            return kwargs["out"]
        return args[0] if func._schema.is_mutable else tree_map(_wrapped, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def _wrapped(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, Tensor) and not isinstance(value, OnGpu) else value


def _refuse_mixed(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """As CUDA does: scalars of the CPU may meet tensors of the GPU, indices of the CPU may index them."""
    if func in _BETWEEN_DEVICES:
        return
    if func in _BY_INDEX:
        tensors = [args[0], *(x for x in args[2:3] if isinstance(x, Tensor))]
    others = [x for x in tensors if not isinstance(x, OnGpu)]
    changes_another = func._schema.is_mutable and not isinstance(args[0], OnGpu)
    if any(x.dim() for x in others) or (others and changes_another):
        raise RuntimeError(f"expected all tensors to be on the same device, found cuda:0 and cpu in {func}")


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: OnGpu) -> Tensor:
        return tensor.inner.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return OnGpu(gradient)


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return OnGpu(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: OnGpu) -> Tensor:
        return gradient.inner


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if isinstance(tensor, OnGpu) == (device.type == "cuda"):
        return tensor
    move = _ToGpu if device.type == "cuda" else _ToCpu
    return move.apply(tensor) if torch.is_grad_enabled() and tensor.requires_grad else move.forward(None, tensor)


class _Devices(TorchFunctionMode):
    """Does what functions are asked to do with devices, which torch could not, built without CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return _moved(args[0], CUDA)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.type_as:
            return self._to(*args)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = _device(kwargs.pop("device"))
        return _moved(func(*tree_map(_inner, args), device=CPU, **kwargs), device)

    def _to(self, tensor: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """Its three forms: a dtype, a device and perhaps a dtype, another tensor."""
        if rest and isinstance(rest[0], Tensor):
            rest = (rest[0].device, rest[0].dtype, *rest[1:])
        device = kwargs.pop("device", None)
        if device is None and rest and isinstance(rest[0], (str, int, torch.device)):
            device, *rest = rest
        if device is not None:
            tensor = _moved(tensor, _device(device))
        kwargs.pop("non_blocking", None)
        dtypes = [x for x in rest if isinstance(x, torch.dtype)]
        return tensor.to(*dtypes, **kwargs) if dtypes or kwargs else tensor


def _device(given: Any) -> torch.device:
    return CUDA if isinstance(given, int) else torch.device(given)
