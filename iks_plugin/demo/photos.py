"""The photographs: scikit-image's own or a folder of the user's, and the small images made from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import IksError
from ..images import reason_of
from .optional import progress_bar, require

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]

SCALE = 2
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
FEWEST_PHOTOS = 3
MOST_PHOTOS = 64
SMALLEST_SIDE = 96
LARGEST_SIDE = 1024

# scikit-image downloads most of its sample images on first use; these lie inside every wheel of it.
TRAINING = ("stereo_motorcycle", "rocket", "immunohistochemistry", "camera", "brick", "grass", "gravel", "coins")
HELD_OUT = ("astronaut", "chelsea", "coffee")


@dataclass(frozen=True)
class Photo:
    """One photograph in the two sizes that super-resolution works between.

    Attributes:
        name: what tables and pictures call it.
        large: the original, (H, W, 3) uint8 RGB, H and W multiples of `SCALE`.
        small: `large` shrunk, (H / SCALE, W / SCALE, 3) uint8 RGB: what the network is given.
    """

    name: str
    large: Pixels
    small: Pixels


@dataclass(frozen=True)
class PhotoSet:
    """Photographs to train on, and others that no training step ever sees."""

    source: str
    training: tuple[Photo, ...]
    held_out: tuple[Photo, ...]


def load_photos(folder: str | Path | None) -> PhotoSet:
    """The photographs of `folder`, or those inside the installed scikit-image if it is None.

    Raises:
        IksError: Pillow or scikit-image is missing, or the folder does not hold what training needs.
    """
    return builtin_photos() if folder is None else folder_photos(Path(folder))


def builtin_photos() -> PhotoSet:
    """Eight photographs to train on and three held out, all from inside scikit-image's wheel."""
    data = require("skimage.data", "scikit-image")

    def load(name: str) -> Photo:
        image = getattr(data, name)()
        left_view = image[0] if isinstance(image, tuple) else image
        return make_photo(name.removeprefix("stereo_"), left_view)

    return PhotoSet(
        source="scikit-image's own photographs",
        training=tuple(map(load, TRAINING)),
        held_out=tuple(map(load, HELD_OUT)),
    )


def folder_photos(folder: Path) -> PhotoSet:
    """The images directly in `folder`, sorted by name; the last two or three of them are held out.

    At most `MOST_PHOTOS` are trained on, the first ones, to bound the memory. Images larger than `LARGEST_SIDE` are
    shrunk to it: evaluation stays quick, and a photograph straight from a camera is softer than its pixel count.

    Raises:
        IksError: no such folder, too few images, or images that cannot be read or are too small (all of them named).
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise IksError(f"--data {folder} {what}: expected a folder with at least {FEWEST_PHOTOS} images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(paths) < FEWEST_PHOTOS:
        raise IksError(
            f"--data {folder} holds too few images: expected at least {FEWEST_PHOTOS}, got {len(paths)}. "
            f"Only files directly in it ending in {', '.join(SUFFIXES)} count: add some, or name another folder"
        )
    held_out = 2 if len(paths) < 8 else 3
    training_paths, held_out_paths = paths[:-held_out][:MOST_PHOTOS], paths[-held_out:]

    photos: dict[Path, Photo] = {}
    problems: list[str] = []
    for path in progress_bar([*training_paths, *held_out_paths], "reading", unit="image"):
        try:
            photos[path] = make_photo(path.name, read_image(path))
        except IksError as error:
            problems.append(f"  {path.name}: {error}")
    if problems:
        shown = problems if len(problems) <= 10 else [*problems[:9], f"  ... and {len(problems) - 9} more"]
        listed = "\n".join(shown)
        raise IksError(
            f"{len(problems)} of the {len(photos) + len(problems)} images in --data {folder} cannot be used:\n"
            f"{listed}\nReplace them or move them away"
        )
    return PhotoSet(
        source=f"the images in {folder}",
        training=tuple(photos[path] for path in training_paths),
        held_out=tuple(photos[path] for path in held_out_paths),
    )


def read_image(path: Path) -> Pixels:
    """The image file at `path` as (H, W, 3) uint8 RGB, turned upright, at most `LARGEST_SIDE` on its longer side.

    Raises:
        IksError: Pillow is missing, the file is no image that it can read, or has more than 8 bits per channel.
    """
    pillow = require("PIL.Image", "Pillow")
    operations = require("PIL.ImageOps", "Pillow")
    try:
        with pillow.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise IksError(f"expected 8 bits per channel, got more (Pillow mode {opened.mode})")
            image = operations.exif_transpose(opened).convert("RGB")
    except IksError:
        raise
    except Exception as error:  # Pillow's plugins raise about anything on damaged files
        raise IksError(f"unreadable: {reason_of(error)}") from error
    longer = max(image.size)
    if longer > LARGEST_SIDE:
        size = tuple(max(1, round(side * LARGEST_SIDE / longer)) for side in image.size)
        image = image.resize(size, pillow.Resampling.LANCZOS)
    return np.asarray(image)


def make_photo(name: str, image: Pixels) -> Photo:
    """Crop `image`, (H, W) grey or (H, W, 3) RGB uint8, to multiples of `SCALE`, and make its small version.

    The small version is what the super-resolution literature means by "bicubic": bicubic with antialiasing, as in
    MATLAB's imresize, which is how Pillow shrinks; rounded to 8 bits like any stored image.

    Raises:
        IksError: a side is shorter than `SMALLEST_SIDE`.
    """
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise IksError(f"too small: expected at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels, got {width} x {height}")
    rgb = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
    large = np.ascontiguousarray(rgb[: height - height % SCALE, : width - width % SCALE])
    return Photo(name, large, resize(large, large.shape[0] // SCALE, large.shape[1] // SCALE))


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """Resize (H, W, 3) uint8 to (height, width, 3) uint8 with bicubic interpolation, antialiased where it shrinks."""
    pillow = require("PIL.Image", "Pillow")
    source: Image = pillow.fromarray(image)
    return np.asarray(source.resize((width, height), pillow.Resampling.BICUBIC))
