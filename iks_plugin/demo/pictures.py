"""The side-by-side picture: the same detail of a photograph as each candidate enlarged it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .optional import require
from .outcome import Candidate, Outcome, shorten
from .photos import Pixels
from .quality import luma

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DETAIL = 80
"""Side of the detail in pixels of the original."""
ZOOM = 4
PANEL = DETAIL * ZOOM
GAP, HEADING, CAPTION = 16, 48, 48
DPI = 100
ACCENT = "#f2b35d"


def draw_side_by_side(outcome: Outcome, path: Path) -> None:
    """Write a picture with a row for each held-out photograph: where the detail lies, each candidate, the original.

    Raises:
        IksError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "matplotlib")
    photos = outcome.photos.held_out
    columns = len(outcome.candidates) + 2
    width = GAP + columns * (PANEL + GAP)
    height = HEADING + len(photos) * (CAPTION + PANEL) + GAP
    figure: Figure = figures.Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.text(GAP / width, 1 - 0.5 * HEADING / height, _title(outcome), fontsize=15, va="center")

    for row, photo in enumerate(photos):
        images = [candidate.images[row] for candidate in outcome.candidates]
        top, left = most_telling(images[0], images[1], photo.large)
        judged = [f"{c.name}   {c.psnr[row]:.2f} dB{_gain(c, outcome, row)}" for c in outcome.candidates]
        captions = [shorten(photo.name), *judged, "original"]
        panels = [photo.large, *(detail(image, top, left) for image in [*images, photo.large])]
        y = HEADING + row * (CAPTION + PANEL) + CAPTION
        for column, (image, caption) in enumerate(zip(panels, captions, strict=True)):
            x = GAP + column * (PANEL + GAP)
            axes = figure.add_axes((x / width, 1 - (y + PANEL) / height, PANEL / width, PANEL / height))
            axes.imshow(image, interpolation="nearest" if column else "antialiased")
            axes.set_title(caption, fontsize=13, loc="left", pad=6, parse_math=False)  # file names may hold a $
            axes.set_axis_off()
            axes.set_anchor("N")
            if column == 0:
                _frame(axes, top, left)
    figure.savefig(path)


def most_telling(bicubic: Pixels, network: Pixels, original: Pixels) -> tuple[int, int]:
    """Top and left of the detail in which `network` repairs most of the squared error of `bicubic`."""
    truth = luma(original)
    gain = (luma(bicubic) - truth) ** 2 - (luma(network) - truth) ** 2
    sums = _window_sums(gain, DETAIL)[::4, ::4]
    top, left = np.unravel_index(int(np.argmax(sums)), sums.shape)
    return int(top) * 4, int(left) * 4


def detail(image: Pixels, top: int, left: int) -> Pixels:
    """The detail of `image` at (`top`, `left`)."""
    return image[top : top + DETAIL, left : left + DETAIL]


def _window_sums(values: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """The sum over each side x side window of (H, W) `values`, by its integral image."""
    integral = np.pad(values.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    sums: NDArray[np.float64] = (
        integral[side:, side:] - integral[:-side, side:] - integral[side:, :-side] + integral[:-side, :-side]
    )
    return sums


def _frame(axes: Axes, top: int, left: int) -> None:
    patches = require("matplotlib.patches", "matplotlib")
    for color, thickness in (("black", 4), (ACCENT, 2)):
        axes.add_patch(patches.Rectangle((left, top), DETAIL, DETAIL, fill=False, edgecolor=color, linewidth=thickness))


def _gain(candidate: Candidate, outcome: Outcome, row: int) -> str:
    if candidate.steps is None:
        return ""
    return f"  ({candidate.psnr[row] - outcome.candidates[0].psnr[row]:+.2f})"


def _title(outcome: Outcome) -> str:
    sparse = f"; sparse: {outcome.report.sparsity:.2%} of the rewritten weights are zero" if outcome.report else ""
    stopped = " (interrupted)" if outcome.interrupted else ""
    return f"EDSR x2 on photographs that it was not trained on{stopped}{sparse}. PSNR is that of the whole photograph."
