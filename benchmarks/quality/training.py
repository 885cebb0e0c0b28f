"""One training loop for the dense network and for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iks_plugin import IksError

from .methods import Method

Tick = Callable[[int], None]
"""Told after each optimizer step how many there have been; may raise to stop the training."""


class DivergedError(IksError):
    """The loss became infinite or NaN."""


def train(
    model: nn.Module,
    method: Method,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    tick: Tick,
    precision: str = "float32",
) -> None:
    """Adam from `lr` on a cosine to 0 over `steps`, L1 loss. `method` has been started on `model`.

    Images are laid out as channels_last, with which bfloat16 is a quarter faster on a CPU; results differ by rounding.

    Args:
        precision: "bfloat16" runs the forward pass under autocast; weights, loss and optimizer stay float32.

    Raises:
        DivergedError: the loss is not finite.
    """
    model.train()
    optimizer = torch.optim.Adam(method.parameter_groups(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for step in range(1, steps + 1):
        small, large = (images.contiguous(memory_format=torch.channels_last) for images in next(batches))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(large.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            output = model(small)
        loss = F.l1_loss(output.float(), large)
        if not math.isfinite(float(loss.detach())):
            raise DivergedError(f"the loss is {float(loss.detach())} at step {step} of {steps}")
        loss.backward()  # type: ignore[no-untyped-call]
        method.after_backward(step)
        optimizer.step()
        method.after_step(step)
        scheduler.step()
        tick(step)
