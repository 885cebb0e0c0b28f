"""How fast a network is packed, against the same network dense: time, memory, and how each layer runs."""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import IksError, OptionError
from .fast import paths
from .packing import pack, unpack
from .runtime import Packed, is_packed
from .table import table


@dataclass(frozen=True)
class Layer:
    """A packed layer: its name, the share of its weights that is zero, its bytes packed and dense, and how it runs."""

    name: str
    sparsity: float
    packed: int
    dense: int
    path: str


@dataclass(frozen=True)
class Bench:
    """Medians of some runs in turn, in seconds; for dense the faster of PyTorch's two layouts of memory."""

    image: tuple[int, ...]
    threads: int
    dense: float
    dense_layout: str
    packed: float
    layers: tuple[Layer, ...]
    dense_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        rows = [
            (layer.name, f"{layer.sparsity:.2%}", f"{layer.packed:,}", f"{layer.dense:,}", layer.path)
            for layer in self.layers
        ]
        lines = (
            [table(("packed layer", "zeros", "bytes", "dense", "runs as"), rows, right={1, 2, 3}), ""] if rows else []
        )
        size = "x".join(map(str, self.image))
        lines.append(f"image {size}, {self.threads} threads, medians of runs in turn")
        lines.append(f"dense:  {1000 * self.dense:9.1f} ms ({self.dense_layout}), weights {self.dense_bytes:,} bytes")
        if not rows:
            return "\n".join((*lines, "packed: the same network, as no layer has zeros enough to be packed"))
        ratio = f"{self.dense / self.packed:.2f} times as fast"
        share = f"{self.packed_bytes / self.dense_bytes:.1%} of dense"
        lines.append(f"packed: {1000 * self.packed:9.1f} ms, {ratio}, weights {self.packed_bytes:,} bytes, {share}")
        return "\n".join(lines)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of "320x180", which gives the width first, as pictures do."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if match is None or not int(match[1]) or not int(match[2]):
        raise OptionError(f"size must be width x height in pixels, such as 320x180, got {text!r}")
    return int(match[2]), int(match[1])


@torch.no_grad()
def bench(model: nn.Module, size: tuple[int, int], rounds: int = 5) -> Bench:
    """Run `model`, packed or to be packed, and its dense copy on an image of random numbers, in turn.

    Args:
        model: a network for images of 3 channels, or else of 1, with zeros; it is packed afterwards.
        size: height and width of the image.
        rounds: how often each runs; medians count.

    Raises:
        IksError: it takes no such image of that size.
    """
    if not is_packed(model):
        pack(model)
    image = _image_for(model, size)
    dense = unpack(copy.deepcopy(model)).to(memory_format=torch.contiguous_format)
    dense_last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    image_last = image.to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], Tensor]] = {
        "packed": lambda: model(image),
        "contiguous": lambda: dense(image),
        "channels_last": lambda: dense_last(image_last),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:  # the first run measures, compiles and makes memory
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    layout = min(("contiguous", "channels_last"), key=medians.__getitem__)
    return Bench(
        image=tuple(image.shape[1:]),
        threads=torch.get_num_threads(),
        dense=medians[layout],
        dense_layout=layout,
        packed=medians["packed"],
        layers=_layers(model),
        dense_bytes=_bytes(dense),
        packed_bytes=_bytes(model),
    )


def _image_for(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """Random numbers that `model` takes: 3 channels, or else 1."""
    reasons = []
    for channels in (3, 1):
        try:
            image = torch.rand(1, channels, *size)
            model(image)
        except Exception as error:  # no memory for it, or whatever a network makes of an image that it does not take
            reasons.append((str(error).strip() or type(error).__name__).splitlines()[0])
        else:
            return image
    raise IksError(
        f"the network takes no image of {size[1]} x {size[0]} pixels, with 3 channels ({reasons[0]}) or with 1 "
        f"({reasons[1]}): expected a network for one such image, try another --size"
    )


def _layers(model: nn.Module) -> tuple[Layer, ...]:
    ways = paths(model)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            weight = module.packed_weight
            numel = weight.shape.numel()
            found.append(Layer(name, weight.zeros / numel, weight.nbytes, numel * weight.dtype.itemsize, ways[name]))
    return tuple(found)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
