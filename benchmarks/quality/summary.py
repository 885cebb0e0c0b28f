"""What the rows of a table say: each method at its best setting, its spread over seeds, and how it compares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .methods import METHODS
from .plan import Cell
from .results import Row

OURS = "iks"


@dataclass(frozen=True)
class Entry:
    """A method at one sparsity of one network, at its best setting: learning rate and ramp of the highest mean PSNR.

    Only settings that were run with the most seeds count.

    Attributes:
        better: settings with fewer seeds that are better on those.
        mean: PSNR in dB, mean over seeds.
        spread: standard deviation over seeds; NaN for a single one.
        tried: the learning rates and ramps that there were.
    """

    network: str
    method: str
    sparsity: float
    rows: tuple[Row, ...]
    tried: tuple[Cell, ...]
    better: tuple[Cell, ...] = ()

    @property
    def mean(self) -> float:
        return fmean(row.psnr for row in self.rows)

    @property
    def spread(self) -> float:
        return stdev(row.psnr for row in self.rows) if len(self.rows) > 1 else math.nan

    @property
    def ssim(self) -> float:
        return fmean(row.ssim for row in self.rows)

    @property
    def bytes(self) -> float:
        return fmean(row.file_bytes for row in self.rows)

    @property
    def reached(self) -> float:
        return fmean(row.reached for row in self.rows)

    @property
    def setting(self) -> str:
        lrs = sorted({lr for lr, _ in self.tried})
        edge = {lrs[0]: " (lowest tried)", lrs[-1]: " (highest tried)"}
        note = edge.get(self.rows[0].lr, "") if len(lrs) > 1 else " (only one tried)"
        chosen = _named((self.rows[0].lr, self.rows[0].ramp), note)
        others = "".join(f"; {_named(cell)} better on fewer seeds" for cell in self.better)
        return chosen + others


def summarise(rows: Iterable[Row]) -> list[Entry]:
    """The entries of all that is in `rows`, in the order of networks, sparsities and methods."""
    groups: dict[tuple[str, str, float], dict[tuple[float, float], list[Row]]] = {}
    for row in rows:
        cells = groups.setdefault((row.network, row.method, row.sparsity), {})
        cells.setdefault((row.lr, row.ramp), []).append(row)
    entries = []
    for group, cells in groups.items():
        most = max(map(len, cells.values()))
        best = max((cell for cell in cells.values() if len(cell) == most), key=_mean_or_worst)
        chosen = {row.seed: row.psnr for row in best}
        better = [
            cell
            for cell, other in cells.items()
            if len(other) < most and all(row.psnr > chosen.get(row.seed, math.inf) for row in other)
        ]
        entries.append(Entry(*group, tuple(sorted(best, key=lambda row: row.seed)), tuple(cells), tuple(better)))
    return sorted(entries, key=lambda entry: (entry.network, entry.sparsity, method_order(entry.method)))


def method_order(method: str) -> tuple[int, str]:
    """What to sort methods by: their order in `METHODS`, then their options."""
    return list(METHODS).index(method.partition(":")[0]), method


def _named(cell: Cell, note: str = "") -> str:
    lr, ramp = cell
    return f"lr {lr:g}{note}" + (f", ramp {ramp:g}" if ramp else "")


def _mean_or_worst(rows: Sequence[Row]) -> float:
    mean = fmean(row.psnr for row in rows)
    return -math.inf if math.isnan(mean) else mean


def dense_of(entries: Iterable[Entry], network: str) -> Entry | None:
    """The dense reference of a network."""
    return next((entry for entry in entries if entry.network == network and entry.sparsity == 0), None)


def differences(entry: Entry, other: Entry) -> tuple[float, float]:
    """PSNR of `entry` over `other` in dB: mean and standard deviation (NaN for one) over the seeds that both have.

    The same seed means the same dense network and the same batches, so differences spread less than values do.
    """
    theirs = {row.seed: row.psnr for row in other.rows}
    gaps = [row.psnr - theirs[row.seed] for row in entry.rows if row.seed in theirs]
    if not gaps:
        return entry.mean - other.mean, math.nan
    return fmean(gaps), stdev(gaps) if len(gaps) > 1 else math.nan


def is_ours(method: str) -> bool:
    """Whether it is our default method, with options of its own or without."""
    return method.partition(":")[0] == OURS


def best_other(entries: Iterable[Entry], ours: Entry) -> Entry | None:
    """Of the methods that are not ours, whole or without a part, the one that `ours` is least ahead of.

    Over the seeds that both have, so that none is the best for having been run with an easy seed alone.
    """
    others = [
        entry
        for entry in entries
        if entry.network == ours.network
        and entry.sparsity == ours.sparsity
        and entry.method.partition(":")[0] not in (OURS, "iks-without")
        and not math.isnan(entry.mean)
    ]
    return min(others, key=lambda entry: differences(ours, entry)[0], default=None)


def sparse_methods(entries: Iterable[Entry]) -> list[str]:
    """The methods of `entries` that leave zeros, in their order."""
    return sorted({entry.method for entry in entries if entry.sparsity}, key=method_order)
