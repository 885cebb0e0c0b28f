"""Pictures of the table, and what all pictures share: by matplotlib, which only they need."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from iks_plugin import IksError
from iks_plugin.files import whole_file

from .networks import title_of
from .summary import Entry, dense_of, is_ours, method_order, sparse_methods

DEPTH = 4.0
"""A training that ends so many dB below the best one broke: it is not shown, as it would flatten all others."""
MARGIN = 0.05
"""Of the height of what is shown, above and below it."""

LINES = ("-", "--", ":", "-.")
"""For the same method with other options, which has the same colour."""


def plot_all(entries: Sequence[Entry], out: Path) -> list[Path]:
    """PSNR over sparsity, and over the size of the file, for each network."""
    written = []
    for network in dict.fromkeys(entry.network for entry in entries):
        for over in ("sparsity", "size"):
            path = out / f"{network}_psnr_over_{over}.png"
            plot(entries, network, over, path)
            written.append(path)
    return written


def plot(entries: Sequence[Entry], network: str, over: str, path: Path) -> None:
    """One picture: a line for each method, the same colour in every picture, and the dense network as a level.

    Bars are one standard deviation.
    """
    figure, axes = new_figure()
    own = [entry for entry in entries if entry.network == network]
    if over == "sparsity":
        mark_sparsities(axes, {entry.sparsity for entry in own if entry.sparsity})
    else:
        mark_sizes(axes)
    dense = dense_of(entries, network)
    if dense is not None:
        axes.axhline(dense.mean, color="0.5", linestyle="--", label="dense")
    styles: defaultdict[int, Iterator[str]] = defaultdict(lambda: cycle(LINES))
    for method in sparse_methods(own):
        place, _ = method_order(method)
        color, width = ("black", 2.5) if is_ours(method) else (f"C{place}", 1.2)
        look = {"color": color, "linewidth": width, "linestyle": next(styles[place])}
        line = sorted((entry for entry in own if entry.method == method), key=lambda entry: entry.sparsity)
        x = [1 - entry.sparsity if over == "sparsity" else entry.bytes / 1000 for entry in line]
        spread = [0.0 if math.isnan(entry.spread) else entry.spread for entry in line]
        y = [entry.mean for entry in line]
        axes.errorbar(x, y, spread, marker="o", capsize=3, label=method, **look)
    left_out = show(axes, [entry.mean for entry in own])
    axes.set_ylabel("PSNR in dB (Y)" + (", the lowest left out" if left_out else ""))
    axes.set_title(title_of(network))
    save_figure(figure, axes, path)


def new_figure() -> tuple[Any, Any]:
    """A figure and its axes, the x axis logarithmic, without any window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise IksError(f"the pictures need matplotlib ({error}): pip install matplotlib") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    return figure, axes


def mark_sparsities(axes: Any, sparsities: Iterable[float]) -> None:
    """Before anything is drawn: let the x axis, of the weights that stay, fall, and mark it with the share of zeros."""
    marks = sorted(sparsities)
    if marks:
        axes.set_xlim((1 - marks[0]) * 1.2, (1 - marks[-1]) / 1.2)
    axes.set_xticks([1 - sparsity for sparsity in marks], [f"{100 * sparsity:g} %" for sparsity in marks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("zeros, on a logarithmic scale of the weights that stay")


def mark_sizes(axes: Any) -> None:
    """Put plain numbers, not powers, at the x axis: for sizes within a decade or two."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("compact file in kB (float32)")


def show(axes: Any, values: Sequence[float]) -> bool:
    """Fit the y axis to those of `values` that are within `DEPTH` of the best; returns whether some are left out."""
    near = [value for value in values if value >= max(values) - DEPTH]
    lowest, highest = min(near), max(near)
    margin = MARGIN * max(highest - lowest, 1)
    axes.set_ylim(lowest - margin, highest + margin)
    return len(near) < len(values)


def save_figure(figure: Any, axes: Any, path: Path) -> None:
    """Write it as PNG, with a legend."""
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png")
