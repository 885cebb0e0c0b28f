"""Damaged and hostile compact files, and what `iks_plugin.load` makes of them.

    python benchmarks/fuzz_files.py                          # 20,000 files: some minutes
    python benchmarks/fuzz_files.py --seed 3 --case 1234 --keep bad.iks    # one of them again, and its file

Half of the files are valid ones that were damaged anywhere. Of the others the index was rewritten to lie, with all the
checksums right. Each is loaded without a model, into one, and packed into one. What may come of it: an `IksError` that
names the file and leaves the model as it was, or the right tensors. Those of a damaged file are the undamaged ones;
those of a hostile one are what it describes, as a second and simpler reader here understands it. Anything else is a
violation: another exception, a crash, more than a few seconds, or memory that files of some kilobytes do not explain.

The files are made and loaded in a process of its own, which is watched from outside; Linux only.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import multiprocessing.connection
import random
import re
import resource
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import iks_plugin
from iks_plugin.codec import decode_mask, decode_words

SLOWEST = 3.0
"""Seconds that loading a file may take."""
HANGS = 60.0
"""Seconds after which it is given up."""
GROWTH = 256 << 20
"""Bytes that the process may grow by while it loads one of them."""
ADDRESS_SPACE = 4 << 30
"""Bytes of address space beyond those at the start: more is a MemoryError, and so a violation."""

State = dict[str, Tensor]
Document = dict[str, Any]


class Toy(nn.Module):
    """A little of everything that entries are made of: zeros, statistics, whole numbers, tied and turned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.transposed = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.last = nn.Conv2d(6, 16, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.linear.weight
        self.register_buffer("flags", torch.arange(40) % 3 == 0)
        self.register_buffer("empty", torch.zeros(0, 4))


@dataclass(frozen=True)
class Sample:
    """A valid file, the model that it is of, and what it holds."""

    name: str
    content: bytes
    model: nn.Module
    state: State


def make_samples(folder: Path) -> list[Sample]:
    """Small files with each type of values, with and without zeros."""
    samples = []
    for name, value_dtype, zeros, dtype in (
        ("float32", "float32", 0.8, torch.float32),
        ("float16", "float16", 0.9, torch.float32),
        ("int8", "int8", 0.7, torch.float32),
        ("all zeros", "float32", 1.0, torch.float32),
        ("plain", "float32", 0.0, torch.float32),
        ("bfloat16 model", "bfloat16", 0.8, torch.bfloat16),
    ):
        torch.manual_seed(0)
        model = Toy().to(dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data *= torch.rand_like(parameter) >= zeros
        path = folder / "sample.iks"
        iks_plugin.save(model, path, value_dtype)
        sample = Sample(name, path.read_bytes(), model, iks_plugin.load(path))
        header, document, data = _open(sample.content)
        path.write_bytes(_closed(header, zlib.compress(json.dumps(document).encode()), bytes(data)))
        iks_plugin.load(path)  # rewritten without a lie it is still valid, so that hostile files fail by their lies
        samples.append(sample)
    return samples


def damaged(content: bytes, seed: object) -> bytes:
    """`content` with one to three things done to its bytes."""
    rng = random.Random(f"damaged {seed}")
    # The container's header refuses most damage by itself: half of the files have theirs behind it.
    header_size = rng.choice((0, 8 + int.from_bytes(content[:8], "little")))
    header, data = content[:header_size], bytearray(content[header_size:])
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(_SAME_SIZE if header_size else _DAMAGES)(data, rng)
    return header + data


def _flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _change_bytes(data: bytearray, rng: random.Random) -> None:
    start, size = _range(data, rng)
    data[start : start + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))


def _cut_out(data: bytearray, rng: random.Random) -> None:
    start, size = _range(data, rng)
    del data[start : start + size]


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _extend(data: bytearray, rng: random.Random) -> None:
    data += rng.choice((rng.randbytes(rng.randint(1, 200)), bytes(rng.randint(1, 5000)), bytes(data)))


def _swap_chunks(data: bytearray, rng: random.Random) -> None:
    start, size = _range(data, rng)
    other = rng.randrange(len(data) - size + 1)
    one, two = data[start : start + size], data[other : other + size]
    data[start : start + size], data[other : other + size] = two, one


def _repeat_chunk(data: bytearray, rng: random.Random) -> None:
    start, size = _range(data, rng)
    place = rng.randrange(len(data) + 1)
    data[place:place] = data[start : start + size]


def _change_header_number(data: bytearray, rng: random.Random) -> None:
    """One of the sizes and offsets in the container's header; its length is set right, or not."""
    size = int.from_bytes(data[:8], "little")
    numbers = [*re.finditer(rb"\d+", bytes(data[8 : min(8 + size, 1 << 16)]))]
    if numbers:
        start, end = rng.choice(numbers).span()
        number = str(rng.choice(_NUMBERS)).encode()
        data[8 + start : 8 + end] = number
        if rng.random() < 0.8:
            data[:8] = ((size + len(number) - (end - start)) % 2**64).to_bytes(8, "little")


def _change_header_size(data: bytearray, rng: random.Random) -> None:
    data[:8] = (rng.choice(_NUMBERS) % 2**64).to_bytes(8, "little")


def _range(data: bytearray, rng: random.Random) -> tuple[int, int]:
    size = min(len(data), rng.choice((1, 2, 8, 64, rng.randint(1, 1000))))
    return rng.randrange(len(data) - size + 1), size


_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    255,
    256,
    -1,
    -8,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
)
_SAME_SIZE = (_flip_bits, _change_bytes, _swap_chunks)
_DAMAGES = (
    *(_flip_bits, _flip_bits, _change_bytes, _cut_out, _truncate, _extend, _swap_chunks, _repeat_chunk),
    *(_change_header_number, _change_header_number, _change_header_size),
)


def hostile(content: bytes, seed: object) -> bytes:
    """`content` with one to three lies in its index or its header, and right checksums."""
    rng = random.Random(f"hostile {seed}")
    header, document, data = _open(content)
    text: Callable[[str], str] = str
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.75:
            rng.choice(_LIES)(document, data, rng)
        elif kind < 0.85:
            text = rng.choice(_TEXTS)(rng)
        else:
            rng.choice(_HEADERS)(header, rng)
    _seal(document, data, rng)
    written = text(re.sub(r'"deep (\d+)"', lambda deep: "[" * int(deep[1]) + "]" * int(deep[1]), json.dumps(document)))
    index = zlib.compress(written.encode("utf-8", "surrogatepass"))
    return _closed(header, index, bytes(data))


def _open(content: bytes) -> tuple[Document, Document, bytearray]:
    """Header, index and data of a valid file."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    arrays = {}
    for name in ("index", "data"):
        start, stop = header[name]["data_offsets"]
        arrays[name] = content[end + start : end + stop]
    return header, json.loads(zlib.decompress(arrays["index"])), bytearray(arrays["data"])


def _closed(header: Document, index: bytes, data: bytes) -> bytes:
    """A container; what was changed in `header` stays so, what is as usual is set right."""
    ends = {"data": (0, len(data)), "index": (len(data), len(data) + len(index))}
    for name, (start, stop) in ends.items():
        if name in header and "lies" not in header[name]:
            header[name] = {**header[name], "data_offsets": [start, stop]}
            if len(header[name]["shape"]) == 1:
                header[name]["shape"] = [(stop - start) // (4 if header[name]["dtype"] == "F32" else 1)]
        header.get(name, {}).pop("lies", None)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and metadata.pop("lies", None) is None:
        metadata["iks"] = f"1 {zlib.crc32(index):08x}"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data + index


def _seal(document: Document, data: bytearray, rng: random.Random) -> None:
    """Make the data as long as the entries claim, where that is not long, and set the entries' checksums right."""
    claimed = sum(map(_claimed, document["entries"]))
    if rng.random() < 0.7 and claimed < 1 << 20:
        del data[claimed:]
        data += bytes(claimed - len(data))
    start = 0
    for entry in document["entries"]:
        size = _claimed(entry)
        if isinstance(entry, dict) and entry.pop("lies", None) is None:
            entry["crc32"] = zlib.crc32(data[start : start + size])
        start += size


def _claimed(entry: Any) -> int:
    """The bytes that an entry says it has; none if it says nothing that could be."""
    sizes = entry.get("sizes") if isinstance(entry, dict) else None
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        return 0
    return sum(sizes)


def _start(document: Document, entry: Document) -> int:
    """Where the bytes of one of the entries begin."""
    place = next((place for place, other in enumerate(document["entries"]) if other is entry), 0)
    return sum(map(_claimed, document["entries"][:place]))


def _some_entry(document: Document, rng: random.Random) -> Document:
    entries = [entry for entry in document["entries"] if isinstance(entry, dict) and "kind" in entry]
    return rng.choice(entries) if entries else {}


def _evil(rng: random.Random) -> Any:
    numbers = [rng.choice(_NUMBERS) for _ in range(rng.randint(1, 5))]
    return rng.choice(
        (
            *(rng.choice(_NUMBERS), rng.choice(_NUMBERS), numbers, numbers[:1] * 4, [*numbers, 0], [0, *numbers]),
            *(None, True, False, 0.5, 1.0, float("nan"), float("inf"), -1e308),
            *("", "x" * 5000, "\ud800", "\x00", "../../x", [], [[]], {}, {"a": 1}, [None], [1] * 65, ["1"], [True]),
            f"deep {rng.choice((10, 100, rng.randint(150, 1100), 20_000))}",
        )
    )


def _lie_in_field(document: Document, data: bytearray, rng: random.Random) -> None:
    keys = ("name", "kind", "dtype", "shape", "order", "sizes", "stored", "nonzeros", "axis", "alias_of", "more")
    _some_entry(document, rng)[rng.choice(keys)] = _evil(rng)


def _lie_in_crc(document: Document, data: bytearray, rng: random.Random) -> None:
    _some_entry(document, rng).update(crc32=_evil(rng), lies=True)


def _drop_field(document: Document, data: bytearray, rng: random.Random) -> None:
    entry = _some_entry(document, rng)
    if entry:
        del entry[rng.choice(sorted(entry))]


def _swap_words(document: Document, data: bytearray, rng: random.Random) -> None:
    """Another word where there is one: kinds, types."""
    words = {
        "kind": ("plain", "sparse", "alias", "Sparse"),
        "stored": ("float64", "float32", "float16", "bfloat16", "int8", "int32"),
        "dtype": (
            *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
            *("complex64", "complex128", "complex32", "float8_e4m3fn", "uint32", "float128"),
        ),
    }
    key = rng.choice(sorted(words))
    _some_entry(document, rng)[key] = rng.choice(words[key])


def _change_number(document: Document, data: bytearray, rng: random.Random) -> None:
    """A little more, a little less, or a lot, where there is a number."""
    entry = _some_entry(document, rng)
    places = [(entry, key) for key, value in entry.items() if type(value) is int]
    places += [(value, place) for value in entry.values() if isinstance(value, list) for place in range(len(value))]
    if places:
        holder, place = rng.choice(places)
        if type(holder[place]) is int:
            holder[place] = rng.choice((holder[place] + rng.choice((-4, -1, 1, 4)), rng.choice(_NUMBERS)))


def _turn_shape(document: Document, data: bytearray, rng: random.Random) -> None:
    """As many values in another shape or order."""
    entry = _some_entry(document, rng)
    shape = entry.get("shape")
    if isinstance(shape, list) and shape:
        key = rng.choice(("shape", "order"))
        entry[key] = rng.sample(shape, len(shape)) if key == "shape" else rng.sample(range(len(shape)), len(shape))


def _huge(document: Document, data: bytearray, rng: random.Random) -> None:
    """A huge tensor of no bytes, or nearly none."""
    entry = _some_entry(document, rng)
    shape = rng.choice(([2**20], [2**13, 2**13], [2**31], [2**31, 2**31], [2**16] * 4, [0, 2**62], [2**62, 0, 2**62]))
    numel = int(np.prod([int(size) for size in shape], dtype=object))
    one_symbol = bytes((1, 7, 7, 1, 0, 0, 0, 0))  # a plane in which every byte is 7
    form = rng.randrange(4)
    if form == 0:
        _replace(document, data, entry, [b"", b"\0" * 4], {"kind": "sparse", "stored": "float32", "nonzeros": 0})
    elif form == 1:
        _replace(
            document, data, entry, [b"", one_symbol * 4], {"kind": "sparse", "stored": "float32", "nonzeros": numel}
        )
    elif form == 2:
        _replace(document, data, entry, [b"", one_symbol, one_symbol * 4], {"kind": "sparse", "stored": "int8"})
        entry.update(nonzeros=numel, axis=0)
    else:
        _replace(document, data, entry, [one_symbol * 4], {"kind": "plain"})
    entry.update(shape=shape, dtype="float32")
    if form == 3 and rng.random() < 0.5:
        entry["dtype"] = rng.choice(("int32", "complex64"))


def _replace(document: Document, data: bytearray, entry: Document, blobs: list[bytes], fields: Document) -> None:
    """Give an entry other bytes, with the sizes that they have."""
    start = _start(document, entry)
    data[start : start + _claimed(entry)] = b"".join(blobs)
    for key in ("stored", "nonzeros", "axis", "order", "alias_of"):
        entry.pop(key, None)
    entry.update(fields, sizes=[len(blob) for blob in blobs])


def _damage_blob(document: Document, data: bytearray, rng: random.Random) -> None:
    """Other bytes in an entry: of the codec's streams and tables, which the checksums no longer guard."""
    entry = _some_entry(document, rng)
    sizes = entry.get("sizes")
    if not _claimed(entry):
        return
    place = rng.randrange(len(sizes))
    start = _start(document, entry) + sum(sizes[:place])
    blob = data[start : start + sizes[place]]
    if not blob or len(blob) != sizes[place]:
        return
    if rng.random() < 0.4:  # the first bytes say how the rest is to be read
        blob[rng.randrange(min(12, len(blob)))] = rng.choice((0, 1, 2, 255, rng.randrange(256)))
    else:
        rng.choice((_flip_bits, _change_bytes, _cut_out, _truncate, _extend, _swap_chunks))(blob, rng)
    data[start : start + sizes[place]] = blob
    sizes[place] = len(blob)


def _swap_names(document: Document, data: bytearray, rng: random.Random) -> None:
    one, other = _some_entry(document, rng), _some_entry(document, rng)
    if one and other:
        one["name"], other["name"] = other.get("name"), one.get("name")


def _copy_name(document: Document, data: bytearray, rng: random.Random) -> None:
    _some_entry(document, rng)["name"] = _some_entry(document, rng).get("name")


def _alias(document: Document, data: bytearray, rng: random.Random) -> None:
    """Of itself, of what comes later, of an alias, of nothing, of another shape, or of another tensor like it."""
    entry = _some_entry(document, rng)
    if entry:
        name = rng.choice((entry.get("name"), _some_entry(document, rng).get("name"), "nothing"))
        _replace(document, data, entry, [], {"kind": "alias", "alias_of": name})


def _move_entries(document: Document, data: bytearray, rng: random.Random) -> None:
    entries = document["entries"]
    if entries:
        what = rng.randrange(4)
        if what == 0:
            rng.shuffle(entries)
        elif what == 1:
            entries.append(copy.deepcopy(rng.choice(entries)))
        elif what == 2:
            entries.pop(rng.randrange(len(entries)))
        else:
            entries.insert(rng.randrange(len(entries)), _evil(rng))


def _many_entries(document: Document, data: bytearray, rng: random.Random) -> None:
    one = {"kind": "plain", "dtype": "uint8", "shape": [0], "sizes": [1]}
    document["entries"] += [{**one, "name": f"many{number}"} for number in range(rng.choice((10, 1000, 20_000)))]


def _lie_about_file(document: Document, data: bytearray, rng: random.Random) -> None:
    key = rng.choice(("plugin_version", "model_class", "target_sparsity", "value_dtype", "entries", "more"))
    value = _evil(rng)
    document[key] = (value if isinstance(value, list) else []) if key == "entries" else value


_LIES = (
    *(_lie_in_field, _lie_in_field, _lie_in_field, _lie_in_crc, _drop_field, _swap_words, _swap_words),
    *(_change_number, _change_number, _change_number, _turn_shape, _turn_shape, _huge, _huge),
    *(_damage_blob, _damage_blob, _damage_blob, _damage_blob, _swap_names, _copy_name, _alias, _alias),
    *(_move_entries, _lie_about_file, _many_entries),
)


def _deep_text(rng: random.Random) -> Callable[[str], str]:
    depth, bracket = rng.choice((100, 900, 1000, 100_000)), rng.choice(("[", '{"entries":', '{"a":'))
    return lambda text: bracket * depth + (text if rng.random() < 0.5 else "")


def _bomb(rng: random.Random) -> Callable[[str], str]:
    size, filler = rng.choice((1 << 20, 30 << 20)), rng.choice((" ", "0", '"', "[1,"))
    return lambda text: text + filler * (size // len(filler)) if rng.random() < 0.5 else filler * size


def _garble(rng: random.Random) -> Callable[[str], str]:
    def garble(text: str) -> str:
        start = rng.randrange(len(text))
        return text[:start] + rng.choice(("", '"', "}", "9" * 5000, "1e999", "NaN", "\\u0000", "é")) + text[start + 1 :]

    return garble


_TEXTS = (_deep_text, _garble, _garble, _garble, _garble, _garble, _garble, _bomb)


def _lie_in_metadata(header: Document, rng: random.Random) -> None:
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        lies = ("", "0", "1", "2 00000000", "1.0 0", "01 0", "-1", "1" * 5000, "\x00", "1 +1", 1, None, ["1"])
        metadata.update(lies=True, iks=rng.choice(lies))


def _lie_in_arrays(header: Document, rng: random.Random) -> None:
    name = rng.choice(("index", "data"))
    if name not in header:
        return
    what = rng.randrange(6)
    if what == 0:
        header[name]["dtype"] = rng.choice(("I8", "F32", "BOOL", "F8_E4M3", "U16", "X"))
    elif what == 1:
        header[name]["shape"] = [1, *header[name]["shape"]]
    elif what == 2:
        header[f"{name}2"] = header.pop(name)
    elif what == 3:
        header["more"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    elif what == 4:
        header[name].update(lies=True, data_offsets=[rng.choice(_NUMBERS), rng.choice(_NUMBERS)])
    else:
        start = rng.randrange(100)
        header[name].update(lies=True, shape=[start], data_offsets=[start, 2 * start])


def _lose_metadata(header: Document, rng: random.Random) -> None:
    header.pop("__metadata__", None)


_HEADERS = (_lie_in_metadata, _lie_in_metadata, _lie_in_arrays, _lie_in_arrays, _lie_in_arrays, _lose_metadata)


def described(content: bytes) -> State:
    """What a hostile file describes, read without any check, for the case that `load` takes it."""
    _, document, data = _open(content)
    state: State = {}
    start = 0
    for entry in document["entries"]:
        blobs = []
        for size in entry["sizes"]:
            blobs.append(bytes(data[start : start + size]))
            start += size
        if entry["kind"] == "alias":
            state[entry["name"]] = state[entry["alias_of"]]
            continue
        dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
        numel = int(np.prod(shape, dtype=object))
        if entry["kind"] == "plain":
            flat = _numbers(blobs[0], dtype, numel)
        else:
            mask = torch.from_numpy(decode_mask(blobs[0], numel, entry["nonzeros"]))
            values = _numbers(blobs[1], getattr(torch, entry["stored"]), entry["nonzeros"])
            if entry["stored"] == "int8":
                scales = _numbers(blobs[2], torch.float32, shape[entry["axis"]])
                values = values.float() * scales[torch.unravel_index(mask.nonzero().view(-1), shape)[entry["axis"]]]
            flat = torch.zeros(numel, dtype=dtype)
            flat[mask] = values.to(dtype)
        state[entry["name"]] = flat.view(shape)
    return state


def _numbers(blob: bytes, dtype: torch.dtype, size: int) -> Tensor:
    parts = 2 if dtype.is_complex else 1
    words = decode_words(blob, np.dtype(f"u{dtype.itemsize // parts}"), size * parts)
    return torch.from_numpy(words.view(np.uint8)).view(dtype)


def violations(sample: Sample, content: bytes, path: Path, is_hostile: bool) -> list[str]:
    """What is wrong with how `load` takes `content`, in sentences; `path` is where to write it."""
    path.write_bytes(content)
    found: list[str] = []
    for form in ("no model", "model", "packed"):
        model = None if form == "no model" else copy.deepcopy(sample.model)
        before = None if model is None else {name: tensor.clone() for name, tensor in model.state_dict().items()}
        began = time.perf_counter()
        try:
            result = iks_plugin.load(path) if model is None else iks_plugin.load(path, model, packed=form == "packed")
        except iks_plugin.IksError as error:
            if str(path) not in str(error):
                found.append(f"{form}: the message does not name the file: {str(error)[:200]}")
            if model is not None and before is not None and (fault := _differs(model.state_dict(), before)):
                found.append(f"{form}: refused, but the model has changed: {fault}")
            continue
        except Exception as error:
            found.append(f"{form}: {type(error).__name__}: {str(error)[:300]} ({_origin(error)})")
            continue
        finally:
            if (taken := time.perf_counter() - began) > SLOWEST:
                found.append(f"{form}: takes {taken:.1f} s")
        try:
            right = described(content) if is_hostile else sample.state
            state = result if isinstance(result, dict) else result.state_dict()
            if before is not None:  # a model's tensors keep their own types
                right = {name: tensor.to(before[name].dtype) for name, tensor in right.items()}
            if fault := _differs(state, right):
                found.append(f"{form}: a wrong result: {fault}")
        except Exception as error:
            found.append(f"{form}: loads, though it cannot be read: {type(error).__name__}: {str(error)[:300]}")
    return found


def _differs(state: State, right: State) -> str:
    if state.keys() != right.keys():
        return f"names {sorted(state.keys() ^ right.keys())[:3]}"
    for name, tensor in state.items():
        other = right[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {other.dtype} {tuple(other.shape)}"
        bits, other_bits = (one.contiguous().view(-1).view(torch.uint8) for one in (tensor, other))
        # The bits of a NaN do not survive every conversion between types.
        if not torch.equal(bits, other_bits) and not torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True):
            return f"values of {name}"
    return ""


def _origin(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"


def make_case(samples: list[Sample], seed: int, case: int) -> tuple[Sample, bytes, bool]:
    """The file number `case` of a seed, the sample that it was made of, and whether it is a hostile one."""
    sample, is_hostile = samples[case // 2 % len(samples)], bool(case % 2)
    return sample, (hostile if is_hostile else damaged)(sample.content, f"{seed} {case}"), is_hostile


def memory(what: str) -> int:
    """Bytes of this process: "VmSize", "VmRSS", or "VmHWM", the peak of the latter."""
    return int(re.findall(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def serve(pipe: multiprocessing.connection.Connection, current: Any, seed: int, cases: range) -> None:
    """In a process of its own: go through `cases`, tell (case, violation) for each, and then the most bytes taken."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mutant.iks")
        samples = make_samples(Path(folder))
        for sample in samples:
            for fault in violations(sample, sample.content, path, is_hostile=True):
                pipe.send((-1, f"the valid file {sample.name!r}: {fault}"))
        most = 0
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ADDRESS_SPACE, resource.RLIM_INFINITY))
        for case in cases:
            current.value = case
            sample, content, is_hostile = make_case(samples, seed, case)
            forget_peak()  # what it took to make the file does not count
            before = memory("VmRSS")
            for fault in violations(sample, content, path, is_hostile):
                pipe.send((case, f"{sample.name}, {'hostile' if is_hostile else 'damaged'}: {fault}"))
            grown = memory("VmHWM") - before
            if grown > GROWTH:
                pipe.send((case, f"{sample.name}: a file of {len(content):,} bytes takes {grown / 1e6:.0f} MB"))
            most = max(most, grown)
        pipe.send((None, most))


def fuzz(seed: int, cases: range) -> tuple[list[tuple[int, str]], int]:
    """The violations among `cases`, and the most bytes that one took; a new process follows each that dies."""
    context = multiprocessing.get_context("spawn")
    found: list[tuple[int, str]] = []
    growth = 0
    with tqdm(total=len(cases), desc=f"seed {seed}", unit="file", disable=None) as bar:
        while cases:
            current = context.Value("q", cases.start, lock=False)
            pipe, theirs = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(theirs, current, seed, cases), daemon=True)
            process.start()
            theirs.close()
            last, since, ended = -1, time.monotonic(), False
            while not ended:
                try:
                    while pipe.poll(0.2):
                        case, fault = pipe.recv()
                        if case is None:
                            growth, cases, ended = max(growth, fault), range(0), True
                        else:
                            found.append((case, fault))
                except EOFError:
                    found.append((current.value, f"the process dies (exit code {_exit_code(process)})"))
                    cases, ended = range(current.value + 1, cases.stop), True
                if current.value != last:
                    last, since = current.value, time.monotonic()
                elif time.monotonic() - since > HANGS and not ended:
                    found.append((last, f"takes more than {HANGS:.0f} s"))
                    process.kill()
                    cases, ended = range(last + 1, cases.stop), True
                bar.update(max(0, last - bar.n))
            process.join()
        bar.update(bar.total - bar.n)
    return found, growth


def _exit_code(process: Any) -> int | None:
    process.join()
    code: int | None = process.exitcode
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000, help="how many, over all seeds (default: %(default)s)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3], help="(default: %(default)s)")
    parser.add_argument("--case", type=int, help="try this one of the first seed alone")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where to write the file of --case")
    parser.add_argument("--json", type=Path, help="write the violations here as well")
    options = parser.parse_args()
    if options.case is not None and options.keep:
        with tempfile.TemporaryDirectory() as folder:
            options.keep.write_bytes(make_case(make_samples(Path(folder)), options.seed[0], options.case)[1])
    found: list[tuple[int, int, str]] = []
    growth = 0
    tried = 0
    for number, seed in enumerate(options.seed):
        share = options.files // len(options.seed) + (number < options.files % len(options.seed))
        cases = range(share) if options.case is None else range(options.case, options.case + 1)
        faults, grown = fuzz(seed, cases)
        found += [(seed, case, fault) for case, fault in faults]
        growth, tried = max(growth, grown), tried + len(cases)
        if options.case is not None:
            break
    for seed, case, fault in found:
        print(f"--seed {seed} --case {case}: {fault}")
    print(f"{tried:,} files: {len(found)} violations; the most memory for one: {growth / 1e6:.0f} MB")
    if options.json:
        options.json.write_text(json.dumps({"files": tried, "violations": found, "growth": growth}, indent=2) + "\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
