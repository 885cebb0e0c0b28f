"""A folder of images as the quality lab wants it: smooth waves with edges, so that there is something to learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 16
    waves = [np.sin(a * y + b * x + c) for a, b, c in random.uniform(-3, 3, (3, 3))]
    edge = np.where(random.uniform(-1, 1) * y + x > random.uniform(1, 3), 40, -40)
    return np.clip(np.stack(waves, -1) * 60 + 128 + edge[..., None], 0, 255).astype(np.uint8)


def save(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def halved(image: NDArray[np.uint8], scale: int = 2) -> NDArray[np.uint8]:
    size = (image.shape[1] // scale, image.shape[0] // scale)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def make_folder(folder: Path) -> Path:
    """Two photographs of 72 x 64, and two test images of 40 x 36 and 37 x 41 with their versions at half the size."""
    for index in range(2):
        save(folder / "RealSR_GT" / f"photo{index}.png", picture(64, 72, index))
    for name, height, width in (("even", 36, 40), ("odd", 41, 37)):
        image = picture(height, width, 10 + height)
        save(folder / "Set5" / "HR" / f"{name}.bmp", image)
        small = halved(image[: height // 2 * 2, : width // 2 * 2])
        save(folder / "Set5" / "LR_bicubic" / "X2" / f"{name}x2.bmp", small)
    return folder
