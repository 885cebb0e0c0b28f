"""What `iks inspect` tells of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import iks_plugin
from iks_plugin.contents import inspect


@pytest.fixture
def path(tmp_path: Path) -> Path:
    weight = torch.randn(8, 4, 3, 3)
    weight.view(-1)[: 288 * 3 // 4] = 0
    shared = torch.randn(100)
    iks_plugin.save({"a.weight": weight, "b": shared, "c": shared, "n": torch.tensor(3)}, tmp_path / "m.iks", "float16")
    return tmp_path / "m.iks"


def test_the_table(path: Path) -> None:
    lines = str(inspect(path)).splitlines()
    assert lines[0] == f"{path}: written by iks-plugin {iks_plugin.__version__}, values in float16"
    assert lines[1] == "model: a bare state dict"
    cells = {line.split()[0]: line.split() for line in lines[5:9]}
    assert cells["a.weight"][1:7] == ["sparse", "8x4x3x3", "float32", "as", "float16", "75.00%"]
    assert cells["b"][1:4] == ["plain", "100", "float32"]
    assert cells["c"][1:4] == ["same", "as", "b"]
    assert cells["n"][1:3] == ["plain", "scalar"]
    assert "sparse weights (1): 216 of 288 are zero, 75.00%" in lines
    size, dense = path.stat().st_size, 288 * 4 + 400 + 8
    assert f"file: {size:,} bytes; its tensors take {dense:,} when dense, {dense / size:.1f} times smaller" in lines
    assert lines[-1] == "checksums: 4 of 4 are right"


def test_what_a_model_was_trained_for(tmp_path: Path) -> None:
    layer = torch.nn.Conv2d(8, 8, 3)
    iks_plugin.sparsify(layer, 0.75)
    iks_plugin.save(layer, tmp_path / "m.iks")
    assert "model: torch.nn.modules.conv.Conv2d, made sparse for a target of 75.00%" in str(inspect(tmp_path / "m.iks"))


def test_the_dictionary_is_json(path: Path) -> None:
    contents = inspect(path).to_dict()
    assert json.loads(json.dumps(contents)) == contents | {"entries": json.loads(json.dumps(contents["entries"]))}
    assert contents["size"] == path.stat().st_size
    assert contents["entries"][0]["zeros"] == 216
    assert sum(entry["bytes"] for entry in contents["entries"]) < contents["size"]


def test_damage_is_found_and_named(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 20] ^= 1  # past the container's header
    path.write_bytes(content)
    contents = inspect(path)
    assert contents.damaged == ("a.weight",)
    text = str(contents)
    assert "WRONG" in text
    assert "checksums: 3 of 4 are right" in text
