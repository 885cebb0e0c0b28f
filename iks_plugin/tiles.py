"""Where an image is cut: the tiles, and what each of them sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .receptive import COLUMNS, ROWS, Reach


@dataclass(frozen=True)
class Cut:
    """A tile in one dimension: it is the pixels from `start` to `stop`, and sees those from `first` to `last`."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Tile:
    """A tile: in the rows and in the columns of the image."""

    rows: Cut
    columns: Cut

    @property
    def pixels(self) -> int:
        """How many pixels it sees."""
        return (self.rows.last - self.rows.first) * (self.columns.last - self.columns.first)

    def window(self, image: Tensor) -> Tensor:
        """What it sees of `image`, (N, C, H, W)."""
        rows, columns = self.rows, self.columns
        return image[..., rows.first : rows.last, columns.first : columns.last]

    def place(self, result: Tensor, scale: int) -> Tensor:
        """Where it is in `result`, which is `scale` times as large as the image."""
        rows, columns = self.rows, self.columns
        return result[..., scale * rows.start : scale * rows.stop, scale * columns.start : scale * columns.stop]

    def part(self, answer: Tensor, scale: int) -> Tensor:
        """Where it is in the `answer` to what it sees."""
        rows, columns = self.rows, self.columns
        height, width = scale * (rows.stop - rows.start), scale * (columns.stop - columns.start)
        below, right = scale * (rows.start - rows.first), scale * (columns.start - columns.first)
        return answer[..., below : below + height, right : right + width]


def cuts(length: int, padded: int, tile: int, reach: Reach) -> list[Cut]:
    """Cut `length` pixels into tiles of at most `tile` of about the same size; what is seen may go up to `padded`."""
    count = -(-length // tile)
    size = -(-length // count)
    result = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = max(0, start - reach.pixels) // reach.period * reach.period
        last = min(padded, -(-(stop + reach.pixels) // reach.period) * reach.period)
        result.append(Cut(start, stop, first, last))
    if all((cut.first, cut.last) == (0, padded) for cut in result):
        return [Cut(0, length, 0, padded)]  # each would see everything, so one will do
    return result


def mirrored(image: Tensor, multiple: int) -> Tensor:
    """`image`, (N, C, H, W), mirrored at its lower and right border to sides that are multiples of `multiple`."""
    for dim in (ROWS, COLUMNS):
        length = image.shape[dim]
        if length % multiple:
            index = np.pad(np.arange(length), (0, -length % multiple), mode="reflect")
            image = image.index_select(dim, torch.from_numpy(index).to(image.device))
    return image
