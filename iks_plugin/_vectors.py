"""What Numba's own language cannot say: vectors in registers, as functions that it compiles into its loops.

Everything is passed by address, as the arrays are of many types and belong to many owners.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic


def _features() -> set[str]:
    chosen = config.CPU_FEATURES  # type: ignore[attr-defined]  # NUMBA_CPU_FEATURES
    return set((get_host_cpu_features() if chosen is None else chosen).split(","))


FEATURES = _features()
LANES = 16 if "+avx512f" in FEATURES else 8 if "+avx2" in FEATURES else 4
"""Floats in a vector: what one instruction of this machine works on."""
HAS_MANY_REGISTERS = LANES == 16 or platform.machine().lower() in ("aarch64", "arm64")
"""32 for vectors, and not 16."""

VECTOR = ir.VectorType(ir.FloatType(), LANES)
ALIGNMENT = 4 * LANES


def _tile(count: int, stride: int = 1) -> Callable[..., Any]:
    """A function that computes `count` vectors of one output channel from one block of input channels.

    The input's vectors are `stride` apart.
    """

    @intrinsic
    def tile(
        typing: Any, source: Any, table: Any, values: Any, index: Any, begin: Any, end: Any,
        is_first: Any, is_last: Any, target: Any, other: Any, bias: Any, slope: Any,
    ) -> Any:  # fmt: skip
        integers = [types.int64] * 6
        signature = types.void(
            *integers, types.boolean, types.boolean, types.int64, types.int64, types.float32, types.float32
        )

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            source, table, values, index, begin, end, is_first, is_last, target, other, bias, slope = arguments
            f32, i8, i32, i64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)

            def pointer(address: Any, kind: Any, offset: int = 0) -> Any:
                base = builder.inttoptr(address, kind.as_pointer())
                return builder.gep(base, [ir.Constant(i64, offset)]) if offset else base

            def splat(number: Any) -> Any:
                one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), number, ir.Constant(i32, 0))
                return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, LANES), [0] * LANES))

            def load(address: Any, place: int) -> Any:
                vector = builder.load(pointer(address, VECTOR, place))
                vector.align = ALIGNMENT
                return vector

            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
            )
            block = {
                name: builder.function.append_basic_block(name)
                for name in ("first", "further", "head", "body", "done", "finish", "add", "finished", "store")
            }
            builder.cbranch(is_first, block["first"], block["further"])
            builder.position_at_end(block["first"])
            started = splat(bias)
            builder.branch(block["head"])
            builder.position_at_end(block["further"])
            sums_so_far = [load(target, place) for place in range(count)]
            builder.branch(block["head"])

            builder.position_at_end(block["head"])
            at = builder.phi(i64)
            at.add_incoming(begin, block["first"])
            at.add_incoming(begin, block["further"])
            sums = []
            for place in range(count):
                total = builder.phi(VECTOR)
                total.add_incoming(started, block["first"])
                total.add_incoming(sums_so_far[place], block["further"])
                sums.append(total)
            builder.cbranch(builder.icmp_signed("<", at, end), block["body"], block["done"])

            builder.position_at_end(block["body"])
            weight = builder.load(builder.gep(pointer(values, f32), [at]))
            tap = builder.zext(builder.load(builder.gep(pointer(index, i8), [at])), i64)
            offset = builder.load(builder.gep(pointer(table, i64), [tap]))
            address, weights = builder.add(source, offset), splat(weight)
            for place in range(count):
                total = builder.call(fma, [weights, load(address, place * stride), sums[place]])
                sums[place].add_incoming(total, block["body"])
            at.add_incoming(builder.add(at, ir.Constant(i64, 1)), block["body"])
            builder.branch(block["head"])

            builder.position_at_end(block["done"])
            builder.cbranch(is_last, block["finish"], block["store"])
            builder.position_at_end(block["finish"])
            slopes, zero = splat(slope), ir.Constant(VECTOR, [0.0] * LANES)
            is_flat = builder.fcmp_ordered("==", slopes, zero)  # minus infinity times 0 would be nan
            active = [
                builder.select(
                    builder.fcmp_unordered(">=", total, zero),
                    total,
                    builder.select(is_flat, zero, builder.fmul(total, slopes)),
                )
                for total in sums
            ]
            builder.cbranch(builder.icmp_signed("!=", other, ir.Constant(i64, 0)), block["add"], block["finished"])
            builder.position_at_end(block["add"])
            added = [builder.fadd(total, load(other, place)) for place, total in enumerate(active)]
            builder.branch(block["finished"])
            builder.position_at_end(block["finished"])
            final = []
            for place in range(count):
                result = builder.phi(VECTOR)
                result.add_incoming(active[place], block["finish"])
                result.add_incoming(added[place], block["add"])
                final.append(result)
            builder.branch(block["store"])
            builder.position_at_end(block["store"])
            results = []
            for place in range(count):
                result = builder.phi(VECTOR)
                result.add_incoming(sums[place], block["done"])
                result.add_incoming(final[place], block["finished"])
                results.append(result)
            for place, result in enumerate(results):
                builder.store(result, pointer(target, VECTOR, place)).align = ALIGNMENT
            return context.get_dummy_value()

        return signature, generate

    return tile


tile_10, tile_8, tile_4, tile_2, tile_1 = map(_tile, (10, 8, 4, 2, 1))
tile_4_of_8 = _tile(4, stride=2)


@intrinsic
def shift(typing: Any, source: Any, target: Any, is_front: Any) -> Any:
    """Store the vector at `source` at `target`, moved up by one lane (for a halo in front) or down; a zero moves in."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pointers = [builder.inttoptr(address, VECTOR.as_pointer()) for address in arguments[:2]]
        vector = builder.load(pointers[0])
        vector.align = ALIGNMENT
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        kind = ir.VectorType(ir.IntType(32), LANES)
        up = builder.shuffle_vector(vector, zero, ir.Constant(kind, [LANES, *range(LANES - 1)]))
        down = builder.shuffle_vector(vector, zero, ir.Constant(kind, [*range(1, LANES), LANES]))
        builder.store(builder.select(arguments[2], up, down), pointers[1]).align = ALIGNMENT
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.boolean), generate


@intrinsic
def transpose(typing: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> Any:
    """Transpose a square of LANES x LANES floats, whose lines are so many bytes apart here and there."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        source, source_step, target, target_step = arguments
        i64, pick = ir.IntType(64), ir.VectorType(ir.IntType(32), LANES)

        def pointer(address: Any, step: Any, line: int) -> Any:
            return builder.inttoptr(
                builder.add(address, builder.mul(step, ir.Constant(i64, line))), VECTOR.as_pointer()
            )

        lines = []
        for line in range(LANES):
            vector = builder.load(pointer(source, source_step, line))
            vector.align = 4
            lines.append(vector)
        half = LANES // 2
        while half:
            # Swap the off-diagonal squares of `half` lines in each square of twice as many.
            low = [at - half + LANES if at & half else at for at in range(LANES)]
            high = [at + LANES if at & half else at + half for at in range(LANES)]
            for line in range(LANES):
                if not line & half:
                    one, two = lines[line], lines[line + half]
                    lines[line] = builder.shuffle_vector(one, two, ir.Constant(pick, low))
                    lines[line + half] = builder.shuffle_vector(one, two, ir.Constant(pick, high))
            half //= 2
        for line, vector in enumerate(lines):
            builder.store(vector, pointer(target, target_step, line)).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def address_of(typing: Any, address: Any, kind: Any) -> Any:
    """An address as a pointer to the numbers that it is the address of."""
    result = types.CPointer(kind.dtype)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(types.int64, kind), generate


OUTPUTS = 4
"""Output channels that a dense tile computes at once."""


def _dense_tile(count: int) -> Callable[..., Any]:
    """A function that computes `count` vectors of OUTPUTS output channels from all weights of one block of inputs."""

    @intrinsic
    def tile(
        typing: Any, source: Any, table: Any, values: Any, taps: Any, is_first: Any, target: Any, step: Any, bias: Any
    ) -> Any:  # fmt: skip
        signature = types.void(*[types.int64] * 4, types.boolean, *[types.int64] * 3)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            source, table, values, taps, is_first, target, step, bias = arguments
            f32, i32, i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
            places = [(output, place) for output in range(OUTPUTS) for place in range(count)]

            def floats(address: Any, place: Any) -> Any:
                return builder.load(builder.gep(builder.inttoptr(address, f32.as_pointer()), [place]))

            def splat(number: Any) -> Any:
                one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), number, ir.Constant(i32, 0))
                return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, LANES), [0] * LANES))

            def vector_at(address: Any, place: int) -> Any:
                base = builder.inttoptr(address, VECTOR.as_pointer())
                return builder.gep(base, [ir.Constant(i64, place)])

            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
            )
            lines = [builder.add(target, builder.mul(step, ir.Constant(i64, output))) for output in range(OUTPUTS)]
            block = {
                name: builder.function.append_basic_block(name) for name in ("first", "further", "head", "body", "done")
            }
            builder.cbranch(is_first, block["first"], block["further"])
            builder.position_at_end(block["first"])
            biases = [splat(floats(bias, ir.Constant(i64, output))) for output in range(OUTPUTS)]
            builder.branch(block["head"])
            builder.position_at_end(block["further"])
            so_far = []
            for output, place in places:
                vector = builder.load(vector_at(lines[output], place))
                vector.align = ALIGNMENT
                so_far.append(vector)
            builder.branch(block["head"])

            builder.position_at_end(block["head"])
            at = builder.phi(i64)
            sums = [builder.phi(VECTOR) for _ in places]
            for origin, numbers in (("first", [biases[output] for output, _ in places]), ("further", so_far)):
                at.add_incoming(ir.Constant(i64, 0), block[origin])
                for total, number in zip(sums, numbers, strict=True):
                    total.add_incoming(number, block[origin])
            builder.cbranch(builder.icmp_signed("<", at, taps), block["body"], block["done"])

            builder.position_at_end(block["body"])
            offset = builder.load(builder.gep(builder.inttoptr(table, i64.as_pointer()), [at]))
            address = builder.add(source, offset)
            inputs = []
            for place in range(count):
                vector = builder.load(vector_at(address, place))
                vector.align = ALIGNMENT
                inputs.append(vector)
            first_weight = builder.mul(at, ir.Constant(i64, OUTPUTS))
            weights = [
                splat(floats(values, builder.add(first_weight, ir.Constant(i64, output)))) for output in range(OUTPUTS)
            ]
            for total, (output, place) in zip(sums, places, strict=True):
                total.add_incoming(builder.call(fma, [weights[output], inputs[place], total]), block["body"])
            at.add_incoming(builder.add(at, ir.Constant(i64, 1)), block["body"])
            builder.branch(block["head"])

            builder.position_at_end(block["done"])
            for total, (output, place) in zip(sums, places, strict=True):
                builder.store(total, vector_at(lines[output], place)).align = ALIGNMENT
            return context.get_dummy_value()

        return signature, generate

    return tile


DENSE_WIDTH = 5 if HAS_MANY_REGISTERS else 3
dense_most, dense_2, dense_1 = map(_dense_tile, (DENSE_WIDTH, 2, 1))
