"""The command line of the lab."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from iks_plugin import IksError

from . import __doc__ as about
from .data import check_folder, fingerprint
from .dial import DIAL, DialJob, DialRow, make_dial
from .methods import METHODS, make_method
from .methods.iks import IKS
from .networks import NETWORKS
from .plan import GivenRows, Plan
from .presets import PRESETS
from .report import write_report
from .results import Measured, Row, read_rows, refuse_other_budget, write_rows
from .settings import CASE_FIELDS, Budget, Case
from .summary import OURS, summarise
from .table import RESULTS, locked, make_table
from .workers import Place


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 where all went well, 1 after an error that it has told, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    act: Callable[[argparse.Namespace], None] = options.act
    try:
        act(options)
    except IksError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: finished rows are kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=about, formatter_class=form)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="make or continue a table, and report", description=about, formatter_class=form
    )
    run.set_defaults(act=_run)
    _add_place(run)
    _add_plan(run)
    dial = commands.add_parser(
        "dial",
        help="one training of ours, dialled, beside trainings of their own",
        description=about,
        formatter_class=form,
    )
    dial.set_defaults(act=_dial)
    _add_place(dial)
    _add_dial(dial)
    report = commands.add_parser("report", help="write report.md and pictures from the rows that there are")
    report.set_defaults(act=_report)
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    listing = commands.add_parser("list", help="networks, methods with their options, presets")
    listing.set_defaults(act=_list)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    usual = Budget()
    parser.add_argument("--data", metavar="DIR", help="folder of the images, see above")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results and dense networks")
    parser.add_argument("--preset", choices=list(PRESETS), help="what the options below are if left out (small)")
    parser.add_argument("--quick", action="store_true", help="the same as --preset quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--jobs", type=_count, default=1, help="trainings at a time, each on one thread (%(default)s)")
    budget = parser.add_argument_group("budget, the same for every row of a folder")
    budget.add_argument("--dense-steps", type=_count, help=f"of the dense start ({usual.dense_steps})")
    budget.add_argument("--steps", type=_count, help=f"of every method after that ({usual.steps})")
    budget.add_argument("--batch", type=_count, help=f"crops per step ({usual.batch})")
    budget.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help=f"of training; bfloat16 is 1.5 to 2 times faster where the processor has it ({usual.precision})",
    )
    budget.add_argument("--patch", type=_count, help=f"side of the small crops in pixels ({usual.patch})")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    plan = parser.add_argument_group("rows")
    plan.add_argument("--networks", nargs="+", choices=list(NETWORKS), metavar="NAME", help=f"{', '.join(NETWORKS)}")
    plan.add_argument("--methods", nargs="+", metavar="NAME", help=f"{', '.join(METHODS)}; options: 'gmp:interval=5'")
    plan.add_argument("--sparsities", nargs="+", type=float, metavar="S", help="in (0, 1)")
    plan.add_argument("--seeds", nargs="+", type=int, metavar="N")
    plan.add_argument("--lrs", nargs="+", type=float, metavar="LR", help="grid: learning rates of the sparse phase")
    plan.add_argument("--ramps", nargs="+", type=float, metavar="R", help="grid: lengths of the ramp, in (0, 1]")
    plan.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="make again what is in a results.csv, with its budget where none is given; the options above choose there",
    )
    plan.add_argument("--full-grid", action="store_true", help="whole grid for every seed, not the first one's best")
    plan.add_argument(
        "--redo", nargs="+", default=[], metavar="METHOD", help="forget the rows of these methods first (once)"
    )


def _add_dial(parser: argparse.ArgumentParser) -> None:
    dial = parser.add_argument_group("dial")
    dial.add_argument("--networks", nargs="+", choices=list(NETWORKS), metavar="NAME", help=f"{', '.join(NETWORKS)}")
    dial.add_argument("--method", default=OURS, metavar="NAME", help="%(default)s, or with options: 'iks:interval=5'")
    dial.add_argument("--seeds", nargs="+", type=int, metavar="N")
    dial.add_argument("--at", type=float, default=0.9, metavar="S", help="the sparsity to train at (%(default)s)")
    dial.add_argument("--to", nargs="+", type=float, default=[0.8, 0.95], metavar="S", help="those to dial (0.8 0.95)")
    dial.add_argument("--share", type=float, default=0.1, help="further steps, of those of the training (%(default)s)")
    dial.add_argument("--lr", type=float, help="of all trainings (default: the best in the table, or 1e-3)")
    dial.add_argument("--ramp", type=float, help="of all trainings (default: the best in the table, or 0.6)")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


GRID = dict(zip(("networks", "methods", "sparsities", "seeds", "lrs", "ramps"), CASE_FIELDS, strict=True))
"""Options that say which rows, and the field of a case that each is about."""


def _place_and_plan(options: argparse.Namespace) -> tuple[Place, Plan]:
    """All that the options name, or else the preset."""
    preset = PRESETS["quick" if options.quick else options.preset or "small"]
    plan = replace(preset.plan, **_grid(options), tune=not getattr(options, "full_grid", False))
    return _place(options, preset.budget), plan


def _place_and_given_rows(options: argparse.Namespace) -> tuple[Place, GivenRows]:
    """Those rows of another table that fit the options."""
    if options.preset or options.quick or options.full_grid:
        raise IksError("--rows says which rows to make: leave out --preset, --quick and --full-grid")
    rows = read_rows(options.rows, Row)
    if not rows:
        raise IksError(f"--rows {options.rows}: expected a results.csv of this lab, got a file without rows, or none")
    for row in rows:
        refuse_other_budget(options.rows, row, rows[0].budget)
    grid = _grid(options)
    cases = [row.case for row in rows if all(_fits(row.case, name, values) for name, values in grid.items())]
    if not cases:
        raise IksError(f"--rows {options.rows}: none of its {len(rows)} rows has the --{', --'.join(grid)} asked for")
    for case in cases:
        make_method(case.method)
        if case.network not in NETWORKS:
            raise IksError(f"--rows {options.rows}: expected networks of {', '.join(NETWORKS)}, got {case.network}")
    return _place(options, asdict(rows[0].budget)), GivenRows(tuple(cases))


def _fits(case: Case, option: str, values: Sequence[Any]) -> bool:
    """Whether a case has one of the values of an option, or none at all: a dense network no sparsity, some no ramp."""
    value = getattr(case, GRID[option])
    return value in values or (option in ("sparsities", "ramps") and value == 0)


def _grid(options: argparse.Namespace) -> dict[str, tuple[Any, ...]]:
    """The options of `GRID` that are given, checked."""
    grid = {name: tuple(getattr(options, name)) for name in GRID if getattr(options, name, None)}
    for method in grid.get("methods", ()):
        make_method(method)
    checks: dict[str, tuple[Callable[[float], bool], str]] = {
        "sparsities": (lambda value: 0 < value < 1, "numbers in (0, 1), such as 0.9"),
        "ramps": (lambda value: 0 < value <= 1, "shares of the steps in (0, 1], such as 0.6"),
        "lrs": (lambda value: value > 0, "positive numbers, such as 5e-4"),
        "seeds": (lambda value: value >= 0, "whole numbers from 0"),
    }
    for name, check in checks.items():
        _check_range(f"--{name}", grid.get(name, ()), *check)
    return grid


def _place(options: argparse.Namespace, usual: Mapping[str, Any]) -> Place:
    """Where, and with which budget: as given, or else `usual`."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise IksError("--device cuda: torch finds no GPU here. Leave it out to run on the CPU")
    check_folder(options.data)
    names = ("dense_steps", "steps", "batch", "patch", "precision")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name)}
    budget = Budget(**{**usual, **chosen, "device": options.device, "data": fingerprint(options.data)})
    return Place(options.data, options.out, budget)


def _check_range(name: str, values: Sequence[float], fits: Callable[[float], bool], expected: str) -> None:
    wrong = [value for value in values if not fits(value)]
    if wrong:
        raise IksError(f"{name}: expected {expected}, got {wrong[0]:g}")


def _run(options: argparse.Namespace) -> None:
    place, plan = _place_and_given_rows(options) if options.rows else _place_and_plan(options)
    if options.redo:
        _forget(options.out, options.redo)
    make_table(plan, place, options.jobs)
    _report(options)


def _dial(options: argparse.Namespace) -> None:
    place, plan = _place_and_plan(options)
    _check_range("--at and --to", (options.at, *options.to), lambda value: 0 < value < 1, "numbers in (0, 1)")
    _check_range("--share", (options.share,), lambda value: value > 0, "a positive number, such as 0.1")
    if type(make_method(options.method)) is not IKS:
        raise IksError(f"--method: expected {OURS}, with options of sparsify or without, got {options.method!r}")
    cells = {network: _dial_cell(options, network) for network in plan.networks}
    sparsities = tuple(sorted({options.at, *options.to}))
    for network, (lr, ramp) in cells.items():
        separate = replace(plan, networks=(network,), methods=("dense", options.method), sparsities=sparsities)
        make_table(replace(separate, lrs=(lr,), ramps=(ramp,)), place, options.jobs)
    targets = tuple(target for target in options.to if target != options.at)
    jobs = [
        DialJob(Case(network, options.method, options.at, seed, *cells[network]), targets, options.share)
        for network in plan.networks
        for seed in plan.seeds
    ]
    make_dial(jobs, place, options.jobs)
    _report(options, "dial.md")


def _dial_cell(options: argparse.Namespace, network: str) -> tuple[float, float]:
    """Learning rate and ramp: as given, or else those of our best row at that sparsity."""
    entries = summarise(read_rows(options.out / RESULTS, Row))
    best = [e for e in entries if (e.network, e.method, e.sparsity) == (network, options.method, options.at)]
    lr, ramp = (best[0].rows[0].lr, best[0].rows[0].ramp) if best else (1e-3, 0.6)
    return options.lr or lr, options.ramp or ramp


def _forget(out: Path, methods: Sequence[str]) -> None:
    """Take the rows of `methods` out of the tables."""
    tables: list[tuple[Path, type[Measured]]] = [(out / RESULTS, Row), (out / DIAL, DialRow)]
    there = {row.method for path, kind in tables for row in read_rows(path, kind)}
    unknown = [method for method in methods if method not in there]
    if unknown:
        names = ", ".join(sorted(there)) or "none"
        raise IksError(f"--redo: expected methods that {out} has rows of ({names}), got {unknown[0]}")
    for path, kind in tables:
        if path.exists():
            with locked(path):
                write_rows(path, [row for row in read_rows(path, kind) if row.method not in methods], kind)


def _report(options: argparse.Namespace, shown: str = "report.md") -> None:
    written = write_report(options.out)
    print((options.out / shown).read_text(encoding="utf-8"))
    print("written: " + ", ".join(str(path) for path in (options.out / RESULTS, *written)))


def _list(options: argparse.Namespace) -> None:
    print("networks:")
    for name, network in NETWORKS.items():
        print(f"  {name:16} {network.title}")
    print("methods, with the options of their own and what these are if left out:")
    for name, cls in METHODS.items():
        own = ", ".join(f"{field.name}={field.default!r}" for field in fields(cls) if field.name != "options")
        any_other = " and any option of sparsify" if issubclass(cls, IKS) else ""
        print(f"  {name:16} {(cls.__doc__ or '').splitlines()[0]}")
        print(f"  {'':16} options: {own or 'none'}{any_other}")
    print("presets:")
    for name, preset in PRESETS.items():
        plan = preset.plan
        grid = f"lrs {' '.join(map('{:g}'.format, plan.lrs))}, ramps {' '.join(map('{:g}'.format, plan.ramps))}"
        print(f"  {name:16} {preset.about}")
        print(f"  {'':16} {sum(plan.size().values())} rows; seeds {' '.join(map(str, plan.seeds))}, {grid}")
