"""Random networks of everything that streams, on images of random sizes: row by row they give what torch gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import iks_plugin
from iks_plugin import tracing
from iks_plugin.trust import is_same

pytest.importorskip("numba")

Step = tuple[Callable[..., Tensor], tuple[int, ...]]
"""What makes a new value, and of which earlier ones."""


class AnyNetwork(nn.Module):
    """So many operations on values that were made before; several of them come out."""

    def __init__(self, random: Random, depth: int) -> None:
        super().__init__()
        self.random, self.layers, self.steps = random, nn.ModuleList(), list[Step]()
        self.channels, self.level = [3], [0]  # of each value; a level up is twice the size
        self._add(self._convolution(3, 8, kernel_size=3, padding=1), (0,), 8, 0)
        for _ in range(depth):
            last = len(self.channels) - 1
            at = last if random.random() < 0.75 else random.randint(1, last)
            getattr(self, random.choice(self.KINDS))(at)
        last = len(self.channels) - 1
        self._add(self._convolution(self.channels[last], 8, kernel_size=3, padding=1), (last,), 8, self.level[last])
        chosen = {number for number in range(2, last + 1) if random.random() < 0.08}
        self.outputs = [last + 1, *sorted(chosen)]
        del self.random

    KINDS = (
        *("_same_size", "_same_size", "_same_size", "_even", "_valid", "_down", "_up", "_shuffle", "_activate"),
        *("_sum", "_join", "_split", "_slice", "_scale"),
    )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for make, sources in self.steps:
            values.append(make(*(values[source] for source in sources)))
        return tuple(values[number] for number in self.outputs)

    def _add(self, make: Callable[..., Tensor], sources: tuple[int, ...], channels: int, level: int) -> None:
        self.steps.append((make, sources))
        self.channels.append(channels)
        self.level.append(level)

    def _convolution(self, inputs: int, outputs: int, **options: object) -> nn.Module:
        self.layers.append(nn.Conv2d(inputs, outputs, **options))  # type: ignore[arg-type]
        return self.layers[-1]

    def _convolve(self, at: int, level: int = 0, **options: object) -> None:
        outputs = self.random.choice([4, 8, 12])
        layer = self._convolution(self.channels[at], outputs, **options)
        self._add(layer, (at,), outputs, self.level[at] + level)

    def _same_size(self, at: int) -> None:
        kernel, dilation = self.random.choice([1, 3, 5]), self.random.choice([1, 1, 2])
        mode = self.random.choice(["zeros", "zeros", "reflect", "replicate"])
        groups = self.random.choice([1, 1, 2, 4]) if self.channels[at] % 4 == 0 else 1
        padding = dilation * (kernel // 2)
        self._convolve(at, kernel_size=kernel, padding=padding, dilation=dilation, padding_mode=mode, groups=groups)

    def _even(self, at: int) -> None:
        mode = self.random.choice(["zeros", "replicate"])
        kernel = self.random.choice([(2, 4), (4, 3), (2, 2), (1, 6)])
        self._convolve(at, kernel_size=kernel, padding="same", padding_mode=mode)

    def _valid(self, at: int) -> None:
        self._convolve(at, kernel_size=(3, 1), padding=(1, 0), bias=False)

    def _down(self, at: int) -> None:
        kernel = self.random.choice([2, 3, 4])
        self._convolve(at, -1, kernel_size=kernel, stride=2, padding=(kernel - 1) // 2)

    def _up(self, at: int) -> None:
        if self.level[at] < 1:
            self._add(lambda x: F.interpolate(x, scale_factor=2), (at,), self.channels[at], self.level[at] + 1)

    def _shuffle(self, at: int) -> None:
        if self.level[at] < 1 and self.channels[at] % 4 == 0:
            self._add(lambda x: F.pixel_shuffle(x, 2), (at,), self.channels[at] // 4, self.level[at] + 1)

    def _activate(self, at: int) -> None:
        slope = self.random.choice([0.0, 0.2])
        self._add(lambda x: F.leaky_relu(x, slope), (at,), self.channels[at], self.level[at])

    def _sum(self, at: int) -> None:
        pairs = zip(self.channels, self.level, strict=True)
        alike = [number for number, pair in enumerate(pairs) if pair == (self.channels[at], self.level[at])]
        self._add(lambda x, y: x + y, (at, self.random.choice(alike)), self.channels[at], self.level[at])

    def _join(self, at: int) -> None:
        alike = [number for number, level in enumerate(self.level) if number and level == self.level[at]]
        other = self.random.choice(alike)
        if self.channels[at] + self.channels[other] <= 48:
            joined = self.channels[at] + self.channels[other]
            self._add(lambda x, y: torch.cat([x, y], 1), (at, other), joined, self.level[at])

    def _split(self, at: int) -> None:
        channels = self.channels[at]
        if channels > 2:
            first, which = self.random.randint(1, channels - 1), self.random.choice([0, 1, -1])
            sizes = [first, channels - first]
            self._add(lambda x: x.split(sizes, 1)[which], (at,), sizes[which], self.level[at])

    def _slice(self, at: int) -> None:
        if self.channels[at] > 3:
            self._add(lambda x: x[:, 1:-1], (at,), self.channels[at] - 2, self.level[at])

    def _scale(self, at: int) -> None:
        self._add(lambda x: x * 0.9 + 0.1, (at,), self.channels[at], self.level[at])


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    random=st.randoms(use_true_random=False),
    depth=st.sampled_from([4, 10, 30]),
    share=st.sampled_from([0.0, 0.6, 0.9]),
    size=st.tuples(st.integers(1, 2), st.integers(8, 64), st.integers(8, 90)),
    threads=st.integers(1, 4),
)
def test_any_graph(random: Random, depth: int, share: float, size: tuple[int, int, int], threads: int) -> None:
    plain = AnyNetwork(random, depth).eval()
    with torch.no_grad():
        for layer in plain.layers:
            layer.weight.mul_(1.5 * (torch.rand_like(layer.weight) >= share))  # type: ignore[operator]
        plain.layers[-1].weight.mul_(torch.rand_like(plain.layers[-1].weight) >= 0.8)  # type: ignore[operator, arg-type]
    image = torch.rand(size[0], 3, *size[1:])
    model = iks_plugin.pack(copy.deepcopy(plain))
    with torch.inference_mode():
        try:
            expected = plain(image)
        except RuntimeError:  # sizes that do not fit together, or too small ones
            return
        steps = tracing.trace(model, image.shape).steps
        assert steps is not None
        torch.set_num_threads(threads)
        try:
            result = tracing.run(steps, dict(model.named_modules()), image)
        finally:
            torch.set_num_threads(1)
    assert is_same(result, expected)
