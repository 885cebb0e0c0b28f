"""examples/mmagic: every config in a short run of real MMagic."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("mmagic")

from mmengine.config import Config

import mmagic_toys as toys

EXAMPLES = Path(__file__).parents[1] / "examples" / "mmagic"
TEST = "plain_EDSR_x2"
CONFIGS = sorted({path.stem for path in EXAMPLES.glob("*.py")} - {"_small", TEST})
SHORT = dict(
    train_cfg__max_iters=4,
    train_cfg__val_interval=2,
    param_scheduler__T_max=4,
    default_hooks__checkpoint__interval=2,
    default_hooks__logger__interval=1,
    train_dataloader__batch_size=1,
)

Train = Callable[[str], tuple[Any, dict[str, Any]]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny images where examples/basicsr/make_data.py puts its own."""
    folder = tmp_path_factory.mktemp("workplace")
    random = np.random.default_rng(0)
    for part, side, count in (("train", 128, 2), ("val", 64, 1)):
        for index in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            for kind, scale in (("HR", 1), ("LRx2", 2), ("LRx4", 4)):
                into = folder / "data" / part / kind
                into.mkdir(parents=True, exist_ok=True)
                coarse.resize((side // scale, side // scale), Image.Resampling.BICUBIC).save(into / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Train:
    """Run a config once, for four iterations. Gives its runner and its last checkpoint."""
    done: dict[str, tuple[Any, dict[str, Any]]] = {}

    def train(name: str) -> tuple[Any, dict[str, Any]]:
        if name not in done:
            runner = toys.run(EXAMPLES / f"{name}.py", **SHORT)
            checkpoint = torch.load(workplace / "work_dirs" / name / "iter_4.pth", map_location="cpu")
            done[name] = runner, checkpoint
        return done[name]

    return train


def read(name: str) -> Any:
    return Config.fromfile(str(EXAMPLES / f"{name}.py"))


def plain_generator(cfg: Any) -> nn.Module:
    from mmagic.registry import MODELS
    from mmagic.utils import register_all_modules

    register_all_modules()
    network: nn.Module = MODELS.build(cfg.model.generator)
    return network


def covered_weights(network: nn.Module, iks: Any) -> list[torch.Tensor]:
    """The weights that the entry counts, by the rules of the README."""
    entry = iks if isinstance(iks, dict) else {}
    types = tuple(getattr(nn, name) for name in entry.get("layer_types", ["Conv2d"]))
    return [
        layer.weight.detach()
        for name, layer in network.named_modules()
        if isinstance(layer, types)
        and min(layer.weight.shape[:2]) > 4
        and not any(fnmatchcase(name, pattern) for pattern in entry.get("exclude", []))
    ]


def test_there_is_one_for_each_kind_of_network() -> None:
    assert CONFIGS == ["EDSR_x2", "ESRGAN_x4", "MSRResNet_x4", "RDN_x2", "SwinIR_x2"]
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in readme for name in CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_agrees_with_itself(name: str) -> None:
    cfg = read(name)
    scale = int(name[-1])
    generator = cfg.model.generator
    assert cfg.experiment_name == name and cfg.work_dir == f"work_dirs/{name}"
    assert generator.get("upscale_factor", generator.get("upscale")) == scale
    assert cfg.param_scheduler.T_max == cfg.train_cfg.max_iters
    assert cfg.train_cfg.max_iters % cfg.train_cfg.val_interval == 0
    assert cfg.default_hooks.checkpoint.interval == cfg.train_cfg.val_interval
    assert cfg.train_dataloader.dataset.data_prefix.img == cfg.val_dataloader.dataset.data_prefix.img == f"LRx{scale}"
    assert [metric.crop_border for metric in cfg.val_evaluator.metrics] == [scale]
    assert cfg.test_dataloader == cfg.val_dataloader and cfg.test_evaluator == cfg.val_evaluator
    assert "http" not in str(cfg.model), "it would download something"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_gives_plain_networks_with_exactly_the_target(name: str, trained: Train) -> None:
    runner, checkpoint = trained(name)
    iks = read(name).iks
    target = iks["target_sparsity"] if isinstance(iks, dict) else iks
    for part, prefix in (("state_dict", "generator."), ("ema_state_dict", "module.generator.")):
        state = checkpoint[part]
        network = plain_generator(runner.cfg)
        network.load_state_dict(
            {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}, strict=True
        )
        weights = covered_weights(network, iks)
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert zeros == round(target * sum(weight.numel() for weight in weights)) > 0, part
    assert checkpoint["iks"]["controllers"].keys() == {"generator"}
    assert checkpoint["iks"]["controllers"]["generator"]["steps"] == 4


def test_exclude_leaves_the_fusion_of_rdn_dense(trained: Train) -> None:
    _, checkpoint = trained("RDN_x2")
    fusion = [
        value
        for key, value in checkpoint["state_dict"].items()
        if key.endswith("weight") and tuple(value.shape[2:]) == (1, 1)
    ]
    assert len(fusion) == 4 and all((weight != 0).all() for weight in fusion)


def test_convolutions_hold_about_half_of_the_small_swinir() -> None:
    cfg = read("SwinIR_x2")
    network = plain_generator(cfg)
    convolutions, both = (sum(map(torch.numel, covered_weights(network, iks))) for iks in (None, cfg.iks))
    assert 0.4 < convolutions / both < 0.5


def test_the_test_config_tests_what_was_trained(trained: Train) -> None:
    """Without the entry, and with it: the checkpoint is a plain network for both."""
    trained("EDSR_x2")
    cfg = read(TEST)
    assert "iks" not in cfg and cfg.model == read("EDSR_x2").model
    path = "work_dirs/EDSR_x2/iter_4.pth"
    psnr = [  # MMagic's test loop returns nothing
        toys.run(EXAMPLES / f"{name}.py", "test", load_from=path).message_hub.get_scalar("test/PSNR").current()
        for name in (TEST, "EDSR_x2")
    ]
    assert psnr[0] == psnr[1] > 0
    assert list(Path("work_dirs", TEST).rglob("*.png"))


def test_a_training_is_resumed_and_its_target_changed_from_the_command_line(trained: Train) -> None:
    trained("MSRResNet_x4")
    runner = toys.run(EXAMPLES / "MSRResNet_x4.py", **{**SHORT, "train_cfg__max_iters": 6}, resume=True, iks=0.7)
    assert runner.iter == 6
    state = torch.load("work_dirs/MSRResNet_x4/iter_6.pth", map_location="cpu")["state_dict"]
    network = plain_generator(runner.cfg)
    network.load_state_dict({key.removeprefix("generator."): state[key] for key in state if key.startswith("gen")})
    weights = covered_weights(network, 0.7)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.7 * sum(map(torch.numel, weights)))
