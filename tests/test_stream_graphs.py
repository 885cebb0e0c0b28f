"""Graphs in which a stream must not assume too much: what is added to it, works in place, or is of another type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

import iks_plugin
from iks_plugin import fast, shapes, tracing

pytest.importorskip("numba")


class Layers(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.narrow, self.wide = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.down, self.up = nn.Conv2d(16, 16, 4, stride=2, padding=1), nn.Upsample(scale_factor=2)
        self.reflected = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.replicated = nn.Conv2d(16, 16, 5, padding=2, padding_mode="replicate")
        self.valid = nn.Conv2d(16, 16, 3)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.act = forward

    def forward(self, x: Tensor) -> Any:
        return self.act(self, x)


def iadd(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    same = h
    h += 1.5
    return m.tail(m.b(h) + same)


def relu_of_another_name(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    return m.tail(m.b(m.relu(h)) + h)


def relu_function(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    return m.tail(m.b(F.relu_(h)) + h)


def mul_method(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    return m.tail(m.b(h.mul_(2.0)) + h)


def view_of_it(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    half = h[:, :8]
    return m.tail(m.b(m.relu(h)) + torch.cat([half, half], 1))


def read_before(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    y = m.b(h)
    h += y
    return m.tail(h)


def input_in_place(m: Any, x: Tensor) -> Tensor:
    x.sub_(0.5)
    return m.tail(m.b(m.a(m.head(x))))


def input_minus(m: Any, x: Tensor) -> Tensor:
    x -= 0.5
    return m.tail(m.b(m.a(m.head(x))))


def with_middle(change: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(m.head(x))
        return m.tail(m.b((h + change(torch.tanh(h))).float()))

    return forward


def without_batch(m: Any, x: Tensor) -> Tensor:
    return m.tail(m.b(m.a(m.head(x[0])))).unsqueeze(0)


def two_outputs(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.a(m.head(x))
    return m.tail(m.b(h)), h


def dense_block(m: Any, x: Tensor) -> Tensor:
    h = m.head(x)
    one = F.leaky_relu(m.narrow(h), 0.2)
    two = m.wide(torch.cat((h, one), 1))
    return m.tail(h + 0.2 * m.a(two) + torch.cat([one, m.narrow(two)], dim=-3))


def distillation(m: Any, x: Tensor) -> Tensor:
    h = m.head(x)
    kept, rest = torch.split(m.a(h), (8, 8), dim=1)
    one, two = m.b(torch.cat([rest, kept], 1)).chunk(2, dim=1)
    three = m.a(h)[:, 4:12]
    last = h.split(4, 1)[3]
    return m.tail(torch.cat([one + three, last, two[:, :4, :, :]], dim=1))


def overwritten_part(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    one, two = h.chunk(2, 1)
    one += 1.0
    return m.tail(m.b(h) + torch.cat([two, one], 1))


def too_far(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    return m.tail(m.b(h) + torch.cat([h[:, 12:40], h[:, :-4]], 1))


def joined_rows(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    return m.tail(m.b(torch.cat([h, h], 2)))


def nearest(m: Any, x: Tensor) -> Tensor:
    h = m.a(F.interpolate(m.head(x), scale_factor=2, mode="nearest"))
    return m.tail(F.interpolate(m.b(h) + m.up(m.head(x)), scale_factor=(3.0, 3.0)))


def other_interpolations(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    h = m.b(F.interpolate(h, scale_factor=2, mode="bilinear"))
    return m.tail(m.b(F.interpolate(h, scale_factor=1.5)) + 1)


def down_and_up(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    small = m.b(m.down(h))
    smaller = m.a(m.down(F.relu(small)))
    return m.tail(m.up(m.up(smaller) + small) + h)


def mixed_borders(m: Any, x: Tensor) -> Tensor:
    h = m.head(x)
    return m.tail(m.a(h) + m.reflected(h) + m.replicated(h) + m.b(m.reflected(h)))


def sizes_that_fit_by_chance(m: Any, x: Tensor) -> Tensor:
    h = m.head(x)
    return m.tail(m.valid(m.a(h)) + m.b(m.down(h)[:, :, :1, :1]))


def asks_for_sizes(m: Any, x: Tensor) -> Tensor:
    n, _, high, wide = x.size()
    padded = F.pad(x, (0, -x.shape[-1] % 16, 0, -high % 16), mode="replicate")
    h = m.a(m.head(padded))
    if h.dim() == 4 and len(h) == n and h.shape[2] % 16 == 0 and h.numel():
        h = m.b(h.view(n, 16, h.size(2), h.size(dim=3)))
    return m.tail(h)[:, :, :high, :wide]


def noise(m: Any, x: Tensor) -> Tensor:
    h = m.a(m.head(x))
    return m.tail(m.b(h) + torch.randn(h.shape))


GRAPHS: dict[str, Callable[[Any, Tensor], Any]] = {
    "iadd": iadd,
    "relu of another name": relu_of_another_name,
    "relu_": relu_function,
    "mul_": mul_method,
    "a view of what is overwritten": view_of_it,
    "read before": read_before,
    "input in place": input_in_place,
    "input minus": input_minus,
    "pooled": with_middle(lambda h: h.mean((2, 3), keepdim=True)),
    "a column": with_middle(lambda h: h[..., :1]),
    "the first of a batch": with_middle(lambda h: h[:1]),
    "bools": with_middle(lambda h: h > 0),
    "float16": with_middle(lambda h: h.half()),
    "float64": with_middle(lambda h: h.double()),
    "flipped": with_middle(lambda h: h.flip(3)),
    "without a batch": without_batch,
    "two outputs": two_outputs,
    "dense block": dense_block,
    "distillation": distillation,
    "a part that is overwritten": overwritten_part,
    "slices beyond the end": too_far,
    "joined rows": joined_rows,
    "nearest": nearest,
    "other interpolations": other_interpolations,
    "down and up": down_and_up,
    "mixed borders": mixed_borders,
    "asks for sizes": asks_for_sizes,
    "a smaller summand": sizes_that_fit_by_chance,
}


def network(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    model = Layers(forward).eval()
    with torch.no_grad():
        for layer in model.children():
            if isinstance(layer, nn.Conv2d) and layer not in (model.head, model.tail):
                layer.weight *= torch.rand_like(layer.weight) >= 0.8
    return model


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(10**6))
    monkeypatch.setattr(fast, "_seconds", lambda act: (act(), next(times))[1])


def assert_close(result: Any, expected: Any, tolerance: float = 1e-5) -> None:
    results, wanted = ([value] if isinstance(value, Tensor) else value for value in (result, expected))
    for one, other in zip(results, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.parametrize("forward", GRAPHS.values(), ids=GRAPHS)
def test_the_same_as_dense(forward: Callable[[Any, Tensor], Any]) -> None:
    plain = network(forward)
    model = iks_plugin.pack(copy.deepcopy(plain))
    image = torch.rand(1 if forward is without_batch else 2, 3, 24, 24)
    with torch.no_grad():
        for _ in range(2):
            ours, theirs = image.clone(), image.clone()
            # What is rounded to float16 on the way may be rounded the other way.
            assert_close(model(ours), plain(theirs), 1e-3 if forward is GRAPHS["float16"] else 1e-5)


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        *((forward, 1) for forward in (dense_block, distillation, nearest, down_and_up, mixed_borders)),
        (overwritten_part, 2),
        (other_interpolations, 3),
        (joined_rows, 2),
        (asks_for_sizes, 2),
    ],
)
def test_how_many_streams_there_are(forward: Callable[[Any, Tensor], Any], count: int) -> None:
    """One, where all that a network does can stream."""
    steps = tracing.trace(iks_plugin.pack(network(forward)), torch.Size((2, 3, 24, 24))).steps
    assert steps is not None
    assert sum(step.stream is not None for step in steps) == count


@pytest.mark.parametrize("forward", GRAPHS.values(), ids=GRAPHS)
def test_shapes_and_dtypes_are_those_that_come_out(forward: Callable[[Any, Tensor], Any]) -> None:
    model = network(forward)
    image = torch.rand(1 if forward is without_batch else 2, 3, 24, 24)
    seen = []

    class Looks(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            value = shapes.value_of(n)
            if isinstance(result, Tensor) and value is not None:
                assert (value.shape, value.dtype) == (result.shape, result.dtype), n.format_node()
                seen.append(n)
            return result

    graph = tracing.Tracer(model, image.shape).trace(model)
    with torch.no_grad():
        Looks(torch.fx.GraphModule(model, graph)).run(image)
    assert len(seen) > 4


def test_a_graph_with_sizes_in_it_is_found_for_each() -> None:
    plain = network(asks_for_sizes)
    model = iks_plugin.pack(copy.deepcopy(plain))
    with torch.no_grad():
        for high, wide in ((24, 24), (30, 17), (24, 24), (7, 40), (16, 300), (65, 33), (24, 24)):
            for count in (1, 2):
                image = torch.rand(count, 3, high, wide)
                assert_close(model(image), plain(image))
    assert set(fast.paths(model).values()) >= {"stream"}


def test_noise_is_new_each_time() -> None:
    model = iks_plugin.pack(network(noise))
    image = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        assert not torch.equal(model(image), model(image))
        torch.manual_seed(0)
        one = model(image)
        torch.manual_seed(0)
        assert torch.equal(one, model(image))


def test_another_default_dtype_or_device() -> None:
    plain = network(GRAPHS["read before"])
    model = iks_plugin.pack(copy.deepcopy(plain))
    image = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        expected = plain(image)
        torch.set_default_dtype(torch.float64)
        try:
            assert_close(model(image), expected)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            assert_close(model(image), expected)
            assert_close(copy.deepcopy(model)(image), expected)


def test_dropout_that_was_left_in_training_mode_drops() -> None:
    model = iks_plugin.pack(network(lambda m, x: m.tail(m.drop(m.b(m.a(m.head(x)))))))
    image = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(model(image), model(image))
        model.drop.train()
        assert not torch.equal(model(image), model(image))


def test_what_looks_at_each_operation_sees_them() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    plain = network(GRAPHS["two outputs"])
    model = iks_plugin.pack(copy.deepcopy(plain))
    image, other = torch.rand(1, 3, 24, 24), torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        model(image)
        with FlopCounterMode(display=False) as counter:
            model(image)
        assert counter.get_total_flops() > 0
        assert_close(make_fx(model)(image)(other), plain(other))
        images = torch.rand(2, 1, 3, 24, 24)
        assert_close(torch.vmap(model)(images), torch.vmap(plain)(images))
