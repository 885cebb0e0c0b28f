"""Which rows a table needs, in which order, given those that it has already."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from .methods import method_class
from .settings import Case

Cell = tuple[float, float]
"""Learning rate and ramp."""

Start = tuple[str, int]
"""Network and seed of the dense network that rows start from."""


@dataclass(frozen=True)
class Plan:
    """The rows of a table.

    Attributes:
        tune: try the grid (`lrs` x `ramps`) on the first seed only, and give the others its best cell of each network,
            method and sparsity; otherwise every seed gets the whole grid.
    """

    networks: tuple[str, ...]
    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    ramps: tuple[float, ...]
    tune: bool = True

    def groups(self) -> list[tuple[str, float, str]]:
        """Network, sparsity and method of all that is compared; the dense network is there once, at sparsity 0."""
        found = []
        for network, sparsity in product(self.networks, (0.0, *self.sparsities)):
            for method in self.methods:
                if (method_class(method) is method_class("dense")) == (sparsity == 0):
                    found.append((network, sparsity, method))
        return found

    def cells(self, method: str) -> list[Cell]:
        """The grid of a method, those without a ramp try learning rates alone; a single dense network for all."""
        ramps = self.ramps if method_class(method).has_ramp else (0.0,)
        return list(product(self.lrs, ramps))

    def size(self) -> dict[Start, int]:
        """How many rows start from each dense network in the end."""
        counts = dict.fromkeys(product(self.networks, self.seeds), 0)
        for network, _, method in self.groups():
            cells = len(self.cells(method))
            for seed in self.seeds:
                counts[network, seed] += cells if seed == self.seeds[0] or not self.tune else 1
        return counts

    def cases(self, psnr: Mapping[Case, float]) -> list[Case]:
        """All rows that are known to be needed, given the PSNR of those that are there; more once those are.

        The first seed of everything comes first: an interrupted table then says something about all methods.
        """
        return [
            case
            for network in self.networks
            for index, seed in enumerate(self.seeds)
            for group in self.groups()
            if group[0] == network
            for case in self._cases_of(*group, seed, index == 0, psnr)
        ]

    def _cases_of(
        self, network: str, sparsity: float, method: str, seed: int, first: bool, psnr: Mapping[Case, float]
    ) -> Iterable[Case]:
        def at(cell: Cell, seed: int) -> Case:
            return Case(network, method, sparsity, seed, *cell)

        cells = self.cells(method)
        if first or not self.tune:
            return [at(cell, seed) for cell in cells]
        tried = {cell: psnr.get(at(cell, self.seeds[0])) for cell in cells}
        scores = {cell: value for cell, value in tried.items() if value is not None}
        if len(scores) < len(cells):
            return []
        return [at(max(scores, key=lambda cell: -math.inf if math.isnan(scores[cell]) else scores[cell]), seed)]


@dataclass(frozen=True)
class GivenRows:
    """A plan of rows that are known from the start, such as those of another table that are to be made again."""

    given: tuple[Case, ...]

    @property
    def networks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(case.network for case in self.given))

    def size(self) -> dict[Start, int]:
        """How many rows start from each dense network."""
        return dict(Counter((case.network, case.seed) for case in self.given))

    def cases(self, psnr: Mapping[Case, float]) -> list[Case]:
        """All rows in their order, whatever is there already."""
        return list(self.given)
