"""Models and compact files: `save` writes the one into the other, `load` reads it back, dense or packed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, overload

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import container
from .container import CompactFile, FileInfo
from .entries import DTYPES, SPARSE, Entry
from .errors import IksError, OptionError
from .fast import speed_up
from .layers import gated_layers
from .quantize import check_value_dtype
from .rewrite import finalized, trained_for
from .runtime import PackedWeight, is_packed, packable_layers, swap_in
from .state import checked, file_info, output_axes, unwrapped

_EXPANSION, _ROOM = 512, 64 << 20
"""Without a model to compare with, a file may claim tensors of this many times its bytes, and so many more."""


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    value_dtype: str = "float32",
    *,
    checkpoint_key: str | None = None,
) -> None:
    """Write `model` to a compact file: masks coded close to their entropy, non-zero values, and all else as it is.

    A model with gates is written as `finalize` would make it and stays as it is. Any other model will do too, whatever
    has made zeros in it. What `load` gives back is the state dict to the bit, with two exceptions: a weight's zeros are
    all +0.0, and a `value_dtype` narrower than a weight's own rounds its non-zeros.

    Args:
        model: a module, or a state dict, which is written entry by entry: of a model with gates give the model, as
            thresholds in a state dict are tensors like any other. Of a wrapper (DataParallel,
            DistributedDataParallel, AveragedModel, `torch.compile`) it is the module inside.
        path: the file, by custom `*.iks`; it is replaced whole or not at all.
        value_dtype: the type of the non-zeros of weights that hold zeros: "float32" (lossless for float32 weights),
            "float16", "bfloat16" or "int8" (with a float scale for each output channel). Weights whose own type is
            narrower keep it; everything else in the state dict keeps its type always.
        checkpoint_key: the key under which the model's framework keeps a state dict in its checkpoints ("params" for
            BasicSR, "state_dict" for MMEngine): `iks restore` will write it there.

    Raises:
        OptionError: `value_dtype` is none of these, or cannot hold a weight.
        IksError: the state dict holds something other than tensors with values, a name has characters that cannot be
            printed, or the file cannot be written; a file that was there before is still there.
    """
    with _state_of(model, value_dtype, checkpoint_key) as (tensors, info, axes):
        content, _ = container.to_bytes(tensors, info, axes)
    container.write(path, content)


@contextmanager
def _state_of(
    model: nn.Module | Mapping[str, Any], value_dtype: str, checkpoint_key: str | None
) -> Iterator[tuple[Mapping[str, Tensor], FileInfo, dict[str, int]]]:
    name = str(check_value_dtype(value_dtype)).removeprefix("torch.")
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        info = file_info(model, trained_for(model), name, checkpoint_key)
        with finalized(model) if gated_layers(model) else nullcontext():
            yield checked(model.state_dict()), info, output_axes(model)
    elif isinstance(model, Mapping):
        yield checked(model), file_info(None, None, name, checkpoint_key), {}
    else:
        raise IksError(f"save expects a torch.nn.Module or a state dict, got {type(model).__name__}")


@overload
def load(path: str | os.PathLike[str]) -> dict[str, Tensor]: ...
@overload
def load(path: str | os.PathLike[str], model: nn.Module, *, packed: bool = False) -> nn.Module: ...
def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, packed: bool = False
) -> nn.Module | dict[str, Tensor]:
    """Read the compact file at `path` into `model`, in place, or give its state dict.

    Args:
        path: a file that `save` has written.
        model: a module of the architecture that was saved, also on the device "meta" (its weights are then made here,
            on the CPU, and what it ties stays tied). Its names and shapes must be the file's. Without a model the plain
            state dict is returned.
        packed: keep the sparse layers' weights packed in memory, as `pack` does, and set the model to eval mode. Their
            dense weights are not made in loading.

    Returns:
        The same model, or the state dict.

    Raises:
        IksError: there is no such file, it is damaged, of another version, or not of this model. Everything is read
            and checked first, so the model is unchanged.
    """
    if model is None:
        if packed:
            raise OptionError("packed=True needs the model that the weights are for: load(path, model, packed=True)")
        with container.opened(path) as file:
            _refuse_expansion(file)
            return _dense_tensors(file, file.entries)
    if not isinstance(model, nn.Module):
        raise IksError(f"load expects a torch.nn.Module to load into, got {type(model).__name__}")
    bare = unwrapped(model)
    if is_packed(bare):
        raise IksError("the model is packed already: call iks_plugin.unpack(model) first, or load into a new one")
    layers = packable_layers(bare) if packed else {}
    with container.opened(path) as file:
        _check_fit(file, bare)
        weights = _packed_weights(file, layers)
        kept = {f"{name}.weight" if name else "weight" for name in weights}
        tensors = _dense_tensors(file, [entry for entry in file.entries if entry.name not in kept])
    on_meta = any(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
    try:
        if on_meta:
            tensors = _to_assign(tensors, bare)
        bare.load_state_dict(tensors, strict=not packed, assign=on_meta)
    except RuntimeError as error:
        raise IksError(f"{os.fspath(path)}: the model does not take what the file holds: {error}") from error
    if packed:
        swap_in({layers[name]: weight for name, weight in weights.items()})
        bare.eval()
        if weights:
            speed_up(bare)
    return model


def _refuse_expansion(file: CompactFile) -> None:
    claimed, limit = sum(entry.dense_nbytes for entry in file.entries), _EXPANSION * file.size + _ROOM
    if claimed > limit:
        raise IksError(
            f"{file.path}: a file of {file.size:,} bytes claims tensors of {claimed:,} bytes, and without a model to "
            f"compare with at most {limit:,} are made: give the model, load(path, model), if you trust the file"
        )


def _check_fit(file: CompactFile, model: nn.Module) -> None:
    gates = {f"{name}.threshold" if name else "threshold" for name in gated_layers(model)}
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in gates}
    theirs = {entry.name: entry for entry in file.entries}
    faults = [f"  {name}: not in the file" for name in own if name not in theirs]
    faults += [f"  {name}: not in the model" for name in theirs if name not in own]
    for name, tensor in own.items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor):
            faults.append(f"  {name}: the model has no tensor there yet")
        elif name in theirs and tuple(tensor.shape) != theirs[name].shape:
            faults.append(f"  {name}: shape {tuple(tensor.shape)} in the model, {theirs[name].shape} in the file")
    faults += [
        f'  {name}: on the device "meta", and no file holds it (a buffer that is not persistent): make it on the CPU'
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.is_meta and name not in own
    ]
    if faults:
        more = f"\n  ... and {len(faults) - 10} more" if len(faults) > 10 else ""
        made_of = f" (a {file.info.model_class})" if file.info.model_class else ""
        raise IksError(
            f"{file.path}: the file{made_of} does not fit the model (a {type(model).__qualname__}), which is "
            f"unchanged:\n" + "\n".join(faults[:10]) + more + "\nBuild the model with the options it was trained with"
        )


def _dense_tensors(file: CompactFile, wanted: list[Entry] | tuple[Entry, ...]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    by_name = {entry.name: entry for entry in file.entries}
    for entry in wanted:
        original = by_name[entry.alias_of] if entry.alias_of is not None else entry
        if original.name not in tensors or original is entry:
            tensors[original.name] = file.decode(original)
        tensors[entry.name] = tensors[original.name]
    names = {entry.name for entry in wanted}
    return {name: tensor for name, tensor in tensors.items() if name in names}


def _to_assign(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`tensors` as `model` can take them for its own: tied where its own are, and nowhere else."""
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names: dict[Tensor, list[str]] = {}
    for name, tensor in own:
        if name in tensors:
            names.setdefault(tensor, []).append(name)
    result, taken = dict(tensors), set[int]()
    for old, tied in names.items():
        values = tensors[tied[-1]]  # where they differ, the last one counts, as where they are copied
        new = values.clone() if id(values) in taken else values
        taken.add(id(values))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        result.update(dict.fromkeys(tied, new))
    return result


def _packed_weights(file: CompactFile, layers: Mapping[str, nn.Module]) -> dict[str, PackedWeight]:
    """By layer name, the weights that are smaller packed; layers that share one in the file share it here."""
    by_name = {entry.name: entry for entry in file.entries}
    made: dict[str, PackedWeight | None] = {}
    weights: dict[str, PackedWeight] = {}
    for name, layer in layers.items():
        entry = by_name[f"{name}.weight" if name else "weight"]
        if entry.alias_of is not None:
            entry = by_name[entry.alias_of]
        if entry.kind == SPARSE and entry.name not in made:
            own: nn.Parameter = layer._parameters["weight"]  # type: ignore[assignment]
            dtype = DTYPES[entry.dtype] if own.is_meta else own.dtype
            if entry.axis is not None and dtype != DTYPES[entry.dtype]:
                continue  # what is computed from scales would not be rounded to the file's dtype in between
            packed = PackedWeight(file.decode_sparse(entry), entry.shape, dtype, entry.axis, entry.order)
            smaller = packed.nbytes < entry.numel * dtype.itemsize
            made[entry.name] = (packed if own.is_meta else packed.to(own.device)) if smaller else None
        result = made.get(entry.name)
        if result is not None:
            weights[name] = result
    return weights
