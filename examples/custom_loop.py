"""A small super-resolution network becomes 90 % sparse in a training loop written by hand. Takes about a minute."""

import torch
from skimage import data  # photographs; pip install scikit-image
from torch import nn
from torch.nn.functional import interpolate, l1_loss

import iks_plugin

STEPS, PATCH = 800, 48


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def photograph(array) -> torch.Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


def shrink(large: torch.Tensor) -> torch.Tensor:
    return interpolate(large, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)


def enlarge(small: torch.Tensor) -> torch.Tensor:
    return interpolate(small, scale_factor=2, mode="bicubic") + model(small)


def psnr(output: torch.Tensor, original: torch.Tensor) -> float:
    return -10 * torch.log10(torch.mean((output.clamp(0, 1) - original) ** 2)).item()


torch.manual_seed(0)
training, held_out = photograph(data.stereo_motorcycle()[0]), photograph(data.astronaut())
hidden = [layer for _ in range(4) for layer in (conv(48, 48), nn.ReLU())]
model = nn.Sequential(conv(3, 48), nn.ReLU(), *hidden, conv(48, 12), nn.PixelShuffle(2))

controller = iks_plugin.sparsify(model, 0.9, total_steps=STEPS, ramp_start=STEPS // 5)
optimizer = torch.optim.Adam(controller.param_groups(lr=1e-3), lr=1e-3)
for step in range(1, STEPS + 1):
    corners = torch.randint(training.shape[2] - PATCH, (8, 2)).tolist()
    large = torch.cat([training[:, :, y : y + PATCH, x : x + PATCH] for y, x in corners])
    loss = l1_loss(enlarge(shrink(large)), large)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # the controller notices this step and moves the thresholds
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.4f}, sparsity {controller.sparsity:.2%}")

iks_plugin.finalize(model)
report = iks_plugin.report(model)
print(report)
assert report.zeros == round(0.9 * report.weights)
with torch.no_grad():
    bicubic = interpolate(shrink(held_out), scale_factor=2, mode="bicubic")
    sparse = enlarge(shrink(held_out))
print(f"held-out photograph: bicubic {psnr(bicubic, held_out):.2f} dB, sparse {psnr(sparse, held_out):.2f} dB")
