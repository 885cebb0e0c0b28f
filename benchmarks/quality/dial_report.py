"""One training at several sparsities, beside trainings of their own: as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from iks_plugin.files import whole_file

from ..edsr import table
from .dial import DIAL, DialRow
from .networks import title_of
from .pictures import mark_sparsities, new_figure, save_figure
from .results import Measured, Row, read_rows


@dataclass(frozen=True)
class Dial:
    """What one setting of one network gives; each maps a sparsity to the PSNR of its seeds.

    Attributes:
        at_once: without further steps.
        further: with `more_steps` further steps.
        separate: trained for that sparsity, with the same seeds and settings.
    """

    network: str
    method: str
    trained_at: float
    lr: float
    ramp: float
    more_steps: int
    at_once: dict[float, list[float]]
    further: dict[float, list[float]]
    separate: dict[float, list[float]]


def dials(rows: Sequence[DialRow], table_rows: Sequence[Row]) -> list[Dial]:
    """The dials in `rows`, with the trainings of the table to compare with."""
    found = []
    for key in dict.fromkeys(_key(row) for row in rows):
        own = [row for row in rows if _key(row) == key]
        setting = key[:2] + key[3:]
        for more_steps in sorted({row.more_steps for row in own} - {0}):
            seeds = {row.seed for row in own if row.more_steps == more_steps}
            same = [row for row in own if row.seed in seeds]
            trained = [
                row
                for row in table_rows
                if (row.network, row.method, row.lr, row.ramp) == setting and row.seed in seeds
            ]
            at_once = _by_sparsity(row for row in same if row.more_steps == 0)
            further = _by_sparsity(row for row in same if row.more_steps == more_steps)
            found.append(Dial(*key, more_steps, at_once, further, _by_sparsity(trained)))
    return found


def _key(row: DialRow) -> tuple[str, str, float, float, float]:
    return row.network, row.method, row.trained_at, row.lr, row.ramp


def _by_sparsity(rows: Iterable[Measured]) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda row: row.sparsity):
        found.setdefault(row.sparsity, []).append(row.psnr)
    return found


def write_dial_report(out: Path, table_rows: Sequence[Row]) -> list[Path]:
    """Write dial.md and a picture for each dial, if there is any; return what was written."""
    found = dials(read_rows(out / DIAL, DialRow), table_rows)
    if not found:
        return []
    written = [out / "dial.md"]
    with whole_file(written[0]) as path:
        path.write_text(markdown(found), encoding="utf-8")
    for dial in found:
        method = "".join(letter if letter.isalnum() else "-" for letter in dial.method)
        settings = f"{method}_{dial.trained_at:g}_lr{dial.lr:g}_ramp{dial.ramp:g}_steps{dial.more_steps}"
        written.append(out / f"{dial.network}_dial_{settings}.png")
        plot(dial, written[-1])
    return written


def markdown(found: Sequence[Dial]) -> str:
    """A table for each dial, with a line for each sparsity."""
    return "\n\n".join(["# One training, dialled", *map(_section, found)]) + "\n"


def _section(dial: Dial) -> str:
    seeds = max(map(len, dial.at_once.values()))
    over = f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"
    rows = []
    for sparsity in sorted(dial.at_once):
        once, more, own = (part.get(sparsity) for part in (dial.at_once, dial.further, dial.separate))
        rows.append([f"{sparsity:g}", _value(once), _value(more), _value(own), _gap(once, own), _gap(more, own)])
    heads = [
        "sparsity",
        "dialled",
        f"+ {dial.more_steps} steps",
        "trained for it",
        "dialled - trained",
        f"+ {dial.more_steps} steps - trained",
    ]
    text = (
        f"## {title_of(dial.network)}, {dial.method} trained at {dial.trained_at:g}, lr {dial.lr:g}\n\n"
        f"Steps as in report.md (ramp {dial.ramp:g}), {over}; PSNR in dB, mean and standard deviation over seeds."
    )
    return f"{text}\n\n{table(heads, rows, markdown=True)}"


def _value(values: list[float] | None) -> str:
    if not values:
        return ""
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _gap(values: list[float] | None, others: list[float] | None) -> str:
    return f"{fmean(values) - fmean(others):+.2f}" if values and others else ""


def plot(dial: Dial, path: Path) -> None:
    """PSNR over sparsity, three lines."""
    figure, axes = new_figure()
    lines = {
        f"trained at {dial.trained_at:g}, dialled": dial.at_once,
        f"and {dial.more_steps} steps more": dial.further,
        "trained for it": dial.separate,
    }
    mark_sparsities(axes, {sparsity for values in lines.values() for sparsity in values})
    for label, values in lines.items():
        x = [1 - sparsity for sparsity in values]
        axes.plot(x, [fmean(value) for value in values.values()], marker="o", label=label)
    axes.set_ylabel("PSNR in dB (Y)")
    axes.set_title(title_of(dial.network))
    save_figure(figure, axes, path)
