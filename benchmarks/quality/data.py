"""Photographs to train on and test images, from a folder; small images as the literature makes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iks_plugin import IksError
from iks_plugin.demo.photos import SUFFIXES, resize

Pixels = NDArray[np.uint8]

TRAINING = "RealSR_GT"
TEST_LARGE = Path("Set5", "HR")
TEST_SMALL = Path("Set5", "LR_bicubic")
SSIM_WINDOW = 11
"""Pixels a side of what SSIM looks at; a test image must hold one when its borders are cut off."""
EXPECTED = (
    f"expected a folder with {TRAINING} (photographs to train on), {TEST_LARGE} and {TEST_SMALL}/X2, X3 or X4 "
    "(test images and their small versions, named like babyx2)"
)


@dataclass(frozen=True)
class TestImage:
    """A test image, both sizes (H, W, 3) uint8 RGB; `large` is cropped to `scale` times the size of `small`."""

    __test__ = False  # for pytest: not a test

    name: str
    small: Pixels
    large: Pixels


@dataclass(frozen=True)
class Photo:
    """A photograph to train on, both sizes (3, H, W) uint8 RGB."""

    small: Tensor
    large: Tensor


@dataclass(frozen=True)
class ImageSet:
    """What the networks of one scale are trained on and tested on."""

    scale: int
    training: tuple[Photo, ...]
    test: tuple[TestImage, ...]


@lru_cache(maxsize=4)
def load_images(folder: str, scale: int, patch: int) -> ImageSet:
    """All images below `folder` for one scale; `patch` is the side of the small crops that training cuts.

    Raises:
        IksError: a folder is missing or holds no images, an image is unreadable or too small for a crop, or a small
            test image is missing or does not fit its large one. All offending images are named.
    """
    return ImageSet(scale, _training(Path(folder, TRAINING), scale, patch), _test(Path(folder), scale))


@lru_cache(maxsize=4)
def fingerprint(folder: str) -> str:
    """Eight digits that change with the name or content of any image that networks might see, of any scale."""
    check_folder(folder)
    digest = hashlib.sha256()
    smalls = sorted(path for path in Path(folder, TEST_SMALL).glob("[Xx][0-9]") if path.is_dir())
    for part in (Path(folder, TRAINING), Path(folder, TEST_LARGE), *smalls):
        for path in _image_paths(part):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def check_folder(folder: str | Path | None) -> None:
    """Raise an `IksError` unless `folder` is a folder at all."""
    if folder is None:
        raise IksError(f"--data is missing: {EXPECTED}")
    if not Path(folder).is_dir():
        what = "is a file" if Path(folder).exists() else "does not exist"
        raise IksError(f"--data {folder} {what}: {EXPECTED}")


def small_folder(folder: Path, scale: int) -> Path:
    """Where the small test images of `scale` lie."""
    names = (f"X{scale}", f"x{scale}")
    found = next((folder / TEST_SMALL / name for name in names if (folder / TEST_SMALL / name).is_dir()), None)
    if found is None:
        raise IksError(
            f"--data {folder} has no small test images for x{scale}: expected the folder {TEST_SMALL / names[0]}, "
            f"got {_listing(folder / TEST_SMALL)}. Add it, or choose networks of another scale"
        )
    return found


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) if names else "an empty folder"


def _image_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise IksError(f"--data lacks the folder {folder}: {EXPECTED}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise IksError(
            f"{folder} holds no images: expected files ending in {', '.join(SUFFIXES)}, got {_listing(folder)}. "
            "Put images there, or name another --data"
        )
    return paths


def _training(folder: Path, scale: int, patch: int) -> tuple[Photo, ...]:
    photos, problems = [], []
    smallest = scale * patch
    for path in _image_paths(folder):
        try:
            image = read_image(path)
            if min(image.shape[:2]) < smallest:
                raise IksError(f"expected at least {smallest} x {smallest} pixels, got {_size(image)}")
        except IksError as error:
            problems.append(f"  {path.name}: {error}")
            continue
        large = np.ascontiguousarray(image[: image.shape[0] // scale * scale, : image.shape[1] // scale * scale])
        photos.append(Photo(_tensor(shrink(large, scale)), _tensor(large)))
    _refuse(problems, folder, f"crops are {patch} x {patch}, x{scale}: move these away, or choose a smaller --patch")
    return tuple(photos)


def _test(folder: Path, scale: int) -> tuple[TestImage, ...]:
    smalls = small_folder(folder, scale)
    small_paths = {path.stem: path for path in _image_paths(smalls)}
    images, problems = [], []
    for path in _image_paths(folder / TEST_LARGE):
        small_path = small_paths.get(f"{path.stem}x{scale}") or small_paths.get(path.stem)
        try:
            if small_path is None:
                raise IksError(f"expected {path.stem}x{scale}{path.suffix} or {path.name} in {smalls}, got none")
            small, large = read_image(small_path), read_image(path)
            if min(large.shape[:2]) < SSIM_WINDOW + 2 * scale:
                raise IksError(f"expected at least {SSIM_WINDOW + 2 * scale} pixels a side, got {_size(large)}")
            height, width = (scale * side for side in small.shape[:2])
            if large.shape[0] // scale * scale != height or large.shape[1] // scale * scale != width:
                raise IksError(
                    f"{small_path.name} of {_size(small)} pixels does not fit: times {scale} it is {width} x {height}, "
                    f"and the large image has {_size(large)}"
                )
        except IksError as error:
            problems.append(f"  {path.name}: {error}")
            continue
        images.append(TestImage(path.stem, small, np.ascontiguousarray(large[:height, :width])))
    _refuse(problems, folder / TEST_LARGE, "each needs a small version, (height / scale) x (width / scale)")
    return tuple(images)


def _refuse(problems: list[str], folder: Path, remedy: str) -> None:
    if problems:
        shown = problems if len(problems) <= 10 else [*problems[:9], f"  ... and {len(problems) - 9} more"]
        listed = "\n".join(shown)
        raise IksError(f"{len(problems)} images in {folder} cannot be used:\n{listed}\n{remedy}")


def _size(image: Pixels) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def read_image(path: Path) -> Pixels:
    """The image file at `path` as (H, W, 3) uint8 RGB in its own size."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise IksError(f"expected 8 bits per channel, got more (Pillow mode {opened.mode})")
            return np.array(opened.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's plugins raise SyntaxError on broken headers; its own messages repeat the path.
        reason = "not an image that Pillow can read" if isinstance(error, UnidentifiedImageError) else error
        raise IksError(f"unreadable: {reason}") from error


def shrink(large: Pixels, scale: int) -> Pixels:
    """`large` by 1 / scale as MATLAB's imresize does: bicubic (a = -0.5), antialiased, rounded to 8 bits."""
    return resize(large, large.shape[0] // scale, large.shape[1] // scale)


def _tensor(image: Pixels) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()


def batches(images: ImageSet, seed: int, phase: int, batch: int, patch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: small crops (N, 3, patch, patch) and large ones, float32 in [0, 1], on the images' device.

    Photographs are drawn by their number of pixels, places evenly; each crop is flipped and rotated at random. The same
    seed and phase give the same batches, whatever is trained with them.
    """
    random = np.random.default_rng([seed, phase])
    pixels = np.array([photo.small.shape[1] * photo.small.shape[2] for photo in images.training], dtype=np.float64)
    while True:
        pairs = [_crop(images, random, pixels / pixels.sum(), patch) for _ in range(batch)]
        small, large = (torch.stack(crops).float().div_(255) for crops in zip(*pairs, strict=True))
        yield small, large


def _crop(
    images: ImageSet, random: np.random.Generator, chances: NDArray[np.float64], patch: int
) -> tuple[Tensor, Tensor]:
    photo = images.training[random.choice(len(chances), p=chances)]
    top = int(random.integers(photo.small.shape[1] - patch + 1))
    left = int(random.integers(photo.small.shape[2] - patch + 1))
    turns, flip = int(random.integers(4)), bool(random.integers(2))

    def cut(image: Tensor, factor: int) -> Tensor:
        side = factor * patch
        crop = image[:, factor * top : factor * top + side, factor * left : factor * left + side]
        crop = crop.flip(2) if flip else crop
        return crop.rot90(turns, (1, 2))

    return cut(photo.small, 1), cut(photo.large, images.scale)


def to_device(images: ImageSet, device: str) -> ImageSet:
    """The same with the photographs on `device`, so that crops need not travel."""
    if device == "cpu":
        return images
    photos = tuple(Photo(photo.small.to(device), photo.large.to(device)) for photo in images.training)
    return ImageSet(images.scale, photos, images.test)
