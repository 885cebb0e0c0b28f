"""Files that were damaged anywhere: bits, bytes, chunks and lengths."""

from __future__ import annotations

import random
import re


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
        number = str(rng.choice(NUMBERS)).encode()
        data[8 + start : 8 + end] = number
        if rng.random() < 0.8:
            data[:8] = ((size + len(number) - (end - start)) % 2**64).to_bytes(8, "little")


def _change_header_size(data: bytearray, rng: random.Random) -> None:
    data[:8] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")


def _range(data: bytearray, rng: random.Random) -> tuple[int, int]:
    size = min(len(data), rng.choice((1, 2, 8, 64, rng.randint(1, 1000))))
    return rng.randrange(len(data) - size + 1), size


NUMBERS = (
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
ANYWHERE = (_flip_bits, _change_bytes, _cut_out, _truncate, _extend, _swap_chunks)
"""What can be done to any bytes."""
_DAMAGES = (*ANYWHERE, _flip_bits, _repeat_chunk, _change_header_number, _change_header_number, _change_header_size)
