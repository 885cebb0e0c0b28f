"""`iks bench`: what it measures and what it prints."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import iks_plugin
import toys
from iks_plugin import IksError
from iks_plugin.__main__ import WRONG_USE, main
from iks_plugin.bench import bench, parse_size

ARCH = "toys:plain_sr"


@pytest.fixture
def pruned() -> nn.Module:
    model = toys.plain_sr()
    for layer in (model[2], model[4]):
        layer.weight.data *= torch.rand_like(layer.weight) >= 0.9
    return model


def test_figures_of_a_network(pruned: nn.Module) -> None:
    result = bench(pruned, (20, 33), rounds=2)
    assert result.image == (3, 20, 33)
    assert result.dense > 0 and result.packed > 0
    assert [layer.name for layer in result.layers] == ["2", "4"]
    assert all(0.85 < layer.sparsity < 0.95 and layer.packed < 0.2 * layer.dense for layer in result.layers)
    assert result.packed_bytes < result.dense_bytes
    assert {layer.path for layer in result.layers} <= {"stream", "torch"}


def test_layouts_of_memory_are_made_before_anything_is_timed(pruned: nn.Module) -> None:
    seen = []
    pack = iks_plugin.pack(pruned)

    def look(layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if type(layer) is nn.Conv2d and layer.in_channels == 16 and layer.out_channels == 16:
            last = [t.is_contiguous(memory_format=torch.channels_last) for t in (layer.weight, *inputs)]
            seen.append((last[0], last[1]))

    with mock.patch.object(nn.Module, "to", autospec=True, side_effect=nn.Module.to) as to:
        handle = nn.modules.module.register_module_forward_pre_hook(look)
        try:
            bench(pack, (20, 33), rounds=4)
        finally:
            handle.remove()
    assert to.call_count <= 2
    assert {(False, False), (True, True)} == set(seen)


def test_the_command(pruned: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iks_plugin.save(pruned, tmp_path / "m.iks")
    arguments = ["bench", str(tmp_path / "m.iks"), "--arch", ARCH, "--size", "33x20", "--rounds", "1", "--threads", "1"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "image 3x20x33, 1 threads" in out
    assert "times as fast" in out
    assert "packed layer" in out


def test_a_network_in_which_nothing_is_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(toys.plain_sr().state_dict(), tmp_path / "m.pth")
    with pytest.warns(iks_plugin.IksWarning, match="no layer of the model was packed") as warned:
        assert main(["bench", str(tmp_path / "m.pth"), "--arch", ARCH, "--size", "20x12", "--rounds", "1"]) == 0
    assert len(warned) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("packed: the same network, as no layer has zeros enough to be packed\n")
    assert "dense: " in printed and "times as fast" not in printed


def test_a_network_for_grey_images_or_for_none() -> None:
    grey = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1))
    assert bench(grey, (8, 9), rounds=1).image == (1, 8, 9)
    five = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1))
    with pytest.raises(IksError, match=r"takes no image of 9 x 8 pixels, with 3 channels \(.*5.*\) or with 1 .*--size"):
        bench(five, (8, 9), rounds=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "320"], "size must be width x height in pixels, such as 320x180, got '320'"),
        (["--size", "0x10"], "size must be width x height"),
        (
            ["--size", "10000000x10000000"],
            "the network takes no image of 10000000 x 10000000 pixels, with 3 channels (",
        ),
        (["--size", f"{10**12}x{10**12}"], "expected a network for one such image, try another --size"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, pruned: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    iks_plugin.save(pruned, tmp_path / "m.iks")
    assert main(["bench", str(tmp_path / "m.iks"), "--arch", ARCH, *arguments]) == WRONG_USE
    assert message in capsys.readouterr().err


def test_sizes() -> None:
    assert parse_size("320x180") == (180, 320)
    assert parse_size(" 64X32 ") == (32, 64)
