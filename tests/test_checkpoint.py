"""State dicts out of checkpoints, with nothing in them executed."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import iks_plugin
import toys
from iks_plugin import IksError
from iks_plugin.checkpoint import read_checkpoint, write_checkpoint

STATE = {"conv.weight": torch.eye(4), "conv.bias": torch.arange(4.0)}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}

LAYOUTS = {
    "plain": (STATE, None, None),
    "ordered": (OrderedDict(STATE), None, None),
    "BasicSR": ({"params": STATE}, "params", "params"),
    "BasicSR with EMA": ({"params": OTHER, "params_ema": STATE}, "params_ema", "params"),
    "MMEngine": ({"meta": {"epoch": 3}, "state_dict": STATE, "ema_state_dict": OTHER}, "state_dict", "state_dict"),
    "a common one": ({"epoch": 3, "model_state_dict": STATE, "optimizer": {}}, "model_state_dict", "model_state_dict"),
    "a tensor beside": ({"state_dict": STATE, "best_psnr": torch.tensor(31.2)}, "state_dict", "state_dict"),
    "a counter beside": ({**STATE, "epoch": 3}, None, None),
    "a tensor without a name beside": ({**STATE, 0: torch.ones(2)}, None, None),
    "parallel": ({f"module.{name}": tensor for name, tensor in STATE.items()}, None, None),
    "parameters": ({name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()}, None, None),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("content", "key", "restored"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path: Path, content: dict, key: str | None, restored: str | None, zipped: bool) -> None:
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(tmp_path / "c.pth")
    assert (checkpoint.key, checkpoint.restored_key) == (key, restored)
    assert toys.states_equal(dict(checkpoint.state), STATE)


def test_a_key_and_a_prefix_of_ones_own_choice(tmp_path: Path) -> None:
    inner = {**{f"generator.{name}": tensor for name, tensor in STATE.items()}, "discriminator.w": torch.ones(2)}
    torch.save({"state_dict": {}, "best": inner}, tmp_path / "c.pth")
    checkpoint = read_checkpoint(tmp_path / "c.pth", key="best", prefix="generator.")
    assert toys.states_equal(dict(checkpoint.state), STATE)
    with pytest.raises(IksError, match="no name begins with 'net.': the names begin with discriminator., generator."):
        read_checkpoint(tmp_path / "c.pth", key="best", prefix="net.")
    with pytest.raises(IksError, match=r"under 'worst', got none: choose one of \['best'\] with --key"):
        read_checkpoint(tmp_path / "c.pth", key="worst")
    with pytest.raises(IksError, match=r"in the checkpoint, got none: choose one of \['best'\] with --key"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_thresholds_are_applied_as_a_layer_of_half_precision_does(tmp_path: Path, dtype: torch.dtype) -> None:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8, law="exact")
    for layer in (model[2], model[4]):
        layer.threshold.data.uniform_(-5, -2)
    model.to(dtype)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    state = read_checkpoint(tmp_path / "c.pth").state
    assert all(torch.equal(state[f"{index}.weight"], model[index].weight) for index in (2, 4))


def test_thresholds_of_the_networks_own_stay(tmp_path: Path) -> None:
    state = {"act.weight": torch.ones(1, 4, 1, 1), "act.threshold": torch.full((1, 4, 1, 1), 0.1)}
    torch.save({"params": state}, tmp_path / "c.pth")
    checkpoint = read_checkpoint(tmp_path / "c.pth", is_gate=lambda name: name != "act.threshold")
    assert toys.states_equal(dict(checkpoint.state), state) and checkpoint.gated == 0


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "layer"])
def test_thresholds_beside_the_weights_are_applied(tmp_path: Path, granularity: str) -> None:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5, granularity=granularity)
    toys.spread_thresholds(model)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    state = read_checkpoint(tmp_path / "c.pth").state
    plain = toys.plain_sr()
    plain.load_state_dict(state)
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(plain(x), model(x))


def test_thresholds_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(4, 3), "a.threshold": torch.ones(5, 3)}, tmp_path / "c.pth")
    with pytest.raises(IksError, match=r"a.threshold does not fit a.weight \(shapes \(5, 3\) and \(4, 3\)\)"):
        read_checkpoint(tmp_path / "c.pth")


def test_thresholds_of_other_kinds_are_left_alone(tmp_path: Path) -> None:
    state = {"act.weight": torch.ones(4, 3), "act.threshold": torch.ones(4)}
    torch.save(state, tmp_path / "c.pth")
    assert toys.states_equal(dict(read_checkpoint(tmp_path / "c.pth").state), state)


class Evil:
    """Unpickling it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.folder,))


class Logs(dict):
    """A class that only the framework that wrote the file has, with state, items and an argument."""

    def __init__(self, size: int) -> None:
        super().__init__(size=size)
        self.history = [1.0] * size


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_other_objects_are_passed_over_and_never_made(tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": STATE, "logs": Logs(3), "evil": Evil(tmp_path / "made"), "where": Path("a"), "set": {1, 2}}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    assert toys.states_equal(dict(read_checkpoint(tmp_path / "c.pth").state), STATE)
    assert not (tmp_path / "made").exists()


WRONG = {
    "nothing": (None, "found nothing: check the path"),
    "text": (b"these are no weights", "expected a checkpoint that torch.save has written, got something else"),
    "empty": (b"", "expected a checkpoint that torch.save has written, got something else"),
    "a pickle": (pickle.dumps({"a": 1}), "expected a checkpoint"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "c.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IksError, match=message) as raised:
        read_checkpoint(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a checkpoint with a state dict, got a list"),
        ({"epoch": 3}, "expected a state dict in the checkpoint, got none: it holds none"),
        ({}, "it holds none"),
        ({0: torch.ones(2)}, "expected a state dict in the checkpoint, got none: it holds none"),
        ({"params": {0: torch.ones(2)}}, "expected a state dict in the checkpoint, got none: it holds none"),
        (torch.ones(3), "expected a checkpoint with a state dict, got a Tensor"),
        (
            torch.nn.Linear(2, 2),
            r"got an object of another kind. Of a whole model save the state dict: torch.save\(model.s",
        ),
    ],
)
def test_checkpoints_without_a_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(IksError, match=message):
        read_checkpoint(tmp_path / "c.pth")


def test_a_key_where_there_is_none(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "c.pth")
    with pytest.raises(IksError, match="the checkpoint is a state dict by itself, so leave --key out"):
        read_checkpoint(tmp_path / "c.pth", key="params")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.iks", "it is what `iks restore` is for"),
        ("m.safetensors", r"compact file by another name: rename it to \*.iks"),
    ],
)
def test_compact_files(tmp_path: Path, name: str, message: str) -> None:
    iks_plugin.save(STATE, tmp_path / name)
    with pytest.raises(IksError, match=message):
        read_checkpoint(tmp_path / name)


def test_a_safetensors_file_is_read_and_thresholds_are_applied(tmp_path: Path) -> None:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5)
    toys.spread_thresholds(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    with iks_plugin.gates_applied(model):
        gated = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("threshold")}
        assert toys.states_equal(checkpoint.state, gated)
    assert (checkpoint.key, checkpoint.gated) == (None, 2)
    with pytest.raises(IksError, match="the checkpoint is a state dict by itself, so leave --key out"):
        read_checkpoint(tmp_path / "model.safetensors", key="params")


@pytest.mark.parametrize("content", [b"", b"no weights", b"\xff" * 8 + b"{}"], ids=["empty", "text", "a huge header"])
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(IksError, match="expected a safetensors file, got another kind or a damaged one") as raised:
        read_checkpoint(path)
    assert str(path) in str(raised.value)


def test_a_safetensors_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(IksError, match="expected a state dict in the checkpoint, got none: it holds none"):
        read_checkpoint(tmp_path / "model.safetensors")


def test_a_truncated_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, STATE, None)
    content = path.read_bytes()
    for size in (10, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:size])
        with pytest.raises(IksError, match="a damaged one"):
            read_checkpoint(path)


@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_a_checkpoint_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_checkpoint(tmp_path / name, STATE, None)

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(IksError, match=r"cannot be read \(Permission denied\)"):
        read_checkpoint(tmp_path / name)


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "c.pth")
    content = (tmp_path / "c.pth").read_bytes()
    for size in (10, len(content) // 2, len(content) - 10):
        (tmp_path / "c.pth").write_bytes(content[:size])
        with pytest.raises(IksError, match="got something else"):
            read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("key", [None, "params", "state_dict"])
def test_what_is_written_is_read(tmp_path: Path, key: str | None) -> None:
    write_checkpoint(tmp_path / "c.pth", STATE, key)
    assert read_checkpoint(tmp_path / "c.pth").key == key
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    assert toys.states_equal(dict(content if key is None else content[key]), STATE)


@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_the_same_state_gives_the_same_file(tmp_path: Path, name: str) -> None:
    files = set()
    for _ in range(3):
        write_checkpoint(tmp_path / name, STATE, "params")
        files.add((tmp_path / name).read_bytes())
    assert len(files) == 1


def test_a_safetensors_file_is_written_with_tensors_that_share_memory(tmp_path: Path) -> None:
    state = {"a": STATE["conv.weight"], "b": STATE["conv.weight"], "c": STATE["conv.weight"].T}
    write_checkpoint(tmp_path / "c.safetensors", state, None)
    assert toys.states_equal(load_file(tmp_path / "c.safetensors"), state)


def test_a_type_that_safetensors_does_not_have(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex128)}
    with pytest.raises(IksError, match=r"c\.safetensors: safetensors cannot hold all of .*complex128.*: write a \.pth"):
        write_checkpoint(tmp_path / "c.safetensors", state, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_cannot_be_written(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(IksError, match="cannot be written .* What was there before is unchanged"):
        write_checkpoint(tmp_path / "no" / f"c{suffix}", STATE, None)
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(IksError, match="cannot be written"):
        write_checkpoint(tmp_path / f"folder{suffix}", STATE, None)
    assert os.listdir(tmp_path) == [f"folder{suffix}"]
