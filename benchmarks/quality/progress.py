"""Progress of a table and of the trainings that run now, with the time that is left; silent in pipes."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """One bar for the whole table, in units of work, and one for each training under way."""

    def __init__(self, work: float, rows: int, done: int) -> None:
        self._rows, self._done = rows, done
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} < {remaining}"
        self._total = tqdm(total=work, desc=self._title(), bar_format=form, disable=None, dynamic_ncols=True)
        self._bars: dict[str, tqdm[Any]] = {}
        self._work: dict[str, float] = {}
        self._taken: dict[str, int] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in (*self._bars.values(), self._total):
            bar.close()

    def start(self, name: str, steps: int, work_per_step: float) -> None:
        """A training called `name` begins."""
        self._bars[name] = tqdm(total=steps, desc=name, unit="step", leave=False, disable=None, dynamic_ncols=True)
        self._work[name] = work_per_step
        self._taken[name] = 0

    def step(self, name: str, steps: int) -> None:
        """It has taken `steps` steps by now."""
        bar = self._bars[name]
        fresh = steps - self._taken[name]
        self._taken[name] = steps
        bar.update(fresh)
        self._total.update(fresh * self._work[name])

    def finish(self, name: str, steps: int, line: str, is_row: bool) -> None:
        """It is done; `line` tells what came of it."""
        self.step(name, steps)
        self._bars.pop(name).close()
        del self._taken[name]
        if is_row:
            self._done += 1
        self._total.set_description(self._title())
        self.say(line)

    def say(self, line: str) -> None:
        """A line of output above the bars."""
        tqdm.write(line)

    def _title(self) -> str:
        return f"table: {self._done} of {self._rows} rows"
