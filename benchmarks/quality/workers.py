"""Trainings in this process or in several at a time, each on one thread, so that their number changes no row."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from iks_plugin import IksError

from .data import ImageSet, load_images, to_device
from .dense import dense_path, load_dense, train_dense
from .networks import NETWORKS
from .results import Row
from .settings import Budget, Case
from .training import Tick
from .trial import run_case


@dataclass(frozen=True)
class Place:
    """Where a table is made: its images, its folder and its budget."""

    data: str
    out: Path
    budget: Budget


@dataclass(frozen=True)
class DenseJob:
    """Train a dense network to start from."""

    network: str
    seed: int

    def __str__(self) -> str:
        return f"{self.network} dense start seed {self.seed}"

    def steps(self, budget: Budget) -> int:
        return budget.dense_steps

    def path(self, place: Place) -> Path:
        return dense_path(place.out, self.network, self.seed, place.budget)

    def run(self, place: Place, images: ImageSet, tick: Tick) -> None:
        train_dense(self.path(place), self.network, self.seed, place.budget, images, tick)


@dataclass(frozen=True)
class CaseJob:
    """What starts from the dense network of a case."""

    case: Case

    @property
    def network(self) -> str:
        return self.case.network

    @property
    def start(self) -> DenseJob:
        return DenseJob(self.case.network, self.case.seed)


@dataclass(frozen=True)
class RowJob(CaseJob):
    """Train and measure one row."""

    def __str__(self) -> str:
        return str(self.case)

    def steps(self, budget: Budget) -> int:
        return budget.steps

    def run(self, place: Place, images: ImageSet, tick: Tick) -> Row:
        return run_case(self.case, place.budget, images, load_dense(self.start.path(place)), tick)


class Job(Protocol):
    """Something to train, in any process."""

    @property
    def network(self) -> str: ...

    def steps(self, budget: Budget) -> int: ...

    def run(self, place: Place, images: ImageSet, tick: Tick) -> Any: ...


def perform(job: Job, place: Place, tick: Tick) -> Any:
    """Do `job` in this process, on one thread, repeatably."""
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(0)
    images = _images(place, NETWORKS[job.network].scale)
    return job.run(place, images, tick)


_on_device: dict[tuple[str, int, int, str], ImageSet] = {}


def _images(place: Place, scale: int) -> ImageSet:
    key = (place.data, scale, place.budget.patch, place.budget.device)
    if key not in _on_device:
        _on_device[key] = to_device(load_images(*key[:3]), place.budget.device)
    return _on_device[key]


class Stopped(Exception):  # noqa: N818  # no error: the user wants it so
    """Raised in a worker that is told to stop."""


class Workers(Protocol):
    """Takes jobs, one for each free place, and gives them back when they are done."""

    free: int

    def submit(self, job: Job) -> None: ...

    def wait(self) -> list[tuple[Job, Any]]: ...


class Inline:
    """Every job is done in this process when it is waited for."""

    def __init__(self, place: Place, on_step: Callable[[Job, int], None]) -> None:
        self.place, self.on_step = place, on_step
        self.free = 1
        self._job: Job | None = None

    def submit(self, job: Job) -> None:
        self._job, self.free = job, 0

    def wait(self) -> list[tuple[Job, Any]]:
        job = self._job
        assert job is not None
        result = perform(job, self.place, lambda step: self.on_step(job, step))
        self._job, self.free = None, 1
        return [(job, result)]


class Pool:
    """Jobs are done in `count` processes of their own."""

    def __init__(self, executor: ProcessPoolExecutor, place: Place, on_step: Any, count: int, steps: Any) -> None:
        self._executor, self._place, self._on_step, self._steps = executor, place, on_step, steps
        self.free = count
        self._running: dict[Future[Any], Job] = {}

    def submit(self, job: Job) -> None:
        self._running[self._executor.submit(_work, job, self._place)] = job
        self.free -= 1

    def wait(self) -> list[tuple[Job, Any]]:
        finished: set[Future[Any]] = set()
        while not finished:
            finished, _ = wait(self._running, timeout=0.3, return_when=FIRST_COMPLETED)
            while not self._steps.empty():
                job, step = self._steps.get()
                if job in self._running.values():
                    self._on_step(job, step)
        done = []
        for future in finished:
            job = self._running.pop(future)
            self.free += 1
            try:
                done.append((job, future.result()))
            except BrokenProcessPool:
                raise IksError(
                    f"a worker died during {job}: it may have run out of memory. Finished rows are kept; "
                    "run the same command again, with fewer --jobs"
                ) from None
        return done


_queue: Any = None
_stop: Any = None


def _enter_worker(queue: Any, stop: Any) -> None:
    global _queue, _stop
    _queue, _stop = queue, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent tells the others to stop


def _work(job: Job, place: Place) -> Any:
    parent = multiprocessing.parent_process()

    def tick(step: int) -> None:
        if _stop.is_set():
            raise Stopped
        if parent is not None and not parent.is_alive():
            os._exit(1)
        if step % 5 == 0:
            _queue.put((job, step))

    return perform(job, place, tick)


@contextmanager
def open_workers(place: Place, count: int, on_step: Callable[[Job, int], None]) -> Iterator[Workers]:
    """Workers for `count` jobs at a time; left by an error or Ctrl-C, all of them stop within a step."""
    if count == 1:
        yield Inline(place, on_step)
        return
    context = multiprocessing.get_context("spawn")
    queue, stop = context.SimpleQueue(), context.Event()
    executor = ProcessPoolExecutor(count, context, _enter_worker, (queue, stop))
    try:
        yield Pool(executor, place, on_step, count, queue)
    finally:
        stop.set()
        executor.shutdown(wait=True, cancel_futures=True)
