"""Numba kernels that push the rows of an image through a chain of layers while these rows stay in the cache.

A row of one channel lies in memory as vectors of `LANES` floats, and not pixel by pixel: it is cut into `LANES` pieces
of equal length, and vector i has the i-th pixel of each. The neighbours of all its pixels are then in the vectors
before and after it, so that a convolution reads whole, aligned vectors only. At the ends of the pieces the neighbours
are those of the next piece: each row has `halo` vectors in front and behind that hold them.

A value of the network (what one layer hands to the next) keeps so many rows as those that read it need, in a ring:
row r lies in slot (r + above) % rows. Rows above and below the image are zero.
"""

from __future__ import annotations

import hashlib
import inspect

import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]

from . import _vectors
from ._vectors import (
    DENSE_WIDTH,
    LANES,
    OUTPUTS,
    address_of,
    dense_1,
    dense_2,
    dense_most,
    shift,
    tile_1,
    tile_2,
    tile_4,
    tile_4_of_8,
    tile_8,
    tile_10,
    transpose,
)

_VECTOR = np.int64(4 * LANES)

VALUE_FIELDS = ("address", "channels", "pieces", "halo", "rows", "above", "height", "width", "factor", "border")
"""Of each value: where it is; channels; vectors of a row without halo; halo; rows kept; rows kept above and below the
image; size of the image; rows for each step through the image; what lies around the image."""
V_ADDRESS, V_CHANNELS, V_PIECES, V_HALO, V_ROWS, V_ABOVE, V_HEIGHT, V_WIDTH, V_FACTOR, V_BORDER = range(
    len(VALUE_FIELDS)
)

OP_FIELDS = (
    *("kind", "source", "other", "target", "height", "width", "step_y", "step_x", "stride_y", "stride_x"),
    *("top", "left", "above", "below", "groups", "scale", "from", "place", "count"),
    *("block", "values", "index", "pointers", "bias", "slope", "address"),
)
"""Of each operation: what it does to which values; a convolution's kernel, dilation, stride, and how far its kernel
begins above and left of a pixel; rows that it reads above and below; groups; how many times larger its image gets;
the channels that it copies; and where its numbers are."""
(
    O_KIND, O_SOURCE, O_OTHER, O_TARGET, O_HEIGHT, O_WIDTH, O_STEP_Y, O_STEP_X, O_STRIDE_Y, O_STRIDE_X,
    O_TOP, O_LEFT, O_ABOVE, O_BELOW, O_GROUPS, O_SCALE, O_FROM, O_PLACE, O_COUNT,
    O_BLOCK, O_VALUES, O_INDEX, O_POINTERS, O_BIAS, O_SLOPE, O_ADDRESS,
) = range(len(OP_FIELDS))  # fmt: skip

READ, CONVOLVE, DENSE, COMBINE, SHUFFLE, REPEAT, COPY, WRITE, KEEP = range(9)
"""Kinds of operations: take rows of an image in; convolve, activate and add, by the non-zeros or by all weights; the
same without a convolution; pixel shuffle; repeat pixels; copy channels; give rows of an image out; keep rows for a
later program."""

ZEROS, REFLECTED, REPLICATED = range(3)
"""What lies around an image, as torch's padding modes have it."""

_FAR = 1 << 58
"""Beyond all rows."""


def _compiled(**options):
    """Compile a function that Python calls, and keep the result on the disk if there is a place to write to."""

    def compiled(function):
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:
            return njit(**options)(function)

    return compiled


@njit(inline="always")
def _floats(address, size):
    return carray(address_of(address, types.float32), size)


@njit
def row_vectors(value):
    """Vectors from one row to the next: so that those of three rows fall into different lines of a cache of 64."""
    vectors = value[V_CHANNELS] * (value[V_PIECES] + 2 * value[V_HALO])
    return vectors + (16 - vectors) % 64


@njit(inline="always")
def _row(value, row):
    """The address of a row of a value, at its first channel's halo."""
    slot = (row + value[V_ABOVE]) % value[V_ROWS]
    return value[V_ADDRESS] + slot * row_vectors(value) * (4 * LANES)


@njit(inline="always")
def _channel(value, row, channel):
    """The address of the first piece of a row of a channel."""
    vectors = value[V_PIECES] + 2 * value[V_HALO]
    return _row(value, row) + (channel * vectors + value[V_HALO]) * (4 * LANES)


@njit(inline="always")
def _inside(place, size, border):
    """The row or column of an image that counts for one outside of it; those too far out count for nothing."""
    if border == REFLECTED:
        place = -place if place < 0 else 2 * (size - 1) - place if place >= size else place
    return min(max(place, 0), size - 1)


@njit
def _close_row(value, row, first, last):
    """Fill the pixels beyond the image's width and the halo of a row's channels that have just been written."""
    pieces, halo, width, border = value[V_PIECES], value[V_HALO], value[V_WIDTH], value[V_BORDER]
    vectors = pieces + 2 * halo
    address = _row(value, row)
    data = _floats(address, value[V_CHANNELS] * vectors * LANES)
    for channel in range(first, last):
        start = (channel * vectors + halo) * LANES
        for pixel in range(width, pieces * LANES):
            data[start + pixel % pieces * LANES + pixel // pieces] = 0.0
        if border != ZEROS:
            for pixel in range(width, min(width + halo, pieces * LANES)):
                from_ = _inside(pixel, width, border)
                number = data[start + from_ % pieces * LANES + from_ // pieces]
                data[start + pixel % pieces * LANES + pixel // pieces] = number
        for step in range(halo):
            row_at = address + 4 * start
            shift(row_at + (pieces + step - halo) * 4 * LANES, row_at + (step - halo) * 4 * LANES, True)
            shift(row_at + step * 4 * LANES, row_at + (pieces + step) * 4 * LANES, False)
        if border != ZEROS:
            for step in range(halo):
                left, right = _inside(-1 - step, width, border), _inside(pieces * LANES + step, width, border)
                data[start - (1 + step) * LANES] = data[start + left % pieces * LANES + left // pieces]
                last_lane = start + (pieces + step) * LANES + LANES - 1
                data[last_lane] = data[start + right % pieces * LANES + right // pieces]


@njit
def _zero_row(value, row):
    size = value[V_CHANNELS] * (value[V_PIECES] + 2 * value[V_HALO]) * LANES
    _floats(_row(value, row), size)[:] = 0.0


@njit
def _read_row(op, target, row, strides, line):
    """A row of an image of (channels, height, width) floats, with a factor and a summand for each channel."""
    channels, width, pieces = target[V_CHANNELS], target[V_WIDTH], target[V_PIECES]
    factors, summands = _floats(op[O_SLOPE], channels), _floats(op[O_BIAS], channels)
    for channel in range(channels):
        image = _floats(op[O_ADDRESS] + 4 * (channel * strides[0] + row * strides[1]), width)
        factor, summand = factors[channel], summands[channel]
        for at in range(width):
            line[at] = image[at] * factor + summand
        start = _channel(target, row, channel)
        _square(
            line.ctypes.data, 4 * pieces, np.int64(4), start, np.int64(4 * LANES), np.int64(4 * LANES), pieces, True
        )


@njit
def _write_row(op, source, row, strides, line):
    width, pieces = source[V_WIDTH], source[V_PIECES]
    for channel in range(source[V_CHANNELS]):
        start = _channel(source, row, channel)
        _square(
            start, np.int64(4 * LANES), np.int64(4 * LANES), line.ctypes.data, 4 * pieces, np.int64(4), pieces, False
        )
        image = _floats(op[O_ADDRESS] + 4 * (channel * strides[0] + row * strides[1]), width)
        image[:] = line[:width]


@njit(inline="always")
def _square(source, source_step, source_place, target, target_step, target_place, pieces, reads):
    """Transpose a row between pixel by pixel and piece by piece, a square at a time, of which the last may overlap."""
    if pieces >= LANES:
        at = np.int64(0)
        while at < pieces:
            if at + LANES > pieces:
                at = pieces - LANES
            transpose(source + at * source_place, source_step, target + at * target_place, target_step)
            at += LANES
    else:
        numbers, result = _floats(source, pieces * LANES), _floats(target, pieces * LANES)
        for lane in range(LANES):
            for piece in range(pieces):
                if reads:
                    result[piece * LANES + lane] = numbers[lane * pieces + piece]
                else:
                    result[lane * pieces + piece] = numbers[piece * LANES + lane]


@njit
def _fill_table(op, source, row, table):
    """The bytes from a block's first channel in the ring to where each of its taps finds its row's first vector."""
    height, width = op[O_HEIGHT], op[O_WIDTH]
    plane = (source[V_PIECES] + 2 * source[V_HALO]) * 4 * LANES
    for y in range(height):
        line = row * op[O_STRIDE_Y] + y * op[O_STEP_Y] - op[O_TOP]
        if source[V_BORDER] != ZEROS:
            line = _inside(line, source[V_HEIGHT], source[V_BORDER])
        start = _row(source, line) - source[V_ADDRESS]
        for channel in range(op[O_BLOCK]):
            for x in range(width):
                place = source[V_HALO] + x * op[O_STEP_X] - op[O_LEFT]
                table[(channel * height + y) * width + x] = start + channel * plane + place * 4 * LANES


@njit
def _convolve_row(op, source, target, other, has_other, row, table):
    groups, block, stride, vector = op[O_GROUPS], op[O_BLOCK], op[O_STRIDE_X], 4 * LANES
    source_plane = (source[V_PIECES] + 2 * source[V_HALO]) * vector
    target_plane = (target[V_PIECES] + 2 * target[V_HALO]) * vector
    _fill_table(op, source, row, table)
    outputs, inputs = target[V_CHANNELS], source[V_CHANNELS] // groups
    group_outputs = outputs // groups
    blocks = -(-inputs // block)
    pointers = carray(address_of(op[O_POINTERS], types.int32), outputs * blocks + 1)
    bias, slope = _floats(op[O_BIAS], outputs), _floats(op[O_SLOPE], outputs)
    taps = table.ctypes.data
    target_row = _row(target, row) + target[V_HALO] * vector
    other_row = np.int64(0)
    other_plane = np.int64(0)
    if has_other:
        other_plane = (other[V_PIECES] + 2 * other[V_HALO]) * vector
        other_row = _row(other, row) + other[V_HALO] * vector
    values, index = op[O_VALUES], op[O_INDEX]
    at = np.int64(0)
    while at < target[V_PIECES]:
        left = target[V_PIECES] - at
        in_eights = left == 12 or left == 16 or left == 24
        count = 10 if left >= 10 and not in_eights else 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
        if stride != 1:
            count = 4 if stride == 2 and left >= 4 else 1
        for number in range(blocks):
            is_first, is_last = number == 0, number == blocks - 1
            for output in range(outputs):
                begin = np.int64(pointers[output * blocks + number])
                end = np.int64(pointers[output * blocks + number + 1])
                if begin == end and not is_first and not is_last:
                    continue
                group = output // group_outputs if groups > 1 else np.int64(0)
                from_ = source[V_ADDRESS] + (group * inputs + number * block) * source_plane + at * stride * vector
                to = target_row + output * target_plane + at * vector
                plus = other_row + output * other_plane + at * vector if has_other else np.int64(0)
                start, bend = bias[output], slope[output]
                if count == 4 and stride == 2:
                    tile_4_of_8(from_, taps, values, index, begin, end, is_first, is_last, to, plus, start, bend)
                elif count == 10:
                    tile_10(from_, taps, values, index, begin, end, is_first, is_last, to, plus, start, bend)
                elif count == 8:
                    tile_8(from_, taps, values, index, begin, end, is_first, is_last, to, plus, start, bend)
                elif count == 4:
                    tile_4(from_, taps, values, index, begin, end, is_first, is_last, to, plus, start, bend)
                elif count == 2:
                    tile_2(from_, taps, values, index, begin, end, is_first, is_last, to, plus, start, bend)
                else:
                    tile_1(from_, taps, values, index, begin, end, is_first, is_last, to, plus, start, bend)
        at += count


@njit
def _convolve_row_densely(op, source, target, other, has_other, row, table):
    """With all weights, those of OUTPUTS output channels side by side: [output // OUTPUTS][tap][output % OUTPUTS]."""
    block, stride, vector = op[O_BLOCK], op[O_STRIDE_X], 4 * LANES
    source_plane = (source[V_PIECES] + 2 * source[V_HALO]) * vector
    target_plane = (target[V_PIECES] + 2 * target[V_HALO]) * vector
    _fill_table(op, source, row, table)
    kernel = op[O_HEIGHT] * op[O_WIDTH]
    inputs = source[V_CHANNELS]
    blocks = -(-inputs // block)
    taps = table.ctypes.data
    target_row = _row(target, row) + target[V_HALO] * vector
    at = np.int64(0)
    while at < target[V_PIECES]:
        left = target[V_PIECES] - at
        count = 1 if stride != 1 else DENSE_WIDTH if left >= DENSE_WIDTH else 2 if left >= 2 else 1
        for number in range(blocks):
            from_ = source[V_ADDRESS] + number * block * source_plane + at * stride * vector
            used = min(block, inputs - number * block) * kernel
            for output in range(0, target[V_CHANNELS], OUTPUTS):
                to = target_row + output * target_plane + at * vector
                weights = op[O_VALUES] + 4 * OUTPUTS * (output // OUTPUTS * inputs + number * block) * kernel
                bias = op[O_BIAS] + 4 * output
                if count == DENSE_WIDTH:
                    dense_most(from_, taps, weights, used, number == 0, to, target_plane, bias)
                elif count == 2:
                    dense_2(from_, taps, weights, used, number == 0, to, target_plane, bias)
                else:
                    dense_1(from_, taps, weights, used, number == 0, to, target_plane, bias)
        at += count
    _finish_row(op, target, other, has_other, row)


@njit(inline="always")
def _bent(number, slope):
    """The activation: `number` where it is positive or nan. Minus infinity times 0 would be nan."""
    if number >= 0 or number != number:
        return number
    return number * slope if slope != 0 else np.float32(0)


@njit
def _finish_row(op, target, other, has_other, row):
    """Activate a row in place and add another value's to it."""
    slopes = _floats(op[O_SLOPE], target[V_CHANNELS])
    size = target[V_PIECES] * LANES
    for channel in range(target[V_CHANNELS]):
        slope = slopes[channel]
        numbers = _floats(_channel(target, row, channel), size)
        if slope != 1.0:
            for at in range(size):
                numbers[at] = _bent(numbers[at], slope)
        if has_other:
            more = _floats(_channel(other, row, channel), size)
            for at in range(size):
                numbers[at] += more[at]


@njit
def _combine_row(op, source, target, other, has_other, row):
    """activation(source * factor + summand + other), with a factor and a summand for each channel."""
    channels, size = target[V_CHANNELS], target[V_PIECES] * LANES
    factors, summands = _floats(op[O_VALUES], channels), _floats(op[O_BIAS], channels)
    slopes = _floats(op[O_SLOPE], channels)
    for channel in range(channels):
        factor, summand, slope = factors[channel], summands[channel], slopes[channel]
        numbers = _floats(_channel(source, row, channel), size)
        result = _floats(_channel(target, row, channel), size)
        if has_other:
            more = _floats(_channel(other, row, channel), size)
            for at in range(size):
                result[at] = _bent(numbers[at] * factor + summand + more[at], slope)
        else:
            for at in range(size):
                result[at] = _bent(numbers[at] * factor + summand, slope)


@njit
def _shuffle_row(op, source, target, row):
    """Pixel shuffle: the pieces of both values are cut alike, so that whole vectors change places."""
    scale = op[O_SCALE]
    line = row % scale
    pieces = source[V_PIECES]
    for channel in range(target[V_CHANNELS]):
        result = _floats(_channel(target, row, channel), target[V_PIECES] * LANES)
        for column in range(scale):
            place = (channel * scale + line) * scale + column
            numbers = _floats(_channel(source, row // scale, place), pieces * LANES)
            for piece in range(pieces):
                start = (piece * scale + column) * LANES
                for lane in range(LANES):
                    result[start + lane] = numbers[piece * LANES + lane]


@njit
def _repeat_row(op, source, target, row):
    """Each pixel several times, side by side and below each other."""
    scale, size = op[O_SCALE], source[V_PIECES] * LANES
    for channel in range(target[V_CHANNELS]):
        result = _floats(_channel(target, row, channel), size * scale)
        numbers = _floats(_channel(source, row // scale, channel), size)
        for piece in range(source[V_PIECES]):
            for column in range(scale):
                start = (piece * scale + column) * LANES
                result[start : start + LANES] = numbers[piece * LANES : (piece + 1) * LANES]


@njit
def _copy_row(op, source, target, row):
    size = source[V_PIECES] * LANES
    for channel in range(op[O_COUNT]):
        result = _floats(_channel(target, row, op[O_PLACE] + channel), size)
        result[:] = _floats(_channel(source, row, op[O_FROM] + channel), size)


@njit(inline="always")
def _first_read(op, row):
    """The first row of its source that an operation reads for a row of its target."""
    return row // op[O_SCALE] * op[O_STRIDE_Y] - op[O_ABOVE]


@njit(inline="always")
def _end_read(op, end):
    """The row after the last one that it reads for the rows before `end`."""
    return (-(-end // op[O_SCALE]) - 1) * op[O_STRIDE_Y] + op[O_BELOW] + 1


@njit
def _needs(values, ops, step, need):
    """For each value the row before which all rows must be there, to write the rows of one `step`."""
    need[:] = -(1 << 60)
    for number in range(len(ops) - 1, -1, -1):
        op = ops[number]
        source = values[op[O_SOURCE]]
        if op[O_KIND] >= WRITE:
            upto = min((step + 1) * source[V_FACTOR], source[V_HEIGHT])
            need[op[O_SOURCE]] = max(need[op[O_SOURCE]], upto)
            continue
        if op[O_KIND] == READ or need[op[O_TARGET]] < -_FAR:
            continue
        upto = min(need[op[O_TARGET]], values[op[O_TARGET]][V_HEIGHT])
        limit = source[V_HEIGHT] + source[V_ABOVE]
        need[op[O_SOURCE]] = max(need[op[O_SOURCE]], min(_end_read(op, upto), limit))
        if op[O_OTHER] >= 0:
            need[op[O_OTHER]] = max(need[op[O_OTHER]], upto)


@_compiled()
def first_rows(values, ops, begin, top):
    """For each value the first row that a band of the image from row `begin` on makes, where none lies above `top`."""
    first = np.full(len(values), 1 << 60, dtype=np.int64)
    for number in range(len(ops) - 1, -1, -1):
        op = ops[number]
        if op[O_KIND] >= WRITE:
            first[op[O_SOURCE]] = min(first[op[O_SOURCE]], begin * values[op[O_SOURCE]][V_FACTOR])
        elif op[O_KIND] != READ and first[op[O_TARGET]] < _FAR:
            real = max(top, first[op[O_TARGET]])
            first[op[O_SOURCE]] = min(first[op[O_SOURCE]], _first_read(op, real))
            if op[O_OTHER] >= 0:
                first[op[O_OTHER]] = min(first[op[O_OTHER]], real)
    return first


@njit
def _start(values, ops, begin):
    """The step to begin with, so that from step to step each operation has only few rows to make.

    The first rows of a band need many of the first layers' rows. These are made one after the other, in steps before
    the band's own, in which nothing is written yet: as many as the layers reach above and below a row.
    """
    first = first_rows(values, ops, begin, -(1 << 60))
    start = begin
    for number in range(len(values)):
        if first[number] < _FAR:
            start = min(start, first[number] // values[number][V_FACTOR])
    return 2 * start - begin


@_compiled()
def ring_rows(values, ops, begin, end):
    """For each value how many rows must be kept while the rows from `begin` to `end` of the image are gone through."""
    first = first_rows(values, ops, begin, 0)
    rows = np.ones(len(values), dtype=np.int64)
    need = np.empty(len(values), dtype=np.int64)
    made = np.empty(len(ops), dtype=np.int64)
    for number in range(len(ops)):
        made[number] = 0 if ops[number][O_KIND] >= WRITE else first[ops[number][O_TARGET]]
    for step in range(_start(values, ops, begin), end):
        _needs(values, ops, step, need)
        for number in range(len(ops)):
            op = ops[number]
            if op[O_KIND] == READ:
                made[number] = max(made[number], need[op[O_TARGET]])
                continue
            if op[O_KIND] < WRITE and need[op[O_TARGET]] < -_FAR:  # nobody reads it
                continue
            if op[O_KIND] >= WRITE:
                oldest = max(step, begin) * values[op[O_SOURCE]][V_FACTOR]
            else:
                oldest = _first_read(op, max(0, made[number]))
            newest = need[op[O_SOURCE]]
            rows[op[O_SOURCE]] = max(rows[op[O_SOURCE]], newest - oldest)
            if op[O_OTHER] >= 0:
                rows[op[O_OTHER]] = max(rows[op[O_OTHER]], need[op[O_OTHER]] - max(0, made[number]))
            if op[O_KIND] < WRITE:
                made[number] = max(made[number], need[op[O_TARGET]])
    return rows


def _band_runner(vectors):
    """Makes `run_band`. What is compiled lies on the disk for as long as this file stays as it is, and the variables of
    the function's closure: `vectors` stands for the other file that goes into it."""

    @_compiled(nogil=True)
    def run_band(values, ops, begin, end, strides):
        """Go through the rows of an image from `begin` to `end`, and with each as far into the network as it leads.

        Args:
            values: int64 (values, VALUE_FIELDS).
            ops: int64 (operations, OP_FIELDS), each after those that make what it reads.
            strides: int64 (operations, 2), in floats: from channel to channel and from row to row of the images that
                are read and written.
        """
        vectors  # noqa: B018
        first = first_rows(values, ops, begin, 0)
        need = np.empty(len(values), dtype=np.int64)
        made = np.empty(len(ops), dtype=np.int64)
        for number in range(len(ops)):
            made[number] = 0 if ops[number][O_KIND] >= WRITE else first[ops[number][O_TARGET]]
        table = np.empty(256, dtype=np.int64)
        widest = np.int64(0)
        for value in values:
            widest = max(widest, value[V_PIECES])
        line = np.zeros(widest * LANES, dtype=np.float32)
        for step in range(_start(values, ops, begin), end):
            _needs(values, ops, step, need)
            for number in range(len(ops)):
                op = ops[number]
                kind = op[O_KIND]
                source = values[max(0, op[O_SOURCE])]
                if kind >= WRITE:
                    if step < begin:
                        continue
                    factor = source[V_FACTOR]
                    for row in range(step * factor, min((step + 1) * factor, source[V_HEIGHT])):
                        if kind == WRITE:
                            _write_row(op, source, row, strides[number], line)
                        else:
                            _copy_row(op, source, values[op[O_TARGET]], row)
                            _close_row(values[op[O_TARGET]], row, 0, source[V_CHANNELS])
                    continue
                target = values[op[O_TARGET]]
                has_other = op[O_OTHER] >= 0
                other = values[max(0, op[O_OTHER])]
                for row in range(made[number], need[op[O_TARGET]]):
                    if row < 0 or row >= target[V_HEIGHT]:
                        _zero_row(target, row)
                        continue
                    begin_channel, end_channel = np.int64(0), target[V_CHANNELS]
                    if kind == CONVOLVE:
                        _convolve_row(op, source, target, other, has_other, row, table)
                    elif kind == DENSE:
                        _convolve_row_densely(op, source, target, other, has_other, row, table)
                    elif kind == READ:
                        _read_row(op, target, row, strides[number], line)
                    elif kind == COMBINE:
                        _combine_row(op, source, target, other, has_other, row)
                    elif kind == SHUFFLE:
                        _shuffle_row(op, source, target, row)
                    elif kind == REPEAT:
                        _repeat_row(op, source, target, row)
                    else:
                        _copy_row(op, source, target, row)
                        begin_channel, end_channel = op[O_PLACE], op[O_PLACE] + op[O_COUNT]
                    _close_row(target, row, begin_channel, end_channel)
                made[number] = max(made[number], need[op[O_TARGET]])

    return run_band


run_band = _band_runner(hashlib.sha256(inspect.getsource(_vectors).encode()).hexdigest())
