"""One tensor of a state dict to bytes and back, with an `Entry` that says how to read them.

A weight that holds zeros is `sparse`: a mask, its non-zero values in the type asked for, and scales if that is int8.
Every other tensor is `plain`: all its values in its own type. A tensor that shares all its memory with an earlier one
is an `alias` of it and has no bytes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .codec import CodecError, Words, decode_mask, decode_words, encode_mask, encode_words
from .errors import IksError
from .quantize import channels_of, rounded, stored_dtype, to_int8

PLAIN, SPARSE, ALIAS = "plain", "sparse", "alias"

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_DTYPES = (
    *_FLOATS,
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    *("complex128", "complex64", "complex32"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPES if hasattr(torch, name)}
"""The types that tensors in a file can have, by name; an old torch lacks some."""

_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Entry:
    """How the bytes of one tensor are to be read.

    Attributes:
        name: its key in the state dict.
        kind: "sparse", "plain" or "alias".
        dtype, shape: the tensor's own.
        order: its dimensions from the slowest to the fastest in memory; None for the usual order.
        sizes: bytes of mask, values and, with int8, scales ("sparse"); of all values ("plain"); nothing ("alias").
        crc32: checksum of these bytes, one after the other.
        stored: "sparse": the type of the values in the file.
        nonzeros: "sparse": how many of them.
        axis: "sparse", int8: the dimension that has a scale for each index.
        alias_of: "alias": the name of the entry that it is the same tensor as.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = ()
    crc32: int = 0
    stored: str | None = None
    nonzeros: int | None = None
    axis: int | None = None
    alias_of: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the entry in the file."""
        return sum(self.sizes)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the tensor in memory; of an alias none, as it is another's."""
        return 0 if self.kind == ALIAS else self.numel * DTYPES[self.dtype].itemsize

    @property
    def zeros(self) -> int:
        """How many of the values a sparse entry does not store."""
        return 0 if self.nonzeros is None else self.numel - self.nonzeros

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @staticmethod
    def from_json(raw: Any) -> Entry:
        """Raises:
        CodecError: `raw` does not describe a tensor, or one that this version cannot read.
        """
        if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
            raise CodecError("expected an entry with a name")
        if not raw["name"].isprintable():
            raise CodecError("the name has characters that cannot be printed")
        for key, is_right in _CHECKS.items():
            if not is_right(raw.get(key)):
                raise CodecError(f"{key} has the impossible value {str(raw.get(key))[:60]!r}")
        if raw.keys() - _CHECKS.keys() - {"name"}:
            raise CodecError("there are keys that this version does not know")
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
        entry = Entry(**fields)
        _check_fit(entry)
        return entry


def is_printable(value: Any) -> bool:
    """Whether `value` is text that can be shown in a terminal: no control characters, no halves of characters."""
    return isinstance(value, str) and value.isprintable()


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _wholes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_DIMENSIONS and all(map(_whole, value))


def _or_none(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: value in (PLAIN, SPARSE, ALIAS),
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "shape": _wholes,
    "order": _or_none(_wholes),
    "sizes": _wholes,
    "crc32": _whole,
    "stored": _or_none(lambda value: value in (*_FLOATS, "int8")),
    "nonzeros": _or_none(_whole),
    "axis": _or_none(_whole),
    "alias_of": _or_none(is_printable),
}


def _check_fit(entry: Entry) -> None:
    """Raise a CodecError where the fields of `entry`, each possible, do not fit each other."""
    if entry.order is not None and sorted(entry.order) != list(range(len(entry.shape))):
        raise CodecError(f"order {entry.order} is none of {len(entry.shape)} dimensions")
    if entry.numel >= 2**63:
        raise CodecError(f"shape {entry.shape} is too large")
    has_scales = entry.stored == "int8"
    expected = {
        PLAIN: (1, False, False, False, False),
        ALIAS: (0, False, False, False, True),
        SPARSE: (3 if has_scales else 2, True, True, has_scales, False),
    }[entry.kind]
    optional = (entry.stored, entry.nonzeros, entry.axis, entry.alias_of)
    if (len(entry.sizes), *(value is not None for value in optional)) != expected:
        raise CodecError(f"what a {entry.kind} entry needs is not all there, or there is more")
    if entry.stored is not None and not _can_be_sparse(entry.dtype, entry.stored, entry.numel):
        raise CodecError(f"a sparse entry cannot be {entry.numel} values of {entry.dtype} stored as {entry.stored}")
    if entry.nonzeros is not None and entry.nonzeros > entry.numel:
        raise CodecError(f"{entry.nonzeros} non-zeros do not fit a shape of {entry.numel} weights")
    if entry.axis is not None and entry.axis >= len(entry.shape):
        raise CodecError(f"axis {entry.axis} is none of {len(entry.shape)} dimensions")


@dataclass(frozen=True)
class SparseWeight:
    """The non-zeros of a weight: where they are, and what they are.

    Attributes:
        mask: one bool for each weight, in the usual order of memory.
        values: the non-zeros in that order, in the stored type.
        scales: for int8, the float32 factor of each index along an axis.
    """

    mask: Tensor
    values: Tensor
    scales: Tensor | None


def _can_be_sparse(dtype: str, stored: str, size: int) -> bool:
    return dtype in _FLOATS and DTYPES[stored].itemsize <= DTYPES[dtype].itemsize and size > 0


def is_sparse_weight(name: str, tensor: Tensor) -> bool:
    """Whether `tensor` is stored as a mask and non-zeros: a floating weight of two dimensions or more, with zeros."""
    return (
        name.endswith("weight")
        and tensor.ndim >= 2
        and str(tensor.dtype).removeprefix("torch.") in _FLOATS
        and int(torch.count_nonzero(tensor)) < tensor.numel()
    )


def encode(name: str, tensor: Tensor, value_dtype: torch.dtype, axis: int) -> tuple[Entry, tuple[bytes, ...]]:
    """The entry of `tensor`, and the bytes of its parts.

    Args:
        value_dtype: the type for the non-zeros of a sparse weight; anything else keeps its own.
        axis: the dimension of a weight that counts output channels.

    Raises:
        IksError: the tensor is of a kind that the format cannot hold, or its values do not fit `value_dtype`.
    """
    dtype = _name_of_dtype(tensor)
    tensor = tensor.detach()
    if is_sparse_weight(name, tensor):
        sparse, scaled_axis = split(tensor.cpu(), value_dtype, axis)
        stored, nonzeros = str(sparse.values.dtype).removeprefix("torch."), sparse.values.numel()
        numbers = (sparse.values,) if sparse.scales is None else (sparse.values, sparse.scales)
        blobs = (encode_mask(sparse.mask.numpy()), *(encode_words(_words(values)) for values in numbers))
    else:
        stored, nonzeros, scaled_axis = None, None, None
        blobs = (encode_words(_words(tensor.cpu())),)
    entry = Entry(
        name=name,
        kind=PLAIN if nonzeros is None else SPARSE,
        dtype=dtype,
        shape=tuple(tensor.shape),
        order=memory_order(tensor),
        sizes=tuple(map(len, blobs)),
        crc32=zlib.crc32(b"".join(blobs)),
        stored=stored,
        nonzeros=nonzeros,
        axis=scaled_axis,
    )
    return entry, blobs


def split(weight: Tensor, value_dtype: torch.dtype, axis: int) -> tuple[SparseWeight, int | None]:
    """The non-zeros of a dense floating `weight` on the CPU, and `axis` if they have scales along it.

    What rounds to zero in the type that they are stored in is no non-zero any more.

    Raises:
        OptionError: the values do not fit `value_dtype`.
    """
    stored, scales = stored_dtype(weight.dtype, value_dtype), None
    if stored == torch.int8:
        weight, scales = to_int8(weight, axis)
    else:
        weight = rounded(weight, stored)
    flat = weight.reshape(-1)
    mask = flat != 0
    return SparseWeight(mask, flat[mask], scales), None if scales is None else axis


def decode_sparse(entry: Entry, data: bytes) -> SparseWeight:
    """The non-zeros of a sparse entry; no dense weight is made.

    Raises:
        CodecError: `data` is not what `encode` has written for the entry.
    """
    blobs = _split(data, entry.sizes)
    assert entry.nonzeros is not None and entry.stored is not None
    values = _decode_tensor(blobs[1], DTYPES[entry.stored], entry.nonzeros)  # first: it checks the size by its bytes
    scales = None
    if entry.axis is not None:
        scales = _decode_tensor(blobs[2], torch.float32, entry.shape[entry.axis])
    mask = decode_mask(blobs[0], entry.numel, entry.nonzeros)
    return SparseWeight(torch.from_numpy(mask), values, scales)


def decode(entry: Entry, data: bytes) -> Tensor:
    """The tensor of a plain or sparse entry, with its own type, shape and order in memory.

    Raises:
        CodecError: `data` is not what `encode` has written for the entry.
    """
    dtype = DTYPES[entry.dtype]
    if entry.kind == SPARSE:
        flat = _dense(entry, decode_sparse(entry, data), dtype)
    else:
        flat = _decode_tensor(data, dtype, entry.numel)
    return in_order(flat.view(entry.shape), entry.order)


def _dense(entry: Entry, sparse: SparseWeight, dtype: torch.dtype) -> Tensor:
    values = sparse.values
    if sparse.scales is not None:
        positions = sparse.mask.nonzero().view(-1)
        values = scaled(values, sparse.scales, positions, torch.Size(entry.shape), entry.axis)
    return torch.zeros(entry.numel, dtype=dtype).masked_scatter_(sparse.mask, values.to(dtype))


def scaled(values: Tensor, scales: Tensor | None, positions: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    """Stored `values` at flat `positions` of a weight as the numbers that they stand for."""
    if scales is None or axis is None:
        return values
    return values.float() * scales[channels_of(positions, shape, axis)]


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions of `tensor` from the slowest to the fastest in memory; None for the usual order, or for none."""
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tuple(order) if tensor.permute(order).is_contiguous() else None


def in_order(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """`tensor` with its dimensions in that order in memory; see `memory_order`."""
    if order is None:
        return tensor
    in_memory = [tensor.shape[dimension] for dimension in order]
    back = [order.index(dimension) for dimension in range(len(order))]
    return tensor.new_empty(in_memory).permute(back).copy_(tensor)


def _split(data: bytes, sizes: tuple[int, ...]) -> list[bytes]:
    ends = [sum(sizes[: count + 1]) for count in range(len(sizes))]
    return [data[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _words(tensor: Tensor) -> Words:
    """The memory of a CPU tensor's values, in the usual order, as unsigned words."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().view(-1)
    raw: Words = flat.view(torch.uint8).numpy()
    return raw.view(_word_type(tensor.dtype))


def _decode_tensor(data: bytes, dtype: torch.dtype, size: int) -> Tensor:
    words = decode_words(data, _word_type(dtype), size * 2 if dtype.is_complex else size)
    return torch.from_numpy(words.view(np.uint8)).view(dtype)


def _word_type(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(f"u{dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize}")


def _name_of_dtype(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        raise IksError(f"expected a dense tensor, got one of layout {tensor.layout}: make it dense with to_dense()")
    if tensor.is_quantized or name not in DTYPES:
        raise IksError(
            f"expected a dtype that the format knows, got {tensor.dtype}: convert it to {', '.join(_FLOATS)}"
        )
    if tensor.device.type == "meta":
        raise IksError(
            "expected a tensor with values, got one on the device 'meta', which has none: load weights first"
        )
    return name
