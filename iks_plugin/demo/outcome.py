"""What a run of the demo has found out, as numbers, as a table and as a dictionary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..report import Report
from .photos import SCALE, PhotoSet, Pixels
from .quality import psnr_y
from .recipe import Recipe

NAME_WIDTH = 20


@dataclass(frozen=True)
class Candidate:
    """One way to enlarge the held-out photographs, and how well it did.

    Attributes:
        name: "bicubic", "dense" or "sparse".
        steps: optimizer steps that it was trained for; None for bicubic.
        images: the held-out photographs as it enlarged them, each (H, W, 3) uint8.
        psnr: dB for each of them.
    """

    name: str
    steps: int | None
    images: tuple[Pixels, ...]
    psnr: tuple[float, ...]

    @property
    def mean_psnr(self) -> float:
        """The mean over the photographs in dB."""
        return fmean(self.psnr)


@dataclass(frozen=True)
class Outcome:
    """What one run found out. `report` is of the sparse network, None where an interrupt came before there was one."""

    photos: PhotoSet
    recipe: Recipe
    target_sparsity: float
    candidates: tuple[Candidate, ...]
    report: Report | None
    interrupted: bool
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """The candidates, one a line, with their PSNR for each held-out photograph."""
        names = [shorten(photo.name) for photo in self.photos.held_out]
        rows = [["", *names, "mean", "steps", "zeros"]]
        for candidate in self.candidates:
            zeros = self.report.sparsity if self.report and candidate.name == "sparse" else 0.0
            values = [*candidate.psnr, candidate.mean_psnr]
            trained = ["", ""] if candidate.steps is None else [f"{candidate.steps:,}", f"{zeros:.2%}"]
            rows.append([candidate.name, *(f"{value:.2f}" for value in values), *trained])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(cells))
            for cells in ([*zip(row, widths, strict=True)] for row in rows)
        ]
        heading = (
            f"PSNR in dB on {len(names)} photographs that were held out "
            f"(Y channel, {SCALE} pixels cropped from each border)"
        )
        return "\n".join([heading, "", *(line.rstrip() for line in lines)])

    def summary(self) -> str:
        """The zeros of the sparse network in a sentence; empty without one."""
        if self.report is None:
            return ""
        kept = self.report.weights - self.report.zeros
        return (
            f"{self.report.zeros:,} of {self.report.weights:,} weights in the rewritten layers are zero: "
            f"{self.report.sparsity:.2%} (target {self.target_sparsity:.2%}), {kept:,} are left"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers, ready for json. An infinite PSNR becomes None."""
        names = [photo.name for photo in self.photos.held_out]
        return {
            "interrupted": self.interrupted,
            "photos": {
                "source": self.photos.source,
                "training": [photo.name for photo in self.photos.training],
                "held_out": names,
            },
            "recipe": {**vars(self.recipe), "target_sparsity": self.target_sparsity},
            "psnr_y": {
                candidate.name: {
                    "steps": candidate.steps,
                    "mean": _finite(candidate.mean_psnr),
                    "photos": [_finite(value) for value in candidate.psnr],
                }
                for candidate in self.candidates
            },
            "sparse": None if self.report is None else self.report.to_dict(),
            "notes": list(self.notes),
        }


def judge(name: str, steps: int | None, images: Sequence[Pixels], photos: PhotoSet) -> Candidate:
    """Compare the enlarged `images` with the held-out originals, which come in the same order."""
    psnr = [psnr_y(image, photo.large) for image, photo in zip(images, photos.held_out, strict=True)]
    return Candidate(name, steps, tuple(images), tuple(psnr))


def shorten(name: str) -> str:
    """`name` in at most `NAME_WIDTH` characters."""
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 3]}..."


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
