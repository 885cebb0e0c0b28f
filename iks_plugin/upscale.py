"""Upscaling an image with a network, as a whole or in tiles that show no seams."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import lcm
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import IksError, OptionError, warn_user
from .network import Network
from .receptive import COLUMNS, ROWS, NoAnswerError, Reach
from .tiles import Cut, Tile, cuts, mirrored

Pixels = NDArray[np.uint8]

_ALIGNED = 16
"""Approximate tiles begin at multiples of this: right for most windows and strides of networks."""
_SMALL = 64
"""A network that rounds sides up to multiples of this may answer a smaller image in twice the size."""
_WASTE = 4
"""From this many times the image's own pixels on, what tiles see in all is worth a warning."""


@overload
def upscale(
    model: nn.Module,
    image: Tensor,
    tile: int | tuple[int, int] | None = None,
    *,
    scale: int | None = None,
    overlap: int | None = None,
    progress: bool | None = None,
) -> Tensor: ...
@overload
def upscale(
    model: nn.Module,
    image: Pixels,
    tile: int | tuple[int, int] | None = None,
    *,
    scale: int | None = None,
    overlap: int | None = None,
    progress: bool | None = None,
) -> Pixels: ...
def upscale(
    model: nn.Module,
    image: Tensor | Pixels,
    tile: int | tuple[int, int] | None = None,
    *,
    scale: int | None = None,
    overlap: int | None = None,
    progress: bool | None = None,
) -> Tensor | Pixels:
    """Upscale `image` with a super-resolution network, in bounded memory where `tile` is given.

    Tiles show no seams: each sees as much around it as the network looks, so that the result is that of the whole image
    up to the rounding of floating-point numbers. How far a network looks is found out by some questions to it, which
    cost about as much as a small image. A network that looks at the whole image, as by global pooling, is refused.

    The network is in eval mode and gradients are off meanwhile; afterwards each module's training flag is what it was.
    If the network takes only sides that are multiples of some number, the image is mirrored at its lower and right
    border to such a size, and the result cut.

    Args:
        model: maps images (N, C, H, W) to (N, C', s * H, s * W) with a whole number s; packed or not, on any device, of
            any floating dtype. The image is brought there, tile by tile.
        image: a floating tensor (C, H, W) or (N, C, H, W), whose values the network gets as they are; or a uint8 array,
            (H, W, 3) in colour or (H, W) in grey, which it gets as values in [0, 1]. A network for colours gets a grey
            image as three equal channels, and their mean is taken of its answer.
        tile: the sides of a tile in pixels of the image: one number, or (height, width). Memory for the network's
            features then grows with the tile. None: the image as a whole.
        scale: the factor s that is expected; another one is an error. None: whatever it is.
        overlap: with it, tiles see so many pixels around them and nothing is found out: they are approximate where the
            network looks further.
        progress: whether to show a progress bar of the tiles. None: if standard error is a terminal and tqdm is there.

    Returns:
        What `image` was: a tensor (C', s * H, s * W) or (N, C', s * H, s * W) of its dtype, on its device; or a uint8
        array (s * H, s * W, 3) or (s * H, s * W), rounded and clamped to [0, 255].

    Raises:
        OptionError: an option has a wrong type or value.
        IksError: the image is none of these; the network fails, or its answer is no such image; its answer to an array
            has other than 3 channels, or in grey 1 or 3; exact tiles are not possible for it.

    Warns:
        IksWarning: the tiles see many times the image in all, as the network looks far beyond them.
    """
    return Upscaler(model, tile, scale=scale, overlap=overlap)(image, progress)


class Upscaler:
    """`upscale` with its options, for many images: what was found out about the network is kept."""

    def __init__(
        self,
        model: nn.Module,
        tile: int | tuple[int, int] | None = None,
        *,
        scale: int | None = None,
        overlap: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise IksError(f"upscale expects a torch.nn.Module that maps images to images, got {type(model).__name__}")
        self.tile, self.overlap = _checked_tile(tile), overlap
        if scale is not None and not _is_whole(scale, 1):
            raise OptionError(f"scale must be a whole number of at least 1 or None, got {scale!r}")
        if overlap is not None and not _is_whole(overlap, 0):
            raise OptionError(f"overlap must be a whole number of pixels, 0 or more, or None, got {overlap!r}")
        if overlap is not None and tile is None:
            raise OptionError("overlap says how far tiles see, but there are none: give tile as well, or leave it out")
        self.network = Network(model, scale)

    @overload
    def __call__(self, image: Tensor, progress: bool | None = None) -> Tensor: ...
    @overload
    def __call__(self, image: Pixels, progress: bool | None = None) -> Pixels: ...
    def __call__(self, image: Tensor | Pixels, progress: bool | None = None) -> Tensor | Pixels:
        """See `upscale`."""
        if progress is not None and not isinstance(progress, bool):
            raise OptionError(f"progress must be True, False or None, got {progress!r}")
        source = _source(image)
        with self.network.inference():
            if isinstance(image, Tensor):
                result = self._upscaled(source, False, progress)
                return result if image.ndim == 4 else result[0]
            grey = image.ndim == 2
            colours = grey and self.network.channels() == 3
            result = self._upscaled(source.expand(-1, 3, -1, -1) if colours else source, grey, progress)
        pixels: Pixels = result[0].permute(1, 2, 0).numpy()
        return pixels[..., 0] if grey else pixels

    def _upscaled(self, source: Tensor, grey: bool, progress: bool | None) -> Tensor:
        sides = source.shape[2:]
        if self.tile is None or all(tile >= side for tile, side in zip(self.tile, sides, strict=True)):
            return self._whole(source, grey)
        sizes = self.network.sizes(source.shape[1])
        padded = mirrored(source, sizes.multiple)
        rows, columns = (self._cuts(source, padded, dim, self.tile) for dim in (ROWS, COLUMNS))
        tiles = [Tile(row, column) for row in rows for column in columns]
        self._warn_of_waste(tiles, sides[0] * sides[1])
        canvas = _Canvas(source, sizes.scale, grey)
        with _bar(tiles, progress) as shown:
            for tile in shown:
                canvas.put(self.network(tile.window(padded)), tile)
        return canvas.image

    def _whole(self, source: Tensor, grey: bool) -> Tensor:
        # An answer to a size that was rounded up may pass for another scale, where the image is small.
        padded = self._padded(source) if min(source.shape[2:]) < _SMALL else source
        try:
            answer = self.network(padded)
        except NoAnswerError:
            padded = self._padded(source)
            if padded.shape == source.shape:
                raise
            answer = self.network(padded)
        canvas = _Canvas(source, answer.shape[2] // padded.shape[2], grey)
        canvas.put(answer, Tile(*(Cut(0, side, 0, side) for side in source.shape[2:])))
        return canvas.image

    def _padded(self, source: Tensor) -> Tensor:
        """`source` in a size that the network takes, if one can be found."""
        try:
            return mirrored(source, self.network.sizes(source.shape[1]).multiple)
        except NoAnswerError:
            return source

    def _cuts(self, source: Tensor, padded: Tensor, dim: int, tile: tuple[int, int]) -> list[Cut]:
        channels, side = source.shape[1], tile[dim - ROWS]
        if side >= source.shape[dim]:
            return [Cut(0, source.shape[dim], 0, padded.shape[dim])]
        if self.overlap is None:
            reach = self.network.reach(channels, dim)
        else:
            reach = Reach(self.overlap, lcm(self.network.sizes(channels).multiple, _ALIGNED))
        return cuts(source.shape[dim], padded.shape[dim], side, reach)

    def _warn_of_waste(self, tiles: list[Tile], pixels: int) -> None:
        times = sum(tile.pixels for tile in tiles) / pixels
        if times > _WASTE:
            warn_user(
                f"the tiles see {times:.0f} times as many pixels as the image has, as each must see far around it: "
                "take larger tiles, or approximate ones that see less (a smaller overlap)",
            )


class _Canvas:
    """The result: made once as a whole, filled tile by tile."""

    def __init__(self, source: Tensor, scale: int, grey: bool) -> None:
        self.source, self.scale, self.grey = source, scale, grey
        self._image: Tensor | None = None

    @property
    def image(self) -> Tensor:
        """(N, C', scale * H, scale * W)."""
        assert self._image is not None
        return self._image

    def put(self, answer: Tensor, tile: Tile) -> None:
        self._check(answer.shape[1])
        part = tile.part(answer, self.scale)
        if self.grey:
            part = part.mean(dim=1, keepdim=True)
        if self.source.dtype == torch.uint8:
            part = (part.float() * 255).round().clamp(0, 255)
        if self._image is None:
            self._image = self._blank(*part.shape[:2])
        tile.place(self._image, self.scale).copy_(part)

    def _check(self, channels: int) -> None:
        if self.source.dtype == torch.uint8 and channels not in ((1, 3) if self.grey else (3,)):
            kind, expected = ("grey", "1 or 3") if self.grey else ("colour", "3")
            raise IksError(
                f"of an image in {kind} the network must make {expected} channels, got {channels}: take another "
                "network, or give the image as a floating tensor, of which any number can be made"
            )

    def _blank(self, n: int, channels: int) -> Tensor:
        height, width = (self.scale * side for side in self.source.shape[2:])
        with torch.inference_mode(False):  # a tensor of inference mode would be refused by autograd ever after
            if self.source.dtype == torch.uint8:
                pixels = torch.empty(n, height, width, channels, dtype=torch.uint8)  # as arrays have them in memory
                return pixels.permute(0, 3, 1, 2)
            return self.source.new_empty(n, channels, height, width)


def _source(image: Any) -> Tensor:
    """The image as (N, C, H, W), floating or uint8."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise IksError(
                f"an array must be uint8 of shape (H, W, 3) in colour or (H, W) in grey, got {image.dtype} of shape "
                f"{image.shape}: other images can be given as tensors"
            )
        source = torch.from_numpy(np.array(image if image.ndim == 3 else image[..., None])).permute(2, 0, 1)[None]
    elif isinstance(image, Tensor):
        if not image.is_floating_point() or image.ndim not in (3, 4):
            raise IksError(
                f"a tensor must be floating, of shape (C, H, W) or (N, C, H, W), got {image.dtype} of shape "
                f"{tuple(image.shape)}"
            )
        source = image.detach() if image.ndim == 4 else image.detach()[None]
    else:
        raise IksError(f"an image must be a floating tensor or a uint8 array, got {type(image).__name__}")
    if 0 in source.shape[1:]:
        raise IksError(f"an image must have channels and pixels, got shape {tuple(image.shape)}")
    return source


def _checked_tile(tile: Any) -> tuple[int, int] | None:
    sides = (tile, tile) if _is_whole(tile, 1) else tile
    if sides is None or (isinstance(sides, tuple) and len(sides) == 2 and all(_is_whole(side, 1) for side in sides)):
        return sides
    raise OptionError(
        f"tile must be a whole number of pixels of at least 1, two of them (height, width), or None, got {tile!r}"
    )


def _is_whole(number: Any, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


@contextmanager
def _bar(tiles: list[Tile], progress: bool | None) -> Iterator[Iterable[Tile]]:
    wanted = sys.stderr.isatty() if progress is None else progress
    try:
        if wanted:
            import tqdm
    except ImportError as error:
        if progress:
            raise IksError(f"a progress bar needs tqdm ({error}): pip install tqdm, or leave progress out") from error
        wanted = False
    if not wanted:
        yield tiles
        return
    with tqdm.tqdm(tiles, desc="upscaling", unit="tile", dynamic_ncols=True) as bar:
        yield bar
