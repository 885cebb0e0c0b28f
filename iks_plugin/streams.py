"""Programs that run: the weights of their convolutions, and plans for the images that they meet."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .plan import Plan
from .program import Program, UnexpectedInputError
from .runtime import Packed, PackedWeight

_DENSE_FROM = {16: 0.36}
"""Share of non-zeros from which a convolution by all weights is faster, by the floats in a vector; 0.5 for others."""
_PLANS = 4
"""Sizes of images whose plans and memory are kept for the next one of that size."""
_BLOCK = 144
_PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}
"""Whatever torch's defaults are."""


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
            UnexpectedInputError: they have not, or what is made of them does not fit together.
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
            torch.empty((count, self.program.values[number].channels, *plan.size(number)), **_PLAIN)
            for number in self.program.outputs
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
