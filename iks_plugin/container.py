"""The compact file: a safetensors container of two byte arrays, `index` and `data`.

`index` is zlib-compressed JSON: what the file is about (`FileInfo`) and an `Entry` for each tensor. `data` holds the
entries' bytes one after the other, so where they lie follows from their sizes. The container's own metadata has the
format's version and the index's checksum, under "iks"; the index has the entries'. Nothing in a file is executed.

Bytes that do not fit are an `IksError` that names file and entry, raised before anything of a size that the file only
claims is made.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import entries
from .codec import CodecError
from .entries import ALIAS, Entry, SparseWeight, is_printable
from .errors import IksError
from .files import whole_file
from .quantize import VALUE_DTYPES

SUFFIX = ".iks"
_MARK, _VERSION = "iks", 1
"""Key in the container's metadata, whose value is the format version and the checksum of the index."""
_INDEX_FACTOR, _INDEX_ROOM = 200, 1 << 20
"""An index may take this many times its compressed bytes, and so many more: real ones take 5 to 10 times them."""


@dataclass(frozen=True)
class FileInfo:
    """What a file says of itself as a whole.

    Attributes:
        plugin_version: the version of iks-plugin that wrote it.
        model_class: qualified name of the model's class; None if a bare state dict was saved.
        target_sparsity: what the model was trained for, where that was known.
        value_dtype: the type that was asked for the values of sparse weights.
        checkpoint_key: where the framework that the model is for looks for a state dict in a checkpoint, such as
            "params"; None if the checkpoint is the state dict.
    """

    plugin_version: str
    model_class: str | None
    target_sparsity: float | None
    value_dtype: str
    checkpoint_key: str | None = None

    @staticmethod
    def from_json(raw: Any) -> FileInfo:
        if (
            not isinstance(raw, dict)
            or raw.keys() != FileInfo.__dataclass_fields__.keys()
            or not is_printable(raw["plugin_version"])
            or not (raw["model_class"] is None or is_printable(raw["model_class"]))
            or raw["value_dtype"] not in tuple(VALUE_DTYPES)
            or not (raw["checkpoint_key"] is None or is_printable(raw["checkpoint_key"]))
        ):
            raise CodecError("what the index says of the file is not what this version writes")
        target = raw["target_sparsity"]
        if target is not None and (type(target) is not float or not 0 <= target < 1):
            raise CodecError(f"target_sparsity has the impossible value {str(target)[:60]!r}")
        return FileInfo(**raw)


def to_bytes(
    tensors: Mapping[str, Tensor], info: FileInfo, axes: Mapping[str, int] | None = None
) -> tuple[bytes, list[Entry]]:
    """The bytes of a compact file with `tensors`, and the entries in it.

    Args:
        axes: by name, the dimension of a weight that counts output channels; 0 where a name is missing.

    Raises:
        IksError: a tensor is of a kind that the format cannot hold, or a name cannot be printed; the message names it.
    """
    from safetensors.numpy import save

    for what, text in (("model_class", info.model_class), ("checkpoint_key", info.checkpoint_key)):
        _check_printable(what, text or "")
    for name in tensors:
        _check_printable("a tensor's name", name)
    written: list[Entry] = []
    blobs: list[bytes] = []
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        twin = first.setdefault(_memory_of(tensor, name), name)
        if twin != name:
            dtype = str(tensor.dtype).removeprefix("torch.")
            written.append(Entry(name, ALIAS, dtype, tuple(tensor.shape), alias_of=twin))
            continue
        try:
            entry, parts = entries.encode(name, tensor, VALUE_DTYPES[info.value_dtype], (axes or {}).get(name, 0))
        except IksError as error:
            raise type(error)(f"{name}: {error}") from None
        written.append(entry)
        blobs.extend(parts)
    document = {**asdict(info), "entries": [entry.to_json() for entry in written]}
    index = zlib.compress(json.dumps(document, separators=(",", ":"), allow_nan=False).encode(), 9)
    arrays = {"index": _bytes_array(index), "data": _bytes_array(b"".join(blobs))}
    # One key only: safetensors writes several in any order, and the same model shall give the same file.
    result: bytes = save(arrays, {_MARK: f"{_VERSION} {zlib.crc32(index):08x}"})
    return result, written


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Put `content` in place of the file at `path`, whole or not at all.

    Raises:
        IksError: it cannot be written; a file that was there before is still there.
    """
    try:
        with whole_file(path) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise IksError(
            f"{os.fspath(path)}: cannot be written ({error.strerror or error}). What was there before is unchanged"
        ) from error


class CompactFile:
    """A compact file opened for reading; `opened` makes it. Its index has been checked, its tensors have not."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.info, self.entries = self._read_index(handle)
        self._data = handle.get_slice("data")
        offset = 0
        self._offsets: dict[str, int] = {}
        for entry in self.entries:
            self._offsets[entry.name] = offset
            offset += entry.nbytes
        if offset != self._data_size():
            raise self._damaged("data", f"expected {offset} bytes by the index, got {self._data_size()}")

    def decode(self, entry: Entry) -> Tensor:
        """The tensor of a plain or sparse entry.

        Raises:
            IksError: its bytes are damaged.
        """
        try:
            return entries.decode(entry, self._read(entry))
        except CodecError as error:
            raise self._damaged(f"entry {entry.name!r}", error) from None

    def decode_sparse(self, entry: Entry) -> SparseWeight:
        """The non-zeros of a sparse entry; see `decode`."""
        try:
            return entries.decode_sparse(entry, self._read(entry))
        except CodecError as error:
            raise self._damaged(f"entry {entry.name!r}", error) from None

    def check(self, entry: Entry) -> None:
        """Raise an `IksError` where the checksum of the entry's bytes is wrong."""
        try:
            self._read(entry)
        except CodecError as error:
            raise self._damaged(f"entry {entry.name!r}", error) from None

    def _read(self, entry: Entry) -> bytes:
        start = self._offsets[entry.name]
        data = self._data[start : start + entry.nbytes].tobytes() if entry.nbytes else b""
        found = zlib.crc32(data)
        if found != entry.crc32:
            raise CodecError(f"expected the checksum {entry.crc32:08x}, got {found:08x}")
        return data

    def _data_size(self) -> int:
        return int(self._data.get_shape()[0])

    def _read_index(self, handle: Any) -> tuple[FileInfo, tuple[Entry, ...]]:
        metadata = handle.metadata() or {}
        if not is_compact(metadata):
            raise IksError(
                f"{self.path}: expected a compact file of iks-plugin, got another safetensors file: make one of it "
                "with `iks export`, or read it with safetensors.torch.load_file"
            )
        version, _, checksum = metadata[_MARK].partition(" ")
        if version != str(_VERSION):
            raise IksError(
                f"{self.path}: expected format version {_VERSION}, got {version[:20]!r}: "
                "read it with the version of iks-plugin that wrote it, or a newer one"
            )
        names = set(handle.keys())
        for name in ("index", "data"):
            if name not in names or not _is_flat_bytes(handle.get_slice(name)):
                raise self._damaged(name, "expected a flat array of bytes")
        packed = handle.get_tensor("index").tobytes()
        if checksum != f"{zlib.crc32(packed):08x}":
            raise self._damaged("index", "its checksum is wrong")
        try:
            return _parse_index(packed)
        except CodecError as error:
            raise self._damaged("index", error) from None

    def _damaged(self, part: str, fact: object) -> IksError:
        return IksError(f"{self.path}: {part}: {fact}. The file is damaged: copy it again, or export it anew")


def is_compact(metadata: Mapping[str, str] | None) -> bool:
    """Whether a safetensors file with this metadata is a compact file, of whatever version."""
    return _MARK in (metadata or {})


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[CompactFile]:
    """The compact file at `path`, while it lasts.

    Raises:
        IksError: there is no such file, or it is not a compact file, or of another version, or its index is damaged.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing"
        raise IksError(f"{path}: expected a compact file, found {what}: check the path")
    try:
        with open(path, "rb"):  # an error of the system's own, if any
            handle: Any = safe_open(path, framework="numpy")
    except OSError as error:
        raise IksError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # safetensors raises errors of its own, of the system and of Python's JSON
        raise IksError(
            f"{path}: expected a compact file, got one that is no safetensors container, or a damaged one ({error}): "
            "copy it again; for a checkpoint such as .pth use `iks export` first"
        ) from error
    with handle:
        yield CompactFile(path, handle)


def _parse_index(packed: bytes) -> tuple[FileInfo, tuple[Entry, ...]]:
    limit = _INDEX_FACTOR * len(packed) + _INDEX_ROOM
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(packed, limit)
        document = json.loads(text) if inflate.eof else None
    except (zlib.error, ValueError, RecursionError) as error:
        raise CodecError(f"it cannot be read ({str(error)[:100]})") from None
    if not isinstance(document, dict) or not isinstance(document.get("entries"), list):
        raise CodecError("it is not whole, or too large, or not a list of entries")
    parsed: list[Entry] = []
    for position, raw in enumerate(document.pop("entries")):
        try:
            parsed.append(Entry.from_json(raw))
        except CodecError as error:
            name = str(raw.get("name"))[:200] if isinstance(raw, dict) else ""
            raise CodecError(f"entry {position} ({name!r}): {error}") from None
    info = FileInfo.from_json(document)
    _check_names(parsed)
    return info, tuple(parsed)


def _check_names(parsed: Iterable[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for entry in parsed:
        if entry.name in seen:
            raise CodecError(f"the name {entry.name!r} occurs twice")
        if entry.alias_of is not None:
            original = seen.get(entry.alias_of)
            if original is None or original.kind == ALIAS:
                raise CodecError(f"{entry.name!r} is an alias of {entry.alias_of!r}, which is no tensor before it")
            if (original.shape, original.dtype) != (entry.shape, entry.dtype):
                raise CodecError(f"{entry.name!r} and what it is an alias of differ in shape or dtype")
        seen[entry.name] = entry


def _check_printable(what: str, text: str) -> None:
    if not is_printable(text):
        raise IksError(f"{what}: expected text that can be printed, got {text!r}: rename it")


def _is_flat_bytes(array: Any) -> bool:
    return array.get_dtype() == "U8" and len(array.get_shape()) == 1


def _bytes_array(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(data, dtype=np.uint8)


def _memory_of(tensor: Tensor, name: str) -> Any:
    """Equal for two tensors that are the same values in the same memory."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return name
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj())
