"""What the benchmarks of files and memory share: EDSR in two sizes, weights for it with zeros, and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Size = tuple[int, int]
"""Blocks and channels."""
SIZES: dict[str, Size] = {"16x64": (16, 64), "32x256": (32, 256)}


class ResidualBlock(nn.Module):
    """conv - ReLU - conv plus the identity."""

    def __init__(self, channels: int, residual_scale: float) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.residual_scale * self.conv2(self.conv1(x).relu_())
        return out


class EDSR(nn.Module):
    """EDSR x2, its parameters named and shaped as in BasicSR; images are RGB in [0, 1]."""

    def __init__(self, blocks: int, channels: int) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        scale = 0.1 if channels > 64 else 1.0  # without it, the paper's large network does not train
        self.body = nn.Sequential(*(ResidualBlock(channels, scale) for _ in range(blocks)))
        self.conv_after_body = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2))
        self.conv_last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv_first(x - 0.5)
        features = features + self.conv_after_body(self.body(features))
        out: Tensor = self.conv_last(self.upsample(features)) + 0.5
        return out


def shapes_of(size: Size) -> dict[str, torch.Size]:
    """The shape of each tensor in the state dict."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in EDSR(*size).state_dict().items()}


def masks_for(size: Size, zeros: float, evenly: bool, seed: int = 0) -> dict[str, Tensor]:
    """Where the non-zeros are in the weights of the body and the upsampler: bools, at random places.

    The convolutions that face the image stay dense, as usual in sparse super-resolution. `zeros` is the share over all
    the layers. Where they are not spread evenly, the layers' densities are logistic in equal steps, in a random order:
    the densest layers have some 50 times the odds of the sparsest.
    """
    random = torch.Generator().manual_seed(seed)
    shapes = {
        name: shape
        for name, shape in shapes_of(size).items()
        if name.endswith("weight") and not name.startswith(("conv_first", "conv_last"))
    }
    sizes = torch.tensor([shape.numel() for shape in shapes.values()], dtype=torch.float64)
    steps = torch.linspace(-2, 2, len(sizes), dtype=torch.float64)[torch.randperm(len(sizes), generator=random)]
    steps *= 0 if evenly else 1
    low, high = -30.0, 30.0  # bisection for the shift at which the densities add up
    for _ in range(100):
        shift = (low + high) / 2
        too_many = float((sizes * torch.sigmoid(steps + shift)).sum()) > (1 - zeros) * float(sizes.sum())
        low, high = (low, shift) if too_many else (shift, high)
    densities = torch.sigmoid(steps + (low + high) / 2)
    masks = {}
    for (name, shape), density in zip(shapes.items(), densities.tolist(), strict=True):
        mask = torch.zeros(shape.numel(), dtype=torch.bool)
        mask[torch.randperm(shape.numel(), generator=random)[: round(density * shape.numel())]] = True
        masks[name] = mask.view(shape)
    return masks


def laplace_state(size: Size, masks: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """A state dict of Laplace-like values, as trained weights are, with the zeros of `masks`.

    Weights that a soft threshold has pruned are as Laplace-like as they were before: what is left of an exponential
    tail beyond any threshold is the same exponential. So the zeros may as well be anywhere.
    """
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes_of(size).items():
        width = 1 / math.sqrt(shape[1:].numel())
        sign = torch.randint(0, 2, shape, generator=random).mul_(2).sub_(1)
        values = torch.empty(shape).exponential_(1 / width, generator=random).mul_(sign)
        state[name] = values.masked_fill_(~masks[name], 0.0) if name in masks else values
    return state


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], markdown: bool = False) -> str:
    """Aligned columns, the first one to the left; as Markdown if asked."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs)]
        for pairs in ([*zip(row, widths, strict=True)] for row in cells)
    ]
    if markdown:
        ruler = "|".join("-" * (width + 1) + ("-" if not place else ":") for place, width in enumerate(widths))
        return "\n".join(
            [f"| {' | '.join(lines[0])} |", f"|{ruler}|", *(f"| {' | '.join(line)} |" for line in lines[1:])]
        )
    return "\n".join("  ".join(line).rstrip() for line in lines)
