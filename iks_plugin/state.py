"""The state dict of a model as a compact file holds it, and what the file says of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .container import FileInfo
from .errors import IksError
from .layers import output_axis
from .swap import Swapped, original_class


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers, whose names do not belong in a file: parallel, averaged, compiled."""
    inner: object = model
    while isinstance(inner, nn.Module):
        model = inner
        wraps = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel))
        inner = model.module if wraps else model._modules.get("_orig_mod")
    return model


def file_info(
    model: nn.Module | None, target_sparsity: float | None, value_dtype: str, checkpoint_key: str | None = None
) -> FileInfo:
    """What a file of `model`, or of a bare state dict, says of itself."""
    from . import __version__

    cls = original_class(model) if isinstance(model, Swapped) else type(model)
    model_class = None if model is None else f"{cls.__module__}.{cls.__qualname__}"
    return FileInfo(__version__, model_class, target_sparsity, value_dtype, checkpoint_key)


def output_axes(model: nn.Module) -> dict[str, int]:
    """For each layer's weight, by its name in the state dict, the dimension that counts output channels."""
    return {
        f"{name}.weight" if name else "weight": output_axis(module)
        for name, module in model.named_modules(remove_duplicate=False)
    }


def checked(state: Mapping[Any, Any]) -> Mapping[str, Tensor]:
    """`state`, if it holds nothing but tensors with names; otherwise an `IksError`."""
    wrong = {key: value for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)}
    if wrong:
        listed = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in list(wrong.items())[:3])
        raise IksError(
            f"{len(wrong)} entries of the state dict are not tensors with a name: {listed}. A compact file holds "
            "tensors alone, as nothing in it is ever executed: keep the others elsewhere"
        )
    return state
