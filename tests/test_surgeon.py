"""The law "obs": what it measures, whom it chooses and what becomes of the others, against sums done by hand."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import iks_plugin
import toys
from iks_plugin import IksWarning, laws, surgeon
from iks_plugin.curvature import CurvatureWatcher, channel_dimension, parts_of, patches_of
from iks_plugin.layers import Gated, gated_layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 9)),
    "1x1, no bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 7, 9)),
    "strided, dilated": (lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), dilation=2, padding=(2, 4)), (2, 4, 9, 11)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 7, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 7, 9)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 9)),
    "same, even kernel": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 7, 9)),
    "one image": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 9)),
    "one-dimensional": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "linear": (lambda: nn.Linear(5, 6), (2, 7, 5)),
    "wide": (lambda: nn.Conv2d(256, 8, 3, padding=1), (1, 256, 5, 5)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_patches_are_what_a_layer_multiplies(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, image = make(), torch.randn(shape)
    output = layer(image)
    patches = patches_of(layer, image, output.shape)
    assert patches is not None
    groups, parts = getattr(layer, "groups", 1), parts_of(layer)
    assert patches.shape[:2] == (groups, parts)
    rows = layer.weight.reshape(groups, layer.weight.shape[0] // groups, parts, -1).permute(0, 2, 1, 3)
    if patches.shape[-1] > rows.shape[-1]:
        assert parts == 1
        rows = torch.cat([rows, layer.bias.view(groups, 1, -1, 1)], dim=-1)
        rest = 0
    else:
        rest = 0 if layer.bias is None else layer.bias
    products = (patches @ rows.transpose(-1, -2)).sum(1)  # (groups, pixels, outputs of a group)
    result = products.transpose(0, 1).flatten(1) + rest
    expected = output.movedim(channel_dimension(layer), -1).flatten(0, -2)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_few_of_many_pixels_are_looked_at() -> None:
    layer, image = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 200, 200)
    patches = patches_of(layer, image, layer(image).shape)
    assert patches is not None
    assert 400 < patches.shape[2] < 800


def moments_for(n: int, seed: int) -> Tensor:
    inputs = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(seed))
    inputs[:, 1:] += inputs[:, :-1]  # neighbours are alike, as in images
    return inputs.T @ inputs / len(inputs)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 20), outputs=st.integers(1, 6), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_others_take_over_as_well_as_they_can(n: int, outputs: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = surgeon.damped(moments_for(n, seed)[None, None])
    rows = torch.randn(1, 1, outputs, n, generator=generator)
    support = torch.rand(1, 1, outputs, n, generator=generator) < density
    result = surgeon.compensated(rows, support, h)
    assert bool((result[~support] == 0).all())
    root = torch.linalg.cholesky(h[0, 0].double()).T
    for output in range(outputs):
        keep = support[0, 0, output]
        best = torch.zeros(n, dtype=torch.double)
        if bool(keep.any()):
            right = root @ rows[0, 0, output].double()
            best[keep] = torch.linalg.lstsq(root[:, keep], right.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(result[0, 0, output].double(), best, rtol=1e-3, atol=1e-3)


def gated(layer: nn.Module) -> Gated:
    model = nn.Sequential(layer)
    iks_plugin.sparsify(model, 0.5, law="obs", include="*", layer_types=[nn.Conv2d, nn.Linear])
    return gated_layers(model)["0"]


@pytest.mark.parametrize("make", [LAYERS[name][0] for name in ("linear", "groups", "wide")])
def test_sensitivities_are_what_the_loss_grows_by(make: Callable[[], nn.Module]) -> None:
    """Weights of a layer removed one by one, the others at their best, against the formula."""
    torch.manual_seed(0)
    layer = gated(make())
    weight, parts = layer.weight.detach(), parts_of(layer)
    groups, inputs = getattr(layer, "groups", 1), weight[0].numel() // parts
    outputs = weight.shape[0] // groups
    with_bias = parts == 1
    h = torch.stack([moments_for(inputs + with_bias, seed) for seed in range(groups * parts)])
    h = h.view(groups, parts, *h.shape[1:])
    importance = torch.rand(weight.shape[0]) + 0.1
    sensitivity = surgeon.sensitivities(layer, surgeon.Curvature(h, importance))
    roots = (weight.abs() * sensitivity).reshape(groups, outputs, parts, inputs)
    damped = surgeon.damped_each(h).double()
    for place in torch.randperm(weight.numel())[:40].tolist():
        group, output, part, column = (int(index) for index in np.unravel_index(place, roots.shape))
        row = weight.double().reshape(roots.shape)[group, output, part]
        row = torch.cat([row, torch.zeros(int(with_bias))])[None, None, None]
        support = torch.ones_like(row, dtype=torch.bool)
        support[..., column] = False
        here = damped[group : group + 1, part : part + 1]
        change = (surgeon.compensated(row, support, here) - row).flatten()
        growth = importance[group * outputs + output] * (change @ here[0, 0] @ change)
        torch.testing.assert_close(roots[group, output, part, column].double() ** 2, growth, rtol=2e-3, atol=1e-9)


class Mixed(nn.Module):
    """Layers whose curvature can be measured, one where it cannot, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.b, self.tail = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2), nn.Conv2d(8, 3, 3, padding=1)
        self.idle = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.b(torch.relu(self.up(torch.relu(self.a(self.head(x)))))))


@pytest.mark.filterwarnings("ignore:1 rewritten layers got no gradient")
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("make", [toys.plain_sr, Mixed])
@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
def test_the_target_is_met_to_the_weight(make: Callable[[], nn.Module], target: float, optimizer: type) -> None:
    torch.manual_seed(0)
    model = make()
    controller = iks_plugin.sparsify(model, target, law="obs", total_steps=30)
    toys.train(model, optimizer(model.parameters(), lr=1e-3), 30)
    weights = sum(layer.raw_weight.numel() for layer in gated_layers(model).values())
    assert round(controller.sparsity * weights) == laws.count_for(target, weights)
    x = torch.randn(1, 3, 12, 12)
    before = model.eval()(x)
    iks_plugin.finalize(model)
    torch.testing.assert_close(model(x), before)
    assert iks_plugin.report(model).zeros == laws.count_for(target, weights)


def test_a_weight_that_went_stays_away_and_the_others_are_not_shrunk() -> None:
    torch.manual_seed(0)
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8, law="obs", ramp_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.95)
    toys.train(model, optimizer, 5)
    masks = {name: layer.weight != 0 for name, layer in gated_layers(model).items()}
    toys.train(model, optimizer, 20)
    for name, layer in gated_layers(model).items():
        assert torch.equal(layer.weight != 0, masks[name])
        alive = masks[name]
        torch.testing.assert_close(layer.weight[alive], layer.raw_weight[alive], rtol=0, atol=1e-4)


def test_it_loses_less_than_magnitude_on_the_layer_itself() -> None:
    """One action on correlated inputs: the output of the pruned layer is nearer to the dense one's."""
    torch.manual_seed(0)
    images = nn.functional.avg_pool2d(torch.randn(4, 8, 40, 40), 5, stride=1)  # smooth, as images are
    errors = {}
    for law in ("obs", "exact"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
        dense = copy.deepcopy(model)
        iks_plugin.sparsify(model, 0.7, law=law, include="*", ramp_steps=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        (model(images) * torch.randn(4, 8, 36, 36)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            errors[law] = float((model(images) - dense(images)).square().mean())
    assert errors["obs"] < 0.5 * errors["exact"]


def test_steps_are_longer_where_few_weights_are_left() -> None:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.9, law="obs", ramp_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    toys.train(model, optimizer, 1)
    layer = gated_layers(model)["2"]
    density = float((layer.weight != 0).float().mean())
    before = layer.raw_weight.detach().clone()
    bias = layer.bias.detach().clone()
    toys.train(model, optimizer, 1)
    expected = -1e-3 * laws.SurgeonLaw(10, 1, None).update_factor(density) * layer.raw_weight.grad
    torch.testing.assert_close(layer.raw_weight - before, expected, rtol=1e-3, atol=2e-7)
    torch.testing.assert_close(layer.bias - bias, -1e-3 * layer.bias.grad, rtol=1e-3, atol=2e-7)


def test_weights_that_see_nothing_go_first() -> None:
    """Inputs that ReLU holds at zero count for nothing, however large their weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0.0, -1.0
        model[2].weight[:, 3] *= 10
    iks_plugin.sparsify(model, 0.2, law="obs", include="*", ramp_steps=5)
    toys.train(model, torch.optim.SGD(model.parameters(), lr=1e-4), 5, channels=8)
    assert int((model[2].weight[:, 3] != 0).sum()) == 0
    assert float((model[2].weight != 0).float().mean()) > 0.6


def test_magnitude_decides_where_gradients_are_zero() -> None:
    """A layer that has no say yet, and one beside it that cannot be measured."""
    torch.manual_seed(0)
    layers = {name: gated(nn.Conv2d(4, 4, 3)) for name in ("dead", "alive", "unmeasured")}
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    h = torch.eye(37)[None, None]
    known = {"dead": surgeon.Curvature(h, torch.zeros(4)), "alive": surgeon.Curvature(h, torch.ones(4))}
    score = laws.SurgeonLaw(10, 1, None).score
    for measured in (known, {name: known[name] for name in ("dead",)}):
        scores = surgeon.all_scores(layers, weights, measured, score)
        for name, weight in weights.items():
            assert torch.equal(scores[name].flatten().argsort(), weight.abs().flatten().argsort())
            assert bool((scores[name] > 0).all())
    scores = surgeon.all_scores(layers, weights, known, score)
    assert scores["dead"].max() < 1e-3 * scores["alive"].mean()
    torch.testing.assert_close(
        scores["unmeasured"].mean() / weights["unmeasured"].abs().mean(),
        scores["alive"].mean() / weights["alive"].abs().mean(),
    )


def test_a_score_is_the_mean_of_magnitude_and_of_what_the_loss_grows_by() -> None:
    magnitude, sensitivity = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([4.0, 0.25, 9.0, 0.0])
    score = laws.SurgeonLaw(10, 1, None).score(magnitude, sensitivity)
    torch.testing.assert_close(score**2, magnitude * (magnitude * sensitivity))


@pytest.mark.parametrize(
    ("density", "factor"),
    [(1.0, 1.0), (0.25, 2.0), (0.01, 10.0), (0.001, laws.LONGEST_UPDATE), (0, laws.LONGEST_UPDATE)],
)
def test_update_factor(density: float, factor: float) -> None:
    assert laws.SurgeonLaw(10, 1, None).update_factor(density) == pytest.approx(factor)


def test_the_dial_turns_both_ways() -> None:
    torch.manual_seed(0)
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, law="obs", ramp_steps=5)
    toys.train(model, torch.optim.Adam(model.parameters()), 6)
    weights = sum(layer.raw_weight.numel() for layer in gated_layers(model).values())
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        before = model(x)
        for target in (0.6, 0.95, 0.2, 0.0, 0.8):
            controller.target_sparsity = target
            assert round(controller.sparsity * weights) == laws.count_for(target, weights)
            if target == 0.6:  # what comes back is as good as zero until it is trained
                torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)


def global_hooks() -> int:
    return len(nn.modules.module._global_forward_hooks)


def test_nothing_is_measured_when_nothing_is_due() -> None:
    gc.collect()  # models of other tests
    assert not global_hooks()
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, law="obs", ramp_steps=40, interval=20)
    optimizer = torch.optim.Adam(model.parameters())
    found = []
    for _ in range(60):
        found.append(global_hooks())
        toys.train(model, optimizer, 1)
    assert found == [int(8 <= step < 20 or 28 <= step < 40) for step in range(60)]
    other = toys.plain_sr()
    iks_plugin.sparsify(other, 0.8, law="obs", ramp_steps=1)
    assert global_hooks() == 1
    del other
    gc.collect()
    assert not global_hooks()
    third = toys.plain_sr()
    iks_plugin.sparsify(third, 0.8, law="obs", ramp_steps=1).detach()
    assert not global_hooks()
    del controller


def test_only_training_is_measured() -> None:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8, law="obs", ramp_steps=1)
    layers = gated_layers(model)
    watcher = CurvatureWatcher(lambda: layers)
    watcher.start()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model(x)
    model.eval()(x).sum().backward()
    model.train()
    assert not watcher.found()
    model(x).sum().backward()
    watcher.stop()
    assert set(watcher.found()) == set(layers)
    gradients = {name: known.gradients for name, known in watcher.found().items()}
    assert all(float(gradient.min()) > 0 for gradient in gradients.values())


class WithPosition(nn.Conv2d):
    """Sees where it is, too (CoordConv): concatenates before it convolves."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(torch.cat([image, torch.ones_like(image[:, :1])], 1))


class Shuffled(nn.Conv2d):
    """Rearranges what it has made."""

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(super().forward(image), 2)


class ChannelsLast(nn.Conv2d):
    """Makes (N, H, W, C)."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).permute(0, 2, 3, 1)


class ChannelsFirst(nn.Linear):
    """Takes (N, H, W, C)."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("layer", "back"),
    [
        (WithPosition(17, 16, 3, padding=1), nn.Identity()),
        (Shuffled(16, 64, 3, padding=1), nn.AvgPool2d(2)),
        (ChannelsLast(16, 12, 3, padding=1), ChannelsFirst(12, 16)),
    ],
    ids=["input", "output", "order of the output"],
)
def test_layers_with_a_forward_of_their_own_go_by_magnitude(layer: nn.Module, back: nn.Module) -> None:
    first, last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
    model = nn.Sequential(first, nn.Conv2d(16, 16, 3, padding=1), layer, back, last)
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=10, interval=5)
    with pytest.warns(IksWarning, match=r"1 rewritten layers \(2\) were trained .* or change it or their output"):
        toys.train(model, torch.optim.Adam(model.parameters()), 10)
    assert controller.sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("how", ["in eval mode", "input by keyword", "one layer alone", "as it should be"])
def test_layers_that_cannot_be_measured_are_named_once(how: str) -> None:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8, ramp_steps=10, interval=5)
    if how == "in eval mode":
        model.eval()
    elif how == "input by keyword":
        model.forward = lambda x: functools.reduce(lambda image, layer: layer(input=image), model, x)  # type: ignore[method-assign]
    elif how == "one layer alone":
        model[4].eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", IksWarning)
        toys.train(model, torch.optim.Adam(model.parameters()), 10)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, IksWarning)]
    named = {"one layer alone": "1 rewritten layers (4)", "as it should be": None}.get(how, "2 rewritten layers (2, 4)")
    assert [text.partition(" were trained in eval mode, got")[0] for text in said] == [named] * (named is not None)


def test_what_goes_to_fewer_zeros_is_as_good_as_zero_too() -> None:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.9, ramp_steps=5)
    toys.train(model, torch.optim.Adam(model.parameters()), 20)
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(iks_plugin.finalize(model, 0.5)(x), before, rtol=1e-4, atol=1e-4)
    assert iks_plugin.report(model).sparsity == pytest.approx(0.5, abs=1e-3)


def test_compiled_models_are_measured_and_compiled_again_afterwards() -> None:
    gc.collect()  # models of other tests
    torch._dynamo.reset()
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=40, interval=20)
    optimizer = torch.optim.Adam(model.parameters())
    calls = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            calls.append(controller.steps)
            return graph(*arguments)

        return call

    compiled = torch.compile(model, backend=backend)
    for _ in range(50):
        compiled(torch.rand(1, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller.steps == 40:
            assert set(controller._curvature.found()) == set(gated_layers(model))
    assert {0, 7, 20, 27, 40, 49} <= set(calls)
    if hasattr(torch.compiler, "set_stance"):
        assert not set(range(8, 20)) & set(calls)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_bias_takes_over_nothing(frozen: bool) -> None:
    torch.manual_seed(0)
    model = toys.plain_sr()
    bias = model[2].bias
    bias.requires_grad_(not frozen)
    before = bias.detach().clone()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=1)
    toys.train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0), 1)
    assert controller.sparsity == pytest.approx(0.8, abs=1e-3)
    assert torch.equal(bias, before) == frozen


def test_another_default_dtype() -> None:
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=5)
    optimizer = torch.optim.Adam(model.parameters())
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(6):
            model(torch.rand(1, 3, 8, 8, dtype=torch.float32)).square().mean().backward()
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert controller.sparsity == pytest.approx(0.8, abs=1e-3)


def test_gradients_that_overflow_are_not_measured() -> None:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8, ramp_steps=1)
    layers = gated_layers(model)
    watcher = CurvatureWatcher(lambda: layers)
    watcher.start()
    x = torch.randn(1, 3, 8, 8)
    (model(x) * float("inf")).sum().backward()
    assert not watcher.found()
    model(x).sum().backward()
    (model(x) * float("nan")).sum().backward()
    watcher.stop()
    assert all(bool(known.gradients.isfinite().all()) for known in watcher.found().values())


def test_rounding_does_not_stop_it() -> None:
    """Inputs without any rank: all channels the same."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    controller = iks_plugin.sparsify(model, 0.5, law="obs", include="*", ramp_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(1e4 * torch.ones(1, 8, 8, 8)).square().sum().backward()
    optimizer.step()
    assert controller.sparsity == 0.5
    assert bool(torch.isfinite(model[0].weight).all())
