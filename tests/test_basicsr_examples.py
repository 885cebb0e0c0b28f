"""examples/basicsr: the script that makes the data set, and every option file in a short run of real BasicSR."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.utils.matlab_functions import imresize
from PIL import Image
from torch import nn

import basicsr_toys as toys

EXAMPLES = Path(__file__).parents[1] / "examples" / "basicsr"
TRAININGS = sorted(path.name for path in EXAMPLES.glob("*.yml") if not path.name.startswith("test_"))
FOLDERS = {"HR": 1, "LRx2": 2, "LRx4": 4}

Options = dict[str, Any]


def run(*command: str, folder: Path) -> str:
    """Run `python command` in `folder`, as a user does. Returns its output."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(os.path.abspath(entry) for entry in given if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def read_options(name: str) -> Options:
    options: Options = yaml.safe_load((EXAMPLES / name).read_text())
    return options


def shorten(options: Options) -> Options:
    """The same training, with the same networks, for two iterations on small batches."""
    options = copy.deepcopy(options)
    options["train"]["total_iter"] = 2
    options["val"]["val_freq"] = options["logger"]["save_checkpoint_freq"] = 1
    options["logger"]["print_freq"] = 1
    options["datasets"]["train"].update(num_worker_per_gpu=0, batch_size_per_gpu=2)
    return options


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set that the script makes of scikit-image's photographs, cut to a few small images."""
    folder = tmp_path_factory.mktemp("workplace")
    small = ("--size", "96", "--step", "400", "--val-size", "32")
    said = run(str(EXAMPLES / "make_data.py"), *small, folder=folder)
    assert "images of 96 x 96 to train on, 3 to validate on; low resolution x2 and x4" in said
    return folder


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Callable[[str], tuple[Options, Path, str]]:
    """Run an option file once. Gives its options, its folder of networks and the log of the run."""
    done: dict[str, tuple[Options, Path, str]] = {}

    def train(name: str) -> tuple[Options, Path, str]:
        if name not in done:
            options = read_options(name)
            log = toys.train(shorten(options), workplace)
            done[name] = options, workplace / "experiments" / options["name"] / "models", log
        return done[name]

    return train


def rewritten_layers(network: nn.Module, iks: Any) -> list[str]:
    """The names of the layers whose weights the block counts, by the rules of the README."""
    block = iks if isinstance(iks, dict) else {}
    types = tuple(getattr(nn, name) for name in block.get("layer_types", ["Conv2d"]))
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, types)
        and min(layer.weight.shape[:2]) > 4
        and not any(fnmatchcase(name, pattern) for pattern in block.get("exclude", []))
    ]


class TestOptionFiles:
    def test_there_is_one_for_each_kind_of_network(self) -> None:
        assert TRAININGS == ["EDSR_x2.yml", "ESRGAN_x4.yml", "MSRResNet_x4.yml", "RCAN_x2.yml", "SwinIR_x2.yml"]

    @pytest.mark.parametrize("name", TRAININGS)
    def test_an_option_file_agrees_with_itself(self, name: str) -> None:
        options = read_options(name)
        scale, train = options["scale"], options["train"]
        assert name == f"{options['name']}.yml"
        assert sum(train["scheduler"]["periods"]) == train["total_iter"]
        assert options["network_g"].get("upscale", 4) == scale
        assert options["val"]["metrics"]["psnr"]["crop_border"] == scale
        assert train["total_iter"] % options["logger"]["save_checkpoint_freq"] == 0
        for dataset in options["datasets"].values():
            assert dataset["dataroot_lq"].endswith(f"LRx{scale}")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", TRAININGS)
    def test_a_training_gives_plain_networks_with_exactly_the_target(
        self, name: str, trained: Callable[[str], tuple[Options, Path, str]]
    ) -> None:
        options, models, log = trained(name)
        assert log.count("# psnr: ") == 3
        network = build_network(copy.deepcopy(options["network_g"]))
        iks = options["iks"]
        target = iks["target_sparsity"] if isinstance(iks, dict) else iks
        assert {path.name for path in models.glob("net_g_*.pth")} == {"net_g_1.pth", "net_g_2.pth", "net_g_latest.pth"}
        for path in models.glob("net_g_*.pth"):
            assert path.with_suffix(".iks").exists() == (isinstance(iks, dict) and bool(iks.get("export")))
            saved = torch.load(path, weights_only=True)
            assert set(saved) == {"params", "params_ema"}
            for state in saved.values():
                network.load_state_dict(state, strict=True)
                weights = [network.get_submodule(layer).weight for layer in rewritten_layers(network, iks)]
                zeros = sum(int((weight == 0).sum()) for weight in weights)
                assert zeros == round(target * sum(weight.numel() for weight in weights))

    def test_convolutions_hold_less_than_half_of_the_small_swinir(self) -> None:
        options = read_options("SwinIR_x2.yml")
        network = build_network(copy.deepcopy(options["network_g"]))
        convolutions, both = (
            sum(network.get_submodule(layer).weight.numel() for layer in rewritten_layers(network, iks))
            for iks in (None, options["iks"])
        )
        assert convolutions < both / 2

    @pytest.mark.slow
    def test_the_test_file_tests_what_was_trained(
        self, workplace: Path, trained: Callable[[str], tuple[Options, Path, str]]
    ) -> None:
        name = "test_EDSR_x2.yml"
        trained("EDSR_x2.yml")
        assert read_options(name)["network_g"] == read_options("EDSR_x2.yml")["network_g"]
        said = run("-m", "iks_basicsr", "--test", "-opt", str(EXAMPLES / name), folder=workplace)
        assert "# psnr: " in said
        assert "with param key: [params_ema]" in said
        images = {path.name for path in (workplace / "results" / "test_EDSR_x2").rglob("*.png")}
        assert images == {f"{photo}_test_EDSR_x2.png" for photo in ("astronaut", "chelsea", "coffee")}


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", EXAMPLES / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_data"] = module
    spec.loader.exec_module(module)
    return module


def fill(folder: Path, *names: str, height: int = 70, width: int = 90) -> Path:
    """Put images of random colours, smooth ones, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SMALL = ("--size", "32", "--step", "32", "--val-size", "64")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# What is put into the folder (images/, perhaps data/), arguments, and what the error says.
WRONG: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "no folder": (lambda at: None, (), "images does not exist: expected a folder with at least 2 images"),
    "a file": (lambda at: (at / "images").touch(), (), "images is a file: expected a folder"),
    "empty folder": (
        lambda at: (at / "images").mkdir(),
        (),
        "expected at least 2 images, got 0. Only files directly in it ending in .png, ",
    ),
    "one image": (lambda at: fill(at / "images", "a.png"), (), "expected at least 2 images, got 1"),
    "no image": (
        lambda at: (fill(at / "images", "a.png", "b.png") / "c.jpg").write_text("no image"),
        (),
        "images cannot be used:\n  c.jpg: not an image that Pillow can read\nReplace them or move them away",
    ),
    "half an image": (
        lambda at: cut_short(fill(at / "images", "a.png", "b.png") / "a.png"),
        (),
        "a.png: cannot be read: ",
    ),
    "deep image": (
        lambda at: Image.fromarray(np.zeros((70, 90), np.uint16)).save(fill(at / "images", "a.png") / "deep.png"),
        (),
        "deep.png: expected 8 bits per channel, got more",
    ),
    "small images": (
        lambda at: fill(at / "images", "a.png", "b.png", height=20),
        (),
        "a: expected at least 32 x 32 pixels (--size), got 90 x 20\n  b: expected at least 32 x 32 pixels, got 90 x 20",
    ),
    "many small images": (
        lambda at: fill(at / "images", *(f"{number}.png" for number in range(14)), height=20),
        (),
        "... and 5 more\nReplace them or move them away",
    ),
    "same names": (
        lambda at: fill(at / "images", "a.png", "a.jpg"),
        (),
        "images that differ only in their ending: a: rename",
    ),
    "size": (
        lambda at: fill(at / "images", "a.png", "b.png"),
        ("--size", "50"),
        "--size: expected a multiple of 4, at least 32, got 50: try 48",
    ),
    "step": (
        lambda at: fill(at / "images", "a.png", "b.png"),
        ("--step", "0"),
        "--step: expected a multiple of 4, at least 4, got 0: try 4",
    ),
    "val-size": (
        lambda at: fill(at / "images", "a.png", "b.png"),
        ("--val-size", "8"),
        "--val-size: expected a multiple of 4, at least 32, got 8: try 32",
    ),
    "out is a file": (
        lambda at: (fill(at / "images", "a.png", "b.png").parent / "data").touch(),
        (),
        "data is a file: expected a folder",
    ),
    "out is somebody's": (
        lambda at: fill(fill(at / "images", "a.png", "b.png").parent / "data" / "train" / "HR", "mine.png", "too.png"),
        (),
        "but those that this script made before, got train/HR/mine.png and 1 more: move them away",
    ),
}


class TestData:
    def make(self, make_data: ModuleType, folder: Path, *arguments: str) -> Path:
        out = folder / "data"
        assert make_data.main(["--source", str(folder / "images"), "--out", str(out), *SMALL, *arguments]) == 0
        return out

    def test_small_images_are_matlab_s_of_the_large_ones(self, make_data: ModuleType, tmp_path: Path) -> None:
        fill(tmp_path / "images", "a.png", "b.png", "c.jpg")
        out = self.make(make_data, tmp_path)
        for part in ("train", "val"):
            names = {folder: {path.name for path in (out / part / folder).iterdir()} for folder in FOLDERS}
            assert names["HR"] == names["LRx2"] == names["LRx4"]
            for name in names["HR"]:
                large = np.asarray(Image.open(out / part / "HR" / name))
                for folder, scale in FOLDERS.items():
                    small = np.asarray(Image.open(out / part / folder / name)).astype(int)
                    expected = imresize(large.astype(np.float32) / 255, 1 / scale).clip(0, 1) * 255
                    assert small.shape == expected.shape
                    inside = slice(2, -2), slice(2, -2)  # cut-outs are shrunk with what lies around them
                    assert np.abs(small - expected)[inside].max() <= 0.51

    def test_train_and_val_come_from_different_photographs(self, make_data: ModuleType, tmp_path: Path) -> None:
        fill(tmp_path / "images", *(f"{letter}.png" for letter in "abcdefg"))
        out = self.make(make_data, tmp_path)
        assert {path.name for path in (out / "val" / "HR").iterdir()} == {"f.png", "g.png"}
        assert {path.name.split("_")[0] for path in (out / "train" / "HR").iterdir()} == set("abcde")

    def test_cut_outs_cover_the_photograph(self, make_data: ModuleType, tmp_path: Path) -> None:
        fill(tmp_path / "images", "a.png", "b.png", height=70, width=32)
        out = self.make(make_data, tmp_path)
        whole = np.asarray(Image.open(tmp_path / "images" / "a.png"))
        parts = [np.asarray(Image.open(path)) for path in sorted((out / "train" / "HR").iterdir())]
        assert len(parts) == 3
        for top, part in zip((0, 32, 36), parts, strict=True):
            np.testing.assert_array_equal(part, whole[top : top + 32])

    def test_a_second_run_replaces_the_first(self, make_data: ModuleType, tmp_path: Path) -> None:
        fill(tmp_path / "images", "a.png", "b.png")
        out = self.make(make_data, tmp_path)
        first = contents(out)
        self.make(make_data, tmp_path, "--size", "64")
        assert len(contents(out)) < len(first)
        self.make(make_data, tmp_path)
        assert contents(out) == first

    @pytest.mark.parametrize(("prepare", "arguments", "message"), WRONG.values(), ids=WRONG)
    def test_what_does_not_do_is_told_before_anything_is_written(
        self,
        make_data: ModuleType,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        prepare: Callable[[Path], object],
        arguments: tuple[str, ...],
        message: str,
    ) -> None:
        prepare(tmp_path)
        before = contents(tmp_path)
        given = ["--source", str(tmp_path / "images"), "--out", str(tmp_path / "data"), *SMALL, *arguments]
        assert make_data.main(given) == 2
        error = capsys.readouterr().err
        assert error.startswith("make_data.py: error: ")
        assert message in error
        assert contents(tmp_path) == before

    @pytest.mark.parametrize(
        ("package", "message"),
        [
            ("skimage", "scikit-image is missing (.*): pip install scikit-image, or give --source"),
            ("iks_basicsr", "BasicSR or its adapter is missing (.*): install them as README.md says"),
        ],
    )
    def test_missing_packages(
        self,
        make_data: ModuleType,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        package: str,
        message: str,
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        assert make_data.main(["--out", str(tmp_path / "data")]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "data").exists()

    def test_a_place_that_cannot_be_written_to(
        self, make_data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fill(tmp_path / "images", "a.png", "b.png")
        out = tmp_path / "images" / "a.png" / "data"
        assert make_data.main(["--source", str(tmp_path / "images"), "--out", str(out), *SMALL]) == 2
        assert f"cannot write to --out {out}: " in capsys.readouterr().err

    def test_help_tells_what_is_written(self, make_data: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            make_data.main(["--help"])
        assert stopped.value.code == 0
        assert "train/HR    train/LRx2    train/LRx4" in capsys.readouterr().out
