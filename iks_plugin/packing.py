"""`pack` and `unpack`: the sparse layers of a model hold only their non-zero weights, or dense ones again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import entries
from .errors import IksError, warn_user
from .fast import slow_down, speed_up
from .layers import output_axis
from .quantize import check_value_dtype
from .runtime import Packed, PackedWeight, packable_layers, swap_in
from .state import unwrapped
from .swap import original_class


def pack(model: nn.Module, value_dtype: str = "float32") -> nn.Module:
    """Keep only the non-zero weights of `model`'s sparse layers in memory, in place, and set it to eval mode.

    For inference with a finalized model, or one that was pruned by another tool: convolutions and linear layers whose
    weight holds zeros are packed where that makes them smaller. They compute what they did before, for "float32" to
    the bit (float64 weights are rounded to it), and a dense weight exists for one layer at a time. `state_dict()` gives
    plain dense weights; `model.parameters()` no longer has the packed ones, and training, like `load_state_dict`, needs
    `unpack`.

    Args:
        model: any module without gates: the network itself, or in a wrapper (`DataParallel`, `AveragedModel`,
            `torch.compile`). Within any other module its layers are packed, but it does not run row by row.
        value_dtype: what the non-zeros are stored in: "float32", "float16", "bfloat16", or "int8" with a scale for each
            output channel. Weights whose own type is narrower keep it.

    Returns:
        The same object.

    Raises:
        IksError: the model has gates, or weights that `value_dtype` cannot hold. It is unchanged.

    Warns:
        IksWarning: no layer is sparse enough to become smaller.
    """
    dtype = check_value_dtype(value_dtype)
    layers = packable_layers(model)
    packed: dict[int, PackedWeight] = {}
    chosen: dict[nn.Module, PackedWeight] = {}
    for name, layer in layers.items():
        weight: nn.Parameter = layer._parameters["weight"]  # type: ignore[assignment]
        if id(weight) not in packed:
            if weight.is_meta or not entries.is_sparse_weight("weight", weight.detach()):
                continue
            packed[id(weight)] = _packed_weight(name, weight.detach(), dtype, output_axis(layer))
        if packed[id(weight)].nbytes < weight.nbytes:
            chosen[layer] = packed[id(weight)]
    swap_in(chosen)
    if not chosen:
        warn_user(
            "no layer of the model was packed: none has zeros enough to become smaller. After a training call "
            "iks_plugin.finalize(model) first",
        )
    else:
        speed_up(unwrapped(model))
    return model.eval()


def _packed_weight(name: str, weight: Tensor, value_dtype: torch.dtype, axis: int) -> PackedWeight:
    try:
        sparse, scaled_axis = entries.split(weight.cpu(), value_dtype, axis)
    except IksError as error:
        raise type(error)(f"{name}.weight: {error}") from None
    order = entries.memory_order(weight)
    return PackedWeight(sparse, tuple(weight.shape), weight.dtype, scaled_axis, order).to(weight.device)


def unpack(model: nn.Module) -> nn.Module:
    """Give the packed layers of `model` their dense weights back as parameters, in place; nothing else changes.

    The model stays in eval mode; the new parameters require gradients.

    Returns:
        The same object.
    """
    slow_down(unwrapped(model))
    dense: dict[PackedWeight, nn.Parameter] = {}
    for layer in [module for module in model.modules() if isinstance(module, Packed)]:
        packed = layer.packed_weight
        if packed not in dense:
            dense[packed] = nn.Parameter(packed())
        layer.__class__ = original_class(layer)  # type: ignore[assignment]
        del layer._modules["packed_weight"]
        others = dict(layer._parameters)
        layer._parameters.clear()
        layer._parameters.update({"weight": dense[packed], **others})
    return model
