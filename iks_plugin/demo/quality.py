"""How good an enlarged photograph is: the networks' answers and their PSNR."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .photos import SCALE, Photo, Pixels, resize


def enlarge_bicubic(photo: Photo) -> Pixels:
    """Enlarge `photo.small` to the size of `photo.large` by bicubic interpolation: what needs no network."""
    height, width = photo.large.shape[:2]
    return resize(photo.small, height, width)


def enlarge(network: nn.Module, photo: Photo) -> Pixels:
    """Enlarge `photo.small` with `network`, rounded to (H, W, 3) uint8 like any stored image."""
    network.eval()
    images = torch.from_numpy(photo.small.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
    with torch.inference_mode():
        output: torch.Tensor = network(images)[0]
    pixels: Pixels = (output * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return pixels


def luma(image: Pixels) -> NDArray[np.float64]:
    """The Y channel of (H, W, 3) uint8 RGB by ITU-R BT.601, in [16, 235], as MATLAB's rgb2ycbcr computes it."""
    weights = np.array([65.481, 128.553, 24.966]) / 255
    y: NDArray[np.float64] = image.astype(np.float64) @ weights + 16
    return y


def psnr_y(image: Pixels, original: Pixels, border: int = SCALE) -> float:
    """Peak signal-to-noise ratio in dB on the Y channel, with `border` pixels cropped from every side.

    This is the measure of the EDSR paper (Lim et al., CVPRW 2017, section 4.2) and of BasicSR's benchmarks
    (`calculate_psnr` with `test_y_channel: true` and `crop_border` equal to the scale). Identical images give infinity.
    """
    inside = (slice(border, -border), slice(border, -border))
    error = float(np.mean((luma(image)[inside] - luma(original)[inside]) ** 2))
    return 10 * math.log10(255**2 / error) if error > 0 else math.inf
