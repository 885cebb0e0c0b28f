"""The picture of a report: how sparse each layer is, and how many of its weights it has kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import IksError

if TYPE_CHECKING:
    from .report import LayerReport, Report

KEPT, ZERO, DENSE = "#1f6f8b", "#f2b35d", "#c9ccd1"
MAX_LABELS = 60


def draw(report: Report, path: Path) -> Path:
    """Write the picture to `path` and return it; the folder is made where it does not exist."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise IksError("drawing needs matplotlib: pip install matplotlib") from error

    layers = report.layers
    positions = range(len(layers))
    figure = Figure(figsize=(min(max(8.0, 0.28 * len(layers) + 2), 28), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    sparsity_axes, weights_axes = figure.subplots(2, 1, sharex=True)

    figure.suptitle(_title(report), fontsize=12)
    colors = [ZERO if layer.rewritten else DENSE for layer in layers]
    sparsity_axes.bar(positions, [layer.sparsity for layer in layers], color=colors, width=0.8)
    if report.weights:
        sparsity_axes.axhline(report.sparsity, color=KEPT, linewidth=1, linestyle="--")
        sparsity_axes.annotate(
            f"{report.sparsity:.1%} over the rewritten layers",
            (1, report.sparsity),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=KEPT,
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
    sparsity_axes.set(ylabel="weights that are zero", ylim=(0, 1.08))
    sparsity_axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    sparsity_axes.yaxis.set_major_formatter(PercentFormatter(1))

    kept = [layer.weights - layer.zeros for layer in layers]
    weights_axes.bar(positions, kept, color=[KEPT if layer.rewritten else DENSE for layer in layers], width=0.8)
    weights_axes.bar(positions, [layer.zeros for layer in layers], bottom=kept, color=colors, width=0.8)
    weights_axes.set(ylabel="weights")
    weights_axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    weights_axes.legend(
        handles=[_patch(KEPT, "kept"), _patch(ZERO, "zero"), _patch(DENSE, "left alone")],
        loc="upper center",
        bbox_to_anchor=(0.5, 1.16),
        ncols=3,
        frameon=False,
    )
    step = -(-len(layers) // MAX_LABELS) or 1
    weights_axes.set_xticks(positions[::step], [_label(layer) for layer in layers[::step]], rotation=90, fontsize=8)
    weights_axes.set_xlim(-0.7, len(layers) - 0.3)
    for axes in (sparsity_axes, weights_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _patch(color: str, label: str) -> object:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)


def _title(report: Report) -> str:
    kept = report.weights - report.zeros
    whole = f"{report.model_zeros:,} of {report.model_weights:,} parameters are zero ({report.model_sparsity:.1%})"
    return (
        f"{report.zeros:,} of {report.weights:,} weights of the rewritten layers are zero, {kept:,} are kept\n"
        f"whole model: {whole}"
    )


def _label(layer: LayerReport) -> str:
    return layer.name if len(layer.name) <= 28 else f"...{layer.name[-25:]}"
