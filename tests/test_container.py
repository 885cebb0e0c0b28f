"""Hostile and damaged files: right checksums over a wrong index, and containers that are something else."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save

import iks_plugin
from iks_plugin import IksError, container


@pytest.fixture
def path(tmp_path: Path) -> Path:
    weight = torch.randn(8, 4, 3, 3)
    weight[torch.rand(weight.shape) < 0.7] = 0
    shared = torch.randn(4)
    iks_plugin.save({"a.weight": weight, "b": shared, "c": shared}, tmp_path / "m.iks", "int8")
    return tmp_path / "m.iks"


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write the file anew with another index, all checksums right."""
    with safe_open(path, framework="numpy") as file:
        data, index = file.get_tensor("data"), file.get_tensor("index").tobytes()
    document = json.loads(zlib.decompress(index))
    changed = change(document)
    write(path, json.dumps(document if changed is None else changed).encode(), data)


def write(path: Path, text: bytes, data: np.ndarray, compress: bool = True, version: str = "1") -> None:
    index = zlib.compress(text) if compress else text
    arrays = {"index": np.frombuffer(index, dtype=np.uint8), "data": data}
    path.write_bytes(save(arrays, {"iks": f"{version} {zlib.crc32(index):08x}"}))


def expect_error(path: Path, message: str) -> None:
    for load in (iks_plugin.load, lambda p: iks_plugin.load(p, torch.nn.Conv2d(4, 8, 3)), container_entries):
        with pytest.raises(IksError) as raised:
            load(path)
        assert str(path) in str(raised.value)
        assert raised.match(message)


def container_entries(path: Path) -> None:
    with container.opened(path):
        pass


def entry(number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["entries"][number].update(values)


WRONG_INDEX: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda _: [1, 2], "it is not whole, or too large, or not a list of entries"),
    "no entries": (lambda document: document.pop("entries") and None, "not a list of entries"),
    "entries a number": (lambda document: document.update(entries=3), "not a list of entries"),
    "an entry a number": (
        lambda document: document["entries"].append(3),
        r"entry 3 \(''\): expected an entry with a name",
    ),
    "no name": (lambda document: document["entries"][0].pop("name") and None, "expected an entry with a name"),
    "no kind": (lambda document: document["entries"][0].pop("kind") and None, "kind has the impossible value 'None'"),
    "another kind": (entry(0, kind="dense"), r"entry 0 \('a.weight'\): kind has the impossible value 'dense'"),
    "a kind that is a list": (entry(0, kind=[]), "kind has the impossible value"),
    "an unknown dtype": (entry(1, dtype="float128"), r"entry 1 \('b'\): dtype has the impossible value 'float128'"),
    "a dtype that is a dict": (entry(1, dtype={}), "dtype has the impossible value"),
    "a negative size": (entry(1, shape=[-4]), "shape has the impossible value"),
    "a fractional size": (entry(1, shape=[4.0]), "shape has the impossible value"),
    "a size that is true": (entry(1, shape=[True]), "shape has the impossible value"),
    "a size beyond 64 bits": (entry(1, shape=[2**64]), "shape has the impossible value"),
    "a product beyond 64 bits": (entry(1, shape=[2**40, 2**40]), "shape .* is too large"),
    "too many dimensions": (entry(1, shape=[1] * 100), "shape has the impossible value"),
    "an order of other dimensions": (entry(0, order=[0, 1, 2, 4]), "order .* is none of 4 dimensions"),
    "an order that repeats": (entry(0, order=[0, 0, 1, 2]), "order .* is none of 4 dimensions"),
    "sizes of another kind": (entry(1, sizes=[4, 4]), "what a plain entry needs is not all there, or there is more"),
    "no scales": (entry(0, axis=None), "what a sparse entry needs is not all there"),
    "an axis too many": (entry(0, axis=4), "axis 4 is none of 4 dimensions"),
    "values stored as text": (entry(0, stored="utf8"), "stored has the impossible value 'utf8'"),
    "more non-zeros than weights": (entry(0, nonzeros=289), "289 non-zeros do not fit a shape of 288 weights"),
    "a sparse entry of whole numbers": (
        entry(0, dtype="int32"),
        "a sparse entry cannot be 288 values of int32 stored as",
    ),
    "a stored type that is wider": (
        entry(0, dtype="float16", stored="float32", axis=None, sizes=[4, 4]),
        "a sparse entry cannot be 288 values of float16 stored as float32",
    ),
    "a sparse entry of nothing": (
        entry(0, shape=[2**62, 0, 2**62], nonzeros=0),
        "a sparse entry cannot be 0 values of float32 stored as int8",
    ),
    "a checksum that is text": (entry(0, crc32="abc"), "crc32 has the impossible value"),
    "a key from the future": (entry(0, rank=3), "there are keys that this version does not know"),
    "the same name twice": (entry(1, name="a.weight"), "the name 'a.weight' occurs twice"),
    "an alias of nothing": (entry(2, alias_of="z"), "'c' is an alias of 'z', which is no tensor before it"),
    "a name that moves the cursor": (
        entry(1, name="\x1b[2J"),
        r"entry 1 \('\\x1b\[2J'\): the name has characters that cannot be printed",
    ),
    "half a character for a name": (entry(1, name="\ud800"), r"\('\\ud800'\): the name has characters that cannot"),
    "an alias of half a character": (entry(2, alias_of="\ud800"), r"alias_of has the impossible value '\\ud800'"),
    "a version in two lines": (lambda document: document.update(plugin_version="1\n2"), "what the index says of"),
    "a class that rings": (lambda document: document.update(model_class="a\x07"), "what the index says of the file"),
    "half a character for a key": (
        lambda document: document.update(checkpoint_key="\ud800"),
        "what the index says of the file",
    ),
    "an alias of itself": (entry(2, alias_of="c"), "'c' is an alias of 'c', which is no tensor before it"),
    "an alias of another shape": (entry(2, shape=[5]), "'c' and what it is an alias of differ in shape or dtype"),
    "more bytes than there are": (entry(1, sizes=[10**9]), "data: expected [0-9]+ bytes by the index, got"),
    "fewer bytes than there are": (entry(1, sizes=[3]), "data: expected [0-9]+ bytes by the index, got"),
    "no plugin version": (lambda document: document.pop("plugin_version") and None, "what the index says of the file"),
    "a target of 2": (
        lambda document: document.update(target_sparsity=2.0),
        "target_sparsity has the impossible value",
    ),
    "a value type of its own": (
        lambda document: document.update(value_dtype="int4"),
        "what the index says of the file",
    ),
    "a value type that is a list": (
        lambda document: document.update(value_dtype=[]),
        "what the index says of the file",
    ),
    "a key that is a number": (lambda document: document.update(checkpoint_key=4), "what the index says of the file"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_INDEX.values(), ids=WRONG_INDEX)
def test_a_wrong_index_with_right_checksums(path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    rewrite(path, change)
    expect_error(path, message)


def test_names_of_the_entries_swapped(path: Path) -> None:
    """Two entries that could be each other's: only the checksums of their bytes tell."""
    iks_plugin.save({"a": torch.randn(4), "b": torch.randn(6)}, path)

    def swap(document: dict[str, Any]) -> None:
        document["entries"].reverse()

    rewrite(path, swap)
    with pytest.raises(IksError, match="entry 'b': expected the checksum"):
        iks_plugin.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(0, nonzeros=5), "entry 'a.weight': "),
        (entry(0, shape=[8, 4, 3, 4]), "entry 'a.weight': "),
        (entry(0, stored="float16", axis=None, sizes=[1, 2]), "data: expected"),
        (entry(1, shape=[5]), "differ in shape"),
        (entry(1, dtype="float64"), "differ in shape or dtype"),
    ],
    ids=["fewer non-zeros", "another shape", "another type", "more values", "wider values"],
)
def test_an_index_that_does_not_fit_the_bytes(path: Path, change: Callable, message: str) -> None:
    rewrite(path, change)
    with pytest.raises(IksError, match=message):
        iks_plugin.load(path)


def test_claims_beyond_what_the_file_can_hold(path: Path) -> None:
    """A tensor of zeros takes no bytes, so a small file may claim any number of them: only the model can tell."""
    iks_plugin.save({"weight": torch.zeros(4, 4)}, path)
    rewrite(path, entry(0, shape=[2**20, 2**20]))
    with pytest.raises(IksError, match=r"claims tensors of [0-9,]+ bytes, and without a model to compare with"):
        iks_plugin.load(path)
    with pytest.raises(IksError, match=r"weight: shape \(4, 4\) in the model"):
        iks_plugin.load(path, torch.nn.Linear(4, 4, bias=False))


@pytest.mark.parametrize(
    ("text", "compress", "message"),
    [
        (b"[" * 100_000, True, "index: it cannot be read"),
        (b'{"entries": ' + b"9" * 10_000 + b"}", True, "index: (it cannot be read|it is not whole)"),
        (b"\xff\xfe{}", True, "index: it cannot be read"),
        (b"{", True, "index: it cannot be read"),
        (b"not compressed", False, "index: it cannot be read"),
        (zlib.compress(b'{"entries": []}')[:-4], False, "index: it is not whole"),
        (b"", False, "index: it is not whole"),
        (b" " * (600 << 20), True, "index: it is not whole, or too large"),
    ],
    ids=["nested", "a huge number", "no text", "half a document", "raw", "cut short", "empty", "a bomb"],
)
def test_an_index_that_is_no_document(path: Path, text: bytes, compress: bool, message: str) -> None:
    write(path, text, np.zeros(0, dtype=np.uint8), compress)
    expect_error(path, message)


@pytest.mark.parametrize("version", ["2", "", "one", "9" * 1000])
def test_other_versions(path: Path, version: str) -> None:
    write(path, b"{}", np.zeros(0, dtype=np.uint8), version=version)
    expect_error(path, "expected format version 1, got '.{0,20}': read it with the version of iks-plugin that wrote it")


OVERLAPPING = json.dumps(
    {
        "index": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "data": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
    }
).encode()

OTHER_CONTAINERS: dict[str, tuple[bytes, str]] = {
    "another safetensors file": (save({"a": np.ones(3)}), "got another safetensors file"),
    "no index": (save({"data": np.ones(3, dtype=np.uint8)}, {"iks": "1 0"}), "index: expected a flat array of bytes"),
    "numbers for an index": (save({"index": np.ones(3), "data": np.ones(3)}, {"iks": "1 0"}), "index: expected a flat"),
    "a square of data": (
        save({"index": np.ones(3, dtype=np.uint8), "data": np.ones((2, 2), dtype=np.uint8)}, {"iks": "1 0"}),
        "data: expected a flat array of bytes",
    ),
    "a wrong checksum": (
        save({"index": np.ones(3, dtype=np.uint8), "data": np.ones(3, dtype=np.uint8)}, {"iks": "1 0"}),
        "index: its checksum is wrong",
    ),
    "nothing": (b"", "no safetensors container, or a damaged one"),
    "text": (b"hello world, this is no model", "no safetensors container"),
    "a huge header": (b"\xff" * 8 + b"{}", "no safetensors container"),
    "a header that overlaps": (
        len(OVERLAPPING).to_bytes(8, "little") + OVERLAPPING + bytes(6),
        "no safetensors container, or a damaged one",
    ),
}


@pytest.mark.parametrize(("content", "message"), OTHER_CONTAINERS.values(), ids=OTHER_CONTAINERS)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.iks").write_bytes(content)
    expect_error(tmp_path / "m.iks", message)


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    expect_error(tmp_path / "no.iks", "expected a compact file, found nothing: check the path")
    (tmp_path / "folder.iks").mkdir()
    expect_error(tmp_path / "folder.iks", "expected a compact file, found a folder")


def test_every_truncation_is_an_error(path: Path) -> None:
    content = path.read_bytes()
    for size in range(0, len(content), 3):
        path.write_bytes(content[:size])
        with pytest.raises(IksError, match=r"m\.iks"):
            iks_plugin.load(path)


def test_the_same_model_gives_the_same_file(path: Path) -> None:
    state = iks_plugin.load(path)
    files = set()
    for number in range(8):
        iks_plugin.save(copy.deepcopy(state), path.with_name(f"{number}.iks"))
        files.add(path.with_name(f"{number}.iks").read_bytes())
    assert len(files) == 1
