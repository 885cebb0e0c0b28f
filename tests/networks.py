"""What the tests know about one network that somebody else wrote: how to build it small, and what to feed it.

The tables of cases are in `networks_basicsr.py` and `networks_spandrel.py`. A class is named by a string and imported
when it is built, so that a table can be read where its library is not installed.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

Shape = tuple[int, ...]
Build = Callable[..., nn.Module]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Network:
    """One case of a table.

    Attributes:
        name: the architecture, and after a dash what this variant of it shows.
        target: `module:class`.
        options: keyword arguments of the class.
        shapes: the shapes of the forward's inputs, images in [0, 1].
        written: patterns of convolutions whose weight their block writes by itself in eval mode.
        unused: patterns of convolutions that cannot change the output in train mode, so they never get a gradient.
        asleep: patterns of convolutions whose gradient is zero at first, because a layer behind them starts at zero.
        tolerance: bound on the relative change of the output by gates at their initial threshold, which take 6e-6 off
            each weight: that is 1e-4 to 9e-4 of the typical weight in a layer here.
        construct: builds the network where the class alone cannot; called with the class and the options.
        make_inputs: the forward's inputs where they are not images of `shapes`.
        note: what is special about the network.
    """

    name: str
    target: str
    options: Mapping[str, Any]
    shapes: tuple[Shape, ...]
    written: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    asleep: tuple[str, ...] = ()
    tolerance: float = 1e-3
    construct: Callable[[Build, Mapping[str, Any]], nn.Module] | None = None
    make_inputs: Callable[[], tuple[Any, ...]] | None = None
    note: str = ""

    def build(self, seed: int) -> nn.Module:
        """The network in train mode, float32, on the CPU; its weights depend on the seed only."""
        module_name, class_name = self.target.split(":")
        cls = getattr(importlib.import_module(module_name), class_name)
        seed_everything(seed)
        model = cls(**self.options) if self.construct is None else self.construct(cls, self.options)
        wake(model)
        return model.train()

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """Fresh inputs of the forward; they depend on the seed only."""
        seed_everything(seed)
        return tuple(torch.rand(shape) for shape in self.shapes) if self.make_inputs is None else self.make_inputs()


def seed_everything(seed: int) -> None:
    """Also Python's and NumPy's generators, which some networks draw their noise from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def wake(model: nn.Module) -> None:
    """Give parameters outside the convolutions that are zero or hardly more a random value around 0.1.

    Many networks start residual scales, modulations or attention gains there, which all but switches whole branches
    off: the output would not depend on the convolutions in them, and a wrong weight there would go unseen.
    """
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                is_kernel = isinstance(module, CONVOLUTIONS) and name.startswith("weight")
                if not is_kernel and parameter.requires_grad and parameter.abs().le(0.01).all():
                    parameter.normal_(std=0.1)
