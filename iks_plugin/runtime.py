"""Packed layers: only the non-zero weights stay in memory, and a layer's dense weight exists while it computes.

A layer is packed and unpacked in place, by a swap of its class. The weights of one layer lie in a `PackedWeight`: its
non-zero values in the usual order, and where they belong. A weight is taken as rows, one for each index of its first
dimension. For where a row's non-zeros are there is the smaller of two forms: one bit for every weight, or a byte for
every non-zero (its place within a block of the row) and two bytes for every block (how many non-zeros it has). In a
convolution's row a block is a number of whole input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import compiled, entries
from .entries import SparseWeight
from .errors import IksError
from .layers import SUPPORTED_TYPES, Gated, refuse_lent
from .selection import written_by_blocks
from .swap import Swapped, original_class, swapped_class

_AT_ONCE = 1 << 16
"""So many weights are unpacked or packed in one step."""
_LARGE, _PART = 1 << 18, 1 << 17
"""A convolution with more weights computes some output channels at a time, so that its dense weight is never whole."""
_PLAIN_FORWARDS = {cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
UNPACK = "call iks_plugin.unpack(model) first"


@dataclass(frozen=True)
class Kept:
    """A dense weight beside the packed one that it was made of, and what its values were then."""

    dense: Tensor
    memory_format: torch.memory_format
    values: Tensor
    version: int

    def is_of(self, values: Tensor) -> bool:
        return self.values is values and self.version == version_of(values)


def version_of(tensor: Tensor) -> int:
    """A number that changes with a tensor's values."""
    return 0 if tensor.is_inference() else tensor._version


class PackedWeight(nn.Module):
    """The non-zeros of one weight. Calling it gives the dense weight, without a gradient.

    Its buffers are not part of any state dict, as the layer's own `state_dict` has the dense weight. `.to(device)`
    moves them. A change of dtype changes that of the dense weight, and of the stored values only where they were
    stored in the dtype that the dense weight had: float16 and int8 values stay what they are.

    Args:
        sparse: mask and values, as a file or `entries.split` has them.
        shape: the dense weight's shape.
        dtype: its floating dtype.
        axis: for int8 values, the dimension that the scales belong to.
        order: the dense weight's order in memory; see `Entry.order`.
    """

    values: Tensor
    index: Tensor
    counts: Tensor | None
    scales: Tensor | None

    def __init__(
        self,
        sparse: SparseWeight,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        axis: int | None = None,
        order: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.dtype, self.axis, self.order = torch.Size(shape), dtype, axis, order
        self.block = _block_size(self.shape)
        self._kept: Kept | None = None
        index, counts = _narrow_index(sparse.mask.view(_rows(self.shape), _row_length(self.shape)), self.block)
        tensors = {"values": sparse.values, "index": index, "counts": counts, "scales": sparse.scales}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight takes in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def zeros(self) -> int:
        """How many weights are not stored, because they are zero."""
        return self.shape.numel() - self.values.numel()

    @torch.no_grad()
    def forward(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.values.device)
        self._fill(dense, 0, 0)
        return entries.in_order(dense, self.order)

    def ready(self) -> Tensor:
        """The dense weight: the kept one, where there is one that is still right, or made anew."""
        if compiled.is_compiling():
            parts = (self.values, self.index, self.counts, self.scales, list(self.shape), self.dtype, self.block)
            order = None if self.order is None else list(self.order)
            dense: Tensor = torch.ops.iks_plugin.dense_weight(*parts, self.axis, order)
            return dense
        kept = self._kept
        return kept.dense if kept is not None and kept.is_of(self.values) else self()

    @property
    def is_kept(self) -> bool:
        return self._kept is not None

    def keep(self, memory_format: torch.memory_format) -> None:
        """Hold the dense weight in memory, in this order, until `drop`; nothing else changes."""
        kept = self._kept
        if kept is None or not kept.is_of(self.values) or kept.memory_format != memory_format:
            with torch.inference_mode(False):  # gradients may have to go through it later
                dense = self()
                if dense.ndim == 4:  # other weights have one layout only
                    dense = dense.contiguous(memory_format=memory_format)
            self._kept = Kept(dense, memory_format, self.values, version_of(self.values))

    def drop(self) -> None:
        """Undo `keep`."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    @torch.no_grad()
    def parts(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """The dense weight a few rows at a time, of about `size` weights: the first row's number, and the rows."""
        rows, done = _rows(self.shape), 0
        step = max(1, size // max(1, _row_length(self.shape)))
        for start in range(0, rows, step):
            shape = (min(step, rows - start), *self.shape[1:])
            part = torch.zeros(shape, dtype=self.dtype, device=self.values.device)
            done = self._fill(part, start, done)
            yield start, part

    def _fill(self, dense: Tensor, first: int, done: int) -> int:
        """Put the non-zeros of the rows from `first` on into `dense`, which is of some rows, all zero.

        In small steps: what is made for the way would leave larger holes in the memory than the weights take.

        Args:
            done: how many non-zeros the rows before have.

        Returns:
            The same for the rows that follow.
        """
        length = _row_length(self.shape)
        step = max(1, _AT_ONCE // max(1, length))
        flat, rows = dense.view(-1), dense.shape[0] if dense.ndim else 1
        for start in range(0, rows, step):
            positions = self._positions(first + start, first + min(rows, start + step), length, done)
            stored = self.values[done : done + positions.numel()]
            done += positions.numel()
            of_whole = positions + (first + start) * length
            values = entries.scaled(stored, self.scales, of_whole, self.shape, self.axis)
            flat[start * length : (start + step) * length][positions] = values.to(self.dtype)
        return done

    def _positions(self, start: int, stop: int, length: int, done: int) -> Tensor:
        """Where the non-zeros of the rows from `start` to `stop` are, counted from the first of these rows."""
        index = self.index
        if self.counts is None:
            bits = torch.arange(8, dtype=torch.uint8, device=index.device)
            mask = (index[start:stop].unsqueeze(2) >> bits & 1).view(stop - start, -1)[:, :length]
            return mask.reshape(-1).nonzero().view(-1)
        counts = self.counts[start:stop].long()
        rows = torch.arange(stop - start, device=index.device).unsqueeze(1) * length
        blocks = rows + torch.arange(counts.shape[1], device=index.device) * self.block
        firsts = blocks.view(-1).repeat_interleave(counts.view(-1))
        return firsts.add_(index[done : done + firsts.numel()])

    @torch.no_grad()
    def taps(self) -> tuple[Tensor, Tensor]:
        """Each non-zero's place within its block (uint8), and where each block's non-zeros begin (int32, one more)."""
        if self.counts is not None:
            index, counts = self.index, self.counts.view(-1)
        else:
            rows, length = _rows(self.shape), _row_length(self.shape)
            blocks = -(-length // self.block)
            positions = self._positions(0, rows, length, 0)
            index = (positions % length % self.block).to(torch.uint8)
            block = positions.div(length, rounding_mode="floor") * blocks
            block += (positions % length).div(self.block, rounding_mode="floor")
            counts = torch.bincount(block, minlength=rows * blocks)
        return index, torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        self.drop()
        before = self.dtype
        self.dtype = fn(torch.empty(0, dtype=before, device=self.values.device)).dtype
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            if buffer.is_floating_point() and (name == "scales" or buffer.dtype != before):
                bits = torch.int32 if buffer.itemsize == 4 else torch.int64 if buffer.itemsize == 8 else torch.int16
                self._buffers[name] = fn(buffer.view(bits)).view(buffer.dtype)  # moves it, and does not cast it
            else:
                self._buffers[name] = fn(buffer)
        return self

    def extra_repr(self) -> str:
        stored = str(self.values.dtype).removeprefix("torch.")
        return f"{tuple(self.shape)}, {self.values.numel():,} {stored} values, {self.nbytes:,} bytes"


def _unpacked(parts: compiled.Parts) -> Tensor:
    weight = PackedWeight.__new__(PackedWeight)
    nn.Module.__init__(weight)
    for name, part in vars(parts).items():
        setattr(weight, name, part)
    weight.shape = torch.Size(parts.shape)
    weight.order = None if parts.order is None else tuple(parts.order)
    return weight.forward()


compiled.register(_unpacked)


def _rows(shape: torch.Size) -> int:
    return shape[0] if shape else 1


def _row_length(shape: torch.Size) -> int:
    return shape.numel() // max(1, _rows(shape))


def _block_size(shape: torch.Size) -> int:
    """Weights of a block: at most 256, and in a convolution of two dimensions the kernels of whole input channels.

    About 144 weights are 16 channels of 3 x 3 kernels, whose rows of an image fit into a core's first cache.
    """
    kernel = shape[2] * shape[3] if len(shape) == 4 else 1
    if kernel == 1 or kernel > 256:
        return 256
    return min(shape[1], max(1, 144 // kernel)) * kernel


def _narrow_index(mask: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
    """Where the ones of each row of a `mask` are: bits, eight to a byte, or bytes and the counts of blocks."""
    rows, length = mask.shape
    steps: tuple[Tensor, ...] = mask.split(max(1, _AT_ONCE // max(1, length)))  # type: ignore[no-untyped-call]
    nonzeros, blocks = int(torch.count_nonzero(mask)), -(-length // block)
    if nonzeros + 2 * rows * blocks < rows * -(-length // 8):
        found = [_bytes_and_counts(step, block) for step in steps]
        return torch.cat([places for places, _ in found]), torch.cat([counts for _, counts in found])
    return torch.cat([_bits(step) for step in steps]), None


def _bytes_and_counts(mask: Tensor, block: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.nonzero(mask, as_tuple=True)
    blocks = -(-mask.shape[1] // block)
    numbers = rows.mul_(blocks).add_(columns.div(block, rounding_mode="floor"))
    counts = torch.bincount(numbers, minlength=mask.shape[0] * blocks)
    return (columns % block).to(torch.uint8), counts.view(-1, blocks).to(torch.int16)


def _bits(mask: Tensor) -> Tensor:
    rows, length = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -length % 8)).view(rows, -(-length // 8), 8).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8)


class Packed(Swapped):
    """Mixin, first base of every packed layer; its `weight` is made anew whenever it is read.

    For inference: in training mode with gradients switched on, reading the weight is an error. In eval mode gradients
    flow to a layer's input and to its bias as ever.
    """

    swapped_prefix = "Packed"
    packed_weight: PackedWeight

    def _get_weight(self) -> Tensor:
        if self.training:
            self._check_mode()
        weight: PackedWeight = self._modules["packed_weight"]  # type: ignore[assignment]  # sooner than by the attribute
        return weight.ready()

    def _check_mode(self) -> None:
        if self.training and torch.is_grad_enabled():
            raise IksError(
                f"a {type(self).__name__} has packed weights, which cannot be trained, and is in training mode: "
                f"call model.eval() for inference; to train, {UNPACK}"
            )

    def _set_weight(self, value: Any) -> None:
        raise IksError(f"the weight of a {type(self).__name__} is packed and cannot be set: {UNPACK}")

    weight = property(_get_weight, _set_weight, doc="The dense weight, made of the packed one.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if compiled.is_compiling():
            return super().forward(*args, **kwargs)
        weight: PackedWeight = self._modules["packed_weight"]  # type: ignore[assignment]
        is_large = not weight.is_kept and weight.shape.numel() > _LARGE and getattr(self, "groups", None) == 1
        if is_large and original_class(self).forward in _PLAIN_FORWARDS:
            return self._forward_in_parts(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def _forward_in_parts(self, input: Tensor) -> Tensor:  # the name that torch's layers give it
        self._check_mode()
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        channels = input.ndim - len(self.packed_weight.shape) + 1  # an input may lack the batch
        output: Tensor | None = None
        for start, part in self.packed_weight.parts(_PART):
            stop = start + len(part)
            computed: Tensor = self._conv_forward(input, part, None if bias is None else bias[start:stop])  # type: ignore[operator]
            if output is None:
                shape = [*computed.shape[:channels], self.packed_weight.shape[0], *computed.shape[channels + 1 :]]
                output = computed.new_empty(shape)
            output.narrow(channels, start, stop - start).copy_(computed)
        assert output is not None
        return output

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.packed_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *reports: list[str]
    ) -> None:
        *_, error_messages = reports
        if f"{prefix}weight" in state_dict:
            error_messages.append(f"{prefix}weight is packed and cannot be loaded into: {UNPACK}.")
            state_dict = {name: value for name, value in state_dict.items() if name != f"{prefix}weight"}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)


def packable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that can be packed, by name: plain ones with a weight that nothing else writes or shares.

    Raises:
        IksError: the model has gates, if only for a while none.
    """
    refuse_lent(model, "pack")
    written = written_by_blocks(model.modules())
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            raise IksError(f"the model is packed already ({name or 'the model itself'}): {UNPACK}")
        if isinstance(module, Gated):
            raise IksError(
                f"the model has gates ({name or 'the model itself'} is a {type(module).__name__}), which a packed one "
                "cannot have: call iks_plugin.finalize(model) first"
            )
        weight = module._parameters.get("weight")
        can_hold = isinstance(module, SUPPORTED_TYPES) and not hasattr(type(module), "weight")
        if can_hold and module not in written and weight is not None and not is_lazy(weight):
            layers[name] = module
    owned = {id(module._parameters["weight"]) for module in layers.values()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if module not in layers.values() or key != "weight":
                owned.discard(id(parameter))
    return {name: layer for name, layer in layers.items() if id(layer._parameters["weight"]) in owned}


def swap_in(packed: Mapping[nn.Module, PackedWeight]) -> None:
    """Turn each layer into a packed one that computes with the weight given for it."""
    for layer, weight in packed.items():
        del layer._parameters["weight"]
        layer.packed_weight = weight
        layer.__class__ = swapped_class(Packed, type(layer))


def class_unpacked(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, packed or not, as it is when it is not packed."""
    return original_class(layer) if isinstance(layer, Packed) else type(layer)


def is_packed(model: nn.Module) -> bool:
    """Whether `model`, or anything in it, has packed weights."""
    return any(isinstance(module, Packed) for module in model.modules())
