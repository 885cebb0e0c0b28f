"""What the processes of a distributed training tell each other."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = 2.0
"""Seconds within which a backend's thread lets a tensor go, however busy the machine is."""


def take_the_first(tensors: Iterable[Tensor]) -> None:
    """In a distributed training, give tensors the values that they have in the first process.

    Args:
        tensors: of the same shapes and dtypes, and in the same order, in every process.
    """
    _exchange(tensors, lambda values: dist.broadcast(values, 0))


def average(tensors: Iterable[Tensor]) -> None:
    """In a distributed training, give floating-point tensors the mean over the processes.

    Args:
        tensors: of the same shapes and dtypes, and in the same order, in every process.
    """

    def mean(values: Tensor) -> None:
        dist.all_reduce(values)
        values /= dist.get_world_size()

    _exchange(tensors, mean)


@torch.no_grad()
def _exchange(tensors: Iterable[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run an in-place collective over the values of all tensors, as few at a time as devices and dtypes allow.

    It returns once no thread of the backend holds what was sent. In torch 2.1 a thread of gloo that is the last to hold
    a tensor waits for Python while Python, ending the process group, waits for that thread.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for group in alike.values():
        _sent(group, collective).wait(_PATIENCE)


def _sent(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> threading.Event:
    """Run the collective over a copy of the values and take its results; set once nothing holds that copy."""
    values = torch.cat([tensor.flatten() for tensor in tensors])
    collective(values)
    for tensor, part in zip(tensors, torch.split(values, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
    let_go = threading.Event()
    weakref.finalize(values, let_go.set).atexit = False
    return let_go
