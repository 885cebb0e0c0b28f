"""Networks as programs that run row by row: which operations there are on which values, in which order."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

Pair = tuple[int, int]
"""Of rows and of columns, where nothing else is said."""
_MOST_TAPS = 256
"""Weights that a convolution may have for one input and one output channel."""


class UnexpectedInputError(Exception):
    """A stream's input is not what its graph seemed to tell: the whole model has to run the usual way."""


@dataclass(frozen=True)
class Window:
    """Where the weights of a convolution are laid: each output pixel's first one lies `before` its place."""

    kernel: Pair
    dilation: Pair
    stride: Pair
    before: Pair
    after: Pair
    mode: str

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Window | None:
        """The window of a layer; None for those that cannot run row by row."""
        kernel, dilation, stride = (_pair(size) for size in (layer.kernel_size, layer.dilation, layer.stride))
        spans = _pair([d * (k - 1) for k, d in zip(kernel, dilation, strict=True)])
        if layer.padding == "same":
            before = _pair([span // 2 for span in spans])
            after = _pair([span - first for span, first in zip(spans, before, strict=True)])
        elif layer.padding == "valid":
            before = after = (0, 0)
        else:
            before = after = _pair(layer.padding)
        # What is put around an image must be found within the rows that are kept anyway: never for "circular".
        fits = layer.padding_mode == "zeros" or (
            layer.padding_mode in ("reflect", "replicate") and 2 * before[0] <= spans[0] and after[0] <= spans[0]
        )
        if not fits or kernel[0] * kernel[1] > _MOST_TAPS:
            return None
        return cls(kernel, dilation, stride, before, after, layer.padding_mode)

    @property
    def spans(self) -> Pair:
        return _pair([d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)])

    @property
    def reads(self) -> Pair:
        """So many rows are read above and below the one that an output row stands for."""
        slack = 0 if self.mode == "zeros" else self.spans[0]
        return self.before[0] + slack, max(0, self.spans[0] - self.before[0])

    @property
    def halo(self) -> int:
        """So many columns are read left or right of the columns that the output columns stand for."""
        return max(self.before[1], self.spans[1] - self.before[1] - self.stride[1] + 1)

    def size(self, height: int, width: int) -> Pair:
        """The size of the output.

        Raises:
            UnexpectedInputError: there is none, which is for torch to say.
        """
        sizes = []
        for dim, size in enumerate((height, width)):
            padding = self.before[dim] + self.after[dim]
            if self.mode == "reflect" and max(self.before[dim], self.after[dim]) >= size:
                raise UnexpectedInputError
            sizes.append((size + padding - self.spans[dim] - 1) // self.stride[dim] + 1)
        if min(sizes) < 1:
            raise UnexpectedInputError
        return _pair(sizes)


def _pair(numbers: Any) -> Pair:
    one, other = numbers
    return int(one), int(other)


@dataclass
class Value:
    """What one operation hands to others: its channels, and its rows and columns for each one of the program's input.

    `mode` is the padding mode of the convolutions that read it.
    """

    channels: int
    rows: Fraction = Fraction(1)
    columns: Fraction = Fraction(1)
    mode: str | None = None


@dataclass
class Op:
    """One operation on values, which are given by their number. `kind` is one of those of `_kernels.py`."""

    kind: int
    source: int = -1
    target: int = -1
    other: int = -1
    layer: nn.Conv2d | None = None
    window: Window | None = None
    slope: Tensor | None = None
    factor: Tensor | None = None
    summand: Tensor | None = None
    scale: int = 1
    first: int = 0
    place: int = 0
    count: int = 0


@dataclass
class Program:
    """Operations in an order in which each comes after those that it reads from."""

    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    _padded: dict[tuple[int, str], int] = field(default_factory=dict)

    def value(self, channels: int, like: int | None = None, times: Pair = (1, 1), per: Pair = (1, 1)) -> int:
        """A new value of so many channels, with `times` as many rows and columns as another one, or one `per` some.

        Returns:
            Its number.
        """
        rows, columns = (self.values[like].rows, self.values[like].columns) if like is not None else (1, 1)
        self.values.append(Value(channels, Fraction(rows * times[0]) / per[0], Fraction(columns * times[1]) / per[1]))
        return len(self.values) - 1

    def read(self, channels: int) -> int:
        from ._kernels import READ

        target = self.value(channels)
        self.ops.append(Op(READ, target=target))
        self.inputs.append(target)
        return target

    def write(self, source: int) -> None:
        from ._kernels import WRITE

        self.ops.append(Op(WRITE, source))
        self.outputs.append(source)

    def convolve(self, layer: nn.Conv2d, window: Window, source: int) -> int:
        from ._kernels import CONVOLVE

        source = self._with_border(source, window.mode)
        target = self.value(int(layer.out_channels), source, per=window.stride)
        self.ops.append(Op(CONVOLVE, source, target, layer=layer, window=window))
        return target

    def combine(self, source: int, other: int = -1, **numbers: Any) -> int:
        from ._kernels import COMBINE

        target = self.value(self.values[source].channels, source)
        self.ops.append(Op(COMBINE, source, target, other, **numbers))
        return target

    def enlarge(self, kind: int, source: int, channels: int, scale: int) -> int:
        """Pixel shuffle to so many channels, or repeated pixels."""
        target = self.value(channels, source, times=(scale, scale))
        self.ops.append(Op(kind, source, target, scale=scale))
        return target

    def channels_of(self, source: int, first: int, count: int) -> int:
        """`count` channels of a value from the `first` on, as a value of their own."""
        from ._kernels import COPY

        target = self.value(count, source)
        self.ops.append(Op(COPY, source, target, first=first, count=count))
        return target

    def concatenate(self, sources: list[int]) -> int:
        from ._kernels import COPY

        target = self.value(sum(self.values[source].channels for source in sources), sources[0])
        place = 0
        for source in sources:
            count = self.values[source].channels
            self.ops.append(Op(COPY, source, target, place=place, count=count))
            place += count
        return target

    def are_alike(self, *numbers: int) -> bool:
        """Whether values have the same size, as far as that can be told without an image."""
        return len({(value.rows, value.columns) for value in (self.values[number] for number in numbers)}) == 1

    def _with_border(self, source: int, mode: str) -> int:
        """A value around which there is what a padding mode says: a copy of one that has something else there."""
        value = self.values[source]
        if value.mode in (None, mode):
            value.mode = mode
            return source
        if (source, mode) not in self._padded:
            copied = self._padded[source, mode] = self.channels_of(source, 0, value.channels)
            self.values[copied].mode = mode
        return self._padded[source, mode]

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
                if adds and self.made_at(other) > self.ops.index(maker):
                    continue
                maker.target, maker.other = op.target, other
                maker.slope = op.slope if activates else maker.slope
                self.ops.remove(op)
                break

    def _readers(self, value: int) -> int:
        return sum((op.source == value) + (op.other == value) for op in self.ops)

    def made_at(self, value: int) -> int:
        """The place of the operation that completes a value."""
        return max((place for place, op in enumerate(self.ops) if op.target == value), default=-1)
