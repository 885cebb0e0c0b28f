"""Compact files whose index or header lies, with all checksums right: what an enemy would write."""

from __future__ import annotations

import copy
import json
import random
import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from damage import ANYWHERE, NUMBERS

Document = dict[str, Any]


def hostile(content: bytes, seed: object) -> bytes:
    """`content` with one to three lies in its index or its header, and right checksums."""
    rng = random.Random(f"hostile {seed}")
    header, document, data = open_container(content)
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
    return close_container(header, index, bytes(data))


def open_container(content: bytes) -> tuple[Document, Document, bytearray]:
    """Header, index and data of a valid file."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    arrays = {}
    for name in ("index", "data"):
        start, stop = header[name]["data_offsets"]
        arrays[name] = content[end + start : end + stop]
    return header, json.loads(zlib.decompress(arrays["index"])), bytearray(arrays["data"])


def close_container(header: Document, index: bytes, data: bytes) -> bytes:
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
    numbers = [rng.choice(NUMBERS) for _ in range(rng.randint(1, 5))]
    return rng.choice(
        (
            *(rng.choice(NUMBERS), rng.choice(NUMBERS), numbers, numbers[:1] * 4, [*numbers, 0], [0, *numbers]),
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
            holder[place] = rng.choice((holder[place] + rng.choice((-4, -1, 1, 4)), rng.choice(NUMBERS)))


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
    one_symbol = bytes((1, 7, 7, 1, 0))  # a plane in which every byte is 7
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
        rng.choice(ANYWHERE)(blob, rng)
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
        header[name].update(lies=True, data_offsets=[rng.choice(NUMBERS), rng.choice(NUMBERS)])
    else:
        start = rng.randrange(100)
        header[name].update(lies=True, shape=[start], data_offsets=[start, 2 * start])


def _lose_metadata(header: Document, rng: random.Random) -> None:
    header.pop("__metadata__", None)


_HEADERS = (_lie_in_metadata, _lie_in_metadata, _lie_in_arrays, _lie_in_arrays, _lie_in_arrays, _lose_metadata)
