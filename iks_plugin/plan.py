"""How a program goes through images of one size: in which bands, groups of layers and memory.

An image is cut into horizontal bands, one for each thread, and the rows of a band go through the whole program before
the next ones (`_kernels.py`), so that they are still in the cache. Each band computes the rows around it that its last
layers need once more; where that would be too many, the program is cut into groups of operations, between which whole
values are kept in memory.
"""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .program import Pair, Program, UnexpectedInputError

_FEWEST_ROWS = 8
"""A band is at least so high; a smaller image has fewer bands than there are threads."""
_PLANES = 64 << 20
"""Bytes of whole values that may be kept between groups; a larger image goes through all layers at once."""


@dataclass
class Group:
    """Operations between two moments at which whole values lie in memory."""

    ops: list[int]
    reads: list[int]
    keeps: list[int]


class Plan:
    """How a program goes through images of one size."""

    def __init__(self, program: Program, height: int, width: int, threads: int) -> None:
        from . import _kernels as k
        from ._vectors import LANES

        self._k, self._lanes = k, LANES
        self._program, self._height = program, height
        self._sizes = _sizes(program, height, width)
        rows_per_step = math.lcm(*(value.rows.denominator for value in program.values))
        self._shape(rows_per_step, math.lcm(*(value.columns.denominator for value in program.values)))
        steps = int(max(-(-self._table[:, k.V_HEIGHT] // self._table[:, k.V_FACTOR])))
        bands = max(1, min(threads, steps * rows_per_step // _FEWEST_ROWS))
        self._cuts = [(steps * band // bands, steps * (band + 1) // bands) for band in range(bands)]
        self._groups = self._cut_into_groups(bands)
        self._planes = {value: self._bytes(value, self._plane_rows(value)) for g in self._groups for value in g.keeps}
        self._tables = [[self._tables_of(group, *cut) for cut in self._cuts] for group in self._groups]
        self._arena = [max(table[2] for table in (tables[band] for tables in self._tables)) for band in range(bands)]
        self._free: list[Memory] = []

    def memory(self) -> _Borrowed:
        """Memory for one run, to be used with `with`; kept for the next one."""
        return _Borrowed(self._free, self._arena, self._planes)

    def size(self, value: int) -> Pair:
        """The height and width of a value."""
        return self._sizes[value]

    def _shape(self, rows_per_step: int, columns_per_step: int) -> None:
        """The fields of all values that follow from the size of the image.

        A step through the image makes a whole number of rows of each value, and so many of the program's input.
        """
        k, values = self._k, self._program.values
        borders = {None: k.ZEROS, "zeros": k.ZEROS, "reflect": k.REFLECTED, "replicate": k.REPLICATED}
        table = np.zeros((len(values), len(k.VALUE_FIELDS)), dtype=np.int64)
        for row, value, (height, width) in zip(table, values, self._sizes, strict=True):
            row[k.V_CHANNELS], row[k.V_FACTOR] = value.channels, int(value.rows * rows_per_step)
            row[k.V_HEIGHT], row[k.V_WIDTH], row[k.V_BORDER] = height, width, borders[value.mode]
        for op in self._program.ops:
            if op.window is not None:
                row, window = table[op.source], op.window
                row[k.V_HALO], row[k.V_ABOVE] = max(row[k.V_HALO], window.halo), max(row[k.V_ABOVE], *window.reads)
        # Pieces of one length, but for the factor between values; a halo reaches into the next piece, not beyond it.
        factors = np.array([int(value.columns * columns_per_step) for value in values])
        longest = np.maximum(-(-table[:, k.V_WIDTH] // self._lanes), table[:, k.V_HALO])
        table[:, k.V_PIECES] = max(-(-longest // factors)) * factors
        self._table = table

    def _bytes(self, value: int, rows: int) -> int:
        k, row = self._k, self._table[value]
        return int(rows * k.row_vectors.py_func(row) * 4 * self._lanes)

    def _plane_rows(self, value: int) -> int:
        return int(self._table[value][self._k.V_HEIGHT] + 2 * self._table[value][self._k.V_ABOVE])

    def _cut_into_groups(self, bands: int) -> list[Group]:
        program, ops = self._program, self._program.ops
        depth = [0.0] * len(program.values)
        deepest = []  # how many rows of the input an operation reaches beyond its own
        for op in ops:
            deepest.append(max(depth))
            if op.target >= 0:
                sources = [depth[number] for number in (op.source, op.other) if number >= 0]
                own = 0.0 if op.window is None else float(max(op.window.reads) / program.values[op.source].rows)
                depth[op.target] = max(depth[op.target], max(sources, default=0) + own)
        cuts = [0]
        if bands > 1:
            # Rows computed twice cost deep / 2 of a band's; keeping a value costs about 0.8 of a layer.
            most = max(4, round(math.sqrt(1.6 * self._height / bands)))
            while deepest[-1] - deepest[cuts[-1]] > 1.5 * most:
                window = [
                    at
                    for at in range(cuts[-1] + 1, len(ops))
                    if 0.6 * most <= deepest[at] - deepest[cuts[-1]] <= 1.3 * most
                ]
                if not window:
                    break
                # Never while a value is being joined: what crosses then is more than what crosses after it.
                cuts.append(min(window, key=lambda at: (self._crossing_bytes(at), -at)))
            if (
                sum(
                    {
                        number: self._bytes(number, self._plane_rows(number))
                        for at in cuts[1:]
                        for number in self._crossing(at)
                    }.values()
                )
                > _PLANES
            ):
                cuts = [0]
        bounds = [*cuts, len(ops)]
        groups = []
        for begin, end in itertools.pairwise(bounds):
            made = {ops[at].target for at in range(begin, end)} - {-1}
            reads = {number for at in range(begin, end) for number in (ops[at].source, ops[at].other)} - made - {-1}
            groups.append(Group(list(range(begin, end)), sorted(reads), sorted(made & set(self._crossing(end)))))
        return groups

    def _crossing(self, at: int) -> list[int]:
        """The values that are made before operation `at` and read from there on."""
        ops = self._program.ops
        made = {op.target for op in ops[:at]} - {-1}
        return sorted(made & {number for op in ops[at:] for number in (op.source, op.other)})

    def _crossing_bytes(self, at: int) -> int:
        return sum(self._bytes(number, self._plane_rows(number)) for number in self._crossing(at))

    def _tables_of(self, group: Group, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """The values and the operations of a group for one band, and the bytes of its rings, whose addresses count
        from the band's arena. Kept values stand once more at the end, as they lie in planes."""
        k, program = self._k, self._program
        count = len(program.values)
        values = np.concatenate([self._table, self._table[group.keeps]])
        ops = np.zeros((len(group.ops) + len(group.keeps), len(k.OP_FIELDS)), dtype=np.int64)
        for row, number in zip(ops, group.ops, strict=False):
            op = program.ops[number]
            row[k.O_KIND], row[k.O_SOURCE], row[k.O_OTHER], row[k.O_TARGET] = op.kind, op.source, op.other, op.target
            row[k.O_SCALE], row[k.O_STRIDE_Y], row[k.O_STRIDE_X] = op.scale, 1, 1
            row[k.O_FROM], row[k.O_PLACE], row[k.O_COUNT] = op.first, op.place, op.count
            if op.layer is not None and op.window is not None:
                row[k.O_HEIGHT], row[k.O_WIDTH] = op.window.kernel
                row[k.O_STEP_Y], row[k.O_STEP_X] = op.window.dilation
                row[k.O_STRIDE_Y], row[k.O_STRIDE_X] = op.window.stride
                row[k.O_TOP], row[k.O_LEFT] = op.window.before
                row[k.O_ABOVE], row[k.O_BELOW] = op.window.reads
                row[k.O_GROUPS] = op.layer.groups
        for place, number in enumerate(group.keeps):
            row = ops[len(group.ops) + place]
            row[k.O_KIND], row[k.O_SOURCE], row[k.O_OTHER], row[k.O_TARGET] = k.KEEP, number, -1, count + place
            row[k.O_COUNT] = program.values[number].channels
        rows = k.ring_rows(values, ops, begin, end)
        made = {program.ops[number].target for number in group.ops} - {-1}
        offset = 0
        for number in made:
            values[number, k.V_ROWS], values[number, k.V_ADDRESS] = rows[number], offset
            offset += self._bytes(number, int(rows[number]))
        for place, number in [*((number, number) for number in group.reads), *enumerate(group.keeps, count)]:
            values[place, k.V_ROWS] = self._plane_rows(number)
        return values, ops, offset

    def run(self, memory: Memory, numbers: list[dict[str, int]], ends: dict[int, Tensor]) -> None:
        """Go through one image. `numbers` are the operations' weights, `ends` the images by the value's number."""
        k, count = self._k, len(self._program.values)
        for group, tables in zip(self._groups, self._tables, strict=True):
            for number in group.keeps:
                self._clear_edges(number, memory.planes[number])
            calls = []
            for band, (cut, (values, ops, _)) in enumerate(zip(self._cuts, tables, strict=True)):
                values, ops = values.copy(), ops.copy()
                strides = np.zeros((len(ops), 2), dtype=np.int64)
                values[:count, k.V_ADDRESS] += memory.arenas[band].ctypes.data
                for place, number in [*((number, number) for number in group.reads), *enumerate(group.keeps, count)]:
                    values[place, k.V_ADDRESS] = memory.planes[number].ctypes.data
                for row, stride, number in zip(ops, strides, group.ops, strict=False):
                    for name, value in numbers[number].items():
                        row[k.OP_FIELDS.index(name)] = value
                    op = self._program.ops[number]
                    if op.kind in (k.READ, k.WRITE):
                        image = ends[op.target if op.kind == k.READ else op.source]
                        row[k.O_ADDRESS], stride[:] = image.data_ptr(), image.stride()[:2]
                calls.append((values, ops, *cut, strides))
            if len(calls) == 1:
                k.run_band(*calls[0])
            else:
                list(_pool(len(calls)).map(lambda call: k.run_band(*call), calls))

    def _clear_edges(self, number: int, plane: NDArray[np.uint8]) -> None:
        edge = self._bytes(number, int(self._table[number][self._k.V_ABOVE]))
        size = self._bytes(number, self._plane_rows(number))
        plane[:edge] = 0
        plane[size - edge : size] = 0


def _sizes(program: Program, height: int, width: int) -> list[Pair]:
    """Height and width of each value, for an image of so many rows and columns.

    Raises:
        UnexpectedInputError: a convolution has no output, or values are to be added or joined that do not fit.
    """
    sizes: list[Pair | None] = [None] * len(program.values)
    for op in program.ops:
        source = sizes[op.source] if op.source >= 0 else None
        if source is None:
            sizes[op.target] = height, width
            continue
        size = source if op.window is None else op.window.size(*source)
        size = size[0] * op.scale, size[1] * op.scale
        if op.target >= 0:
            if size != (sizes[op.target] or size) or (op.other >= 0 and size != sizes[op.other]):
                raise UnexpectedInputError
            sizes[op.target] = size
    return [size or (height, width) for size in sizes]


@dataclass
class Memory:
    """What one run works in."""

    arenas: list[NDArray[np.uint8]]
    planes: dict[int, NDArray[np.uint8]]


class _Borrowed:
    """Memory out of a list of free ones, or a new one; given back at the end."""

    def __init__(self, free: list[Memory], arenas: list[int], planes: dict[int, int]) -> None:
        self._free, self._arenas, self._planes = free, arenas, planes

    def __enter__(self) -> Memory:
        try:
            self._memory = self._free.pop()
        except IndexError:
            planes = {number: _aligned(size) for number, size in self._planes.items()}
            self._memory = Memory([_aligned(size) for size in self._arenas], planes)
        return self._memory

    def __exit__(self, *_: object) -> None:
        if not self._free:
            self._free.append(self._memory)


def _aligned(size: int) -> NDArray[np.uint8]:
    whole = np.empty(size + 64, dtype=np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + size]


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has to make its own."""
    key = (os.getpid(), threads)
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="iks")
    return _pools[key]
