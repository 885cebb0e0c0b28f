"""What docs/quality.md shows is what its rows say: reports are those of their CSVs, tables those of the reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.quality import dial_report
from benchmarks.quality.dial import DialRow
from benchmarks.quality.report import markdown
from benchmarks.quality.results import Row, read_rows
from benchmarks.quality.summary import summarise

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("report", sorted((DOCS / "quality").rglob("report.md")), ids=lambda path: path.parent.name)
def test_a_report_is_that_of_its_rows(report: Path) -> None:
    rows = read_rows(report.parent / "results.csv", Row)
    assert report.read_text(encoding="utf-8") == markdown(rows, summarise(rows))


def test_the_dials_report_is_that_of_its_rows() -> None:
    folder = DOCS / "quality"
    found = dial_report.dials(read_rows(folder / "dial.csv", DialRow), read_rows(folder / "results.csv", Row))
    assert (folder / "dial.md").read_text(encoding="utf-8") == dial_report.markdown(found)


def test_tables_said_to_be_the_reports_are() -> None:
    text = (DOCS / "quality.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- as in (\S+) -->\n((?:\|.*\n)+)", text)
    assert len(tables) == text.count("<!-- as in ") > 7
    for report, table in tables:
        assert table in (DOCS / report).read_text(encoding="utf-8"), f"not in {report}:\n{table}"
