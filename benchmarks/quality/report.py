"""The table as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from iks_plugin import IksError
from iks_plugin.files import whole_file

from ..edsr import table
from .dial_report import write_dial_report
from .networks import title_of
from .pictures import plot_all
from .results import Row, read_rows
from .summary import OURS, Entry, best_other, dense_of, differences, is_ours, sparse_methods, summarise
from .table import RESULTS

HIGH = 0.9
"""From here on a sparsity counts as high."""


def write_report(out: Path) -> list[Path]:
    """Write report.md and two pictures for each network beside the results in `out`; return what was written.

    Raises:
        IksError: there are no results, or matplotlib is missing (report.md is written by then).
    """
    rows = read_rows(out / RESULTS, Row)
    if not rows:
        raise IksError(f"{out / RESULTS} has no rows yet: run a table first, with --out {out}")
    entries = summarise(rows)
    written = [out / "report.md"]
    with whole_file(written[0]) as path:
        path.write_text(markdown(rows, entries), encoding="utf-8")
    return written + plot_all(entries, out) + write_dial_report(out, rows)


def markdown(rows: Sequence[Row], entries: Sequence[Entry]) -> str:
    """The whole report."""
    first = rows[0]
    torches = ", ".join(sorted({row.torch for row in rows}))
    lines = [
        "# Quality at equal steps",
        "",
        f"Dense networks of {first.dense_steps:,} steps (Adam, {first.dense_lr:g}, cosine), then {first.steps:,} more "
        f"steps for every method, on batches of {first.batch} crops of {first.patch} x {first.patch}. Images "
        f"{first.data}, {first.device}, {first.precision}, torch {torches}. PSNR in dB and SSIM of the Y channel, mean "
        "over the test images, borders of the scale's width cut off; mean and standard deviation over seeds, of "
        "differences those of the same seed. Every method is at the best of the settings that were tried.",
    ]
    networks = list(dict.fromkeys(entry.network for entry in entries))
    if len(networks) > 1 and any(entry.method == OURS for entry in entries):
        lines += ["", "## All networks", "", all_networks(entries)]
    for network in networks:
        lines += ["", f"## {title_of(network)}"]
        for part in (overview, learning_rates, details):
            lines += ["", part(entries, network)]
    return "\n".join(lines) + "\n"


def all_networks(entries: Sequence[Entry]) -> str:
    """Networks by sparsities: what our default gains over the dense network, and over the best other method."""
    ours = {(entry.network, entry.sparsity): entry for entry in entries if entry.method == OURS}
    networks = list(dict.fromkeys(network for network, _ in ours))
    sparsities = sorted({sparsity for _, sparsity in ours})
    heads = [f"{sparsity:g}" for sparsity in sparsities]

    def to_dense(network: str, sparsity: float) -> str:
        return _gain(ours.get((network, sparsity)), dense_of(entries, network))

    def to_best_other(network: str, sparsity: float) -> str:
        return _lead(ours.get((network, sparsity)), entries)

    return "\n\n".join(
        table([name, *heads], [[title_of(n), *(gain(n, s) for s in sparsities)] for n in networks], markdown=True)
        for name, gain in ((f"{OURS} - dense", to_dense), (f"{OURS} - best other", to_best_other))
    )


def overview(entries: Sequence[Entry], network: str) -> str:
    """Methods by sparsities: PSNR, and what ours gains over the best other one."""
    own = [entry for entry in entries if entry.network == network]
    sparsities = sorted({entry.sparsity for entry in own if entry.sparsity})
    methods = sparse_methods(own)
    by_place = {(entry.method, entry.sparsity): entry for entry in own}
    dense = dense_of(entries, network)
    most = max(len(entry.rows) for entry in own)
    rows: list[list[str]] = []
    if dense is not None:
        rows.append(["dense", *[_value(dense, most)] * len(sparsities)])
    for method in methods:
        rows.append([method, *(_value(by_place.get((method, sparsity)), most) for sparsity in sparsities)])
    notes = [_seeds(own, most)]
    for method in filter(is_ours, methods):
        ours = {sparsity: by_place.get((method, sparsity)) for sparsity in sparsities}
        if dense is not None:
            rows.append([f"{method} - dense", *(_gain(ours[s], dense) for s in sparsities)])
        rows.append([f"{method} - best other", *(_lead(ours[s], own) for s in sparsities)])
        pairs = {s: (entry, best_other(own, entry)) for s, entry in ours.items() if entry and s >= HIGH}
        gaps = {s: differences(entry, other)[0] for s, (entry, other) in pairs.items() if other}
        if gaps:
            high = ", ".join(f"{s:g}" for s in gaps)
            notes.append(
                f"{method} - best other, mean over sparsities of {HIGH:g} and above ({high}): "
                f"{fmean(gaps.values()):+.3f} dB"
            )
    text = table(["sparsity", *(f"{sparsity:g}" for sparsity in sparsities)], rows, markdown=True)
    return "\n\n".join([text, *notes])


def learning_rates(entries: Sequence[Entry], network: str) -> str:
    """Methods by sparsities: the learning rates that were tried, in thousandths, the chosen one in bold."""
    own = {(entry.method, entry.sparsity): entry for entry in entries if entry.network == network}
    sparsities = sorted({sparsity for _, sparsity in own if sparsity})
    rows = []
    if dense := dense_of(entries, network):
        rows.append(["dense", *[_rates(dense)] * len(sparsities)])
    for method in sparse_methods(own.values()):
        rows.append([method, *(_rates(own.get((method, sparsity))) for sparsity in sparsities)])
    return table(["rate x 1000", *(f"{sparsity:g}" for sparsity in sparsities)], rows, markdown=True)


def details(entries: Sequence[Entry], network: str) -> str:
    """A line for each entry."""
    dense = dense_of(entries, network)
    rows = [
        [
            entry.method,
            f"{entry.sparsity:g}",
            _value(entry),
            _gain(entry, dense) if entry.sparsity else "",
            f"{entry.ssim:.4f}",
            f"{entry.reached:.4%}",
            f"{entry.bytes:,.0f}",
            str(len(entry.rows)),
            f"{entry.setting}; of {len(entry.tried)}",
        ]
        for entry in entries
        if entry.network == network
    ]
    heads = ["method", "sparsity", "PSNR", "to dense", "SSIM", "zeros", "file bytes", "seeds", "best setting"]
    return table(heads, rows, markdown=True)


def _seeds(entries: Sequence[Entry], most: int) -> str:
    counts = {len(entry.rows) for entry in entries}
    if most == 1:
        return "One seed."
    fewer = ", or as many as stand in brackets" if counts - {1, most} else ""
    return f"Of {most} seeds{fewer}" + ("; of one where there is no ±." if 1 in counts else ".")


def _value(entry: Entry | None, most: int = 0) -> str:
    """PSNR and spread, and of how many seeds if of more than one but fewer than `most`."""
    if entry is None:
        return ""
    if math.isnan(entry.spread):
        return f"{entry.mean:.2f}"
    return f"{entry.mean:.2f} ± {entry.spread:.2f}" + (f" ({len(entry.rows)})" if len(entry.rows) < most else "")


def _rates(entry: Entry | None) -> str:
    if entry is None:
        return ""
    rates = sorted({lr for lr, _ in entry.tried})
    return ", ".join(f"**{1000 * lr:g}**" if lr == entry.rows[0].lr else f"{1000 * lr:g}" for lr in rates)


def _gain(entry: Entry | None, other: Entry | None) -> str:
    if entry is None or other is None:
        return ""
    mean, spread = differences(entry, other)
    return f"{mean:+.2f}" if math.isnan(spread) else f"{mean:+.2f} ± {spread:.2f}"


def _lead(ours: Entry | None, entries: Sequence[Entry]) -> str:
    """What `ours` gains over the best other method, and which that is."""
    other = best_other(entries, ours) if ours else None
    return f"{_gain(ours, other)} ({other.method})" if other else ""
