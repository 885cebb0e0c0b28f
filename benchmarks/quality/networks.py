"""Small versions of the networks of the literature: large enough to be what they are, small enough for a CPU.

Images are RGB in [0, 1]; a network maps (N, 3, H, W) to (N, 3, scale * H, scale * W). All subtract mid-grey rather than
a data set's mean colour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import edsr


def upsampler(channels: int, scale: int) -> nn.Sequential:
    """Sub-pixel convolutions (Shi et al., CVPR 2016), one for each factor of 2."""
    if scale not in (2, 4):
        raise ValueError(f"scale must be 2 or 4, got {scale}")
    stages: list[nn.Module] = []
    for _ in range(scale // 2):
        stages += [nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*stages)


class EDSR(edsr.EDSR):
    """Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution" (CVPRW 2017)."""

    def __init__(self, blocks: int, channels: int, scale: int) -> None:
        super().__init__(blocks, channels)
        if scale != 2:
            self.upsample = upsampler(channels, scale)


class ChannelAttention(nn.Module):
    """The channels weighed by a small network over their `statistics` (RCAN, section 3.3)."""

    def __init__(self, channels: int, squeezed: int, statistics: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.statistics = statistics
        self.weigh = nn.Sequential(
            nn.Conv2d(channels, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.weigh(self.statistics(x))
        return out


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def contrast(x: Tensor) -> Tensor:
    """Mean plus standard deviation of each channel (IMDN, section 3.3)."""
    return mean(x) + (x.var((2, 3), unbiased=False, keepdim=True) + 1e-8).sqrt()


class RCAB(nn.Module):
    """Residual channel attention block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            ChannelAttention(channels, channels // 8, mean),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class ResidualGroup(nn.Module):
    def __init__(self, blocks: int, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(RCAB(channels) for _ in range(blocks)), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class RCAN(nn.Module):
    """Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks" (ECCV 2018)."""

    def __init__(self, groups: int, blocks: int, channels: int, scale: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(
            *(ResidualGroup(blocks, channels) for _ in range(groups)), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.upsample = upsampler(channels, scale)
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(x - 0.5)
        out: Tensor = self.tail(self.upsample(features + self.body(features))) + 0.5
        return out


class Distillation(nn.Module):
    """Information multi-distillation block: a quarter of the channels is set aside at each of three steps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kept = channels // 4
        self.sizes = [kept, channels - kept]
        self.steps = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1)
            for inputs, outputs in (
                (channels, channels),
                (channels - kept, channels),
                (channels - kept, channels),
                (channels - kept, kept),
            )
        )
        self.activation = nn.LeakyReLU(0.05)
        self.attention = ChannelAttention(channels, channels // 4, contrast)
        self.fuse = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, rest = [], x
        for index, step in enumerate(self.steps):
            features = step(rest)
            if index < len(self.steps) - 1:
                aside, rest = torch.split(self.activation(features), self.sizes, dim=1)
            else:
                aside = features
            kept.append(aside)
        out: Tensor = x + self.fuse(self.attention(torch.cat(kept, 1)))
        return out


class IMDN(nn.Module):
    """Hui et al., "Lightweight Image Super-Resolution with Information Multi-distillation Network" (ACM MM 2019)."""

    def __init__(self, blocks: int, channels: int, scale: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Distillation(channels) for _ in range(blocks))
        self.gather = nn.Sequential(nn.Conv2d(blocks * channels, channels, 1), nn.LeakyReLU(0.05))
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(channels, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        features = rest = self.head(x - 0.5)
        outputs = []
        for block in self.blocks:
            rest = block(rest)
            outputs.append(rest)
        out: Tensor = self.upsample(features + self.smooth(self.gather(torch.cat(outputs, 1)))) + 0.5
        return out


@dataclass(frozen=True)
class Network:
    """A network by name: its scale, how it is made, and what to call it in tables."""

    title: str
    scale: int
    make: Callable[[], nn.Module]


NETWORKS = {
    "edsr-8x32-x2": Network("EDSR 8 x 32, x2", 2, lambda: EDSR(8, 32, 2)),
    "edsr-16x64-x2": Network("EDSR 16 x 64, x2", 2, lambda: EDSR(16, 64, 2)),
    "rcan-2x4x32-x2": Network("RCAN 2 x 4 x 32, x2", 2, lambda: RCAN(2, 4, 32, 2)),
    "imdn-4x32-x2": Network("IMDN 4 x 32, x2", 2, lambda: IMDN(4, 32, 2)),
    "edsr-8x32-x4": Network("EDSR 8 x 32, x4", 4, lambda: EDSR(8, 32, 4)),
    "edsr-1x8-x2": Network("EDSR 1 x 8, x2", 2, lambda: EDSR(1, 8, 2)),  # to try the lab itself
}


def title_of(name: str) -> str:
    """What tables call the network; its name where rows have one that is no longer known."""
    return NETWORKS[name].title if name in NETWORKS else name


def make_network(name: str, seed: int) -> nn.Module:
    """The network called `name` with initial weights by `seed`, on the CPU; torch's own random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name].make()


def work_per_step(name: str, batch: int, patch: int) -> float:
    """Multiplications of one training step in millions, roughly: what progress bars count."""
    network = make_network(name, 0)
    total = 0.0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d)
        total += layer.weight.numel() * output.shape[-1] * output.shape[-2]

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, patch, patch))
    return 3 * batch * total / 1e6
