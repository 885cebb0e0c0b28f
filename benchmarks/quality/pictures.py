"""Pictures of the table, and what all pictures share: by matplotlib, which only they need."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from iks_plugin import IksError
from iks_plugin.files import whole_file

from .networks import title_of
from .summary import Entry, dense_of, is_ours, method_order, sparse_methods

DEPTH = 6.0
"""So many dB a picture shows."""

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
    dense = dense_of(entries, network)
    if dense is not None:
        axes.axhline(dense.mean, color="0.5", linestyle="--", label="dense")
    styles: defaultdict[int, Iterator[str]] = defaultdict(lambda: cycle(LINES))
    for method in sparse_methods(own):
        place, _ = method_order(method)
        color, width = ("black", 2.5) if is_ours(method) else (f"C{place}", 1.2)
        look = {"color": color, "linewidth": width, "linestyle": next(styles[place])}
        line = sorted((entry for entry in own if entry.method == method), key=lambda entry: entry.sparsity)
        x = [entry.sparsity if over == "sparsity" else entry.bytes / 1000 for entry in line]
        spread = [0.0 if math.isnan(entry.spread) else entry.spread for entry in line]
        y = [entry.mean for entry in line]
        axes.errorbar(x, y, spread, marker="o", capsize=3, label=method, **look)
    axes.set_xlabel("share of zeros" if over == "sparsity" else "compact file in kB (float32)")
    if over == "size":
        log_sizes(axes)
    left_out = cut_below(axes, DEPTH)
    axes.set_ylabel("PSNR in dB (Y)" + (", the lowest left out" if left_out else ""))
    axes.set_title(title_of(network))
    save_figure(figure, axes, path)


def new_figure() -> tuple[Any, Any]:
    """A figure and its axes, without any window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise IksError(f"the pictures need matplotlib ({error}): pip install matplotlib") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    return figure, figure.subplots()


def log_sizes(axes: Any) -> None:
    """A logarithmic x axis with plain numbers, not powers, for sizes within a decade or two."""
    from matplotlib.ticker import ScalarFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())


def cut_below(axes: Any, depth: float) -> bool:
    """Show no more than `depth` from the top of the y axis: a training that broke would flatten all others.

    Returns whether something is left out.
    """
    lowest, highest = axes.get_ylim()
    shown = max(lowest, highest - depth)
    axes.set_ylim(shown, highest)
    return bool(shown > lowest)


def save_figure(figure: Any, axes: Any, path: Path) -> None:
    """Write it as PNG, with a legend."""
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png")
