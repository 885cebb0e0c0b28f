"""How far a network looks: what of an image a tile must see for its output to be that of the whole image.

Nothing is read off the modules. The network is asked: where a pixel that is not a number (NaN) shows in the output is
where that pixel counts, since NaN goes through convolutions, activations, sums and rearrangements of pixels alike. The
questions are strips, long in the direction in question and narrow in the other, so that a reach of hundreds of pixels
costs less than one tile does. What was found is then checked: the network answers a strip of noise and a cut-out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import IksError

Ask = Callable[[Tensor], Tensor]
"""A network: images (N, C, H, W) to images (N, C', s * H, s * W). Raises `NoAnswerError` for a size it refuses."""

_BASES = (32, 48, 64, 80, 96, 112, 128, 192, 256)
_PERIODS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
_LONGEST = 1024
_REMEDY = (
    "Upscale the image as a whole (without tiles), or allow approximate tiles that see N pixels around them (overlap "
    "N, such as 32)"
)
ROWS, COLUMNS = 2, 3
"""The dimensions of (N, C, H, W) in which an image is cut."""


class NoAnswerError(IksError):
    """A network has failed on an input, or has given something other than images of a whole number of its size."""


@dataclass(frozen=True)
class Reach:
    """What an output pixel depends on in one dimension.

    Attributes:
        pixels: an output pixel that lies in input pixel p depends on p - pixels to p + pixels, at most.
        period: the network treats all places alike that are so many pixels apart: where an input for it is cut out of
            an image, it must begin and end at a multiple.
    """

    pixels: int
    period: int


@dataclass(frozen=True)
class Sizes:
    """What images a network takes: `base` for one, and other sides that are multiples of `multiple`.

    `scale` is how many times larger its answers are.
    """

    base: int
    multiple: int
    scale: int


def find_sizes(ask: Ask, channels: int) -> Sizes:
    """The sizes that the network answers.

    Raises:
        NoAnswerError: it answers none of those that were tried; the message is that of the first.
    """
    first: NoAnswerError | None = None
    for base in _BASES:
        try:
            scale = ask(_noise(channels, base, base)).shape[2] // base
        except NoAnswerError as error:
            first = first or error
        else:
            return Sizes(base, _multiple(ask, channels, base, scale), scale)
    assert first is not None
    raise first


def _multiple(ask: Ask, channels: int, base: int, scale: int) -> int:
    for step in (period for period in _PERIODS if base % period == 0):
        try:
            answer = ask(_noise(channels, base + step, base + step))
        except NoAnswerError:
            continue
        if answer.shape[2] == scale * (base + step):
            return step
    return base


def find_reach(ask: Ask, channels: int, sizes: Sizes, dim: int) -> Reach:
    """How far the network looks along `dim`, `ROWS` or `COLUMNS`; exactly, where its period is 1.

    Raises:
        IksError: no tile can be exact, as the network looks at the whole image or treats all its places differently.
    """
    length = 2 * sizes.base
    while length <= max(_LONGEST, 4 * sizes.base):
        reach = _Strip(ask, channels, sizes, dim, length).reach()
        if reach is not None:
            return reach
        length *= 2
    raise IksError(
        f"tiles cannot be exact for this network: its output depends on pixels {length // 4} and more away, or on the "
        f"whole image, as with global pooling, normalisation over the image or attention to all of it. {_REMEDY}"
    )


@dataclass(frozen=True)
class _Strip:
    """Questions on a strip of one length."""

    ask: Ask
    channels: int
    sizes: Sizes
    dim: int
    length: int

    def reach(self) -> Reach | None:
        """The reach, or None where it needs a longer strip to show."""
        multiple, scale = self.sizes.multiple, self.sizes.scale
        for period in [period for period in _PERIODS if period % multiple == 0] or [multiple]:
            start = self.length // 2 // period * period
            if start + 2 * period >= self.length:
                return None
            here, next_ = self.seen(start, period), self.seen(start + period, period)
            if here is None or next_ is None:
                return None
            first, last = here
            pixels = max(0, last // scale - start, start + period - 1 - first // scale)
            if 2 * pixels + 4 * period >= self.length:
                return None
            if next_ == (first + period * scale, last + period * scale):
                reach = Reach(pixels, period)
                self.check(reach)
                return reach
        return None

    def noise(self) -> Tensor:
        sides = (self.length, self.sizes.base) if self.dim == ROWS else (self.sizes.base, self.length)
        return _noise(self.channels, *sides)

    def seen(self, start: int, size: int) -> tuple[int, int] | None:
        """The first and the last output pixel that depend on `size` pixels from `start`; None where there is no end."""
        image = self.noise()
        image.narrow(self.dim, start, size).fill_(torch.nan)
        with _each_product_by_itself():
            answer = self.ask(image).isnan()
        found = answer.any(dim=1).any(dim=2 if self.dim == ROWS else 1)[0].nonzero().flatten().tolist()
        if not found:
            raise IksError(
                "how far this network looks cannot be found out: a pixel that is not a number (NaN) leaves no trace in "
                f"its output. {_REMEDY}"
            )
        return None if found[0] == 0 or found[-1] == answer.shape[self.dim] - 1 else (found[0], found[-1])

    def check(self, reach: Reach) -> None:
        """Compare the answer to a strip with those to it without its first and without its last pixels."""
        image, scale, size = self.noise(), self.sizes.scale, self.length - reach.period
        whole = self.ask(image)
        inside = scale * (size - reach.pixels)
        head = self.ask(image.narrow(self.dim, 0, size)).narrow(self.dim, 0, inside)
        tail = self.ask(image.narrow(self.dim, reach.period, size)).narrow(self.dim, scale * reach.pixels, inside)
        expected = (whole.narrow(self.dim, 0, inside), whole.narrow(self.dim, scale * self.length - inside, inside))
        largest = max(float(part.double().abs().max()) for part in expected)
        off = max(float((a.double() - b.double()).abs().max()) for a, b in zip((head, tail), expected, strict=True))
        if not off <= max(1e-4, 32 * torch.finfo(whole.dtype).eps) * largest:
            raise IksError(
                f"tiles cannot be exact for this network: {reach.pixels} pixels around a tile seemed enough, but parts "
                f"of an image came out up to {off:.2g} different, with values up to {largest:.2g}. Its output depends "
                f"on where in the image a pixel is, on chance, or on the far side of the image. {_REMEDY}"
            )


def _noise(channels: int, height: int, width: int) -> Tensor:
    """Random pixels in [0, 1], the same ones each time; torch's own generator goes on as if nothing had been drawn."""
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def _each_product_by_itself() -> AbstractContextManager[None]:
    """cuDNN's fast algorithms compute neighbouring pixels together, so that a NaN in one would reach the others."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=False)
    return flags if torch.cuda.is_available() else nullcontext()
