"""One training, dialled: our method at one sparsity, then at others without a step, or with a few."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import nn

import iks_plugin

from .data import ImageSet, batches
from .dense import load_dense
from .methods import make_method
from .methods.base import Method, Schedule
from .methods.iks import IKS
from .networks import make_network, work_per_step
from .progress import Progress
from .results import Measured, read_rows, write_rows
from .scores import evaluate
from .settings import Budget
from .table import locked, run_jobs
from .training import Tick, train
from .trial import counted_layers, make_row, train_case
from .workers import CaseJob, Job, Place

DIAL = "dial.csv"


@dataclass(frozen=True)
class DialRow(Measured):
    """A network at `sparsity` that comes from a training at another one.

    Attributes:
        trained_at: the target of that training.
        more_steps: optimizer steps at `sparsity` after it.
    """

    trained_at: float
    more_steps: int


@dataclass(frozen=True)
class DialJob(CaseJob):
    """Train our method once at the sparsity of `case`, then take `targets` from it.

    Attributes:
        share: further steps as a share of those of the budget.
    """

    targets: tuple[float, ...]
    share: float

    def __str__(self) -> str:
        return f"{self.case}, dialled"

    def more_steps(self, budget: Budget) -> int:
        return max(1, round(self.share * budget.steps))

    def steps(self, budget: Budget) -> int:
        return budget.steps + len(self.targets) * self.more_steps(budget)

    def run(self, place: Place, images: ImageSet, tick: Tick) -> list[DialRow]:
        budget = place.budget
        model = make_network(self.case.network, self.case.seed)
        model.load_state_dict(load_dense(self.start.path(place)))
        model.to(budget.device)
        start = time.perf_counter()
        layers = counted_layers(model)
        method = train_case(model, layers, self.case, budget, images, tick)
        assert isinstance(method, IKS)
        measure = partial(self._measure, tuple(layers), budget, images)
        rows = [measure(model, self.case.sparsity, 0, start)]
        for index, target in enumerate(self.targets):
            start = time.perf_counter()
            with _dialled(model, method.controller, target):
                rows.append(measure(model, target, 0, start))
            done = budget.steps + index * self.more_steps(budget)
            further = self._train_on(model, target, budget, images, _counting_from(done, tick))
            rows.append(measure(further, target, self.more_steps(budget), start))
        return rows

    def _train_on(self, model: nn.Module, target: float, budget: Budget, images: ImageSet, tick: Tick) -> nn.Module:
        """A copy of `model` after further steps with a new target; `model` stays as it is."""
        further, steps = copy.deepcopy(model), self.more_steps(budget)
        ramp_steps = max(1, round(self.case.ramp * steps))
        own = make_method(self.case.method)
        assert isinstance(own, IKS)
        options = {"total_steps": steps, "ramp_steps": ramp_steps, **own.options}
        controller = iks_plugin.sparsify(further, target, **options)
        method = _Adopted(controller)
        method.start(further, {}, target, Schedule(steps, ramp_steps))
        source = batches(images, self.case.seed, 2, budget.batch, budget.patch)
        train(further, method, source, steps, self.case.lr, tick, budget.precision)
        return further

    def _measure(
        self,
        names: tuple[str, ...],
        budget: Budget,
        images: ImageSet,
        model: nn.Module,
        target: float,
        more_steps: int,
        start: float,
    ) -> DialRow:
        """What `finalize` would make of `model` at `target`; the layers called `names` count."""
        with iks_plugin.finalized(model, target):
            case = replace(self.case, sparsity=target)
            score = evaluate(model, images.test, images.scale)
            layers = {name: model.get_submodule(name) for name in names}
            row = make_row(case, budget, model, layers, score, time.perf_counter() - start, "")
        return DialRow(**asdict(row), trained_at=self.case.sparsity, more_steps=more_steps)


@contextmanager
def _dialled(model: nn.Module, controller: iks_plugin.SparsityController, target: float) -> Iterator[None]:
    """`model` at another sparsity for a while."""
    trained, usual = copy.deepcopy(model.state_dict()), controller.target_sparsity
    controller.target_sparsity = target
    try:
        yield
    finally:
        controller.target_sparsity = usual
        model.load_state_dict(trained)


def _counting_from(done: int, tick: Tick) -> Tick:
    return lambda step: tick(done + step)


class _Adopted(Method):
    """Trains a copy that has got a controller of its own."""

    def __init__(self, controller: iks_plugin.SparsityController) -> None:
        self.controller = controller

    def parameter_groups(self) -> Any:
        return self.controller.param_groups()


def make_dial(jobs: list[DialJob], place: Place, processes: int) -> list[DialRow]:
    """Do the `jobs` whose rows are not in the file of `place` yet, and return all its rows; dense networks are there.

    Raises:
        IksError: the file holds rows of another budget. Nothing has been trained then.
    """
    path = place.out / DIAL
    with locked(path):
        rows = read_rows(path, DialRow, place.budget)
        left = [job for job in jobs if not _is_done(job, rows, place.budget)]
        work = {name: work_per_step(name, place.budget.batch, place.budget.patch) for name in {j.network for j in left}}
        total = sum(work[job.network] * job.steps(place.budget) for job in left)
        waiting: list[Job] = list(left)

        def finished(job: Job, result: list[DialRow]) -> str:
            waiting.remove(job)
            rows.extend(result)
            write_rows(path, rows, DialRow)
            return f"{job}: " + ", ".join(f"{row.sparsity:g}+{row.more_steps} {row.psnr:.3f} dB" for row in result)

        with Progress(total, len(jobs), len(jobs) - len(left)) as progress:
            run_jobs(lambda: waiting, finished, place, processes, progress, work)
        return rows


def _is_done(job: DialJob, rows: list[DialRow], budget: Budget) -> bool:
    there = {(row.case, row.trained_at, row.more_steps) for row in rows}
    at = job.case.sparsity
    return all(
        (replace(job.case, sparsity=target), at, more) in there
        for target in job.targets
        for more in (0, job.more_steps(budget))
    )
