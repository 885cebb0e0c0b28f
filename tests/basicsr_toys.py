"""Tiny real trainings of BasicSR: images, options, and starting them in this process or in one of their own."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

EDSR = {
    "type": "EDSR",
    "num_in_ch": 3,
    "num_out_ch": 3,
    "num_feat": 8,
    "num_block": 1,
    "upscale": 2,
    "img_range": 255.0,
    "rgb_mean": [0.4488, 0.4371, 0.4040],
}
MSRRESNET = {"type": "MSRResNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": 2}
RRDBNET = {
    "type": "RRDBNet",
    "num_in_ch": 3,
    "num_out_ch": 3,
    "num_feat": 8,
    "num_block": 1,
    "num_grow_ch": 4,
    "scale": 2,
}
SWINIR = {
    "type": "SwinIR",
    "upscale": 2,
    "in_chans": 3,
    "img_size": 16,
    "window_size": 4,
    "img_range": 1.0,
    "depths": [1],
    "embed_dim": 12,
    "num_heads": [2],
    "mlp_ratio": 2,
    "upsampler": "pixelshuffledirect",
    "resi_connection": "1conv",
}
BASICVSR = {"type": "BasicVSR", "num_feat": 8, "num_block": 1}
UNET_DISCRIMINATOR = {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 8, "skip_connection": True}

ADAM = {"type": "Adam", "lr": 1e-3, "betas": [0.9, 0.99]}
GAN_LOSS = {"type": "GANLoss", "gan_type": "vanilla", "real_label_val": 1.0, "fake_label_val": 0.0, "loss_weight": 0.1}
DISK = {"type": "disk"}


def write_images(folder: Path, count: int = 1, size: int = 32, scale: int = 2) -> None:
    """`count` smooth random images in folder/HR and their halves (at scale 2) in folder/LR."""
    random = np.random.default_rng(0)
    for index in range(count):
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        small = image.resize((size // scale, size // scale), Image.Resampling.BICUBIC)
        for name, content in (("HR", image), ("LR", small)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            content.save(folder / name / f"{index:08d}.png")


def options(folder: Path, network_g: dict[str, Any] = EDSR, iks: Any = 0.9, **changes: Any) -> dict[str, Any]:
    """The options of a training on the images in `folder`, without any randomness in its data.

    A crop is as large as the image and there are no flips, so that a training that is resumed in the middle of an
    epoch, which BasicSR starts over then, sees what the straight one sees. `changes` replace whole top-level blocks;
    a dictionary is merged into the block that is there.
    """
    data = {"type": "PairedImageDataset", "dataroot_gt": str(folder / "HR"), "dataroot_lq": str(folder / "LR")}
    opt: dict[str, Any] = {
        "name": "run",
        "model_type": "SRModel",
        "scale": 2,
        "num_gpu": 0,
        "manual_seed": 0,
        "datasets": {
            "train": {
                **data,
                "name": "images",
                "io_backend": DISK,
                "gt_size": 32,
                "use_hflip": False,
                "use_rot": False,
                "num_worker_per_gpu": 0,
                "batch_size_per_gpu": 1,
                "dataset_enlarge_ratio": 5,
            },
            "val": {**data, "name": "images", "io_backend": DISK},
        },
        "network_g": network_g,
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "optim_g": ADAM,
            "scheduler": {"type": "MultiStepLR", "milestones": [15], "gamma": 0.5},
            "total_iter": 20,
            "warmup_iter": -1,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {
            "val_freq": 10,
            "save_img": False,
            "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": False}},
        },
        "logger": {"print_freq": 5, "save_checkpoint_freq": 10, "use_tb_logger": False},
    }
    if iks is not None:
        opt["iks"] = iks
    for key, value in changes.items():
        opt[key] = {**opt[key], **value} if isinstance(value, dict) and key in opt else value
    return copy.deepcopy(opt)


def adversarial(model_type: str, network_g: dict[str, Any] = MSRRESNET, **train: Any) -> dict[str, Any]:
    """Changes of `options` that make the training one of a GAN, without any loss that downloads a network."""
    return {
        "model_type": model_type,
        "network_g": network_g,
        "network_d": UNET_DISCRIMINATOR,
        "train": {"optim_d": ADAM, "gan_opt": GAN_LOSS, **train},
    }


class _NoAliases(yaml.SafeDumper):
    """Without YAML's references, with which BasicSR would have one dictionary in two places and change both."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_options(opt: dict[str, Any], folder: Path) -> Path:
    path = folder / f"{opt['name']}.yml"
    path.write_text(yaml.dump(opt, Dumper=_NoAliases, sort_keys=False))
    return path


def train(opt: dict[str, Any], folder: Path, *flags: str) -> str:
    """Run BasicSR's own training in this process, with experiments in `folder`. Returns its log."""
    from basicsr.train import train_pipeline

    with _as_a_program(folder, "train.py", "-opt", str(write_options(opt, folder)), *flags):
        train_pipeline(str(folder))
    return newest_log(folder / "experiments" / opt["name"])


def test(opt: dict[str, Any], folder: Path) -> str:
    """Run BasicSR's own testing in this process. Returns its log."""
    from basicsr.test import test_pipeline

    with _as_a_program(folder, "test.py", "-opt", str(write_options(opt, folder))):
        test_pipeline(str(folder))
    return newest_log(folder / "results" / opt["name"])


def newest_log(folder: Path) -> str:
    return max(folder.glob("*.log"), key=lambda path: path.stat().st_mtime_ns).read_text()


@contextmanager
def _as_a_program(folder: Path, *arguments: str) -> Iterator[None]:
    """The state of a process that has just been started: arguments, folder, and no logger yet."""
    from basicsr.utils import logger

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(arguments))
        patch.chdir(folder)
        patch.setattr(logger, "initialized_logger", {})
        root = logging.getLogger("basicsr")
        for handler in list(root.handlers):
            root.removeHandler(handler)
        yield


def run_python(*arguments: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def said_without(package: str, adapter: str, folder: Path) -> str:
    """What a process prints to stderr that imports `adapter` where `package` is not installed."""
    code = f"import sys; sys.modules[{package!r}] = None; import {adapter}"
    return run_python("-c", code, cwd=folder, check=False).stderr


def saved(folder: Path, name: str, kind: str = "models") -> Any:
    """What BasicSR has saved in the experiment "run": a network's file, or kind="training_states"."""
    return torch.load(folder / "experiments" / "run" / kind / name, map_location="cpu", weights_only=False)


def zeros_and_weights(state: dict[str, Tensor], gated: list[str]) -> tuple[int, int]:
    kernels = [state[f"{name}.weight"] for name in gated]
    return sum(int((kernel == 0).sum()) for kernel in kernels), sum(kernel.numel() for kernel in kernels)


def convolutions_within(net: nn.Module) -> list[str]:
    """By the documented rule: the names of the convolutions that have more than 4 channels on both sides."""
    return [
        name
        for name, module in net.named_modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and min(module.in_channels, module.out_channels) > 4
    ]


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Equal to the bit, at any depth of dictionaries, lists, tensors and plain values."""
    if isinstance(first, Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key, value in first.items():
            assert_same(value, second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    else:
        assert first == second, where
