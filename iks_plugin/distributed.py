"""What the processes of a distributed training tell each other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

_AT_ONCE = 1 << 18
"""Numbers that are sent in one go."""


def take_the_first(tensors: Iterable[Tensor]) -> None:
    """In a distributed training, give tensors the values that they have in the first process.

    Args:
        tensors: of the same shapes and dtypes, and in the same order, in every process.
    """
    _exchange(tensors, lambda numbers: dist.broadcast(numbers, 0))


def average(tensors: Iterable[Tensor]) -> None:
    """In a distributed training, give floating-point tensors the mean over the processes.

    Args:
        tensors: of the same shapes and dtypes, and in the same order, in every process.
    """

    def mean(numbers: Tensor) -> None:
        dist.all_reduce(numbers)
        numbers /= dist.get_world_size()

    _exchange(tensors, mean)


@torch.no_grad()
def _exchange(tensors: Iterable[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run an in-place collective over the values of all tensors."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, dtype), group in alike.items():
        buffer = _buffer(device, dtype)
        values = torch.cat([tensor.flatten() for tensor in group])
        for part in torch.split(values, _AT_ONCE):
            buffer[: part.numel()].copy_(part)
            collective(buffer)
            part.copy_(buffer[: part.numel()])
        for tensor, part in zip(group, torch.split(values, [tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


@functools.cache
def _buffer(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The one tensor that is ever sent; it outlives every process group.

    A thread of gloo may hold what was sent for a while longer. In torch 2.1, where nothing else does any more, it waits
    for Python to let go of it, and Python, while it ends the process group, waits for that thread: for ever.
    """
    return torch.zeros(_AT_ONCE, device=device, dtype=dtype)
