"""RRDBNet, the generator of ESRGAN: dense blocks, whose convolutions read what all those before have made."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DenseBlock(nn.Module):
    """Five convolutions, each on the block's input and all their outputs so far, and a scaled residual."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        inputs = [channels + number * growth for number in range(5)]
        outputs = [growth] * 4 + [channels]
        self.convs = nn.ModuleList(nn.Conv2d(*size, 3, padding=1) for size in zip(inputs, outputs, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in self.convs[:-1]:
            seen.append(F.leaky_relu(conv(torch.cat(seen, 1)), 0.2))
        out: Tensor = self.convs[-1](torch.cat(seen, 1)) * 0.2 + x
        return out


class RRDB(nn.Module):
    """Three dense blocks and a scaled residual."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(DenseBlock(channels, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x) * 0.2 + x
        return out


class RRDBNet(nn.Module):
    """RRDBNet x4; images are RGB in [0, 1]. ESRGAN has 23 blocks of 64 channels that grow by 32."""

    def __init__(self, blocks: int = 23, channels: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(RRDB(channels, growth) for _ in range(blocks)))
        self.conv_body = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_up1, self.conv_up2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.conv_hr = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv_first(x)
        features = features + self.conv_body(self.body(features))
        for conv in (self.conv_up1, self.conv_up2):
            features = F.leaky_relu(conv(F.interpolate(features, scale_factor=2.0, mode="nearest")), 0.2)
        out: Tensor = self.conv_last(F.leaky_relu(self.conv_hr(features), 0.2))
        return out
