"""Make the small data set that the option files beside this script train and validate on.

    python make_data.py                     # from photographs that come with scikit-image
    python make_data.py --source FOLDER     # from your own images

writes to data/ (--out names another folder):

    train/HR    train/LRx2    train/LRx4    overlapping cut-outs; those in LR have the same names as those in HR
    val/HR      val/LRx2      val/LRx4      the middle of other photographs than those in train

The small images are whole photographs shrunk as MATLAB's imresize shrinks them (bicubic, antialiased), cut afterwards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

SCALES = (2, 4)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
FEWEST_IMAGES = 2
MOST_VALIDATED = 3
LIST_OF_FILES = "made-by-make_data.txt"
FOLDERS = ("HR", *(f"LRx{scale}" for scale in SCALES))

# scikit-image downloads most of its sample images on first use; these lie inside every wheel of it.
TRAINING = ("stereo_motorcycle", "rocket", "immunohistochemistry", "camera", "brick", "grass", "gravel", "coins")
VALIDATION = ("astronaut", "chelsea", "coffee")


class DataError(Exception):
    """What the user gave does not do. The message says what was expected and what to do."""


@dataclass(frozen=True)
class Photo:
    """A photograph: its name, its part of the data set (train or val), and (H, W, 3) uint8 RGB."""

    name: str
    part: str
    pixels: np.ndarray


def main(arguments: list[str] | None = None) -> int:
    """Run the script. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _check_sizes(options)
        photos = builtin_photos() if options.source is None else folder_photos(options.source)
        _check_photos(photos, options)
        written = write(photos, options.out, options.size, options.step, options.val_size)
    except (DataError, OSError) as error:
        what = f"cannot write to --out {options.out}: {error}" if isinstance(error, OSError) else error
        print(f"make_data.py: error: {what}", file=sys.stderr)
        return 2
    counts = {part: sum(path.startswith(f"{part}/HR/") for path in written) for part in ("train", "val")}
    print(
        f"{options.out}: {counts['train']} images of {options.size} x {options.size} to train on, "
        f"{counts['val']} to validate on; low resolution x{' and x'.join(map(str, SCALES))}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, metavar="FOLDER", help="your images; the last few by name are validated on"
    )
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="FOLDER", help="default: data")
    parser.add_argument("--size", type=int, default=160, help="side of a training cut-out in HR pixels (160)")
    parser.add_argument("--step", type=int, default=120, help="distance from one cut-out to the next (120)")
    parser.add_argument("--val-size", type=int, default=256, help="longest side of a validation image (256)")
    return parser


def _check_sizes(options: argparse.Namespace) -> None:
    multiple = max(SCALES)
    for name, fewest in (("size", 32), ("step", multiple), ("val_size", 32)):
        value = getattr(options, name)
        if value < fewest or value % multiple:
            flag = f"--{name.replace('_', '-')}"
            near = max(fewest, round(value / multiple) * multiple)
            raise DataError(f"{flag}: expected a multiple of {multiple}, at least {fewest}, got {value}: try {near}")


def builtin_photos() -> list[Photo]:
    """Eight photographs to train on and three to validate on, all from inside scikit-image's wheel."""
    try:
        from skimage import data
    except ImportError as error:
        raise DataError(f"scikit-image is missing ({error}): pip install scikit-image, or give --source") from error

    def load(name: str, part: str) -> Photo:
        image = getattr(data, name)()
        left_view = image[0] if isinstance(image, tuple) else image
        rgb = np.asarray(Image.fromarray(left_view).convert("RGB"))
        return Photo(name.removeprefix("stereo_"), part, rgb)

    return [load(name, "train") for name in TRAINING] + [load(name, "val") for name in VALIDATION]


def folder_photos(folder: Path) -> list[Photo]:
    """The images directly in `folder`; the last ones by name, a third of them but at most three, are validated on.

    Raises:
        DataError: no such folder, too few images, or files that cannot be read (all of them named).
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"--source {folder} {what}: expected a folder with at least {FEWEST_IMAGES} images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(paths) < FEWEST_IMAGES:
        raise DataError(
            f"--source {folder}: expected at least {FEWEST_IMAGES} images, got {len(paths)}. Only files directly in it "
            f"ending in {', '.join(SUFFIXES)} count: add some, or name another folder"
        )
    validated = max(1, min(MOST_VALIDATED, len(paths) // 3))
    photos: list[Photo] = []
    problems: list[str] = []
    for position, path in enumerate(tqdm(paths, desc="reading", unit="image", disable=None)):
        try:
            part = "val" if position >= len(paths) - validated else "train"
            photos.append(Photo(path.stem, part, read_image(path)))
        except DataError as error:
            problems.append(f"{path.name}: {error}")
    _refuse(problems, len(paths), str(folder))
    _refuse_same_names(photos)
    return photos


def read_image(path: Path) -> np.ndarray:
    """The image file at `path` as (H, W, 3) uint8 RGB, turned upright.

    Raises:
        DataError: it is no image that Pillow can read, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise DataError(f"expected 8 bits per channel, got more (Pillow mode {opened.mode})")
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except UnidentifiedImageError as error:
        raise DataError("not an image that Pillow can read") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be read: {error}") from error  # Pillow raises SyntaxError on broken headers


def _refuse_same_names(photos: list[Photo]) -> None:
    names = [photo.name for photo in photos]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"--source: images that differ only in their ending: {', '.join(twice)}: rename them")


def _check_photos(photos: list[Photo], options: argparse.Namespace) -> None:
    """Every photograph must hold a cut-out; those that are validated on may be smaller, down to 32 pixels."""
    problems = []
    for photo in photos:
        height, width = photo.pixels.shape[:2]
        needed = options.size if photo.part == "train" else 32
        if min(height, width) < needed:
            flag = " (--size)" if photo.part == "train" else ""
            problems.append(f"{photo.name}: expected at least {needed} x {needed} pixels{flag}, got {width} x {height}")
    _refuse(problems, len(photos), str(options.source or "scikit-image"))


def _refuse(problems: list[str], total: int, source: str) -> None:
    if problems:
        shown = problems if len(problems) <= 10 else [*problems[:9], f"... and {len(problems) - 9} more"]
        listed = "\n".join(f"  {line}" for line in shown)
        raise DataError(
            f"{len(problems)} of {total} images in {source} cannot be used:\n{listed}\nReplace them or move them away"
        )


def write(photos: list[Photo], out: Path, size: int, step: int, val_size: int) -> list[str]:
    """Write the data set to `out`, in place of one that this script has made there before.

    Returns:
        The files, relative to `out`.

    Raises:
        DataError: `out` is no folder, holds other files where the data set goes, or BasicSR is missing. Nothing has
            changed then.
    """
    imresize = _imresize()
    boxes = {photo.name: list(_boxes(photo, size, step, val_size)) for photo in photos}
    names = {
        photo.name: [
            f"{photo.name}_{number:03}.png" if photo.part == "train" else f"{photo.name}.png"
            for number in range(len(boxes[photo.name]))
        ]
        for photo in photos
    }
    files = [f"{p.part}/{folder}/{name}" for p in photos for name in names[p.name] for folder in FOLDERS]
    _make_room(out, files)
    for photo in tqdm(photos, desc="shrinking and cutting", unit="photo", disable=None):
        height, width = (side - side % max(SCALES) for side in photo.pixels.shape[:2])
        large = photo.pixels[:height, :width]
        versions = {"HR": (large, 1)}
        for scale in SCALES:
            small = imresize(large.astype(np.float32) / 255, 1 / scale)
            versions[f"LRx{scale}"] = ((small.clip(0, 1) * 255).round().astype(np.uint8), scale)
        for name, (top, left, box_height, box_width) in zip(names[photo.name], boxes[photo.name], strict=True):
            for folder, (image, scale) in versions.items():
                rows = slice(top // scale, (top + box_height) // scale)
                columns = slice(left // scale, (left + box_width) // scale)
                Image.fromarray(np.ascontiguousarray(image[rows, columns])).save(out / photo.part / folder / name)
    return files


def _imresize() -> Any:
    """BasicSR's imresize, which gives what MATLAB's gives."""
    try:
        import iks_basicsr  # noqa: F401, I001  (first: BasicSR alone cannot be imported beside a new torchvision)
        from basicsr.utils.matlab_functions import imresize
    except ImportError as error:
        raise DataError(f"BasicSR or its adapter is missing ({error}): install them as README.md says") from error
    return imresize


def _boxes(photo: Photo, size: int, step: int, val_size: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, height, width) of what is cut out of a photograph, all multiples of the largest scale."""
    multiple = max(SCALES)
    height, width = (side - side % multiple for side in photo.pixels.shape[:2])
    if photo.part == "val":
        middle_height, middle_width = min(height, val_size), min(width, val_size)
        top, left = (height - middle_height) // 2, (width - middle_width) // 2
        yield top - top % multiple, left - left % multiple, middle_height, middle_width
        return
    for top in _starts(height, size, step):
        for left in _starts(width, size, step):
            yield top, left, size, size


def _starts(length: int, size: int, step: int) -> list[int]:
    """Where cut-outs start along one side: every `step`, and one that ends where the side ends."""
    starts = list(range(0, length - size + 1, step))
    return starts if starts[-1] == length - size else [*starts, length - size]


def _make_room(out: Path, files: list[str]) -> None:
    """Make the folders, without the files of an earlier run: BasicSR trains on whatever lies in them."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file: expected a folder, or a name that is free")
    record = out / LIST_OF_FILES
    earlier = set(record.read_text(encoding="utf-8").splitlines()) if record.is_file() else set()
    folders = [out / part / folder for part in ("train", "val") for folder in FOLDERS]
    present = {path.relative_to(out).as_posix() for folder in folders if folder.is_dir() for path in folder.iterdir()}
    foreign = sorted(present - earlier)
    if foreign:
        raise DataError(
            f"--out {out}: expected no files but those that this script made before, got {foreign[0]}"
            + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
            + ": move them away, or name another folder"
        )
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    record.write_text("\n".join(sorted(earlier | set(files))) + "\n", encoding="utf-8")
    for name in present:
        (out / name).unlink()
    record.write_text("\n".join(files) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
