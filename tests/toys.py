"""Small models, named for the trouble they make, and the loop that trains them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def plain_sr(channels: int = 16) -> nn.Sequential:
    """Head and tail face the image; the two convolutions between them are to be rewritten."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.Conv2d(channels, 3, 3, padding=1),
    )


class ReadsWeightByHand(nn.Module):
    """Convolves with `.weight` itself, and merges two kernels into one in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.conv1(F.conv2d(x, self.conv3.weight, self.conv3.bias, padding=1))
        mixed = self.conv1.weight[:, :, 0, 0]
        kernel = torch.einsum("oi,icyx->ocyx", mixed, self.conv3.weight)
        return F.conv2d(x, kernel, mixed @ self.conv3.bias + self.conv1.bias, padding=1)


class MergesInEvalMode(nn.Module):
    """Trains two convolutions, and in eval mode writes their product into a third, which training never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.merged = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.second(self.first(x))
        self.merged.weight.data = torch.einsum("omyx,mi->oiyx", self.second.weight, self.first.weight[:, :, 0, 0])
        self.merged.bias.data = self.second.bias.data
        return self.merged(x)


class UnusedLayer(nn.Module):
    """One of its layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Conv2d(8, 8, 3, padding=1)
        self.unused = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class StandardisedConv2d(nn.Conv2d):
    """A third-party subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class DefinesWeightItself(nn.Conv2d):
    """A subclass whose class attribute stands where the gate would."""

    @property
    def weight(self) -> Tensor:
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return 2 * self._parameters["weight"]

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.register_parameter("weight", value)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self._parameters["weight"])
        nn.init.zeros_(self.bias)


class TiedConvs(nn.Module):
    """Two layers that hold one and the same weight."""

    def __init__(self, partner: Callable[[], nn.Module] = lambda: nn.Conv2d(8, 8, 3, padding=1)) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = partner()
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class BorrowsWeight(nn.Module):
    """Holds a convolution's weight as a bare parameter of its own as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.free = nn.Conv2d(8, 8, 3, padding=1)
        self.kernel = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.conv(x)) + F.conv2d(x, self.kernel, padding=1)


class LeftAlone(nn.Module):
    """One layer for each reason not to rewrite it, and one good layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3)
        self.tail = nn.Conv2d(8, 4, 3)
        self.good = nn.Conv2d(8, 8, 3)
        self.frozen = nn.Conv2d(8, 8, 3).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
        self.old_spectral = nn.utils.spectral_norm(nn.Conv2d(8, 8, 3))
        self.zero = nn.Conv2d(8, 8, 3)
        nn.init.zeros_(self.zero.weight)
        self.unwanted = nn.Conv2d(8, 8, 3)
        self.linear = nn.Linear(8, 8)
        self.own = DefinesWeightItself(8, 8, 3)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(8, 6, 3, padding=1), (2, 8, 5, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(8, 6, 3, stride=2), (2, 8, 9)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), (2, 8, 9, 9)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(8, 6, 2, stride=2), (2, 8, 5, 5, 5)),
    "linear": (lambda: nn.Linear(8, 6), (2, 5, 8)),
    "groups": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 9)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, groups=2), (2, 8, 9, 9)),
    "depthwise transposed": (lambda: nn.ConvTranspose2d(8, 8, 3, groups=8), (2, 8, 9, 9)),
    "dilated": (lambda: nn.Conv2d(8, 6, 3, dilation=2), (2, 8, 9, 9)),
    "strided": (lambda: nn.Conv2d(8, 6, 3, stride=2), (2, 8, 9, 9)),
    "no bias": (lambda: nn.Conv2d(8, 6, 3, bias=False), (2, 8, 9, 9)),
    "pad same": (lambda: nn.Conv2d(8, 6, 3, padding="same"), (2, 8, 9, 9)),
    "pad reflect": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), (2, 8, 9, 9)),
    "pad replicate": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="replicate"), (2, 8, 9, 9)),
    "pad circular": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), (2, 8, 9, 9)),
    "own forward": (lambda: StandardisedConv2d(8, 6, 3), (2, 8, 9, 9)),
}
"""Every kind of layer that can be rewritten or packed: how to make one, and the shape of an input."""


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0, channels: int = 3
) -> list[float]:
    """A plain loop on noise; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    losses = []
    for _ in range(steps):
        x = torch.randn(2, channels, 10, 10, generator=generator, dtype=weight.dtype).to(weight.device)
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def spread_thresholds(model: nn.Module, share: float = 0.5) -> None:
    """Set every threshold so that about `share` of its layer's weights are gated to zero."""
    from iks_plugin.layers import gated_layers

    with torch.no_grad():
        for layer in gated_layers(model).values():
            cut = layer.raw_weight.abs().flatten().quantile(share).clamp(1e-6, 1 - 1e-6)
            layer.threshold.fill_(torch.logit(cut))


def states_equal(one: object, other: object) -> bool:
    """Whether two nested states (dicts, lists, tensors, numbers) are the same to the bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(states_equal(one[k], other[k]) for k in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(states_equal, one, other))  # type: ignore[arg-type]
    return one == other
