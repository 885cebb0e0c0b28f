"""What a graph does not tell: models whose forward takes, makes, keeps or gives more than an image and its like."""

from __future__ import annotations

import copy
import logging
import random
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import iks_plugin
from iks_plugin import fast, tracing
from iks_plugin.runtime import PackedWeight
from iks_plugin.settings import settings_of
from iks_plugin.trust import is_same
from test_stream_graphs import Layers, network

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams seem to be the fastest way."""
    times = iter(range(10**6))
    monkeypatch.setattr(fast, "_seconds", lambda act: (act(), next(times))[1])


SHAPES = ((1, 3, 24, 24), (2, 3, 24, 24), (1, 3, 30, 17), (1, 3, 24, 24))


def body(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(m.head(x)))


def by_keyword(m: Any, x: Tensor) -> Tensor:
    return m.tail(input=F.relu(input=m.b(m.relu(input=m.a(input=m.head(x))))))


def fills_a_tensor(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    out[:, :, :, :] = m.tail(body(m, x))
    return out


def adds_to_a_tensor(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    out.add_(m.tail(body(m, x)))
    return out * 2


def adds_up(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros(1)
    y = m.tail(body(m, x))
    total += y.mean()
    return y + total


def overlapping_tiles(m: Any, x: Tensor) -> Tensor:
    count, channels, high, wide = x.shape
    out, seen = torch.zeros(count, channels, high, wide), torch.zeros(1, 1, high, wide)
    for top in (0, high - 16):
        out[:, :, top : top + 16].add_(m.tail(body(m, x[:, :, top : top + 16])))
        seen[:, :, top : top + 16].add_(1)
    return out.div_(seen)


def gives_a_mask(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.tail(body(m, x)), torch.ones(x.shape)


def one_by_one(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.tail(body(m, one)) for one in x.split(1)], 0)


def unbound(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.tail(m.b(m.a(one.unsqueeze(0))))[0] for one in m.head(x).unbind(0)], 0)


def squeezed(m: Any, x: Tensor) -> Tensor:
    h = m.head(x).squeeze(0)
    h = h.unsqueeze(0) if h.dim() == 3 else h
    return m.tail(m.b(m.a(h)))


def after_a_part(change: Callable[[Tensor], object]) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(m.head(x))
        half = h[:, :8]
        change(h)
        return m.tail(m.b(h) + torch.cat([half, half], 1))

    return forward


def by_another_name(change: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(m.head(x))
        same = h.contiguous()
        h = change(h)
        return m.tail(m.b(h) + same)

    return forward


def power(h: Tensor) -> Tensor:
    h **= 2
    return h


def remainder(h: Tensor) -> Tensor:
    h %= 0.5
    return h


def rounded(h: Tensor) -> Tensor:
    h //= 0.1
    return h


def gives_a_list(m: Any, x: Tensor) -> list[Tensor]:
    h = body(m, x)
    return [m.tail(h), h]


def gives_a_dict(m: Any, x: Tensor) -> dict[str, Tensor]:
    return {"image": m.tail(body(m, x))}


class Output(OrderedDict[str, Tensor]):
    """As libraries give that let their output be read by attributes, too."""


def gives_a_dict_of_its_own(m: Any, x: Tensor) -> Output:
    return Output(image=m.tail(body(m, x)))


def whole_numbers(m: Any, x: Tensor) -> Tensor:
    return m.tail(m.b(m.a(m.head(x) * m.a.bias.view(1, 16, 1, 1).mul(10).to(torch.int))))


def constants_of_their_own(m: Any, x: Tensor) -> Tensor:
    offset = m.a.bias.view(1, 16, 1, 1) + 1.0
    return m.tail(m.b(m.a(m.head(x)) + offset))


def some_parts(m: Any, x: Tensor) -> Tensor:
    parts = m.a(m.head(x)).chunk(4, 1)
    return m.tail(m.b(torch.cat([parts[0], *parts[1:]], 1)))


def looks_at_types(m: Any, x: Tensor) -> Tensor:
    y = m.tail(body(m, x))
    return y if isinstance(x, Tensor) else y * 2


GRAPHS: dict[str, Callable[[Any, Tensor], Any]] = {
    "by keyword": by_keyword,
    "fills a tensor": fills_a_tensor,
    "adds to a tensor": adds_to_a_tensor,
    "adds up": adds_up,
    "overlapping tiles": overlapping_tiles,
    "gives a mask": gives_a_mask,
    "one by one": one_by_one,
    "unbound": unbound,
    "squeezed": squeezed,
    "clamp_": after_a_part(lambda h: torch.clamp_(h, min=0)),
    "elu_": after_a_part(F.elu_),
    "elu in place": after_a_part(lambda h: F.elu(h, 1.0, True)),
    "out": after_a_part(lambda h: torch.mul(h, 2, out=h)),
    "power": by_another_name(power),
    "remainder": by_another_name(remainder),
    "rounded": by_another_name(rounded),
    "gives a list": gives_a_list,
    "gives a dict": gives_a_dict,
    "gives a dict of its own": gives_a_dict_of_its_own,
    "whole numbers": whole_numbers,
    "constants of their own": constants_of_their_own,
    "some parts": some_parts,
    "looks at types": looks_at_types,
}


@pytest.mark.parametrize("forward", GRAPHS.values(), ids=GRAPHS)
def test_the_same_as_dense(forward: Callable[[Any, Tensor], Any]) -> None:
    plain = network(forward)
    model = iks_plugin.pack(copy.deepcopy(plain))
    results = []
    with torch.no_grad():
        for shape in SHAPES:
            image = torch.rand(shape)
            result, expected = model(image.clone()), plain(image.clone())
            results.append((result, copy.deepcopy(result)))
            assert type(result) is type(expected)
            assert is_same(result, expected, 1e-5)
    assert all(is_same(result, before, 0.0) for result, before in results)  # nothing that was given has changed since


def test_an_image_that_is_changed_in_place_is_changed() -> None:
    def centred(m: Any, x: Tensor) -> Tensor:
        x -= 0.5
        return m.tail(body(m, x))

    model = iks_plugin.pack(network(centred))
    image = torch.ones(1, 3, 24, 24)
    with torch.no_grad():
        for _ in range(3):
            model(image)
    assert float(image.mean()) == pytest.approx(-0.5)


class WithOptions(Layers):
    def __init__(self) -> None:
        super().__init__(lambda m, x: x)

    def forward(self, x: Tensor, gain: float = 2.0, mask: Tensor | None = None, **others: Tensor) -> Tensor:
        y: Tensor = self.tail(body(self, x)) * gain
        y = y if mask is None else y * mask
        return y + others["more"] if "more" in others else y


def test_options_have_their_defaults() -> None:
    plain = WithOptions().eval()
    plain.a.weight.data.mul_(torch.rand_like(plain.a.weight) > 0.9)
    model = iks_plugin.pack(copy.deepcopy(plain))
    image, mask = torch.rand(1, 3, 24, 24), torch.rand(1, 1, 24, 24)
    with torch.no_grad():
        for _ in range(2):
            assert is_same(model(image), plain(image), 1e-5)
            assert is_same(model(image, 3.0), plain(image, 3.0), 1e-5)
            assert is_same(model(image, mask=mask), plain(image, mask=mask), 1e-5)
            assert is_same(model(image, more=mask), plain(image, more=mask), 1e-5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda m: random.random(),
        lambda m: float(np.random.default_rng().random()),
        lambda m: torch.rand(1, 1, 1, 1),
        lambda m: torch.rand(1, generator=m.generator),
    ],
)
def test_chance_stays_chance(draw: Callable[[Any], Any]) -> None:
    model = network(lambda m, x: m.tail(body(m, x)) * (1 + draw(m)))
    model.generator = torch.Generator()  # type: ignore[assignment]
    iks_plugin.pack(model)
    image = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        assert not torch.equal(model(image), model(image))


def test_what_is_drawn_first_is_what_the_model_would_draw() -> None:
    plain = network(lambda m, x: m.tail(body(m, x)) * (1 + torch.rand(1) + random.random() + np.random.rand()))
    image = torch.rand(1, 3, 24, 24)
    results = []
    for model in (plain, iks_plugin.pack(copy.deepcopy(plain))):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        with torch.no_grad():
            results.append([model(image) for _ in range(3)])
    assert all(map(is_same, *results))


def remembers(m: Any, x: Tensor) -> Tensor:
    h = body(m, x)
    m.seen = h if m.seen is None or m.seen.shape != h.shape else 0.5 * m.seen + h
    return m.tail(m.seen)


def collects(m: Any, x: Tensor) -> Tensor:
    h = body(m, x)
    m.maps.append(h)
    return m.tail(h)


def counts(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.tail(body(m, x)) * m.count


def remembers_in_a_buffer(m: Any, x: Tensor) -> Tensor:
    h = body(m, x)
    m.mean.mul_(0.5).add_(h.mean((0, 2, 3), keepdim=True))
    return m.tail(h + m.mean)


def counts_in_a_buffer(m: Any, x: Tensor) -> Tensor:
    m.frames += 1
    return m.tail(body(m, x) + m.mean)


def replaces_a_buffer(m: Any, x: Tensor) -> Tensor:
    h = body(m, x)
    m.mean = 0.5 * m.mean + h.mean((0, 2, 3), keepdim=True)
    return m.tail(h + m.mean)


def remembers_in_an_object(m: Any, x: Tensor) -> Tensor:
    h = body(m, x)
    m.memory.last = h.mean() + 0.5 * m.memory.last
    return m.tail(h) * m.memory.last


def collects_in_an_object(m: Any, x: Tensor) -> Tensor:
    h = body(m, x)
    m.memory.means.append(float(x.mean()))
    return m.tail(h)


@dataclass(slots=True)
class InSlots:
    mean: float = 0.0


def remembers_in_slots(m: Any, x: Tensor) -> Tensor:
    m.slots.mean = 0.9 * m.slots.mean + 0.1 * float(m.a.bias.sum())
    return m.tail(body(m, x)) * m.slots.mean


def counts_in_a_parameter(m: Any, x: Tensor) -> Tensor:
    m.total.add_(1)
    return m.tail(body(m, x)) * m.total


def counts_in_a_tensor_that_it_makes(m: Any, x: Tensor) -> Tensor:
    if m.seen is None:
        m.seen = torch.zeros(1)
    m.seen += 1
    return m.tail(body(m, x)) * m.seen


def keeps_the_shape(m: Any, x: Tensor) -> Tensor:
    m.memory.last = tuple(x.shape)
    return m.tail(body(m, x))


@pytest.mark.parametrize(
    "forward",
    [
        remembers,
        remembers_in_slots,
        counts_in_a_parameter,
        counts_in_a_tensor_that_it_makes,
        keeps_the_shape,
        collects,
        counts,
        remembers_in_a_buffer,
        counts_in_a_buffer,
        replaces_a_buffer,
        remembers_in_an_object,
        collects_in_an_object,
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_model_remembers(forward: Callable[[Any, Tensor], Tensor], mode: Callable[[], Any]) -> None:
    plain = network(forward)
    plain.seen, plain.maps, plain.count = None, [], 0  # type: ignore[assignment]
    plain.memory = SimpleNamespace(last=0.0, means=deque())  # type: ignore[assignment]
    plain.slots, plain.total = InSlots(), nn.Parameter(torch.zeros(1))  # type: ignore[assignment]
    plain.register_buffer("mean", torch.zeros(1, 16, 1, 1))
    plain.register_buffer("frames", torch.tensor(0))
    model = iks_plugin.pack(copy.deepcopy(plain))
    with mode():
        for shape in (*SHAPES, (1, 3, 80, 24), *SHAPES):
            image = torch.rand(shape)
            assert is_same(model(image), plain(image), 1e-5)
    assert len(model.maps) == len(plain.maps)
    assert model.count == plain.count
    assert len(model.memory.means) == len(plain.memory.means)
    assert is_same(model.memory.last, plain.memory.last, 1e-5)
    assert model.slots.mean == pytest.approx(plain.slots.mean)
    assert model.total == plain.total
    assert is_same(model.seen, plain.seen, 1e-5)
    assert is_same(model.mean, plain.mean)
    assert model.frames == plain.frames


class Gains(Layers):
    of_the_class, more_of_the_class = 1.0, (1.0,)


def tripled(x: Tensor) -> Tensor:
    return 3 * x


def change_function(m: Any) -> None:
    m.last = None
    m.last = tripled


def change_partial(m: Any) -> None:
    m.last = None  # the next one may lie where this one has lain
    m.last = partial(torch.mul, other=3.0)


CHANGES: dict[str, Callable[[Any], object]] = {
    "namespace": lambda m: setattr(m.options, "gain", 2.0),
    "slots": lambda m: setattr(m.slots, "mean", 2.0),
    "set": lambda m: m.names.add("more"),
    "dict by tensors": lambda m: setattr(m, "by_tensor", {torch.ones(2): 2.0}),
    "function": change_function,
    "partial": change_partial,
    "module of two names": lambda m: setattr(m, "active", m.b),
    "buffer of two names": lambda m: setattr(m, "level", m.high),
}


@pytest.mark.parametrize("change", [*CHANGES, "class", "tuple of the class"])
def test_settings_elsewhere_that_change_are_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        gain = m.options.gain * m.slots.mean * len(m.names) * next(iter(m.by_tensor.values())) * m.of_the_class
        return m.last(m.tail(m.active(body(m, x)) * gain * m.more_of_the_class[0] * m.level))

    model = Gains(forward).eval()
    model.load_state_dict(network(body).state_dict())
    model.options, model.slots, model.names = SimpleNamespace(gain=1.0), InSlots(1.0), {"one"}  # type: ignore[assignment]
    model.last, model.by_tensor, model.active = partial(torch.mul, other=2.0), {torch.ones(1): 1.0}, model.a  # type: ignore[assignment]
    for name, value in {"low": 1.0, "high": 2.0}.items():
        model.register_buffer(name, torch.tensor([value]))
    model.level = model.low
    iks_plugin.pack(model)
    image = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        before = model(image)
        assert "stream" in fast.paths(model).values()
        if change in CHANGES:
            CHANGES[change](model)
        elif change == "class":
            monkeypatch.setattr(Gains, "of_the_class", 2.0)
        else:
            monkeypatch.setattr(Gains, "more_of_the_class", (2.0,))
        assert not is_same(model(image), before)
        assert is_same(model(image), iks_plugin.unpack(model)(image), 1e-5)


def test_a_memory_that_is_switched_on_later() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = body(m, x)
        if m.temporal:
            m.memory.last = 0.5 * m.memory.last + h.mean()
            h = h * m.memory.last
        return m.tail(h)

    plain = network(forward)
    plain.temporal, plain.memory = False, SimpleNamespace(last=torch.ones(1))  # type: ignore[assignment]
    model = iks_plugin.pack(copy.deepcopy(plain))
    with torch.no_grad():
        for number in range(5):
            model.temporal = plain.temporal = number > 1  # type: ignore[assignment]
            image = torch.rand(1, 3, 24, 24)
            assert is_same(model(image), plain(image), 1e-5)


def test_settings_that_change_all_the_time_are_not_traced_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    trace = tracing.trace
    monkeypatch.setattr(tracing, "trace", lambda *given: (traced.append(given), trace(*given))[1])
    plain = network(lambda m, x: m.tail(body(m, x)) * m.gain)
    model = iks_plugin.pack(copy.deepcopy(plain))
    image = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        for number in range(12):
            model.gain = plain.gain = float(number)  # type: ignore[assignment]
            assert is_same(model(image), plain(image), 1e-5)
    assert len(traced) <= 4


def test_loggers_and_great_graphs_of_objects_are_not_looked_through() -> None:
    model = network(lambda m, x: m.tail(body(m, x)))
    model.logger = logging.getLogger("one")  # type: ignore[assignment]
    node = model.tree = SimpleNamespace(parent=model, depth=0)  # type: ignore[assignment]
    for depth in range(5000):
        node.child = SimpleNamespace(parent=node, depth=depth)
        node = node.child
    model.names = [str(number) for number in range(10**5)]  # type: ignore[assignment]
    before = settings_of(model)
    assert len(str(before)) < 10**4
    logging.getLogger("another")
    node.depth = -1
    assert settings_of(model) == before
    model.tree.depth = -1
    assert settings_of(model) != before


def test_other_threads_draw_other_numbers_meanwhile() -> None:
    drawn: list[float] = []

    def draw() -> None:
        drawn.extend((float(torch.rand(1)), random.random(), float(np.random.rand())))

    def forward(m: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
        return m.tail(body(m, x))

    model = iks_plugin.pack(network(forward))
    with torch.no_grad():
        model(torch.rand(1, 3, 24, 24))
    assert len(set(drawn)) == len(drawn) > 6
    assert "stream" in fast.paths(model).values()


class GivesItself(Layers):
    def __deepcopy__(self, memo: Any) -> GivesItself:
        return self


def test_a_model_that_gives_itself_for_a_copy_stays_what_it_is() -> None:
    model = GivesItself(lambda m, x: m.tail(body(m, x))).eval()
    model.load_state_dict(network(body).state_dict())
    cls = type(iks_plugin.pack(model))
    image = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        result = model(image)
        assert type(model) is cls
        assert is_same(result, iks_plugin.unpack(model)(image), 1e-5)


def test_hooks_on_all_modules_see_each_image() -> None:
    model = iks_plugin.pack(network(lambda m, x: m.tail(body(m, x))))
    image, seen = torch.rand(1, 3, 24, 24), []
    with torch.no_grad():
        model(image)
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            model(image)
        finally:
            handle.remove()
    assert {model.head, model.a, model.b, model.tail} <= set(seen)


def test_streams_run_while_another_network_is_measured() -> None:
    in_training = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    controller = iks_plugin.sparsify(in_training, 0.5, ramp_steps=2)
    assert nn.modules.module._global_forward_hooks
    model = iks_plugin.pack(network(lambda m, x: m.tail(body(m, x))))
    with torch.no_grad():
        model(torch.rand(1, 3, 24, 24))
    assert "stream" in fast.paths(model).values()
    controller.detach()


@pytest.mark.parametrize("change", ["replace", "in place", "list", "dict"])
def test_attributes_that_change_are_seen(change: str) -> None:
    model = network(lambda m, x: m.tail(body(m, x) * m.gain * m.gains[0] * m.named["gain"]))
    model.gain, model.gains, model.named = torch.ones(1), [1.0], {"gain": 1.0}  # type: ignore[assignment]
    iks_plugin.pack(model)
    image = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        before = model(image)
        if change == "replace":
            model.gain = torch.full((1,), 2.0)
        elif change == "in place":
            model.gain.mul_(2)
        elif change == "list":
            model.gains[0] = 2.0
        else:
            model.named["gain"] = 2.0
        assert not is_same(model(image), before)
        assert is_same(model(image), iks_plugin.unpack(model)(image), 1e-5)


def test_layers_in_training_mode_see_each_image_once() -> None:
    model = network(lambda m, x: m.tail(m.norm(body(m, x))))
    model.norm = nn.BatchNorm2d(16)
    iks_plugin.pack(model)
    model.norm.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(1, 3, 24, 24))
    assert int(model.norm.num_batches_tracked) == 3


@pytest.mark.parametrize("what", ["a lock", "a tensor with a gradient"])
def test_models_that_cannot_be_copied(what: str) -> None:
    model = iks_plugin.pack(network(lambda m, x: m.tail(body(m, x))))
    image = torch.rand(1, 3, 24, 24)
    model.extra = threading.Lock() if what == "a lock" else model.head(image)  # type: ignore[assignment]
    with torch.no_grad():
        result = model(image)
        assert all(module._kept is not None for module in model.modules() if isinstance(module, PackedWeight))
        assert is_same(result, iks_plugin.unpack(model)(image), 1e-5)


@pytest.mark.parametrize("error", [AssertionError, ValueError, IndexError])
def test_models_that_refuse_a_part_of_an_image(error: type[Exception]) -> None:
    def only_large(m: Any, x: Tensor) -> Tensor:
        if x.shape[2] <= 64:
            raise error("too small")
        return m.tail(body(m, x))

    plain = network(only_large)
    model = iks_plugin.pack(copy.deepcopy(plain))
    image = torch.rand(1, 3, 70, 24)
    with torch.no_grad():
        assert is_same(model(image), plain(image), 1e-5)


def test_a_gradient_after_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_fastest", lambda ways: "channels_last")
    model = iks_plugin.pack(network(lambda m, x: m.tail(body(m, x))))
    image = torch.rand(1, 3, 24, 24)
    with torch.inference_mode():
        model(image)
    image.requires_grad_()
    model(image).sum().backward()
    assert image.grad is not None


def test_feature_maps_are_dropped_when_nobody_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result = torch.tanh(x)
            made.append(weakref.ref(result))
            alive.append(sum(one() is not None for one in made))
            return result

    def deep(m: Any, x: Tensor) -> Tensor:
        h = m.head(x)
        for _ in range(12):
            h = m.look(m.a(h))
        return m.tail(h)

    usual = tracing.Tracer.is_leaf_module
    monkeypatch.setattr(tracing.Tracer, "is_leaf_module", lambda *given: isinstance(given[1], Looks) or usual(*given))
    model = network(deep)
    model.look = Looks()
    trace = tracing.trace(iks_plugin.pack(model), torch.Size((1, 3, 24, 24)))
    assert trace.steps is not None
    made.clear()  # those without data, of which the shapes were known
    alive.clear()
    with torch.no_grad():
        tracing.run(trace.steps, dict(model.named_modules()), torch.rand(1, 3, 24, 24))
    assert len(alive) == 12
    assert max(alive) <= 2
