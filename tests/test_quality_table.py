"""The quality lab's table: which rows, in which file, resumed after an interruption; its command line and report."""

from __future__ import annotations

import csv
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.quality import pictures, progress, report, workers
from benchmarks.quality.cli import main
from benchmarks.quality.dense import dense_path
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import GivenRows, Plan
from benchmarks.quality.results import Row, read_rows, write_rows
from benchmarks.quality.settings import Budget, Case
from benchmarks.quality.summary import best_other, dense_of, differences, summarise
from benchmarks.quality.table import locked
from iks_plugin import IksError
from quality_images import make_folder

ROOT = Path(__file__).parent.parent
TINY = ["--networks", "edsr-1x8-x2", "--dense-steps", "6", "--steps", "10", "--batch", "2", "--patch", "8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("lab") / "data")


def run(data: Path, out: Path, *more: str) -> int:
    return main(["run", "--data", str(data), "--out", str(out), *TINY, "--seeds", "0", "--lrs", "1e-3", *more])


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return sorted(
            ({key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)),
            key=lambda row: (row["method"], row["sparsity"], row["seed"], row["lr"]),
        )


def make_row(**changes: Any) -> Row:
    values = {field.name: {"int": 1, "float": 0.5, "str": "x"}[str(field.type)] for field in fields(Row)}
    budget = Budget(data="abc")
    return Row(**{**values, **asdict(budget), **asdict(Case("edsr-8x32-x2", "gmp", 0.9, 0, 1e-3, 0.6)), **changes})


# --- real tables ---


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that nothing has interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert run(data, out, "--methods", "dense", "gmp", "iks", "--sparsities", "0.5", "0.9") == 0
    return out


def test_rows_say_what_was_done_and_what_came_of_it(whole: Path) -> None:
    rows = read_rows(whole / "results.csv", Row)
    assert [(row.method, row.sparsity) for row in rows] == [
        ("dense", 0.0),
        ("gmp", 0.5),
        ("iks", 0.5),
        ("gmp", 0.9),
        ("iks", 0.9),
    ]
    for row in rows:
        assert row.weights == 4 * 8 * 8 * 9 + 8 * 32 * 9 - 8 * 8 * 9
        assert row.nonzeros == row.weights - round(row.sparsity * row.weights)
        assert row.reached == 1 - row.nonzeros / row.weights
        images = dict(pair.split("=") for pair in row.psnr_images.split(";"))
        assert list(images) == ["even", "odd"]
        assert row.psnr == pytest.approx(sum(map(float, images.values())) / 2, abs=1e-3)
        assert 0 < row.ssim <= 1
        assert row.torch == torch.__version__
        assert (row.dense_steps, row.steps, row.batch, row.patch, row.device) == (6, 10, 2, 8, "cpu")
    assert rows[3].file_bytes < rows[1].file_bytes < rows[0].file_bytes


def test_an_interrupted_table_goes_on_row_by_row(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--methods", "dense", "gmp", "iks", "--sparsities", "0.5", "0.9")
    steps_before: list[str] = []
    plain = progress.Progress.step

    def interrupted(self: progress.Progress, name: str, steps: int) -> None:
        steps_before.append(name)
        if len(steps_before) == 6 + 2 * 10 + 5:
            raise KeyboardInterrupt
        plain(self, name, steps)

    with monkeypatch.context() as patch:
        patch.setattr(progress.Progress, "step", interrupted)
        assert run(data, tmp_path, *arguments) == 130
    assert "finished rows are kept" in capsys.readouterr().err
    kept = (tmp_path / "results.csv").read_text()
    assert 1 <= len(table(tmp_path)) < 5
    trained: list[str] = []
    perform = workers.perform
    monkeypatch.setattr(workers, "perform", lambda job, *rest: (trained.append(str(job)), perform(job, *rest))[1])
    assert run(data, tmp_path, *arguments) == 0
    assert len(trained) == 5 - (kept.count("\n") - 1)
    assert (tmp_path / "results.csv").read_text().startswith(kept)
    assert table(tmp_path) == table(whole)
    trained.clear()
    assert run(data, tmp_path, *arguments) == 0
    assert trained == []


def test_redo_forgets_a_method_only(data: Path, whole: Path, tmp_path: Path) -> None:
    rows = read_rows(whole / "results.csv", Row)
    write_rows(tmp_path / "results.csv", [replace(row, psnr=1.0) for row in rows], Row)
    dense = next(whole.glob("dense/*.pt"))
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / dense.name).write_bytes(dense.read_bytes())
    assert run(data, tmp_path, "--methods", "dense", "gmp", "iks", "--sparsities", "0.5", "0.9", "--redo", "gmp") == 0
    assert {row.method for row in read_rows(tmp_path / "results.csv", Row) if row.psnr == 1.0} == {"dense", "iks"}


def test_redo_of_what_is_not_there(whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (whole / "results.csv").read_text()
    (tmp_path / "results.csv").write_text(text)
    assert run(data, tmp_path, "--methods", "gmp", "--sparsities", "0.5", "--redo", "gmp", "iks-without") == 1
    expected = f"--redo: expected methods that {tmp_path} has rows of (dense, gmp, iks), got iks-without"
    assert expected in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text() == text


def again(data: Path, out: Path, table: Path, *more: str) -> int:
    return main(["run", "--data", str(data), "--out", str(out), "--rows", str(table), *more])


def test_rows_of_another_table_are_made_again(data: Path, whole: Path, tmp_path: Path) -> None:
    rows = whole / "results.csv"
    assert again(data, tmp_path / "one", rows, "--sparsities", "0.9", "--methods", "gmp", "dense") == 0
    some = table(tmp_path / "one")
    assert [(row["method"], row["sparsity"]) for row in some] == [("dense", "0.0"), ("gmp", "0.9")]
    assert again(data, tmp_path / "one", rows) == 0
    assert table(tmp_path / "one") == table(whole)
    assert again(data, tmp_path / "longer", rows, "--methods", "dense", "--steps", "11") == 0
    assert [row["steps"] for row in table(tmp_path / "longer")] == ["11"]


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (None, (), "expected a results.csv of this lab, got a file without rows, or none"),
        (lambda text: text.splitlines()[0] + "\n", (), "got a file without rows, or none"),
        (lambda text: text.replace("psnr,", "loudness,", 1), (), "is not a table of this lab"),
        (str, ("--networks", "imdn-4x32-x2", "--lrs", "1"), "none of its 5 rows has the --networks, --lrs asked for"),
        (str, ("--sparsities", "90"), "--sparsities: expected numbers in"),
        (str, ("--preset", "small"), "leave out --preset, --quick and --full-grid"),
        (str, ("--full-grid",), "leave out --preset, --quick and --full-grid"),
        (
            lambda text: text.replace("x2,gmp", "x9,gmp", 1),
            (),
            "expected networks of edsr-8x32-x2, .*, got edsr-1x8-x9",
        ),
        (lambda text: text.replace(",gmp", ",magic", 1), (), "expected any of dense, .*, got 'magic'"),
        (
            lambda text: text.replace("float32", "bfloat16", 1),
            (),
            "rows of another budget: expected precision bfloat16, got float32",
        ),
    ],
)
def test_tables_whose_rows_cannot_be_made_again(
    data: Path,
    whole: Path,
    tmp_path: Path,
    spoil: Any,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = tmp_path / "rows.csv"
    if spoil:
        rows.write_text(spoil((whole / "results.csv").read_text()))
    assert again(data, tmp_path / "out", rows, *arguments) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_every_method_runs(data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, tmp_path, "--sparsities", "0.9", "--ramps", "0.5") == 0
    assert {row["method"] for row in table(tmp_path)} == set(METHODS) - {"iks-without"}
    shown = capsys.readouterr().out
    assert "iks - best other" in shown
    assert "# Quality at equal steps" in shown
    assert (tmp_path / "edsr-1x8-x2_psnr_over_size.png").stat().st_size > 1000
    # Other methods beside it change no row.
    assert [row["psnr"] for row in table(tmp_path) if row["method"] == "dense"] == [
        row["psnr"] for row in table(whole) if row["method"] == "dense"
    ]


def test_a_training_that_diverges_is_a_row_and_the_table_goes_on(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path, "--methods", "gmp", "--sparsities", "0.5", "--lrs", "1e30", "1e-3", "--full-grid") == 0
    broken, fine = sorted(read_rows(tmp_path / "results.csv", Row), key=lambda row: -row.lr)
    assert math.isnan(broken.psnr)
    assert "the loss is" in broken.note
    assert fine.psnr > 0
    assert [entry.rows[0].lr for entry in summarise([broken, fine])] == [1e-3]


def test_the_grid_is_tried_on_the_first_seed_only(data: Path, tmp_path: Path) -> None:
    more = ["--methods", "oneshot", "--sparsities", "0.5", "--lrs", "1e-4", "3e-3", "--seeds", "3", "4"]
    assert run(data, tmp_path, *more) == 0
    rows = read_rows(tmp_path / "results.csv", Row)
    first = {row.lr: row.psnr for row in rows if row.seed == 3}
    assert set(first) == {1e-4, 3e-3}
    assert [row.lr for row in rows if row.seed == 4] == [max(first, key=lambda lr: first[lr])]


@pytest.mark.parametrize("method", ["iks", "iks:law=exact;granularity=kernel", "iks:law=obs"])
def test_dial(data: Path, tmp_path: Path, method: str) -> None:
    arguments = ["dial", "--data", str(data), "--out", str(tmp_path), *TINY, "--seeds", "0", "--share", "0.3"]
    arguments += ["--method", method]
    assert main(arguments) == 0
    with (tmp_path / "dial.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sparsity"], row["more_steps"]) for row in rows] == [
        ("0.9", "0"),
        ("0.8", "0"),
        ("0.8", "3"),
        ("0.95", "0"),
        ("0.95", "3"),
    ]
    for row in rows:
        weights = int(row["weights"])
        assert int(row["nonzeros"]) == weights - round(float(row["sparsity"]) * weights)
    separate = {row["sparsity"]: row for row in table(tmp_path) if row["method"] == method}
    assert set(separate) == {"0.8", "0.9", "0.95"}
    assert separate["0.9"]["psnr"] == rows[0]["psnr"]
    text = (tmp_path / "dial.md").read_text()
    assert f"{method} trained at 0.9" in text
    assert text.count("+0.00") == 1  # at 0.9 itself
    assert "+ 3 steps" in text
    before = (tmp_path / "dial.csv").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "dial.csv").read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_and_they_make_the_same_rows(data: Path, whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "quality"), "run", "--data", str(data), "--out", str(tmp_path)]
    command += [
        *TINY,
        "--seeds",
        "0",
        "--lrs",
        "1e-3",
        "--methods",
        "dense",
        "gmp",
        "iks",
        "--sparsities",
        "0.5",
        "0.9",
    ]
    command += ["--jobs", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "results.csv").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "finished rows are kept" in errors
    assert 1 <= len(table(tmp_path)) < 5
    assert subprocess.run(command, capture_output=True, timeout=200).returncode == 0
    assert table(tmp_path) == table(whole)


def test_a_worker_that_dies(tmp_path: Path) -> None:
    class Executor:
        def submit(self, *_: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool())
            return future

    class NoSteps:
        def empty(self) -> bool:
            return True

    place = workers.Place("data", tmp_path, Budget())
    pool = workers.Pool(Executor(), place, None, 2, NoSteps())  # type: ignore[arg-type]
    pool.submit(workers.DenseJob("edsr-8x32-x2", 3))
    with pytest.raises(IksError, match="a worker died during edsr-8x32-x2 dense start seed 3.*Finished rows are kept"):
        pool.wait()


def test_a_damaged_dense_network(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, tmp_path, "--methods", "dense") == 0
    path = next(tmp_path.glob("dense/*.pt"))
    path.write_bytes(path.read_bytes()[:100])
    assert run(data, tmp_path, "--methods", "oneshot", "--sparsities", "0.5") == 1
    assert f"{path} is no dense network" in capsys.readouterr().err


# --- which rows ---


PLAN = Plan(("edsr-8x32-x2",), ("dense", "oneshot", "gmp"), (0.8, 0.9), (0, 1), (1e-4, 1e-3), (0.3, 0.6))


def test_plan_of_the_first_seed_is_the_grid() -> None:
    cases = PLAN.cases({})
    assert len(cases) == 2 + 2 * (2 + 4)
    assert {case.seed for case in cases} == {0}
    assert {case.sparsity for case in cases if case.method == "dense"} == {0.0}
    assert {case.ramp for case in cases if case.method == "gmp"} == {0.3, 0.6}
    assert {case.ramp for case in cases if case.method == "oneshot"} == {0.0}


def test_plan_of_other_seeds_is_the_best_cell_once_all_are_tried() -> None:
    first = PLAN.cases({})
    psnr = {case: 30 + case.lr * 1e3 + case.ramp for case in first}
    del psnr[Case("edsr-8x32-x2", "gmp", 0.8, 0, 1e-4, 0.3)]
    psnr[Case("edsr-8x32-x2", "gmp", 0.9, 0, 1e-3, 0.6)] = float("nan")
    second = [case for case in PLAN.cases(psnr) if case.seed == 1]
    assert [(case.method, case.sparsity, case.lr, case.ramp) for case in second] == [
        ("dense", 0.0, 1e-3, 0.0),
        ("oneshot", 0.8, 1e-3, 0.0),
        ("oneshot", 0.9, 1e-3, 0.0),
        ("gmp", 0.9, 1e-3, 0.3),
    ]
    psnr[Case("edsr-8x32-x2", "gmp", 0.8, 0, 1e-4, 0.3)] = 99.0
    assert Case("edsr-8x32-x2", "gmp", 0.8, 1, 1e-4, 0.3) in PLAN.cases(psnr)
    assert PLAN.size() == {("edsr-8x32-x2", 0): 14, ("edsr-8x32-x2", 1): 5}
    assert len(PLAN.cases(psnr)) == 14 + 5


def test_plan_of_a_full_grid() -> None:
    plan = replace(PLAN, tune=False)
    assert plan.size() == {("edsr-8x32-x2", 0): 14, ("edsr-8x32-x2", 1): 14}
    assert len(plan.cases({})) == 2 * 14


def test_plan_of_given_rows_asks_for_their_dense_networks_alone() -> None:
    cases = (Case("edsr-8x32-x2", "gmp", 0.9, 2, 1e-3, 0.6), Case("imdn-4x32-x2", "dense", 0.0, 0, 1e-3, 0.0))
    plan = GivenRows((*cases, replace(cases[0], lr=2e-3)))
    assert plan.networks == ("edsr-8x32-x2", "imdn-4x32-x2")
    assert plan.size() == {("edsr-8x32-x2", 2): 2, ("imdn-4x32-x2", 0): 1}
    assert plan.cases({cases[0]: 36.0}) == [*cases, replace(cases[0], lr=2e-3)]


def test_dense_networks_are_kept_by_what_they_depend_on(tmp_path: Path) -> None:
    usual = Budget(data="abc")
    path = dense_path(tmp_path, "edsr-8x32-x2", 0, usual)
    assert dense_path(tmp_path, "edsr-8x32-x2", 0, replace(usual, steps=7)) == path
    for other in (replace(usual, dense_steps=7), replace(usual, data="xyz"), replace(usual, device="cuda")):
        assert dense_path(tmp_path, "edsr-8x32-x2", 0, other) != path
    assert dense_path(tmp_path, "edsr-8x32-x2", 1, usual) != path


# --- the file ---


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [make_row(note='of "two", lines', psnr=float("inf")), make_row(seed=1, lr=1 / 3)]
    write_rows(tmp_path / "results.csv", rows, Row)
    assert read_rows(tmp_path / "results.csv", Row) == rows
    assert read_rows(tmp_path / "none.csv", Row) == []


@pytest.mark.parametrize("change", [{"steps": 7}, {"data": "xyz"}, {"device": "cuda"}, {"dense_lr": 0.5}])
def test_rows_of_another_budget_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_rows(tmp_path / "results.csv", [make_row(), make_row(seed=1, **change)], Row)
    name, value = next(iter(change.items()))
    with pytest.raises(IksError, match=f"rows of another budget: expected {name} .*, got {value} .*another --out"):
        read_rows(tmp_path / "results.csv", Row, Budget(data="abc"))


def _cut_line(text: str) -> str:
    return text[:-20]


def _no_number(text: str) -> str:
    return text.replace(",0.6,", ",often,")


def _other_columns(text: str) -> str:
    return text.replace("psnr,", "loudness,", 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut_line, r"line 2: expected \d+ values, got \d+. Remove that line"),
        (_no_number, r"line 2: ramp expected a float, got 'often'"),
        (_other_columns, r"is not a table of this lab.*missing: psnr; unknown: loudness"),
        (lambda text: "", r"is not a table of this lab: .*got none"),
    ],
)
def test_files_that_do_not_do(tmp_path: Path, spoil: Any, message: str) -> None:
    path = tmp_path / "results.csv"
    write_rows(path, [make_row()], Row)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(IksError, match=message):
        read_rows(path, Row)


def test_two_runs_cannot_write_to_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with locked(tmp_path / "results.csv"):
        with pytest.raises(IksError, match="another run is writing to .*results.csv"), locked(tmp_path / "results.csv"):
            pass
        with locked(tmp_path / "dial.csv"):
            pass
    with locked(tmp_path / "results.csv"):
        pass


# --- the summary ---


def test_summary_takes_the_best_setting_of_those_with_most_seeds() -> None:
    rows = [make_row(seed=seed, lr=1e-3, psnr=30.0 + seed) for seed in (0, 1, 2)]
    rows += [make_row(seed=seed, lr=1e-4, psnr=29.0) for seed in (0, 1, 2)]
    rows += [make_row(seed=0, lr=1e-2, psnr=50.0)]
    rows += [make_row(method="iks", psnr=40.0), make_row(method="iks:interval=5", psnr=41.0)]
    rows += [make_row(method="oneshot", psnr=float("nan")), make_row(method="dense", sparsity=0.0, psnr=35.0)]
    entries = summarise(rows)
    assert [entry.method for entry in entries] == ["dense", "oneshot", "gmp", "iks", "iks:interval=5"]
    gmp = entries[2]
    setting = "lr 0.001, ramp 0.6; lr 0.01, ramp 0.6 better on fewer seeds"
    assert (gmp.mean, gmp.spread, gmp.setting, len(gmp.rows)) == (31.0, 1.0, setting, 3)
    assert set(gmp.tried) == {(1e-4, 0.6), (1e-3, 0.6), (1e-2, 0.6)}
    assert summarise(rows[:6])[0].setting == "lr 0.001 (highest tried), ramp 0.6"
    assert entries[3].setting == "lr 0.001 (only one tried), ramp 0.6"
    assert math.isnan(entries[3].spread)
    dense = dense_of(entries, "edsr-8x32-x2")
    assert dense is not None and dense.mean == 35.0
    assert all(best_other(entries, ours) is gmp for ours in entries[3:])
    assert best_other(entries, replace(entries[3], sparsity=0.5)) is None
    assert differences(gmp, dense) == (-5.0, pytest.approx(math.nan, nan_ok=True))
    shifted = replace(gmp, rows=tuple(replace(row, psnr=row.psnr + 0.25) for row in gmp.rows))
    assert differences(shifted, gmp) == (0.25, 0.0)


def test_the_best_other_method_is_not_the_one_with_an_easy_seed_alone() -> None:
    rows = [make_row(method="iks", seed=seed, psnr=psnr) for seed, psnr in enumerate((36.0, 34.0))]
    rows += [make_row(method="gmp", seed=seed, psnr=psnr) for seed, psnr in enumerate((35.875, 33.875))]
    rows += [make_row(method="str", psnr=35.75), make_row(method="oneshot", psnr=math.nan)]
    entries = summarise(rows)
    other = best_other(entries, next(entry for entry in entries if entry.method == "iks"))
    assert other is not None and other.method == "gmp"
    assert "(0.9): +0.125 dB" in report.overview(entries, "edsr-8x32-x2")


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data nowhere does not exist: expected a folder with RealSR_GT"),
        (["--data", __file__], "is a file: expected a folder"),
        ([], "--data is missing: expected a folder with RealSR_GT"),
        (["--methods", "magic"], "--methods: expected any of dense"),
        (["--sparsities", "90"], "--sparsities: expected numbers in (0, 1), such as 0.9, got 90"),
        (["--ramps", "0"], "--ramps: expected shares of the steps in (0, 1], such as 0.6, got 0"),
        (["--lrs", "-1"], "--lrs: expected positive numbers"),
        (["--seeds", "-1"], "--seeds: expected whole numbers from 0, got -1"),
        (["--device", "cuda"], "torch finds no GPU here"),
    ],
)
def test_wrong_options(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", "--out", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "95"], "--at and --to: expected numbers in (0, 1), got 95"),
        (["--at", "0"], "--at and --to: expected numbers in (0, 1), got 0"),
        (["--method", "gmp"], "--method: expected iks, with options of sparsify or without, got 'gmp'"),
        (["--method", "iks-paper"], "--method: expected iks"),
        (["--share", "0"], "--share: expected a positive number"),
    ],
)
def test_wrong_options_of_dial(
    data: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dial", "--data", str(data), "--out", str(tmp_path / "out"), *TINY, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pictures_without_matplotlib(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.csv").write_bytes((whole / "results.csv").read_bytes())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", "--out", str(tmp_path)]) == 1
    assert "the pictures need matplotlib" in capsys.readouterr().err
    assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("psnrs", "shown", "label"),
    [
        ([36.0, 34.0], (33.9, 36.1), "(Y)"),  # with 5 % of what is between them
        ([36.0, 34.0, 31.9], (33.9, 36.1), "(Y), the lowest left out"),  # more than 4 dB below the best
        ([36.0, 13.0], (35.95, 36.05), "(Y), the lowest left out"),
    ],
)
def test_a_training_that_broke_does_not_flatten_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, psnrs: list[float], shown: tuple[float, float], label: str
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, axes, path: drawn.append(axes))
    methods = ("gmp", "iks", "str")
    entries = summarise(make_row(method=method, psnr=psnr) for method, psnr in zip(methods, psnrs, strict=False))
    pictures.plot(entries, "edsr-8x32-x2", "sparsity", tmp_path / "picture.png")
    assert drawn[0].get_ylim() == pytest.approx(shown)
    assert drawn[0].get_ylabel() == f"PSNR in dB {label}"


def test_sparsities_are_as_far_apart_as_the_weights_that_stay_are_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, axes, path: drawn.append(axes))
    entries = summarise(make_row(sparsity=sparsity, psnr=36.0) for sparsity in (0.0, 0.5, 0.75, 0.875))
    pictures.plot(entries, "edsr-8x32-x2", "sparsity", tmp_path / "picture.png")
    axes = drawn[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["50 %", "75 %", "87.5 %"]
    places = axes.transData.transform([(place, 36.0) for place in axes.get_xticks()])[:, 0]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1]) and places[0] < places[1]


def test_a_table_of_dense_networks_alone_has_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entries = summarise([make_row(method="dense", sparsity=0.0, psnr=36.0)])
    assert all(path.stat().st_size > 1000 for path in pictures.plot_all(entries, tmp_path))


def test_a_method_has_the_same_colour_in_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, axes, path: drawn.append(axes))
    for methods in (("oneshot", "gmp", "iks", "iks:law=exact"), ("gmp", "iks:law=exact", "iks")):
        entries = summarise(make_row(method=method, psnr=36.0) for method in methods)
        pictures.plot(entries, "edsr-8x32-x2", "size", tmp_path / "picture.png")
    looks = [
        {line.get_label(): (line.lines[0].get_color(), line.lines[0].get_linestyle()) for line in axes.containers}
        for axes in drawn
    ]
    assert looks[1] == {method: looks[0][method] for method in looks[1]}
    assert len(set(looks[0].values())) == 4


def test_the_mean_over_high_sparsities_names_those_that_both_have() -> None:
    rows = [make_row(sparsity=sparsity, psnr=35.0) for sparsity in (0.8, 0.9, 0.95, 0.99)]
    rows += [
        make_row(method="iks", sparsity=sparsity, psnr=psnr)
        for sparsity, psnr in ((0.8, 37.0), (0.9, 35.5), (0.95, 36.0))
    ]
    shown = report.overview(summarise(rows), "edsr-8x32-x2")
    assert "iks - best other, mean over sparsities of 0.9 and above (0.9, 0.95): +0.750 dB" in shown


def test_values_of_fewer_seeds_are_marked() -> None:
    rows = [make_row(seed=seed, psnr=35.0 + seed) for seed in range(3)]
    rows += [make_row(sparsity=0.95, seed=seed, psnr=34.0 + seed) for seed in range(2)]
    rows += [make_row(sparsity=0.99, psnr=33.0)]
    cases = [
        (rows, "Of 3 seeds, or as many as stand in brackets; of one where there is no ±."),
        (rows[:5], "Of 3 seeds, or as many as stand in brackets."),
        (rows[:3], "Of 3 seeds."),
        (rows[:1], "One seed."),
    ]
    for chosen, note in cases:
        assert note in report.overview(summarise(chosen), "edsr-8x32-x2").splitlines()
    cells = report.overview(summarise(rows), "edsr-8x32-x2").splitlines()[2].split("|")
    assert [cell.strip() for cell in cells] == ["", "gmp", "36.00 ± 1.00", "34.50 ± 0.71 (2)", "33.00", ""]


def test_the_learning_rates_that_were_tried() -> None:
    rows = [make_row(lr=lr, seed=seed, psnr=30 + lr) for lr in (2e-3, 5e-4) for seed in (0, 1)]
    rows += [make_row(lr=4e-3, psnr=36.0), make_row(method="iks", sparsity=0.95)]
    rows += [make_row(method="dense", sparsity=0.0), make_row(network="imdn-4x32-x2", sparsity=0.5)]
    shown = report.learning_rates(summarise(rows), "edsr-8x32-x2").splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown[:1] + shown[2:]] == [
        ["rate x 1000", "0.9", "0.95"],
        ["dense", "**1**", "**1**"],
        ["gmp", "0.5, **2**, 4", ""],
        ["iks", "", "**1**"],
    ]


def test_all_networks_at_a_glance() -> None:
    rows = [make_row(method="dense", sparsity=0.0, psnr=36.0)]
    rows += [make_row(psnr=35.0), make_row(method="oneshot", psnr=35.25), make_row(method="iks", psnr=35.5)]
    rows += [replace(row, network="imdn-4x32-x2", sparsity=0.95) for row in rows if row.method in ("gmp", "iks")]
    lines = report.all_networks(summarise(rows)).splitlines()
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert shown[0] == ["iks - dense", "0.9", "0.95"]
    assert shown[2:4] == [["EDSR 8 x 32, x2", "-0.50", ""], ["IMDN 4 x 32, x2", "", ""]]
    assert shown[5] == ["iks - best other", "0.9", "0.95"]
    assert shown[7:9] == [["EDSR 8 x 32, x2", "+0.25 (oneshot)", ""], ["IMDN 4 x 32, x2", "", "+0.50 (gmp)"]]


def test_wrong_counts_are_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--out", "x", "--steps", "0"])
    assert "expected a whole number of at least 1, got 0" in capsys.readouterr().err


def test_another_budget_for_the_same_folder(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.csv").write_bytes((whole / "results.csv").read_bytes())
    assert run(data, tmp_path, "--steps", "11", "--methods", "gmp") == 1
    assert "rows of another budget: expected steps 11, got 10" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


def test_a_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--out", str(tmp_path)]) == 1
    assert "has no rows yet" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*METHODS, "edsr-16x64-x2", "small", "full"))


@pytest.mark.parametrize("how", [["-m", "benchmarks.quality"], [str(ROOT / "benchmarks" / "quality")]])
def test_it_starts_as_a_module_and_as_a_folder(how: list[str]) -> None:
    done = subprocess.run([sys.executable, *how, "run", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--sparsities" in done.stdout


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
