"""The quality lab's images, batches and scores."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from torch import nn

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.quality.data import batches, fingerprint, load_images, shrink
from benchmarks.quality.networks import NETWORKS, make_network, upsampler, work_per_step
from benchmarks.quality.scores import enlarge, evaluate, ssim_y
from iks_plugin import IksError
from iks_plugin.demo.quality import luma
from quality_images import make_folder, picture, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data")


# --- what is read ---


def test_images(folder: Path) -> None:
    images = load_images(str(folder), 2, 8)
    assert [(photo.small.shape, photo.large.shape) for photo in images.training] == [((3, 32, 36), (3, 64, 72))] * 2
    assert [(image.name, image.small.shape, image.large.shape) for image in images.test] == [
        ("even", (18, 20, 3), (36, 40, 3)),
        ("odd", (20, 18, 3), (40, 36, 3)),
    ]
    large = np.asarray(Image.open(folder / "Set5/HR/odd.bmp"))
    assert np.array_equal(images.test[1].large, large[:40, :36])
    assert np.array_equal(images.training[0].small.permute(1, 2, 0).numpy(), shrink(picture(64, 72, 0), 2))


def test_small_images_may_have_the_large_ones_name_and_the_folder_a_small_x(folder: Path) -> None:
    lows = folder / "Set5/LR_bicubic"
    (lows / "X2").rename(lows / "x2")
    (lows / "x2/evenx2.bmp").rename(lows / "x2/even.bmp")
    assert len(load_images(str(folder), 2, 8).test) == 2


def test_shrinking_is_bicubic_with_antialiasing() -> None:
    checks = np.indices((32, 32)).sum(0) % 2 * 255
    small = shrink(np.repeat(checks[..., None], 3, 2).astype(np.uint8), 2)
    assert small.shape == (16, 16, 3)
    assert np.abs(small[4:-4, 4:-4].astype(int) - 127).max() <= 8  # without antialiasing: black and white


def test_fingerprint_changes_with_the_images(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(str(folder))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert fingerprint(str(moved)) == before
    other = shutil.copytree(folder, tmp_path / "other")
    save(other / "RealSR_GT/photo0.png", picture(64, 72, 99))
    assert fingerprint(str(other)) != before


# --- what is refused ---


def _no_training(folder: Path) -> None:
    shutil.rmtree(folder / "RealSR_GT")


def _empty_training(folder: Path) -> None:
    for path in (folder / "RealSR_GT").iterdir():
        path.unlink()
    (folder / "RealSR_GT/notes.txt").write_text("none")


def _tiny_photo(folder: Path) -> None:
    save(folder / "RealSR_GT/tiny.png", picture(15, 40, 3))


def _broken_photo(folder: Path) -> None:
    (folder / "RealSR_GT/broken.png").write_bytes(b"no image")


def _deep_photo(folder: Path) -> None:
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(folder / "RealSR_GT/deep.png")


def _no_test(folder: Path) -> None:
    shutil.rmtree(folder / "Set5/HR")


def _no_small(folder: Path) -> None:
    (folder / "Set5/LR_bicubic/X2").rename(folder / "Set5/LR_bicubic/X3")


def _no_small_at_all(folder: Path) -> None:
    shutil.rmtree(folder / "Set5/LR_bicubic")


def _one_small_missing(folder: Path) -> None:
    (folder / "Set5/LR_bicubic/X2/evenx2.bmp").unlink()


def _misfit(folder: Path) -> None:
    save(folder / "Set5/LR_bicubic/X2/evenx2.bmp", picture(18, 21, 3))


def _tiny_test(folder: Path) -> None:
    save(folder / "Set5/HR/odd.bmp", picture(14, 40, 3))
    save(folder / "Set5/LR_bicubic/X2/oddx2.bmp", picture(7, 20, 3))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_training, r"lacks the folder .*RealSR_GT: expected a folder with RealSR_GT"),
        (_empty_training, r"RealSR_GT holds no images: expected files ending in .png.*got notes.txt"),
        (_tiny_photo, r"(?s)1 images in .*tiny.png: expected at least 16 x 16 pixels, got 40 x 15.*smaller --patch"),
        (_broken_photo, r"broken.png: unreadable: not an image"),
        (_deep_photo, r"deep.png: expected 8 bits per channel, got more"),
        (_no_test, r"lacks the folder .*HR"),
        (_no_small, r"no small test images for x2: expected the folder Set5.LR_bicubic.X2, got X3"),
        (_no_small_at_all, r"no small test images for x2: .* got no such folder"),
        (_one_small_missing, r"even.bmp: expected evenx2.bmp or even.bmp in .*X2, got none"),
        (_misfit, r"evenx2.bmp of 21 x 18 pixels does not fit: times 2 it is 42 x 36, and the large image has 40 x 36"),
        (_tiny_test, r"odd.bmp: expected at least 15 pixels a side, got 40 x 14"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_folders_that_do_not_do(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(IksError, match=message):
        load_images(str(folder), 2, 8)


# --- batches ---


def test_batches_depend_on_seed_and_phase_alone(folder: Path) -> None:
    images = load_images(str(folder), 2, 8)

    def first(seed: int, phase: int) -> list[torch.Tensor]:
        return [tensor for pair in itertools.islice(batches(images, seed, phase, 3, 8), 4) for tensor in pair]

    once = first(5, 1)
    torch.manual_seed(123)
    assert all(torch.equal(a, b) for a, b in zip(once, first(5, 1), strict=True))
    assert not torch.equal(once[0], first(6, 1)[0])
    assert not torch.equal(once[0], first(5, 0)[0])


def test_small_and_large_crops_show_the_same(folder: Path) -> None:
    small, large = next(batches(load_images(str(folder), 2, 8), 0, 0, 16, 8))
    assert (small.shape, large.shape) == ((16, 3, 8, 8), (16, 3, 16, 16))
    assert float(large.min()) >= 0
    assert float(large.max()) <= 1
    assert float((nn.functional.avg_pool2d(large, 2) - small).abs().mean()) < 0.02


# --- scores ---


class Repeat(nn.Module):
    """Each pixel four times, brightened beyond what an image can hold if asked."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_ssim_is_the_one_of_the_papers() -> None:
    original = picture(60, 50, 0)
    noise = np.random.default_rng(0).normal(0, 12, original.shape)
    image = np.clip(original + noise, 0, 255).astype(np.uint8)
    expected = structural_similarity(
        luma(image)[2:-2, 2:-2],
        luma(original)[2:-2, 2:-2],
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim_y(image, original, 2) == pytest.approx(expected, abs=1e-9)
    assert ssim_y(original, original, 2) == pytest.approx(1)


def test_scores_are_of_8_bit_images_without_borders(folder: Path) -> None:
    images = load_images(str(folder), 2, 8).test
    network = Repeat(1.5).train()
    score = evaluate(network, images, 2)
    assert network.training
    assert list(score.psnr) == list(score.ssim) == ["even", "odd"]
    output = enlarge(network, images[0].small)
    exact = np.clip(np.round(np.repeat(np.repeat(images[0].small, 2, 0), 2, 1) * 1.5), 0, 255)
    assert np.abs(output - exact).max() <= 1
    error = luma(output)[2:-2, 2:-2] - luma(images[0].large)[2:-2, 2:-2]
    assert score.psnr["even"] == pytest.approx(10 * np.log10(255**2 / (error**2).mean()))
    assert score.mean_psnr == pytest.approx((score.psnr["even"] + score.psnr["odd"]) / 2)


# --- networks ---


@pytest.mark.parametrize("name", [name for name in NETWORKS if "16x64" not in name])
def test_networks(name: str) -> None:
    before = torch.random.get_rng_state()
    network, again, other = make_network(name, 1), make_network(name, 1), make_network(name, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [next(model.parameters()) for model in (network, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    scale = NETWORKS[name].scale
    output = network(torch.rand(1, 3, 9, 11))
    assert output.shape == (1, 3, 9 * scale, 11 * scale)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_scales_without_an_upsampler() -> None:
    with pytest.raises(ValueError, match="scale must be 2 or 4, got 3"):
        upsampler(8, 3)


def test_work_is_that_of_the_convolutions() -> None:
    layers = [m for m in make_network("edsr-1x8-x2", 0).modules() if isinstance(m, nn.Conv2d)]
    pixels = [100] * (len(layers) - 1) + [400]
    macs = sum(layer.weight.numel() * area for layer, area in zip(layers, pixels, strict=True))
    assert work_per_step("edsr-1x8-x2", 2, 10) == pytest.approx(3 * 2 * macs / 1e6)
