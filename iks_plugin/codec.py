"""Arrays to bytes and back, without loss: masks close to their entropy, numbers as byte planes.

Pure functions of numpy arrays; what they are parts of, and how a file names and checks them, is for others to say.
Entropy coding is done by the range coder of the library `constriction`.

A mask is coded as independent bits of one probability, the share of ones, so it takes size * H(ones / size) bits. What
the decoder must know beside the bytes are these two numbers.

Numbers, taken as unsigned words, are rotated left by one bit, so that a float's sign moves from the top to the bottom
and its exponent fills the top byte. Their bytes are regrouped into planes, first all top bytes, then all second bytes,
and so on. The exponents of trained weights take 2 to 3 bits each; the lower planes are mostly noise and stay raw. A
plane is one byte for its kind, and then its bytes as they are (kind 0). Or (kind 1 + g) its symbols are taken in groups
of 2 ** g neighbours, which count as equally frequent, and there follow the first and the last group that occur, a table
with a byte for each group from the one to the other, the length of the stream (seven bits a byte, the low ones first,
the top bit set in all but the last), and the stream. Few values have a coarse table: it is a part of what they take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RAW, _CODED = 0, 1
_COARSEST = 5
_GROUPINGS = (0, 3)
"""Those that are tried: each symbol for itself, and without the three mantissa bits in the top byte of a float16."""
_WORTH_IT = 0.97
"""A plane is coded where that takes at most this share of its bytes: decoding costs time."""

_STEP = 1 << 18
"""Symbols passed to the range coder at once; it wants each in 32 bits, which shall not fill the memory."""

_RARITIES = 254
_FREQUENCIES = np.array([0, *(round(2 ** (40 - rarity / 16)) for rarity in range(_RARITIES + 1))], dtype=np.uint64)
"""What a byte of a table stands for: 0 for a symbol that does not occur, r + 1 for one of frequency 2 ** (-r / 16)."""

Words = NDArray[np.unsignedinteger[Any]]


class CodecError(ValueError):
    """Bytes that no encoder has written for the numbers that came with them."""


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """Code a flat `mask`; `decode_mask` needs its size and the number of its ones beside the bytes."""
    ones = int(np.count_nonzero(mask))
    if ones in (0, mask.size):
        return b""
    return _encode(mask, _bernoulli(mask.size, ones))


def decode_mask(data: bytes, size: int, ones: int) -> NDArray[np.bool_]:
    """The flat mask of `size` bits, `ones` of them set, that `encode_mask` has made `data` of.

    Raises:
        CodecError: `data` cannot be such a mask.
    """
    if not 0 <= ones <= size:
        raise CodecError(f"a mask of {size} bits cannot have {ones} ones")
    if ones in (0, size):
        if data:
            raise CodecError(f"expected no bytes for a mask that is all {'ones' if ones else 'zeros'}, got {len(data)}")
        return np.full(size, bool(ones))
    mask = np.empty(size, dtype=np.bool_)
    _decode_into(mask, data, _bernoulli(size, ones))
    found = int(np.count_nonzero(mask))
    if found != ones:
        raise CodecError(f"expected a mask with {ones} ones, got {found}")
    return mask


def encode_words(words: Words) -> bytes:
    """Code flat unsigned integers of 1, 2, 4 or 8 bytes; `decode_words` needs type and number beside the bytes."""
    bits = 8 * words.itemsize
    rotated = (words << 1 | words >> (bits - 1)).astype(words.dtype.newbyteorder("<"), copy=False)
    columns = rotated.view(np.uint8).reshape(words.size, words.itemsize)
    return b"".join(_encode_plane(columns[:, place]) for place in reversed(range(words.itemsize)))


def decode_words(data: bytes, dtype: np.dtype[Any], size: int) -> Words:
    """The `size` words of the unsigned type `dtype` that `encode_words` has made `data` of.

    Raises:
        CodecError: `data` cannot be such words.
    """
    reader = _Reader(data)
    little = np.dtype(dtype).newbyteorder("<")
    planes = [_plane_reader(reader, size) for _ in range(little.itemsize)]
    reader.expect_end()  # before anything of the size claimed is made
    columns = np.empty((size, little.itemsize), dtype=np.uint8)
    for place, fill in zip(reversed(range(little.itemsize)), planes, strict=True):
        fill(columns[:, place])
    words: Words = columns.reshape(-1).view(little).astype(dtype, copy=False)
    for chunk in _chunks(words):
        chunk[:] = chunk >> 1 | chunk << (8 * little.itemsize - 1)
    return words


def _encode_plane(plane: NDArray[np.uint8]) -> bytes:
    plane = np.ascontiguousarray(plane)
    if not plane.size:
        return bytes([_RAW])
    counts = np.bincount(plane, minlength=256)
    if 2 * np.count_nonzero(counts) > plane.size or 100 * counts.max() < plane.size:
        return bytes([_RAW]) + plane.tobytes()  # noise, told without the work below
    ways = {grouped: _coarse(counts, grouped) for grouped in _GROUPINGS}
    grouped = min(ways, key=lambda way: ways[way][2])
    first, table, estimate = ways[grouped]
    if estimate > _WORTH_IT * plane.size:
        return bytes([_RAW]) + plane.tobytes()
    stream = b""
    if len(table) > 1 or grouped:  # otherwise there is one symbol only
        stream = _encode(plane - np.uint8(first << grouped), _categorical(table, grouped))
    head = bytes([_CODED + grouped, first, first + len(table) - 1])
    return head + table.tobytes() + _varint(len(stream)) + stream


def _coarse(counts: NDArray[np.int64], grouped: int) -> tuple[int, NDArray[np.uint8], float]:
    """A plane in groups of 2 ** grouped symbols: the first that occurs, the table, and the bytes that it will take."""
    total = counts.reshape(-1, 1 << grouped).sum(axis=1)
    occurring = np.flatnonzero(total)
    first, last = int(occurring[0]), int(occurring[-1])
    shares = total[first : last + 1] / total.sum()
    with np.errstate(divide="ignore"):
        bits = -np.log2(shares)
    table = np.where(shares > 0, np.minimum(np.round(16 * bits), _RARITIES - 1) + 1, 0).astype(np.uint8)
    known = shares > 0
    size = float(np.sum(shares[known] * (bits[known] + grouped))) * int(total.sum()) / 8
    return first, table, 6 + len(table) + size


def _plane_reader(reader: _Reader, size: int) -> Any:
    """Read one plane's bytes; what is returned decodes them into an array of `size` bytes."""
    kind = reader.byte()
    if kind == _RAW:
        raw = np.frombuffer(reader.take(size), dtype=np.uint8)
        return lambda plane: np.copyto(plane, raw)
    grouped = kind - _CODED
    if grouped > _COARSEST:
        raise CodecError(f"expected a plane of kind 0 to {_CODED + _COARSEST}, got {kind}")
    first, last = reader.byte(), reader.byte()
    if last < first:
        raise CodecError(f"a plane's last symbol ({last}) comes before its first ({first})")
    if last >= 256 >> grouped:
        raise CodecError(f"a plane's last symbol ({last}) is none of {256 >> grouped}")
    table = np.frombuffer(reader.take(last - first + 1), dtype=np.uint8)
    if not table[0] or not table[-1]:
        raise CodecError("the first or the last symbol of a plane does not occur in its table")
    stream = reader.take(reader.varint())
    if first == last and not grouped:
        if stream:
            raise CodecError(f"expected no stream for a plane of one symbol, got {len(stream)} bytes")
        return lambda plane: plane.fill(first)

    def decode(plane: NDArray[np.uint8]) -> None:
        _decode_into(plane, stream, _categorical(table, grouped))
        plane += np.uint8(first << grouped)

    return decode


def _varint(number: int) -> bytes:
    sevens = [number >> shift & 127 for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes(seven | 128 for seven in sevens[:-1]) + bytes(sevens[-1:])


class _Reader:
    """Takes bytes off the front."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise CodecError(f"expected {size} bytes more, got {len(taken)}")
        self._at += size
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        number = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise CodecError("the length of a stream has no end")

    def expect_end(self) -> None:
        if self._at < len(self._data):
            raise CodecError(f"{len(self._data) - self._at} bytes are left over")


def _bernoulli(size: int, ones: int) -> Any:
    import constriction

    return constriction.stream.model.Bernoulli(ones / size, perfect=False)


def _categorical(table: NDArray[np.uint8], grouped: int) -> Any:
    import constriction

    frequencies = np.repeat(_FREQUENCIES[table], 1 << grouped)
    # Whole numbers below 2 ** 53, divided once: the same doubles, and so the same model, on every machine.
    probabilities = frequencies.astype(np.float64) / float(frequencies.sum())
    return constriction.stream.model.Categorical(probabilities, perfect=False)


def _encode(symbols: NDArray[Any], model: Any) -> bytes:
    import constriction

    encoder = constriction.stream.queue.RangeEncoder()
    for chunk in _chunks(symbols):
        encoder.encode(chunk.astype(np.int32), model)
    compressed: bytes = encoder.get_compressed().astype("<u4").tobytes()
    return compressed


def _decode_into(symbols: NDArray[Any], data: bytes | memoryview, model: Any) -> None:
    import constriction

    if len(data) % 4:
        raise CodecError(f"a coded stream is whole words of 4 bytes, got {len(data)} bytes")
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))
    try:
        for chunk in _chunks(symbols):
            chunk[:] = decoder.decode(model, chunk.size)
    except AssertionError as error:  # what the library raises for streams that its encoder cannot have written
        raise CodecError("a coded stream does not fit the frequencies of its symbols") from error
    if not decoder.maybe_exhausted():
        raise CodecError("a coded stream goes on after its last symbol")


def _chunks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, array.size, _STEP):
        yield array[start : start + _STEP]
