"""Pictures by matplotlib, which only they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iks_plugin import IksError
from iks_plugin.files import whole_file


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
