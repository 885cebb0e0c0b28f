"""PSNR and SSIM as super-resolution papers give them: Y channel, 8 bits, borders cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from iks_plugin.demo.quality import luma, psnr_y

from .data import SSIM_WINDOW, Pixels, TestImage


@dataclass(frozen=True)
class Score:
    """How near a network comes to the large images, for each by name; PSNR in dB, SSIM in [-1, 1]."""

    psnr: dict[str, float]
    ssim: dict[str, float]

    @property
    def mean_psnr(self) -> float:
        return fmean(self.psnr.values())

    @property
    def mean_ssim(self) -> float:
        return fmean(self.ssim.values())


def evaluate(network: nn.Module, images: Sequence[TestImage], scale: int) -> Score:
    """Let `network` enlarge each image as a whole and compare; it is back in its mode afterwards."""
    was_training = network.training
    network.eval()
    outputs = {image.name: enlarge(network, image.small) for image in images}
    network.train(was_training)
    return Score(
        {image.name: psnr_y(outputs[image.name], image.large, scale) for image in images},
        {image.name: ssim_y(outputs[image.name], image.large, scale) for image in images},
    )


def enlarge(network: nn.Module, small: Pixels) -> Pixels:
    """What `network` makes of (H, W, 3) uint8, clamped and rounded to uint8 like any stored image."""
    device = next(network.parameters()).device
    inputs = torch.from_numpy(small.copy()).to(device).permute(2, 0, 1).unsqueeze(0).float() / 255
    with torch.inference_mode():
        output: Tensor = network(inputs)[0]
    pixels: Pixels = (output.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels


def ssim_y(image: Pixels, original: Pixels, border: int) -> float:
    """Structural similarity (Wang et al. 2004) of the Y channels, `border` pixels cut off every side.

    Gaussian windows of 11 x 11 with a deviation of 1.5, where they fit as a whole, as in the authors' MATLAB code.
    """
    inside = (slice(border, -border), slice(border, -border))
    x, y = (torch.from_numpy(luma(pixels)[inside].copy())[None, None] for pixels in (image, original))
    window = torch.from_numpy(_window())[None, None]
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    var_x = F.conv2d(x * x, window) - mean_x**2
    var_y = F.conv2d(y * y, window) - mean_y**2
    covariance = F.conv2d(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((ratio / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _window() -> NDArray[np.float64]:
    reach = SSIM_WINDOW // 2
    line = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * 1.5**2))
    window: NDArray[np.float64] = np.outer(line, line) / np.outer(line, line).sum()
    return window
