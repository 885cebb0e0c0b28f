"""Networks that run row by row: the same results as layer by layer, for any size, layer, type of value and thread."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import iks_plugin
import toys
from iks_plugin import fast, tracing
from iks_plugin.plan import Plan
from iks_plugin.program import UnexpectedInputError
from iks_plugin.runtime import Packed, PackedWeight

pytest.importorskip("numba")


class EveryOperation(nn.Module):
    """What a stream can do: sums, constants for each channel, activations, shuffles, values that are read twice."""

    def __init__(
        self, channels: int = 8, kernel: int = 3, dilation: int = 1, groups: int = 1, scale: int = 2, act: int = 0
    ) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        padding = dilation * (kernel // 2)
        self.a = nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, groups=groups)
        self.b = nn.Conv2d(channels, channels, 1)
        self.act = (nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(), nn.PReLU(channels))[act]
        self.up = nn.Sequential(nn.Conv2d(channels, channels * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.tail = nn.Conv2d(channels, 3, 3, padding=1, bias=False)
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) * 2.0
        features = self.head(x)
        y = self.act(self.a(features))
        y = self.b(y) * 0.3 + features
        y = F.leaky_relu(y + self.a(y), 0.1)
        return self.tail(self.up(y.contiguous() + features)) / 2.0 + self.mean


def prune(model: nn.Module, share: float) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and min(module.in_channels, module.out_channels) > 3:
                module.weight *= torch.rand_like(module.weight) >= share
    return model.eval()


def run_streamed(model: nn.Module, image: Tensor) -> Tensor:
    steps = tracing.trace(model, image.shape).steps
    assert steps is not None
    assert any(step.stream is not None for step in steps)
    with torch.inference_mode():
        return tracing.run(steps, dict(model.named_modules()), image)


def assert_close(result: Tensor, expected: Tensor) -> None:
    assert result.shape == expected.shape
    assert float((result - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    channels=st.sampled_from([4, 8, 12, 24, 40]),
    kernel=st.sampled_from([1, 3, 5]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([1, 2, 3]),
    act=st.integers(0, 3),
    share=st.sampled_from([0.0, 0.3, 0.6, 0.9, 0.99, 1.0]),
    value_dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
    size=st.tuples(st.integers(1, 2), st.integers(1, 60), st.integers(1, 90)),
    threads=st.integers(1, 3),
)
def test_any_network_on_any_image(
    channels: int,
    kernel: int,
    dilation: int,
    groups: int,
    scale: int,
    act: int,
    share: float,
    value_dtype: str,
    size: tuple[int, int, int],
    threads: int,
) -> None:
    model = prune(EveryOperation(channels, kernel, dilation, groups, scale, act), max(share, 0.2))
    image = torch.rand(size[0], 3, *size[1:])
    torch.set_num_threads(threads)
    try:
        iks_plugin.pack(model, value_dtype)
        if not any(isinstance(module, Packed) for module in model.modules()):
            return
        result = run_streamed(model, image)
    finally:
        torch.set_num_threads(1)
    with torch.inference_mode():
        assert_close(result, iks_plugin.unpack(model)(image))


class Window(nn.Module):
    """A convolution of any shape between others, as an encoder or a network with borders of its own has it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.head, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, **settings)
        self.b = nn.Conv2d(8, 16, 3, padding=1)
        self.up = nn.PixelShuffle(2)
        self.tail = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(x)
        return self.tail(self.up(self.b(F.relu(self.a(features)))))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kernel=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.tuples(st.integers(0, 7), st.integers(0, 7)), st.sampled_from(["same", "valid"])),
    mode=st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
    groups=st.sampled_from([1, 2, 8]),
    share=st.sampled_from([0.0, 0.6, 0.9]),
    size=st.tuples(st.integers(1, 2), st.integers(8, 60), st.integers(8, 70)),
    threads=st.integers(1, 3),
)
def test_any_kernel_stride_dilation_and_padding(
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    mode: str,
    groups: int,
    share: float,
    size: tuple[int, int, int],
    threads: int,
) -> None:
    if padding == "same":
        stride = (1, 1)
    model = Window(
        kernel_size=kernel, dilation=dilation, stride=stride, padding=padding, padding_mode=mode, groups=groups
    )
    model.eval().b.weight.data *= torch.rand_like(model.b.weight) >= 0.9
    model.a.weight.data *= torch.rand_like(model.a.weight) >= share
    image = torch.rand(size[0], 3, *size[1:])
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            try:
                expected = model(image)
            except RuntimeError:  # no output, or more padding than there is an image
                iks_plugin.pack(model)
                with pytest.raises((RuntimeError, UnexpectedInputError)):
                    run_streamed(model, image)
                return
            iks_plugin.pack(model)
            result = run_streamed(model, image)
    finally:
        torch.set_num_threads(1)
    assert_close(result, expected)


def test_groups_of_layers_and_bands_meet() -> None:
    """Deep enough for several groups, with values that cross them."""
    layers: list[nn.Module] = [toys.plain_sr(8)[0]]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(F.relu(self.one(x))) * 0.2

    layers = [nn.Conv2d(3, 8, 3, padding=1), *(Block() for _ in range(12)), nn.Conv2d(8, 3, 3, padding=1)]
    model = prune(nn.Sequential(*layers), 0.8)
    image = torch.rand(1, 3, 50, 40)
    with torch.inference_mode():
        expected = model(image)
    iks_plugin.pack(model)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            assert_close(run_streamed(model, image), expected)
        finally:
            torch.set_num_threads(1)


class PartlyStreaming(nn.Module):
    """Attention over the whole image between chains of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.squeeze, self.strided = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.around = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.tail = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.head(x).relu())
        y = y * torch.sigmoid(self.squeeze(y.mean(dim=(2, 3), keepdim=True)))
        small = F.interpolate(self.strided(y), size=y.shape[2:], mode="bilinear")
        return self.tail(torch.cat([self.around(y), small], dim=1))


class OwnTensors(nn.Module):
    """Parameters, buffers and new tensors, inside and outside of what streams; as MMagic's EDSR sets its mean anew."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.rand(1, 3, 1, 1)
        self.scale, self.map = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(1, 8, 20, 33))
        self.head, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.to(x)
        y = self.body(self.head(x - self.mean) * self.scale)
        y = torch.tanh(y * self.scale) + self.map + torch.tensor([0.5])
        return self.tail(y + torch.tensor([0.25])) + self.mean


@pytest.mark.parametrize("make", [PartlyStreaming, OwnTensors])
def test_what_cannot_stream_is_left_to_torch(make: type[nn.Module]) -> None:
    model = prune(make(), 0.7)
    image = torch.rand(2, 3, 20, 33)
    with torch.inference_mode():
        expected = model(image)
    iks_plugin.pack(model)
    assert_close(run_streamed(model, image), expected)


@pytest.mark.parametrize("make", toys.LAYERS.values(), ids=toys.LAYERS)
def test_single_layers_of_every_kind(make: tuple[Callable[[], nn.Module], tuple[int, ...]]) -> None:
    layer, shape = make[0](), make[1]
    model = nn.Sequential(layer).eval()
    layer.weight.data *= torch.rand_like(layer.weight) >= 0.8
    image = torch.rand(shape)
    with torch.inference_mode():
        expected = model(image)
        iks_plugin.pack(model)
        steps = tracing.trace(model, image.shape).steps
        if steps is not None:
            assert_close(tracing.run(steps, dict(model.named_modules()), image), expected)
        assert_close(model(image), expected)


@pytest.fixture
def model() -> nn.Module:
    return iks_plugin.pack(prune(EveryOperation(), 0.8))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are taken whichever way is the faster one here."""
    times = iter(range(10**6))
    monkeypatch.setattr(fast, "_seconds", lambda act: (act(), next(times))[1])


IMAGE = torch.rand(1, 3, 24, 30, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("always")
def test_a_packed_model_streams_by_itself(model: nn.Module) -> None:
    with torch.no_grad():
        result = model(IMAGE)
    assert set(fast.paths(model).values()) == {"stream"}
    assert type(model).__name__ == "StreamedEveryOperation"
    assert_close(result, iks_plugin.unpack(model)(IMAGE))
    assert type(model) is EveryOperation


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "image",
    [
        IMAGE.transpose(2, 3),
        IMAGE[:, :, ::2, 3:],
        IMAGE.expand(3, 3, 24, 30),
        IMAGE.to(memory_format=torch.channels_last),
        IMAGE[:, :, :1, :1],
    ],
    ids=["transposed", "sliced", "expanded", "channels_last", "one pixel"],
)
def test_images_of_any_layout(model: nn.Module, image: Tensor) -> None:
    with torch.inference_mode():
        result = model(image)
    assert_close(result, iks_plugin.unpack(model)(image))


@pytest.mark.usefixtures("always")
def test_changing_sizes_copies_pickles_and_threads(model: nn.Module) -> None:
    plain = iks_plugin.unpack(copy.deepcopy(model))
    with torch.no_grad():
        for size in ((24, 30), (9, 7), (24, 30), (33, 40), (17, 64), (24, 30)):
            image = torch.rand(1, 3, *size)
            assert_close(model(image), plain(image))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_close(other(IMAGE), plain(IMAGE))
    expected = plain(IMAGE)

    def work(_: int) -> Tensor:
        with torch.no_grad():
            return model(IMAGE)

    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(work, range(12)):
            assert_close(result, expected)


@pytest.mark.usefixtures("always")
def test_the_usual_way_for_everything_else(model: nn.Module) -> None:
    plain = iks_plugin.unpack(copy.deepcopy(model))
    image = IMAGE.clone().requires_grad_()
    model(image).sum().backward()
    assert image.grad is not None
    with torch.no_grad():
        assert torch.allclose(copy.deepcopy(model).double()(IMAGE.double()), plain.double()(IMAGE.double()))
        seen = []
        handle = model.a.register_forward_hook(lambda *_: seen.append(1))
        model(IMAGE)
        assert seen
        handle.remove()
        traced = torch.jit.trace(model, IMAGE, check_trace=False)
        assert_close(traced(IMAGE), model(IMAGE))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("wrapper", [AveragedModel, nn.DataParallel], ids=lambda cls: cls.__name__)
def test_a_network_in_a_wrapper_streams(wrapper: Callable[[nn.Module], nn.Module]) -> None:
    network = prune(EveryOperation(act=3), 0.8)
    plain = copy.deepcopy(network)
    wrapped = iks_plugin.pack(wrapper(network))
    with torch.no_grad():
        assert_close(wrapped(IMAGE), plain(IMAGE))
        assert set(fast.paths(wrapped).values()) == {"stream"}
        iks_plugin.unpack(wrapped)
        assert_close(wrapped(IMAGE), plain(IMAGE))
        assert not fast.paths(wrapped)


@pytest.mark.usefixtures("always")
def test_weights_that_change_are_seen(model: nn.Module) -> None:
    with torch.no_grad():
        before = model(IMAGE)
        model.head.weight.mul_(2)
        model.head.bias.add_(1)
        after = model(IMAGE)
        assert not torch.allclose(before, after)
        assert_close(after, iks_plugin.unpack(model)(IMAGE))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1.0, 2.0),
        (np.float64(1), np.float64(2)),
        (np.float32(1), np.float32(2)),
        (np.array(1.0), np.array(2.0)),
        ([np.int64(1)], [np.int64(2)]),
        ({"gain": np.array([1.0, 5.0])}, {"gain": np.array([2.0, 5.0])}),
    ],
    ids=str,
)
def test_settings_of_any_kind_that_change_are_seen(first: Any, second: Any) -> None:
    class Scaled(EveryOperation):
        gain: Any

        def forward(self, x: Tensor) -> Tensor:
            gain = self.gain["gain"] if isinstance(self.gain, dict) else self.gain
            return super().forward(x) * float(np.ravel(gain)[0])

    model = prune(Scaled(act=3), 0.8)
    model.gain = first
    iks_plugin.pack(model)
    with torch.no_grad():
        before = model(IMAGE)
        assert set(fast.paths(model).values()) == {"stream"}
        model.gain = second
        assert_close(model(IMAGE), 2 * before)
        if isinstance(second, np.ndarray):
            second *= 2  # in place
            assert_close(model(IMAGE), 4 * before)


@pytest.mark.usefixtures("always")
def test_settings_and_small_tensors_that_change_are_seen() -> None:
    class Scaled(EveryOperation):
        gain = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    model = iks_plugin.pack(prune(Scaled(act=3), 0.8))
    with torch.no_grad():
        before = model(IMAGE)
        model.gain = 2.0
        assert_close(model(IMAGE), 2 * before)
        model.mean.zero_()
        model.act.weight.fill_(0.9)
        assert_close(model(IMAGE), iks_plugin.unpack(model)(IMAGE))


@pytest.mark.parametrize("way", ["stream", "contiguous", "channels_last", "torch"])
def test_the_fastest_way_is_taken(model: nn.Module, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = iks_plugin.unpack(copy.deepcopy(model))
    tried: list[str] = []
    if way == "torch":
        monkeypatch.setattr(fast, "_MOST_KEPT", 0)

    def seconds(act: Callable[[], object]) -> float:
        act()
        tried.append(act.args[0])
        return 1.0 if act.args[0] == way else 2.0

    monkeypatch.setattr(fast, "_seconds", seconds)
    with torch.no_grad():
        result = model(IMAGE)
        assert_close(result, plain(IMAGE))
        assert result.is_contiguous()
        seen = set(tried)
        assert seen == ({"stream", "torch"} if way == "torch" else {"stream", "contiguous", "channels_last"})
        tried.clear()
        assert_close(model(IMAGE + 1), plain(IMAGE + 1))
        assert not tried  # it is known by then
    assert set(fast.paths(model).values()) == {"stream" if way == "stream" else "torch"}
    kept = [module._kept for module in model.modules() if isinstance(module, PackedWeight)]
    layouts = {weight.memory_format for weight in kept if weight is not None}
    assert layouts == ({fast._LAYOUTS[way]} if way in fast._LAYOUTS else set())


def test_the_ways_are_tried_in_turn_and_the_choice_stays(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def fastest(ways: dict[str, Callable[[], object]]) -> str:
        for _ in range(2):
            for name, way in ways.items():
                tried.append(name)
                way()
        return "stream"

    monkeypatch.setattr(fast, "_fastest", fastest)
    with torch.no_grad():
        for _ in range(3):
            model(IMAGE)
    assert tried == ["stream", "contiguous", "channels_last"] * 2


def test_images_are_tried_in_their_layout(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def looked(act: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (seen.append(given[-1].is_contiguous()), act(*given))[1]

    for name in ("_fastest_way", "_run"):
        monkeypatch.setattr(fast.Streams, name, looked(getattr(fast.Streams, name)))
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            seen.clear()
            model(IMAGE.to(memory_format=memory_format))
            assert set(seen) == {memory_format == torch.contiguous_format}


@pytest.mark.parametrize("way", ["stream", "contiguous", "channels_last"])
@pytest.mark.parametrize(
    "image",
    [IMAGE[:, :, 2:-2, 1:-1], IMAGE.mT, IMAGE.flip(0).repeat(1, 2, 1, 1)[:, ::2], IMAGE[:, :, ::2]],
    ids=["crop", "turned", "some channels", "some rows"],
)
def test_the_output_of_any_image_has_the_layout_that_torch_gives(
    model: nn.Module, image: Tensor, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "_seconds", lambda act: (act(), 1.0 if act.args[0] == way else 2.0)[1])
    plain = iks_plugin.unpack(copy.deepcopy(model))
    with torch.no_grad():
        result, expected = model(image), plain(image)
    assert_close(result, expected)
    assert result.is_contiguous() == expected.is_contiguous()


def test_what_compiles_first_is_not_taken_for_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"stream": [9.0, 0.1, 0.1], "contiguous": [0.2], "channels_last": [0.5], "torch": [0.01, 0.2]}
    calls: list[str] = []
    ways = {name: functools.partial(calls.append, name) for name in seconds}

    def run(act: Callable[[], object]) -> float:
        act()
        left = seconds[calls[-1]]
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(fast, "_seconds", run)
    assert fast._fastest(ways) == "stream"
    assert calls.count("channels_last") == 1  # far behind; but what takes a moment gets a second run
    assert calls.count("torch") == 2


def test_kept_weights_stay_right(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_fastest", lambda ways: "channels_last")
    size = len(pickle.dumps(model))
    with torch.no_grad():
        before = model(IMAGE)
        assert len(pickle.dumps(model)) == size  # they are not part of the model
        assert_close(copy.deepcopy(model)(IMAGE), before)
        model.a.packed_weight.values.mul_(2)
        after = model(IMAGE)
        assert not torch.allclose(before, after)
        assert_close(after, iks_plugin.unpack(copy.deepcopy(model))(IMAGE))
        model.double()
        model.float()
        assert_close(model(IMAGE), after)


def test_without_numba_the_plain_way_says_once_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_told", False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(iks_plugin.IksWarning, match="run without their fast kernels, which need the package numba"):
        packed = iks_plugin.pack(prune(EveryOperation(), 0.8))
    iks_plugin.pack(prune(EveryOperation(), 0.8))  # says nothing more
    assert type(packed) is EveryOperation
    with torch.no_grad():
        assert_close(packed(IMAGE), iks_plugin.unpack(packed)(IMAGE))


def test_a_model_that_cannot_be_traced() -> None:
    class Looks(EveryOperation):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.mean()) > 0 else x

    model = iks_plugin.pack(prune(Looks(), 0.8))
    assert tracing.trace(model, IMAGE.shape).steps is None
    with torch.no_grad():
        assert_close(model(IMAGE), iks_plugin.unpack(model)(IMAGE))


def test_no_cut_goes_through_what_is_joined() -> None:
    """Between two groups of operations whole values are kept, so that none may be half made there."""

    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
            self.convs = nn.ModuleList(nn.Conv2d(24, 8, 3, padding=1) for _ in range(40))

        def forward(self, x: Tensor) -> Tensor:
            h = self.head(x)
            for conv in self.convs:
                h = conv(torch.cat([h, h * 0.5, h], 1))
            return self.tail(h)

    model, image = iks_plugin.pack(prune(Joins(), 0.9)), torch.rand(1, 3, 40, 40)
    steps = tracing.trace(model, image.shape).steps
    assert steps is not None
    (stream,) = (step.stream for step in steps if step.stream is not None)
    plan = Plan(stream.program, 40, 40, threads=4)
    assert len(plan._groups) > 3
    makers = [{stream.program.ops[number].target for number in group.ops} - {-1} for group in plan._groups]
    assert sum(map(len, makers)) == len(set().union(*makers))
    torch.set_num_threads(4)
    try:
        result = run_streamed(model, image)
    finally:
        torch.set_num_threads(1)
    with torch.inference_mode():
        assert_close(result, iks_plugin.unpack(model)(image))
