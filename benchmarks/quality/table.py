"""Making a table: what is missing is trained, and each finished row is in the file before the next one begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from iks_plugin import IksError

from .data import load_images
from .networks import NETWORKS, work_per_step
from .plan import GivenRows, Plan, Start
from .progress import Progress
from .results import Row, read_rows, write_rows
from .settings import Case
from .workers import DenseJob, Job, Place, RowJob, open_workers

RESULTS = "results.csv"


def make_table(plan: Plan | GivenRows, place: Place, jobs: int = 1) -> list[Row]:
    """Train what `plan` needs and the file of `place` does not hold yet; return all rows of the file.

    Raises:
        IksError: the images do not do, or the file holds rows of another budget. Nothing has been trained then.
        KeyboardInterrupt: Ctrl-C; the rows that were finished by then are in the file.
    """
    path = place.out / RESULTS
    place.out.mkdir(parents=True, exist_ok=True)
    with locked(path):
        rows = {row.case: row for row in read_rows(path, Row, place.budget)}
        for scale in sorted({NETWORKS[name].scale for name in plan.networks}):
            load_images(place.data, scale, place.budget.patch)
        _Table(plan, place, path, rows).run(jobs)
        return list(rows.values())


class _Table:
    def __init__(self, plan: Plan | GivenRows, place: Place, path: Path, rows: dict[Case, Row]) -> None:
        self.plan, self.place, self.path, self.rows = plan, place, path, rows
        self.work = {name: work_per_step(name, place.budget.batch, place.budget.patch) for name in plan.networks}

    def run(self, jobs: int) -> None:
        done = sum(case in self.rows for case in self._cases())
        with Progress(self._work_left(), sum(self.plan.size().values()), done) as progress:
            run_jobs(self._ready, self._finished, self.place, jobs, progress, self.work)

    def _finished(self, job: Job, result: Row | None) -> str:
        if result is None:
            return f"{job}: done"
        self.rows[result.case] = result
        write_rows(self.path, self.rows.values(), Row)
        return f"{job}: {result.psnr:.3f} dB, {result.reached:.2%} zeros, {result.seconds:.0f} s"

    def _cases(self) -> list[Case]:
        return self.plan.cases({case: row.psnr for case, row in self.rows.items()})

    def _ready(self) -> list[Job]:
        """What could begin now: rows whose dense network is there, and dense networks that rows wait for."""
        ready: list[Job] = []
        for case in self._cases():
            job = RowJob(case)
            if case in self.rows:
                continue
            wanted: Job = job if job.start.path(self.place).exists() else job.start
            if wanted not in ready:
                ready.append(wanted)
        return ready + [job for job in self._starts() if job not in ready]

    def _starts(self) -> list[DenseJob]:
        """Dense networks that are missing and that some row will need, be it known yet or not."""
        jobs = [DenseJob(*start) for start, rows in self._rows_left().items() if rows]
        return [job for job in jobs if not job.path(self.place).exists()]

    def _rows_left(self) -> dict[Start, int]:
        left = self.plan.size()
        for case in self._cases():
            left[case.network, case.seed] -= case in self.rows
        return left

    def _work_left(self) -> float:
        budget = self.place.budget
        rows = sum(self.work[name] * budget.steps * count for (name, _), count in self._rows_left().items())
        return rows + sum(self.work[job.network] * budget.dense_steps for job in self._starts())


def run_jobs(
    ready: Callable[[], Sequence[Job]],
    finished: Callable[[Job, Any], str],
    place: Place,
    count: int,
    progress: Progress,
    work: Mapping[str, float],
) -> None:
    """Do jobs, `count` at a time, until none is ready.

    Args:
        ready: what could begin now, running jobs among it, best first.
        finished: keeps a result at once, and says in a line what it is.
        work: of one step of each network, for the progress.
    """
    running: set[Job] = set()
    with open_workers(place, count, lambda job, step: progress.step(str(job), step)) as workers:
        while True:
            for job in [job for job in ready() if job not in running][: workers.free]:
                progress.start(str(job), job.steps(place.budget), work[job.network])
                running.add(job)
                workers.submit(job)
            if not running:
                return
            for job, result in workers.wait():
                running.remove(job)
                progress.finish(str(job), job.steps(place.budget), finished(job, result), result is not None)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Refuse a second run that would write to the same file; no lock where the system has none of this kind."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.with_name(f".{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise IksError(
                f"another run is writing to {path}: wait for it, or choose another --out (--jobs does rows in parallel)"
            ) from None
        yield
