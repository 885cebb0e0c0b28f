"""Arrays to bytes and back: without loss, close to the entropy, and never anything but a CodecError for wrong bytes."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from iks_plugin.codec import CodecError, decode_mask, decode_words, encode_mask, encode_words

WORD_TYPES = [np.dtype(name) for name in ("u1", "u2", "u4", "u8")]


def entropy(share: float) -> float:
    """Bits that one bit of a mask takes at least."""
    return 0.0 if share in (0, 1) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)


@given(arrays.arrays(np.bool_, st.integers(0, 3000)))
def test_a_mask_comes_back(mask: np.ndarray) -> None:
    assert np.array_equal(decode_mask(encode_mask(mask), mask.size, int(mask.sum())), mask)


@settings(max_examples=200)
@given(st.sampled_from(WORD_TYPES).flatmap(lambda dtype: arrays.arrays(dtype, st.integers(0, 2000))))
def test_words_come_back(words: np.ndarray) -> None:
    assert np.array_equal(decode_words(encode_words(words), words.dtype, words.size), words)


@pytest.mark.parametrize("dtype", WORD_TYPES, ids=str)
@pytest.mark.parametrize("symbols", [1, 2, 200, 256])
def test_words_that_pay_to_code_come_back(dtype: np.dtype, symbols: int) -> None:
    common = np.minimum(np.random.default_rng(0).geometric(0.2, size=70_000), symbols).astype(dtype)
    coded = encode_words(common)
    assert len(coded) < 0.7 * common.nbytes
    assert np.array_equal(decode_words(coded, dtype, common.size), common)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1, 0.05, 0.01, 0.001])
@pytest.mark.parametrize("size", [36_864, 1_000_003])
def test_a_mask_takes_its_entropy(share: float, size: int) -> None:
    mask = np.random.default_rng(0).random(size) < share
    least = size * entropy(mask.mean()) / 8
    assert least <= len(encode_mask(mask)) + 1
    assert len(encode_mask(mask)) <= (1.003 if share >= 0.01 else 1.01) * least + 8


def test_few_values_have_a_coarse_table() -> None:
    """Of float16 the top byte has 5 bits of exponent and 3 of mantissa, which hold next to nothing."""
    values = (0.01 * np.random.default_rng(0).laplace(size=370)).astype(np.float16)
    coded = encode_words(values.view("u2"))
    assert len(coded) <= 0.9 * values.nbytes
    assert np.array_equal(decode_words(coded, np.dtype("u2"), values.size), values.view("u2"))


def test_noise_grows_by_a_byte_for_each_plane_at_most() -> None:
    noise = np.frombuffer(np.random.default_rng(0).bytes(40_000), dtype="u4")
    assert len(encode_words(noise)) == noise.nbytes + 4


@pytest.mark.parametrize(
    ("dtype", "bits"), [("float32", 27.0), ("float16", 14.0)], ids=["27 of 32 bits", "14 of 16 bits"]
)
def test_trained_weights_take_fewer_bits(dtype: str, bits: float) -> None:
    """Laplace-like, as trained weights are: their exponents are few."""
    values = (0.01 * np.random.default_rng(0).laplace(size=200_000)).astype(dtype)
    words = values.view(f"u{values.itemsize}")
    assert 8 * len(encode_words(words)) / values.size <= bits


MASK = np.random.default_rng(0).random(5000) < 0.1
ONES = int(MASK.sum())
CODED = encode_mask(MASK)


@pytest.mark.parametrize(
    ("data", "size", "ones", "message"),
    [
        (CODED, 5000, 5001, "a mask of 5000 bits cannot have 5001 ones"),
        (CODED, 5000, -1, "cannot have -1 ones"),
        (CODED, 5000, 0, "expected no bytes for a mask that is all zeros, got"),
        (CODED, 5000, 5000, "expected no bytes for a mask that is all ones, got"),
        (CODED[:-1], 5000, ONES, "a coded stream is whole words of 4 bytes, got"),
        (CODED[:40], 5000, ONES, "a coded stream does not fit"),
        (bytes(4), 5000, ONES, "expected a mask with [0-9]+ ones, got 0"),
        (CODED + CODED, 5000, ONES, "a coded stream goes on after its last symbol"),
        (bytes([255]) * 400, 5000, ONES, "a coded stream does not fit the frequencies of its symbols"),
    ],
)
def test_bytes_that_are_no_mask(data: bytes, size: int, ones: int, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode_mask(data, size, ones)


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        (b"", 3, "expected 1 bytes more, got 0"),
        (b"\x00ab", 3, "expected 3 bytes more, got 2"),
        (b"\x00abcd", 3, "1 bytes are left over"),
        (b"\x07abc", 3, "expected a plane of kind 0 to 6, got 7"),
        (b"\x02\x80\x80", 3, r"a plane's last symbol \(128\) is none of 128"),
        (b"\x01\x05\x05\x01" + b"\xff" * 12, 3, "the length of a stream has no end"),
        (b"\x01\x05\x04", 3, r"a plane's last symbol \(4\) comes before its first \(5\)"),
        (b"\x01\x05\x06\x00\x01\x00", 3, "the first or the last symbol of a plane does not occur"),
        (b"\x01\x05\x05\x01\x04abcd", 3, "expected no stream for a plane of one symbol, got 4 bytes"),
        (b"\x01\x05\x06\x01\x01\x04\x00\x00\x00", 3, "expected 4 bytes more, got 3"),
        (b"\x01\x05\x06\x01\x01\x03\x00\x00\x00", 3, "whole words of 4 bytes, got 3 bytes"),
    ],
)
def test_bytes_that_are_no_words(data: bytes, size: int, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode_words(data, np.dtype("u1"), size)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from(WORD_TYPES), st.integers(0, 500))
def test_any_bytes_are_words_or_an_error(data: bytes, dtype: np.dtype, size: int) -> None:
    with contextlib.suppress(CodecError):
        assert decode_words(data, dtype, size).shape == (size,)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 2000), st.integers(-5, 2005))
def test_any_bytes_are_a_mask_or_an_error(data: bytes, size: int, ones: int) -> None:
    with contextlib.suppress(CodecError):
        assert decode_mask(data, size, ones).sum() == ones
