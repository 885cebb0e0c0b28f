"""Networks as programs that run row by row: what there is to compute, in which order, and in which memory.

A `Program` is a chain of convolutions, activations, sums and pixel shuffles. A `Stream` cuts an image into horizontal
bands, one for each thread, and pushes the rows of a band through the whole chain before the next ones (`_kernels.py`),
so that they are still in the cache. Each band computes the rows around it that its last layers need once more; where
that would be too many, the chain is cut into groups of layers, between which whole values are kept in memory.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .runtime import Packed, PackedWeight

_DENSE_FROM = {16: 0.36}
"""Share of non-zeros from which a convolution by all weights is faster, by the floats in a vector; 0.5 for others."""
_FEWEST_ROWS = 8
"""A band is at least so high; a smaller image has fewer bands than there are threads."""
_PLANES = 64 << 20
"""Bytes of whole values that may be kept between groups; a larger image goes through all layers at once."""
_PLANS = 4
"""Sizes of images whose plans and memory are kept for the next one of that size."""
_BLOCK = 144

Addresses = dict[int, int]
_PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}
"""Whatever torch's defaults are."""


class UnexpectedInputError(Exception):
    """A stream's input is not what its graph seemed to tell: the whole model has to run the usual way."""


@dataclass
class Value:
    """What one operation hands to others: its channels, and its rows for each row of the program's input."""

    channels: int
    factor: int


@dataclass
class Op:
    """One operation on values, which are given by their number. `kind` is one of those of `_kernels.py`."""

    kind: int
    source: int = -1
    target: int = -1
    other: int = -1
    layer: nn.Conv2d | None = None
    slope: Tensor | None = None
    factor: Tensor | None = None
    summand: Tensor | None = None
    scale: int = 1
    place: int = 0

    def reach(self) -> int:
        """Rows above and below that it reads."""
        if self.layer is None:
            return 0
        return (self.layer.kernel_size[0] // 2) * self.layer.dilation[0]


@dataclass
class Program:
    """Operations in an order in which each comes after those that it reads from."""

    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def value(self, channels: int, factor: int) -> int:
        self.values.append(Value(channels, factor))
        return len(self.values) - 1

    def add(self, kind: int, source: int, channels: int, times: int = 1, **options: Any) -> int:
        """Add an operation that makes a new value of `source`, with `times` as many rows; the value's number."""
        target = self.value(channels, self.values[source].factor * times)
        self.ops.append(Op(kind, source, target, **options))
        return target

    def fuse(self) -> None:
        """Let convolutions activate their results and add others to them, instead of operations of their own."""
        from ._kernels import COMBINE, CONVOLVE

        for op in [op for op in self.ops if op.kind == COMBINE and op.factor is None and op.summand is None]:
            for source, other in ((op.source, op.other), (op.other, op.source)):
                maker = next((one for one in self.ops if one.target == source and one.kind == CONVOLVE), None)
                if maker is None or self._readers(source) != 1 or source in self.outputs or maker.other >= 0:
                    continue
                adds, activates = other >= 0, op.slope is not None
                if (adds and activates) or (activates and maker.slope is not None):
                    continue
                if adds and self._made_at(other) > self.ops.index(maker):
                    continue
                maker.target, maker.other = op.target, other
                maker.slope = op.slope if activates else maker.slope
                self.ops.remove(op)
                break

    def _readers(self, value: int) -> int:
        return sum((op.source == value) + (op.other == value) for op in self.ops)

    def _made_at(self, value: int) -> int:
        return next((place for place, op in enumerate(self.ops) if op.target == value), -1)


class Stream:
    """A program that is ready to run, with the plans and the memory for images of the sizes that it has met."""

    def __init__(self, program: Program) -> None:
        program.fuse()
        self.program = program
        self._plans: OrderedDict[tuple[int, int, int], Plan] = OrderedDict()
        self._taps: dict[int, tuple[PackedWeight, int, Tensor, Tensor]] = {}
        self._lock = threading.Lock()

    def run(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Compute the program's outputs, (N, C, H, W) float32, of its inputs, which have all the same N, H and W.

        Raises:
            UnexpectedInputError: they have not.
        """
        for image, number in zip(images, self.program.inputs, strict=True):
            expected = (images[0].shape[0], self.program.values[number].channels, *images[0].shape[2:])
            if image.dtype != torch.float32 or image.device.type != "cpu" or tuple(image.shape) != expected:
                raise UnexpectedInputError
        images = [image.resolve_neg().contiguous() for image in images]
        count, _, height, width = images[0].shape
        plan = self._plan(height, width, torch.get_num_threads())
        numbers, _keep = self._numbers()
        outputs = [
            torch.empty((count, value.channels, height * value.factor, width * value.factor), **_PLAIN)
            for value in (self.program.values[number] for number in self.program.outputs)
        ]
        with plan.memory() as memory:
            for sample in range(count):
                ends = [*(image[sample] for image in images), *(output[sample] for output in outputs)]
                plan.run(memory, numbers, dict(zip(self.program.inputs + self.program.outputs, ends, strict=True)))
        return outputs

    def _plan(self, height: int, width: int, threads: int) -> Plan:
        key = (height, width, threads)
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = Plan(self.program, height, width, threads)
                while len(self._plans) > _PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
        return plan

    def _numbers(self) -> tuple[list[dict[str, int]], list[Any]]:
        """For each operation the fields that hold its weights, and what must live as long as these addresses count."""
        keep: list[Any] = []

        def address(tensor: Tensor) -> int:
            keep.append(tensor)
            return tensor.data_ptr()

        fields = []
        for number, op in enumerate(self.program.ops):
            channels = self.program.values[op.target if op.target >= 0 else op.source].channels
            one, zero = (torch.full((channels,), number, **_PLAIN) for number in (1.0, 0.0))
            slope, factor = (one if tensor is None else tensor.float() for tensor in (op.slope, op.factor))
            summand = zero if op.summand is None else op.summand.float()
            entry = {"slope": address(slope.contiguous()), "bias": address(summand.contiguous())}
            if op.layer is None:
                entry["values"] = address(factor.contiguous())
            else:
                entry.update(self._weights(number, op.layer, address))
            fields.append(entry)
        return fields, keep

    def _weights(self, number: int, layer: nn.Conv2d, address: Any) -> dict[str, int]:
        from ._kernels import CONVOLVE, DENSE
        from ._vectors import LANES, OUTPUTS

        bias = layer.bias
        outputs, groups = layer.out_channels, layer.groups
        fields = {"bias": address(torch.zeros(outputs, **_PLAIN) if bias is None else bias.detach().contiguous())}
        packed = layer.packed_weight if isinstance(layer, Packed) else None
        if packed is not None and (
            packed.values.numel() < _DENSE_FROM.get(LANES, 0.5) * packed.shape.numel()
            or groups > 1
            or outputs % OUTPUTS
        ):
            index, pointers = self._taps_of(number, packed)
            kernel = packed.shape[2] * packed.shape[3]
            values = _widened(packed)
            block = packed.block // kernel
            return fields | {
                "kind": CONVOLVE,
                "block": block,
                "values": address(values),
                "index": address(index),
                "pointers": address(pointers),
            }
        weight = layer.weight.detach().contiguous()
        kernel, inputs = weight.shape[2] * weight.shape[3], weight.shape[1]
        block = min(inputs, max(1, _BLOCK // kernel))
        if groups == 1 and outputs % OUTPUTS == 0:
            side_by_side = weight.view(outputs // OUTPUTS, OUTPUTS, inputs, kernel).permute(0, 2, 3, 1).contiguous()
            return fields | {"kind": DENSE, "block": block, "values": address(side_by_side)}
        size, blocks = block * kernel, -(-inputs // block)
        index = (torch.arange(inputs * kernel, device="cpu") % size).to(torch.uint8).repeat(outputs)
        starts = (
            torch.arange(outputs, device="cpu").unsqueeze(1) * inputs * kernel
            + torch.arange(blocks, device="cpu") * size
        )
        pointers = torch.cat([starts.view(-1), torch.tensor([outputs * inputs * kernel], device="cpu")]).to(torch.int32)
        return fields | {
            "kind": CONVOLVE,
            "block": block,
            "values": address(weight),
            "index": address(index),
            "pointers": address(pointers),
        }

    def _taps_of(self, number: int, packed: PackedWeight) -> tuple[Tensor, Tensor]:
        known = self._taps.get(number)
        if known is None or known[0] is not packed or known[1] != packed.index.data_ptr():
            known = self._taps[number] = (packed, packed.index.data_ptr(), *packed.taps())
        return known[2], known[3]


def _widened(packed: PackedWeight) -> Tensor:
    """The non-zeros as float32, made anew for each run where they are stored in another type."""
    values = packed.values
    if packed.scales is not None and packed.axis is not None:
        _, pointers = packed.taps()
        rows = pointers.view(-1)[:: max(1, (pointers.numel() - 1) // packed.shape[0])].long()
        values = values.float() * packed.scales.repeat_interleave(rows.diff())
    return values.float().contiguous()


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
        self._program, self._height, self._width = program, height, width
        bands = max(1, min(threads, height // _FEWEST_ROWS))
        self._cuts = [(height * band // bands, height * (band + 1) // bands) for band in range(bands)]
        self._shape()
        self._groups = self._cut_into_groups(bands)
        self._planes = {value: self._bytes(value, self._plane_rows(value)) for g in self._groups for value in g.keeps}
        self._tables = [[self._tables_of(group, *cut) for cut in self._cuts] for group in self._groups]
        self._arena = [max(table[2] for table in (tables[band] for tables in self._tables)) for band in range(bands)]
        self._free: list[Memory] = []

    def memory(self) -> _Borrowed:
        """Memory for one run, to be used with `with`; kept for the next one."""
        return _Borrowed(self._free, self._arena, self._planes)

    def _shape(self) -> None:
        """The fields of all values that follow from the size of the image."""
        k, values = self._k, self._program.values
        table = np.zeros((len(values), len(k.VALUE_FIELDS)), dtype=np.int64)
        for row, value in zip(table, values, strict=True):
            row[k.V_CHANNELS], row[k.V_FACTOR] = value.channels, value.factor
            row[k.V_HEIGHT], row[k.V_WIDTH] = self._height * value.factor, self._width * value.factor
        for op in self._program.ops:
            if op.layer is not None:
                row = table[op.source]
                halo = (op.layer.kernel_size[1] // 2) * op.layer.dilation[1]
                row[k.V_HALO], row[k.V_ABOVE] = max(row[k.V_HALO], halo), max(row[k.V_ABOVE], op.reach())
        # A halo reaches into the next piece, and not beyond it.
        pieces = max(-(-self._width // self._lanes), *(-(-table[:, k.V_HALO] // table[:, k.V_FACTOR])))
        table[:, k.V_PIECES] = pieces * table[:, k.V_FACTOR]
        self._table = table

    def _bytes(self, value: int, rows: int) -> int:
        k, row = self._k, self._table[value]
        return int(rows * k.row_vectors.py_func(row) * 4 * self._lanes)

    def _plane_rows(self, value: int) -> int:
        return int(self._table[value][self._k.V_HEIGHT] + 2 * self._table[value][self._k.V_ABOVE])

    def _cut_into_groups(self, bands: int) -> list[Group]:
        ops = self._program.ops
        depth = [0] * len(self._program.values)
        deepest = []  # the depth that has been reached before each operation
        for op in ops:
            deepest.append(max(depth))
            if op.target >= 0:
                sources = [depth[number] for number in (op.source, op.other) if number >= 0]
                depth[op.target] = max(sources, default=0) + op.reach()
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
            row[k.O_KERNEL], row[k.O_DILATION], row[k.O_GROUPS], row[k.O_PLACE] = op.scale, 1, 1, op.place
            if op.layer is not None:
                high, wide = op.layer.kernel_size
                row[k.O_KERNEL] = high * 65536 + wide
                row[k.O_DILATION], row[k.O_GROUPS] = op.layer.dilation[0], op.layer.groups
        for place, number in enumerate(group.keeps):
            row = ops[len(group.ops) + place]
            row[k.O_KIND], row[k.O_SOURCE], row[k.O_OTHER], row[k.O_TARGET] = k.KEEP, number, -1, count + place
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
