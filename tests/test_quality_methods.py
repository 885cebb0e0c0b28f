"""The methods that the quality lab compares, each against the formula of its paper."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.quality.methods import METHODS, Method, Schedule, make_method
from benchmarks.quality.methods.gmp import GMP
from benchmarks.quality.methods.iks import IKS, IKSPaper
from benchmarks.quality.methods.issp import ISSP, shrink_unimportant
from benchmarks.quality.methods.masks import count_for, cubic_sparsity, global_masks
from benchmarks.quality.methods.rigl import RigL, drop_and_grow, update_share
from benchmarks.quality.methods.str_ import STR, SoftThreshold, decay_for
from benchmarks.quality.methods.without import PARTS, by_magnitude, on_their_own
from benchmarks.quality.training import DivergedError, train
from benchmarks.quality.trial import counted_layers
from iks_plugin import IksError, OptionError
from iks_plugin.curvature import Curvature
from iks_plugin.layers import gated_layers
from iks_plugin.surgeon import compensated, damped, sensitivities


class Net(nn.Module):
    """x2 from two prunable layers of different scale of weights between two that face the image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 12, 3, padding=1)
        self.up = nn.PixelShuffle(2)
        with torch.no_grad():
            self.two.weight.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.two(self.one(self.head(x).relu()).relu()))
        return out


WEIGHTS = 8 * 8 * 9 + 8 * 12 * 9


def random_batches(seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    while True:
        large = torch.rand(2, 3, 16, 16, generator=random)
        yield nn.functional.avg_pool2d(large, 2), large


def run(name: str | Method, target: float = 0.75, steps: int = 30, ramp: int = 18, lr: float = 1e-3) -> Net:
    torch.manual_seed(0)
    model = Net()
    method = make_method(name) if isinstance(name, str) else name
    method.start(model, counted_layers(model), target, Schedule(steps, ramp))
    train(model, method, random_batches(), steps, lr, lambda step: None)
    method.finish()
    return model


def zeros(model: Net) -> int:
    return sum(int((layer.weight == 0).sum()) for layer in (model.one, model.two))


def started(method: Method, target: float, steps: int = 100, ramp: int = 60) -> Net:
    model = Net()
    method.start(model, counted_layers(model), target, Schedule(steps, ramp))
    return model


# --- all methods ---


WITHOUT = [f"iks-without:part={part}" for part in PARTS]


@pytest.mark.parametrize("name", [*METHODS, *WITHOUT, "rigl:interval=4", "iss-p:shrink=0"])
def test_a_plain_model_with_the_wanted_zeros_in_the_same_layers(name: str) -> None:
    torch.manual_seed(0)
    fresh = Net()
    trained = run(name)
    assert set(trained.state_dict()) == set(fresh.state_dict())
    assert type(trained.one) is nn.Conv2d
    assert zeros(trained) == (0 if name == "dense" else round(0.75 * WEIGHTS))
    assert int((trained.head.weight == 0).sum()) == 0
    assert not torch.equal(trained.head.bias, fresh.head.bias)


@pytest.mark.parametrize("name", list(METHODS))
def test_the_same_twice(name: str) -> None:
    first, second = run(name).state_dict(), run(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("target", [0.5, 0.99])
@pytest.mark.parametrize("name", ["str", "iss-p", "rigl", "gmp", "oneshot", "iks"])
def test_other_targets(name: str, target: float) -> None:
    assert zeros(run(name, target)) == round(target * WEIGHTS)


def test_counted_layers_are_those_that_sparsify_rewrites() -> None:
    class WithImageLayers(Net):
        def __init__(self) -> None:
            super().__init__()
            self.tail = nn.Conv2d(3, 3, 3, padding=1)

    model = WithImageLayers()
    layers = counted_layers(model)
    assert list(layers) == ["one", "two"]
    assert layers["one"] is model.one
    assert type(model.one) is nn.Conv2d


def test_a_training_that_diverges_is_stopped() -> None:
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step \d+ of 30"):
        run("dense", lr=1e30)


# --- masks and the ramp ---


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (10, 0.9 * (1 - 0.8**3)), (25, 0.9 * (1 - 0.5**3)), (50, 0.9), (51, 0.9)]
)
def test_cubic_schedule(step: int, expected: float) -> None:
    assert cubic_sparsity(step, 50, 0.9) == pytest.approx(expected)


def test_cubic_schedule_from_another_start() -> None:
    assert cubic_sparsity(25, 50, 0.9, start=0.5) == pytest.approx(0.9 - 0.4 / 8)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 30), st.lists(st.integers(-3, 3), min_size=30, max_size=30))
def test_global_masks_cut_exactly_the_smallest_even_where_many_are_equal(wanted: int, values: list[int]) -> None:
    flat = torch.tensor(values, dtype=torch.float32)
    weights = [flat[:12].view(3, 4), flat[12:].view(2, 3, 3)]
    masks = global_masks(weights, wanted)
    assert [mask.shape for mask in masks] == [weight.shape for weight in weights]
    kept = torch.cat([mask.flatten() for mask in masks])
    assert int((~kept).sum()) == wanted
    if 0 < wanted < 30:
        assert flat.abs()[~kept].max() <= flat.abs()[kept].min()


# --- one-shot ---


def test_oneshot_cuts_at_once_over_all_layers_and_holds_its_mask() -> None:
    torch.manual_seed(0)
    method = make_method("oneshot")
    model = started(method, 0.75)
    before = [layer.weight.detach().clone() for layer in (model.one, model.two)]
    magnitudes = torch.cat([weight.abs().flatten() for weight in before])
    assert zeros(model) == round(0.75 * WEIGHTS)
    assert int((model.two.weight == 0).sum()) / model.two.weight.numel() > 0.75  # its weights are smaller
    line = float(magnitudes.sort().values[round(0.75 * WEIGHTS)])
    masks = [layer.weight != 0 for layer in (model.one, model.two)]
    Net()  # as a training would draw numbers
    train(model, method, random_batches(), 12, 1e-2, lambda step: None)
    for layer, mask, old in zip((model.one, model.two), masks, before, strict=True):
        assert torch.equal(layer.weight != 0, mask)
        assert bool((old.abs()[mask] >= line).all())
        assert not torch.equal(layer.weight[mask], old[mask])


# --- gradual magnitude pruning ---


def test_gmp_follows_the_cubic_ramp_and_then_holds_its_mask() -> None:
    method = GMP(interval=4)
    model = started(method, 0.8, steps=40, ramp=18)
    counts = {}
    masks = {}

    def look(step: int) -> None:
        counts[step] = zeros(model)
        masks[step] = torch.cat([(layer.weight == 0).flatten() for layer in (model.one, model.two)])

    train(model, method, random_batches(), 40, 1e-2, look)
    for step in range(1, 41):
        acted = 18 if step >= 18 else step // 4 * 4
        assert counts[step] == round(cubic_sparsity(acted, 18, 0.8) * WEIGHTS), step
    assert all(torch.equal(masks[step], masks[18]) for step in range(18, 41))
    assert not bool((masks[8] & ~masks[18]).any())  # what is zero stays it


# --- STR ---


def test_soft_threshold_and_its_gradients() -> None:
    gate = SoftThreshold(-1.0, torch.zeros(1))
    cut = 1 / (1 + math.e)
    weight = torch.tensor([0.9, -0.5, 0.2, -0.1, 0.0], requires_grad=True)
    out = gate(weight)
    assert out.tolist() == pytest.approx([0.9 - cut, cut - 0.5, 0, 0, 0])
    out.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4]))
    assert weight.grad is not None and gate.s.grad is not None
    assert weight.grad.tolist() == [1, 10, 0, 0, 0]
    assert float(gate.s.grad) == pytest.approx((-1 + 10) * cut * (1 - cut))


def test_str_decay_is_the_factor_that_makes_the_wanted_zeros() -> None:
    random = torch.Generator().manual_seed(0)
    raw = [torch.randn(50, generator=random) * 0.1, torch.randn(80, generator=random) * 0.01]
    scales = [torch.tensor(-12.0), torch.tensor(-9.0)]
    factor = decay_for(raw, scales, 65)
    assert 0 < factor < 1
    cuts = [torch.sigmoid(factor * scale.double()) for scale in scales]
    gone = sum(int((weight.double().abs() <= cut).sum()) for weight, cut in zip(raw, cuts, strict=True))
    assert gone in (64, 65)


def test_str_has_one_threshold_for_each_layer_that_the_loss_moves_apart_and_follows_the_ramp() -> None:
    method = STR(interval=4)
    model = started(method, 0.8, steps=40, ramp=18)
    parameters = {id(parameter) for parameter in method.parameter_groups()}
    assert all(id(gate.s) in parameters for gate in method.gates.values())
    counts = {}

    def look(step: int) -> None:
        counts[step] = zeros(model)

    train(model, method, random_batches(), 40, 1e-2, look)
    for step in (4, 8, 12, 18, 20, 40):
        assert counts[step] == pytest.approx(round(cubic_sparsity(step, 18, 0.8) * WEIGHTS), abs=2), step
    one, two = (float(gate.s.detach()) for gate in method.gates.values())
    assert one != two
    gated = [layer.weight.detach().clone() for layer in (model.one, model.two)]
    method.finish()
    assert zeros(model) == round(0.8 * WEIGHTS)
    moved = sum(int((a != b.weight).sum()) for a, b in zip(gated, (model.one, model.two), strict=True))
    assert moved <= 2


# --- ISS-P ---


def test_issp_shrinks_what_the_target_would_cut_and_nothing_else() -> None:
    weights = [torch.tensor([0.1, -0.5, 0.2]), torch.tensor([[0.9], [-0.05]])]
    masks = global_masks(weights, 3)
    shrink_unimportant(weights, masks, 0.9)
    assert weights[0].tolist() == pytest.approx([0.09, -0.5, 0.18])
    assert weights[1].flatten().tolist() == pytest.approx([0.9, -0.045])


def test_issp_lets_weights_grow_back_until_its_mask_is_frozen() -> None:
    method = ISSP(shrink=0.5)
    model = started(method, 0.75, steps=10, ramp=3)
    parts = [layer.weight.detach() for layer in (model.one, model.two)]
    first = torch.cat([mask.flatten() for mask in global_masks(parts, round(0.75 * WEIGHTS))])
    place = int((~first).nonzero()[0])
    method.after_step(1)
    assert zeros(model) == 0  # shrunk, not cut
    weight = parts[0] if place < parts[0].numel() else parts[1]
    weight.view(-1)[place if place < parts[0].numel() else place - parts[0].numel()] = 5.0
    method.after_step(2)
    assert zeros(model) == 0
    assert 5.0 in weight  # it has grown across the line, so it is not shrunk
    method.after_step(3)
    assert zeros(model) == round(0.75 * WEIGHTS)
    assert 5.0 in weight
    dead = [part == 0 for part in parts]
    for part in parts:
        part.add_(1.0)
    method.after_step(4)
    assert [torch.equal(part == 0, mask) for part, mask in zip(parts, dead, strict=True)] == [True, True]


# --- RigL ---


@pytest.mark.parametrize(("step", "expected"), [(0, 0.3), (50, 0.15), (100, 0.0), (25, 0.15 * (1 + math.sqrt(0.5)))])
def test_rigl_share(step: int, expected: float) -> None:
    assert update_share(step, 100, 0.3) == pytest.approx(expected)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, 39), st.integers(0, 40))
def test_rigl_drops_the_smallest_and_grows_the_largest_gradients(seed: int, living: int, count: int) -> None:
    random = torch.Generator().manual_seed(seed)
    mask = torch.zeros(40, dtype=torch.bool)
    mask[torch.randperm(40, generator=random)[:living]] = True
    weight = torch.randn(40, generator=random) * mask
    grad = torch.randn(40, generator=random)
    after = drop_and_grow(weight.view(4, 10), grad.view(4, 10), mask.view(4, 10), count).flatten()
    assert int(after.sum()) == living
    moved = min(count, living, 40 - living)
    stayed = torch.zeros(40, dtype=torch.bool)
    stayed[torch.where(mask, weight.abs(), -1.0).topk(living - moved).indices] = True
    assert bool((after & stayed).sum() == living - moved)
    grown = after & ~stayed
    if moved:
        rest = ~after
        assert int(grown.sum()) == moved
        assert not bool(rest.any()) or grad.abs()[grown].min() >= grad.abs()[rest].max()


def test_rigl_keeps_each_layers_count_starts_grown_ones_at_zero_and_ends() -> None:
    method = RigL(interval=5, end=0.75)
    torch.manual_seed(0)
    model = started(method, 0.75, steps=40)
    layers = (model.one, model.two)
    counts = [int(mask.sum()) for mask in method.masks]
    assert sum(counts) == WEIGHTS - round(0.75 * WEIGHTS)
    before = [mask.clone() for mask in method.masks]
    history = {}

    def look(step: int) -> None:
        history[step] = torch.cat([mask.flatten() for mask in method.masks])
        for layer, mask in zip(layers, method.masks, strict=True):
            assert not bool((layer.weight[~mask] != 0).any())

    train(model, method, random_batches(), 40, 1e-2, look)
    assert [int(mask.sum()) for mask in method.masks] == counts
    changes = [step for step in range(2, 41) if not torch.equal(history[step], history[step - 1])]
    assert changes == [5, 10, 15, 20, 25]
    grown = int((history[5] & ~torch.cat([mask.flatten() for mask in before])).sum())
    assert 0 < grown <= sum(round(update_share(5, 30, 0.3) * count) for count in counts)


def test_rigl_grows_from_zero() -> None:
    method = RigL(interval=1, end=1.0)
    torch.manual_seed(0)
    model = started(method, 0.5, steps=10)
    old = method.masks[0].clone()
    small, large = next(random_batches())
    nn.functional.l1_loss(model(small), large).backward()
    method.after_backward(1)
    grown = method.masks[0] & ~old
    assert bool(grown.any())
    assert not bool((model.one.weight[grown] != 0).any())
    grad = model.one.weight.grad
    assert grad is not None
    assert bool((grad[grown] != 0).all())
    assert not bool((grad[~method.masks[0]] != 0).any())


# --- ours ---


def test_iks_hands_its_options_and_schedule_to_sparsify() -> None:
    method = make_method("iks:law=exact;interval=7;granularity=kernel")
    model = started(method, 0.9, steps=50, ramp=20)
    assert isinstance(method, IKS)
    state = method.controller.state_dict()
    assert (state["total_steps"], state["interval"], state["granularity"]) == (50, 7, "kernel")
    assert state["target_sparsity"] == 0.9
    assert type(model.one).__name__ == "SparseConv2d"


def test_the_paper_law_acts_as_often_as_asked() -> None:
    method = make_method("iks-paper:actions=5")
    started(method, 0.9, steps=50)
    assert isinstance(method, IKSPaper)
    assert method.controller.state_dict()["law"] == "paper"
    assert method.controller.state_dict()["interval"] == 10


# --- names ---


def test_options_by_name() -> None:
    assert make_method("gmp:interval=5") == GMP(interval=5)
    assert make_method("iss-p:shrink=0.9") == ISSP(shrink=0.9)
    assert count_for(0.9, 15) == round(13.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", "expected any of dense, oneshot, gmp, .*got 'magic'"),
        ("gmp:pace=5", "no option 'pace'; it has interval"),
        ("oneshot:pace=5", "no option 'pace'; it has none"),
        ("gmp:interval", "expected options as name=value;name=value, got 'interval'"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(IksError, match=message):
        make_method(name)


def test_options_that_sparsify_does_not_know() -> None:
    with pytest.raises(OptionError, match="no option 'pace'"):
        started(make_method("iks:pace=5"), 0.9)


# --- ours without a part ---


def test_what_is_left_without_a_part() -> None:
    method = make_method("iks")
    layer = gated_layers(started(method, 0.9))["one"]
    inputs = torch.randn(500, 73, generator=torch.Generator().manual_seed(0))
    inputs[:, 1:] += inputs[:, :-1]
    known = Curvature((inputs.T @ inputs / 500)[None, None], torch.rand(8))
    alone, plain = on_their_own(known), by_magnitude(known)
    torch.testing.assert_close(
        sensitivities(layer, alone), sensitivities(layer, known), rtol=0.03, atol=0.0
    )  # the damping of 1 % comes twice
    everywhere = sensitivities(layer, plain)
    torch.testing.assert_close(everywhere, everywhere[0, 0, 0, 0].expand_as(everywhere))
    rows, support = torch.randn(1, 1, 8, 73), torch.rand(1, 1, 8, 73) < 0.5
    for changed in (alone, plain):
        torch.testing.assert_close(compensated(rows, support, damped(changed.inputs)), rows * support)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_makes_a_difference(part: str) -> None:
    whole, without = run("iks"), run(f"iks-without:part={part}")
    assert not torch.equal(whole.two.weight, without.two.weight)


def test_the_unknown_part_is_named() -> None:
    with pytest.raises(IksError, match="iks-without: expected part=steps, magnitude, takeover or curvature, got 'all'"):
        started(make_method("iks-without:part=all"), 0.9)
