"""Convolutions whose weight passes through the gate: static subclasses, entered by swapping a module's class.

`layer.weight` reads the gated weight, and `forward` stays the parent's own. So whoever reads `.weight`, the layer
itself or a block that convolves by hand, computes with what the network will be after training. `parameters()` and
`state_dict()` hold the raw `weight` and its `threshold`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import IksError
from .gate import soft_threshold
from .sizes import Budget
from .swap import Swapped, original_class, register, swapped_class

GRANULARITIES = ("weight", "kernel", "filter", "layer")

_MADE_OF = ("weight_g", "weight_orig")
"""What old parametrizations (`torch.nn.utils`) and torch's pruning make a layer's weight of."""
_REPLACED = (
    "as weight_norm, spectral_norm and other parametrizations replace it, and torch.nn.utils.prune does: apply these "
    "before sparsify, which then leaves the layer dense, or leave it out: sparsify(..., exclude=...)"
)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(eq=False)
class Goal:
    """The sparsity that a set of layers is to reach together; one object, shared with every deep copy of the layers.

    An EMA copy of a network thus always knows the target that its original is trained for. `weights` is how many
    weights the layers have together, those that layers share counted once. Where there is a `budget`, the target
    follows from it: anew in a training from time to time, and for any weights that are finalized.
    """

    target_sparsity: float
    weights: int
    budget: Budget | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Goal:
        return self


@dataclass(frozen=True)
class GateSettings:
    """How one layer is gated."""

    granularity: str
    threshold_init: float
    goal: Goal


class Gated(Swapped):
    """Mixin, first base of every sparse layer; its second base is the class that the module had before."""

    swapped_prefix = "Sparse"
    _iks: GateSettings
    threshold: nn.Parameter

    @property
    def raw_weight(self) -> nn.Parameter:
        """The trained weight before the gate."""
        raw = self._parameters.get("weight")
        if raw is None:
            raw = self.__dict__.get("weight")
        if raw is None:
            raise IksError(f"{type(self).__name__} has lost its parameter weight, {_REPLACED}")
        return raw

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise IksError(f"{type(self).__name__} cannot do without its parameter weight, {_REPLACED}")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in _MADE_OF:
            raise IksError(f"{type(self).__name__} cannot have {name} in place of weight, {_REPLACED}")
        super().register_parameter(name, param)

    def spread_threshold(self) -> Tensor:
        """The threshold in a shape that broadcasts to the weight's."""
        threshold, rows = self.threshold, self.raw_weight.shape[0]
        if threshold.shape[0] in (1, rows):
            return threshold
        # One threshold per filter of a grouped transposed convolution: a group of input channels shares a row.
        return threshold.repeat_interleave(rows // threshold.shape[0], dim=0)

    def _get_weight(self) -> Tensor:
        return soft_threshold(self.raw_weight, self.spread_threshold())

    def _set_weight(self, value: Tensor) -> None:
        # Reached only where no parameter `weight` is registered: DataParallel's replicas hold plain tensors.
        self.__dict__["weight"] = value

    weight = property(_get_weight, _set_weight, doc="The gated weight: what the layer computes with.")

    def reset_parameters(self) -> None:
        with ungated(self):
            self.reset_parameters()
        nn.init.constant_(self.threshold, self._iks.threshold_init)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, granularity={self._iks.granularity!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gated:
        # Around t = -12 half precision has steps of 0.8 % (float16) or 6 % (bfloat16) of a cut: too coarse.
        precise = self.threshold.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.threshold.dtype in (torch.float16, torch.bfloat16):
            self.threshold.data = precise.to(self.threshold.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *reports: list[str]
    ) -> None:
        key = f"{prefix}threshold"
        own = self.threshold
        state_dict = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        loaded = state_dict.get(key)
        if loaded is None:
            if f"{prefix}weight" in state_dict:  # a dense checkpoint
                state_dict[key] = torch.full_like(own, self._iks.threshold_init)
        elif loaded.numel() == own.numel():
            state_dict[key] = loaded.reshape(own.shape).to(own.dtype)
        else:
            *_, error_messages = reports
            error_messages.append(self._threshold_mismatch(key, loaded))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)

    def _threshold_mismatch(self, key: str, loaded: Tensor) -> str:
        raw = self.raw_weight
        cls, groups = original_class(self), getattr(self, "groups", 1)
        fitting = [g for g in GRANULARITIES if threshold_shape(cls, raw, g, groups) == loaded.shape]
        was = f" (granularity={fitting[0]!r}: rewrite the model with that one)" if fitting else ""
        return (
            f"{key} expected {tuple(self.threshold.shape)} (granularity={self._iks.granularity!r}), "
            f"got {tuple(loaded.shape)}{was}."
        )


GATE_ATTRIBUTES = ("threshold", "raw_weight", "spread_threshold", "_iks")
"""What a layer must not have of its own, because the gate puts it there."""


@register
class SparseConv1d(Gated, nn.Conv1d):
    pass


@register
class SparseConv2d(Gated, nn.Conv2d):
    pass


@register
class SparseConv3d(Gated, nn.Conv3d):
    pass


@register
class SparseConvTranspose1d(Gated, nn.ConvTranspose1d):
    pass


@register
class SparseConvTranspose2d(Gated, nn.ConvTranspose2d):
    pass


@register
class SparseConvTranspose3d(Gated, nn.ConvTranspose3d):
    pass


@register
class SparseLinear(Gated, nn.Linear):
    pass


CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
SUPPORTED_TYPES: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)


def sparse_class(cls: type[nn.Module]) -> type[Gated]:
    """The gated subclass of `cls`, which is a supported type or a subclass of one that brings its own forward."""
    return swapped_class(Gated, cls)


def threshold_shape(cls: type[nn.Module], weight: Tensor, granularity: str, groups: int = 1) -> tuple[int, ...]:
    """The shape of the threshold for a `weight` of a layer of type `cls`; it broadcasts to the weight's shape.

    The weight's own shape ("weight"), one entry per k x k slice ("kernel"), per output channel ("filter"), or one for
    all ("layer"). In a grouped transposed convolution, whose weight is (in, out / groups, ...), "filter" gives
    (groups, out / groups, 1, ...): each row serves the input channels of its group.
    """
    ones = (1,) * weight.ndim
    if granularity == "weight":
        return tuple(weight.shape)
    if granularity == "kernel":
        return (*weight.shape[:2], *ones[2:])
    if granularity == "filter":
        if issubclass(cls, _TRANSPOSED):
            return (groups, weight.shape[1], *ones[2:])
        return (weight.shape[0], *ones[1:])
    return ones


def output_axis(layer: nn.Module) -> int:
    """The dimension of the layer's weight that counts output channels (per group, in a transposed convolution)."""
    return 1 if isinstance(layer, _TRANSPOSED) else 0


def new_threshold(layer: nn.Module, settings: GateSettings) -> nn.Parameter:
    """The initial threshold parameter for a layer that is not gated yet: float32 at least, on the weight's device."""
    weight: nn.Parameter = layer._parameters["weight"]  # type: ignore[assignment]
    shape = threshold_shape(type(layer), weight, settings.granularity, getattr(layer, "groups", 1))
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    like = weight if shape == weight.shape else weight.new_empty(shape)
    values = torch.full_like(like, settings.threshold_init, dtype=dtype, requires_grad=False)
    return nn.Parameter(values)


def open_gate(layer: nn.Module, threshold: nn.Parameter, settings: GateSettings) -> None:
    """Turn `layer` into its gated subclass, in place."""
    sparse = sparse_class(type(layer))
    layer.register_parameter("threshold", threshold)
    layer._iks = settings  # type: ignore[assignment]
    layer.__class__ = sparse


def remove_gate(layer: Gated) -> None:
    """Turn `layer` back into a plain module of its original class, in place; its raw weight stays as it is."""
    layer.__class__ = original_class(layer)  # type: ignore[assignment]
    del layer._parameters["threshold"]
    del layer.__dict__["_iks"]


@contextmanager
def ungated(layer: Gated) -> Iterator[None]:
    """While it lasts, `layer.weight` is the raw weight: for initialisation in place, lost on a gated one."""
    sparse = type(layer)
    layer.__class__ = original_class(layer)  # type: ignore[assignment]
    try:
        yield
    finally:
        layer.__class__ = sparse


_lent: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@contextmanager
def lent(layers: Iterable[nn.Module], to: str) -> Iterator[None]:
    """While it lasts, `layers` have lent out their gates `to` a context and must be left as they are: `refuse_lent`."""
    before = {layer: _lent.get(layer) for layer in layers}
    _lent.update(dict.fromkeys(before, to))
    try:
        yield
    finally:
        for layer, lender in before.items():
            _lent.pop(layer, None)
            if lender is not None:
                _lent[layer] = lender


def refuse_lent(model: nn.Module, action: str) -> None:
    """Raise an `IksError` if `model` has lent out its gates, as what `action` does could not be undone afterwards."""
    lender = next((_lent[module] for module in model.modules() if module in _lent), None)
    if lender is not None:
        raise IksError(
            f"the model is within iks_plugin.{lender}, which changes it for a while alone: {action} a copy.deepcopy of "
            "it, or the model itself afterwards"
        )


def gated_layers(model: nn.Module) -> dict[str, Gated]:
    """The gated layers of `model` by qualified name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Gated)}
