"""The table in a CSV file: a row for each finished training, written at once; and what must not be mixed in it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from iks_plugin import IksError
from iks_plugin.files import whole_file

from .settings import BUDGET_FIELDS, CASE_FIELDS, Budget, Case

Record = TypeVar("Record", bound="Measured")


@dataclass(frozen=True)
class Measured:
    """What a finished training is and what came of it; the fields are the columns.

    The first ones are those of `Case` and of `Budget`.

    Attributes:
        weights: how many weights the target counts over.
        nonzeros: how many of them are not zero in the end.
        reached: the sparsity in the end, 1 - nonzeros / weights.
        psnr: mean over the test images in dB; NaN where the training diverged.
        ssim: mean over the test images.
        psnr_images, ssim_images: the same for each, "name=value;name=value".
        file_bytes: of the compact file, float32.
        seconds: of training and testing.
        note: what the method warned of.
    """

    network: str
    method: str
    sparsity: float
    seed: int
    lr: float
    ramp: float
    dense_steps: int
    steps: int
    batch: int
    patch: int
    dense_lr: float
    precision: str
    device: str
    data: str
    weights: int
    nonzeros: int
    reached: float
    psnr: float
    ssim: float
    psnr_images: str
    ssim_images: str
    file_bytes: int
    seconds: float
    threads: int
    torch: str
    iks_plugin: str
    note: str

    @property
    def case(self) -> Case:
        return Case(**{name: getattr(self, name) for name in CASE_FIELDS})

    @property
    def budget(self) -> Budget:
        return Budget(**{name: getattr(self, name) for name in BUDGET_FIELDS})


@dataclass(frozen=True)
class Row(Measured):
    """A row of the table of methods."""


def pairs(values: dict[str, float], digits: int) -> str:
    """A column that holds a value for each image."""
    return ";".join(f"{name}={value:.{digits}f}" for name, value in values.items())


def read_rows(path: Path, kind: type[Record], budget: Budget | None = None) -> list[Record]:
    """The rows of the file at `path`; none where there is no file.

    Raises:
        IksError: it has other columns, a value that does not fit its column, or (given a `budget`) rows of another one.
    """
    if not path.exists():
        return []
    columns = [field.name for field in fields(kind)]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != columns:
            missing = sorted(set(columns) - set(header))
            strange = sorted(set(header) - set(columns))
            raise IksError(
                f"{path} is not a table of this lab: expected the columns {', '.join(columns)}, got "
                f"{', '.join(header) or 'none'} (missing: {', '.join(missing) or 'none'}; unknown: "
                f"{', '.join(strange) or 'none'}). Choose another --out, or move the file away"
            )
        rows = [_parse(kind, columns, cells, f"{path}, line {reader.line_num}") for cells in reader]
    if budget is not None:
        for row in rows:
            refuse_other_budget(path, row, budget)
    return rows


def refuse_other_budget(path: Path, row: Measured, budget: Budget) -> None:
    """Raise unless `row` was made with `budget`: rows are compared with each other."""
    for name in BUDGET_FIELDS:
        expected, got = getattr(budget, name), getattr(row, name)
        if expected != got:
            raise IksError(
                f"{path} holds rows of another budget: expected {name} {expected}, got {got} ({row.case}). "
                "Rows of different budgets cannot be compared: choose another --out, or give the options of that run"
            )


def _parse(kind: type[Record], columns: list[str], cells: list[str], where: str) -> Record:
    if len(cells) != len(columns):
        raise IksError(f"{where}: expected {len(columns)} values, got {len(cells)}. Remove that line, and run again")
    values: dict[str, Any] = {}
    types = {field.name: field.type for field in fields(kind)}
    for name, cell in zip(columns, cells, strict=True):
        try:
            values[name] = {"int": int, "float": float, "str": str}[str(types[name])](cell)
        except ValueError:
            raise IksError(
                f"{where}: {name} expected a {types[name]}, got {cell!r}. Remove that line, and run again"
            ) from None
    return kind(**values)


def write_rows(path: Path, rows: Iterable[Measured], kind: type[Measured]) -> None:
    """Write all `rows` to `path`: the file is whole at any time, whatever happens to this process."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(kind)])
    for row in rows:
        writer.writerow([value if isinstance(value, str) else repr(value) for value in asdict(row).values()])
    with whole_file(path) as unfinished:
        unfinished.write_text(text.getvalue(), encoding="utf-8", newline="")
