"""How the loss bends over a layer's weights, seen from outside during a few training steps.

For weights W of a layer y = W u the second derivative of the loss is close to the Kronecker product of E[u u^T] and
E[g g^T], where u are the inputs of one output pixel (a patch of the image) and g is the gradient at y; for convolutions
times the number of pixels (Martens & Grosse 2015, Grosse & Martens 2016, "K-FAC"). Both are measured while the model
trains: the first as a matrix, the second as its diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import eager
from .distributed import average
from .layers import Gated

_POSITIONS = 512
"""Output pixels of a batch that are looked at in one step: few in many steps say more than many in few."""
_LARGEST = 1152
"""Rows of the largest matrix: wider layers are taken as parts of so many inputs, each by itself."""
_MEMORY = 12
"""Backward passes that a mean reaches back, about."""


@dataclass
class Curvature:
    """Running means for one layer.

    Attributes:
        inputs: E[u u^T], (groups, parts, n, n) float32. Where there is one part, the last row and column belong to the
            bias, if the layer has one.
        gradients: pixels * E[g^2], (outputs,) float32.
    """

    inputs: Tensor
    gradients: Tensor


class CurvatureWatcher:
    """Measures the curvature of layers while it is switched on, through hooks that nothing keeps or copies.

    Args:
        layers: returns the layers by name.
    """

    def __init__(self, layers: Callable[[], Mapping[str, Gated]]) -> None:
        self._layers = layers
        self._handle: Any = None
        self._names: dict[int, str] = {}
        self._means: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._missed: set[str] = set()

    def start(self) -> None:
        if self._handle is None:
            self._means.clear()
            self._missed.clear()
            self._names = {id(layer): name for name, layer in self._layers().items()}
            self._handle = nn.modules.module.register_module_forward_hook(self._on_forward)
        eager.hold(self)  # again, as torch.compile may have come up meanwhile

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            eager.let_go(self)

    def unfinished(self) -> dict[str, list[Tensor]]:
        """What this process has measured so far, on the CPU; empty while it is switched off."""
        if self._handle is None:
            return {}
        left = self._layers()
        return {
            name: [inputs.cpu().clone(), gradients.cpu().clone(), torch.tensor(count)]
            for name, (inputs, gradients, count) in self._means.items()
            if name in left
        }

    def resume(self, unfinished: Mapping[str, Sequence[Tensor]]) -> None:
        """Go on with what another watcher has measured, if this one is switched on."""
        if self._handle is not None:
            self._means = {
                name: (inputs.clone(), gradients.clone(), int(count))
                for name, (inputs, gradients, count) in unfinished.items()
            }

    @staticmethod
    def owns(hook: Any) -> bool:
        """Whether a hook on all modules is that of a watcher, which has nothing to do with layers without gates."""
        return isinstance(getattr(hook, "__self__", None), CurvatureWatcher)

    def found(self) -> dict[str, Curvature]:
        """What has been measured of each layer that took part; in a distributed training the mean over all of it."""
        found = {name: Curvature(inputs, gradients) for name, (inputs, gradients, _) in self._means.items()}
        layers = self._layers()
        device = next(iter(layers.values())).raw_weight.device
        shares = torch.tensor([name in found for name in layers], dtype=torch.float32, device=device)
        average([shares])  # of the processes that have measured a layer
        found = {name: found[name] for name, share in zip(layers, shares.tolist(), strict=True) if share == 1}
        average(part for curvature in found.values() for part in (curvature.inputs, curvature.gradients))
        return found

    def missed(self) -> list[str]:
        """Layers that had gradients to pass on but could not be measured, as in eval mode."""
        return sorted(self._missed - self._means.keys())

    def _on_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        name = self._names.get(id(module))
        if name is None or not isinstance(module, Gated):
            return
        if not isinstance(output, Tensor) or not output.requires_grad or not output.numel():
            return
        if not module.training or not arguments or not isinstance(arguments[0], Tensor):
            self._missed.add(name)
            return
        image, shape = arguments[0].detach(), output.shape

        def on_gradient(gradient: Tensor) -> None:  # so that a forward pass without a backward one does not count
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                self._measure(name, module, image.float(), gradient.detach().float(), shape)

        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    def _measure(self, name: str, layer: nn.Module, image: Tensor, gradient: Tensor, shape: torch.Size) -> None:
        if not _is_of_its_kind(layer, image, shape):
            self._missed.add(name)
            return
        patches = patches_of(layer, image, shape)
        if patches is None:
            return
        moments = patches.transpose(-1, -2) @ patches / patches.shape[-2]
        channel = channel_dimension(layer) % gradient.ndim
        others = [dimension for dimension in range(gradient.ndim) if dimension != channel]
        gradients = gradient.square().mean(others) * _pixels(layer, shape)
        if not bool(moments.isfinite().all() & gradients.isfinite().all()):
            return  # scaled gradients overflow now and then
        inputs_before, gradients_before, count = self._means.get(name, (moments, gradients, 0))
        count = min(count + 1, _MEMORY)
        self._means[name] = (
            torch.lerp(inputs_before.to(moments.device), moments, 1 / count),
            torch.lerp(gradients_before.to(gradients.device), gradients, 1 / count),
            count,
        )


def channel_dimension(layer: nn.Module) -> int:
    """The dimension of the layer's output that counts its channels, from the end."""
    return {nn.Linear: -1, nn.Conv1d: -2}.get(_kind(layer), -3)


def _kind(layer: nn.Module) -> type[nn.Module]:
    return next((kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d) if isinstance(layer, kind)), nn.Module)


def _is_of_its_kind(layer: nn.Module, image: Tensor, output: torch.Size) -> bool:
    """Whether a layer makes an output of that shape of `image`, as its kind does: a subclass may change either."""
    kind = _kind(layer)
    if kind is nn.Module:
        return True
    inputs = _inputs_and_taps(layer)[0] * getattr(layer, "groups", 1)
    outputs = layer._parameters["weight"].shape[0]  # type: ignore[union-attr]
    channel = channel_dimension(layer)
    if len(output) != image.ndim or image.ndim < -channel or output[:channel] != image.shape[:channel]:
        return False
    if image.shape[channel] != inputs or output[channel] != outputs:
        return False
    if kind is nn.Linear:
        return True
    conv: Any = layer
    padding = conv._reversed_padding_repeated_twice[::-1]
    geometry = zip(conv.kernel_size, conv.stride, conv.dilation, padding[1::2], padding[::2], strict=True)
    sides = [
        (side + before + after - dilation * (kernel - 1) - 1) // stride + 1
        for side, (kernel, stride, dilation, before, after) in zip(image.shape[channel + 1 :], geometry, strict=True)
    ]
    return list(output[channel + 1 :]) == sides


def _pixels(layer: nn.Module, shape: torch.Size) -> float:
    """Output pixels of one image; 1 for a linear layer, whose inputs are pixels or tokens of any arrangement."""
    kind = _kind(layer)
    return 1.0 if kind is nn.Linear else float(math.prod(shape[channel_dimension(layer) + 1 :]))


def parts_of(layer: nn.Module) -> int:
    """Into how many parts the inputs of each of the layer's groups are cut: the fewest that are small enough."""
    inputs, taps = _inputs_and_taps(layer)
    return next(p for p in range(1, inputs + 1) if inputs % p == 0 and (inputs // p * taps <= _LARGEST or p == inputs))


def _inputs_and_taps(layer: nn.Module) -> tuple[int, int]:
    shape = layer.raw_weight.shape if isinstance(layer, Gated) else layer._parameters["weight"].shape  # type: ignore[union-attr]
    return shape[1], math.prod(shape[2:])


def patches_of(layer: nn.Module, image: Tensor, shape: torch.Size) -> Tensor | None:
    """What the pixels of an output of `shape` are made of: (groups, parts, pixels, n), with a 1 for the bias.

    None for layers of other kinds than Linear, Conv1d and Conv2d.
    """
    kind = _kind(layer)
    groups = getattr(layer, "groups", 1)
    inputs, taps = _inputs_and_taps(layer)
    if kind is nn.Linear:
        rows = image.reshape(-1, image.shape[-1])
        found = rows[:: max(1, len(rows) // _POSITIONS)]
    elif kind is nn.Module:
        return None
    else:
        if image.ndim == len(layer.kernel_size) + 1:  # type: ignore[arg-type]
            image = image.unsqueeze(0)  # one without a batch
        mode = layer.padding_mode if layer.padding_mode != "zeros" else "constant"
        image = F.pad(image, layer._reversed_padding_repeated_twice, mode=str(mode))  # type: ignore[arg-type]
        geometry: list[tuple[int, ...]] = [layer.kernel_size, layer.stride, layer.dilation]  # type: ignore[list-item]
        if kind is nn.Conv1d:
            image, geometry = image.unsqueeze(2), [(1, *numbers) for numbers in geometry]
        kernel, stride, dilation = geometry
        every = max(1, math.isqrt(len(image) * math.prod(shape[channel_dimension(layer) + 1 :]) // _POSITIONS))
        steps = tuple(every * one for one in stride)
        found = F.unfold(image, kernel, dilation, 0, steps).transpose(1, 2).flatten(0, 1)
    parts = parts_of(layer)
    found = found.view(len(found), groups, parts, inputs // parts * taps).permute(1, 2, 0, 3)
    if parts == 1 and getattr(layer, "bias", None) is not None:
        found = torch.cat([found, found.new_ones(*found.shape[:-1], 1)], dim=-1)
    return found
