"""A small EDSR: the network that the demo trains."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """conv - ReLU - conv plus the identity, without batch normalisation (EDSR, section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        out: Tensor = x + self.conv2(self.relu(self.conv1(x)))
        return out


class EDSR(nn.Module):
    """EDSR of Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution" (CVPRW 2017), in small.

    Values are RGB in [0, 1]. The paper subtracts the mean colour of its training set in a frozen convolution; here it
    is mid-grey, a plain number, so that every convolution of the network is one that learns.
    """

    def __init__(self, channels: int = 64, blocks: int = 4, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        body = [ResidualBlock(channels) for _ in range(blocks)]
        self.body = nn.Sequential(*body, nn.Conv2d(channels, channels, 3, padding=1))
        self.upsample = nn.Sequential(
            nn.Conv2d(channels, channels * scale**2, 3, padding=1),
            nn.PixelShuffle(scale),
        )
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) in [0, 1] to (N, 3, scale * H, scale * W), around [0, 1] but not clamped to it."""
        features = self.head(x - 0.5)
        features = features + self.body(features)
        out: Tensor = self.tail(self.upsample(features)) + 0.5
        return out
