"""Picture files: read, upscaled by a network, written. For the command line; needs Pillow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .errors import IksError
from .files import whole_file
from .upscale import Pixels, Upscaler

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_NO_ALPHA = (".jpg", ".jpeg")
_16_BITS = re.compile(r"(?<!BGR);16")  # BGR;16 is three channels in 16 bits
_SAVING: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}


@dataclass(frozen=True)
class Picture:
    """What a picture file shows.

    Attributes:
        pixels: (H, W, 3) RGB or (H, W) grey, uint8.
        alpha: (H, W) uint8, or None where all is opaque.
        profile: the ICC profile of the pixels' colours, if the file had one.
    """

    pixels: Pixels
    alpha: Pixels | None = None
    profile: bytes | None = None

    @property
    def size(self) -> str:
        """Width and height, for people."""
        return f"{self.pixels.shape[1]} x {self.pixels.shape[0]}"


def check_paths(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Raise an `IksError` if `source` could not be upscaled to `out`, or Pillow is missing: before any work."""
    source, out = Path(source), Path(out)
    _pillow("Image")
    if not source.exists():
        raise IksError(f"{source}: expected a picture or a folder of them, found nothing: check the path")
    if out.exists() and out.samefile(source):
        raise IksError(f"{out} is what to read: write to another place")
    if source.is_dir():
        if not _pictures(source):
            raise IksError(f"{source}: expected pictures in the folder, found none that ends in {', '.join(SUFFIXES)}")
        if out.exists() and not out.is_dir():
            raise IksError(f"{out} is a file: name a folder to write to, as {source} is one too")
    elif out.is_dir():
        raise IksError(f"{out} is a folder: name the file to write, as {source} is one too")
    elif not out.parent.is_dir():
        raise IksError(f"{out}: there is no folder {out.parent} to write to: make it first")
    elif out.suffix.lower() not in SUFFIXES:
        raise IksError(f"{out}: expected a name that ends in {', '.join(SUFFIXES)}, got {out.suffix or 'no ending'!r}")


def upscale_files(upscaler: Upscaler, source: str | os.PathLike[str], out: str | os.PathLike[str]) -> str:
    """Upscale the picture `source` to the file `out`, or each picture in the folder `source` to the folder `out`.

    Files are written whole or not at all. In a folder a picture that cannot be upscaled does not keep the others from
    it. Returns a line that says what was done.

    Raises:
        IksError: Pillow is missing, there is nothing to read, or pictures cannot be read, upscaled or written.
    """
    check_paths(source, out)
    source, out = Path(source), Path(out)
    if source.is_dir():
        return _upscale_folder(upscaler, source, out)
    start = time.perf_counter()
    picture, result = _upscale_file(upscaler, source, out)
    return f"{source}: {picture.size} -> {out}: {result.size}, {time.perf_counter() - start:.1f} s"


def _upscale_file(upscaler: Upscaler, source: Path, out: Path, progress: bool | None = None) -> tuple[Picture, Picture]:
    picture = read_picture(source)
    if picture.alpha is not None and out.suffix.lower() in _NO_ALPHA:
        if (picture.alpha < 255).any():
            raise IksError(f"{source} has transparent pixels, which {out.suffix} files cannot have: write a .png file")
        picture = replace(picture, alpha=None)
    result = enlarged(upscaler, picture, progress)
    write_picture(out, result)
    return picture, result


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _upscale_folder(upscaler: Upscaler, source: Path, out: Path) -> str:
    start, paths, faults = time.perf_counter(), _pictures(source), []
    _make_folder(out)
    for path in _bar(paths):
        try:
            _upscale_file(upscaler, path, out / path.name, progress=False)
        except IksError as error:
            faults.append(str(error))
    if faults:
        raise IksError(f"{len(faults)} of {len(paths)} pictures were not upscaled: {'; '.join(faults)}")
    return f"{source} -> {out}: {len(paths)} pictures, {time.perf_counter() - start:.1f} s"


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IksError(f"{out}: the folder cannot be made ({error})") from error


def read_picture(path: Path) -> Picture:
    """The picture at `path`, turned upright.

    Raises:
        IksError: it is no picture that Pillow can read, has more than 8 bits a channel, or more than one frame.
    """
    pillow = _pillow("Image")
    try:
        with pillow.open(path) as opened:
            # Pillow opens 16-bit RGB as if it had 8, and only the decoder's arguments tell.
            if opened.mode.startswith(("I", "F")) or any(_16_BITS.search(str(entry[3])) for entry in opened.tile):
                raise IksError(f"{path}: expected 8 bits a channel, got more: convert it first")
            if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:  # a camera's MPO has a preview besides
                raise IksError(f"{path}: expected one picture, got {opened.n_frames} frames: take them apart first")
            profile = opened.info.get("icc_profile") if _keeps_colours(opened) else None
            image = _pillow("ImageOps").exif_transpose(opened)
            transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
            grey = image.mode in ("1", "L", "LA", "La")
            alpha = np.asarray(image.convert("RGBA").getchannel("A")) if transparent else None
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except IksError:
        raise
    except Exception as error:  # Pillow's plugins raise about anything on damaged files
        raise IksError(f"{path}: unreadable: {reason_of(error)}") from error
    return Picture(pixels, alpha, profile)


def reason_of(error: Exception) -> str:
    """Why Pillow could not read a picture, in a line."""
    if type(error).__name__ == "UnidentifiedImageError":  # its message repeats the path
        return "not a picture that Pillow can read"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _keeps_colours(image: Any) -> bool:
    """Whether its colours are RGB or grey in the file too, so that what a profile says of them stays true."""
    if image.mode in ("P", "PA"):
        return getattr(image.palette, "mode", None) in ("RGB", "RGBA")
    return image.mode in ("RGB", "RGBA", "L", "LA")


def enlarged(upscaler: Upscaler, picture: Picture, progress: bool | None = None) -> Picture:
    """`picture`, upscaled by a network; its alpha, and where the network takes one channel its colours, bicubic.

    Of a picture in colour such a network gets the luma (Y of YCbCr), as its training has meant it.
    """
    with upscaler.network.inference():
        channels = upscaler.network.channels()
    if picture.pixels.ndim == 2 or channels == 3:
        pixels = upscaler(picture.pixels, progress)
    else:
        pillow = _pillow("Image")
        luma, *chroma = (np.asarray(band) for band in pillow.fromarray(picture.pixels).convert("YCbCr").split())
        luma = upscaler(luma, progress)
        bands = [luma, *(_bicubic(band, luma.shape) for band in chroma)]
        pixels = np.asarray(pillow.merge("YCbCr", [pillow.fromarray(band) for band in bands]).convert("RGB"))
    alpha = None if picture.alpha is None else _bicubic(picture.alpha, pixels.shape)
    return Picture(pixels, alpha, picture.profile)


def write_picture(path: Path, picture: Picture) -> None:
    """Write `picture` in the format of the name's ending; whole or not at all.

    Raises:
        IksError: it cannot be written; a file that was there before is still there.
    """
    pillow = _pillow("Image")
    image = pillow.fromarray(picture.pixels)
    if picture.alpha is not None:
        image.putalpha(pillow.fromarray(picture.alpha))
    kind = pillow.registered_extensions()[path.suffix.lower()]
    profile = {"icc_profile": picture.profile} if picture.profile else {}
    try:
        with whole_file(path) as unfinished:
            image.save(unfinished, kind, **_SAVING.get(kind, {}), **profile)
    except (OSError, ValueError) as error:
        raise IksError(f"{path}: cannot be written ({error}). What was there before is unchanged") from error


def _bicubic(channel: Pixels, shape: tuple[int, ...]) -> Pixels:
    pillow = _pillow("Image")
    return np.asarray(pillow.fromarray(channel).resize((shape[1], shape[0]), pillow.Resampling.BICUBIC))


def _pillow(module: str) -> Any:
    try:
        return import_module(f"PIL.{module}")
    except ImportError as error:
        raise IksError(f"reading pictures needs Pillow ({error}): pip install pillow") from error


def _bar(paths: Sequence[Path]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return paths
    return tqdm(paths, desc="upscaling", unit="picture", disable=None, dynamic_ncols=True)
