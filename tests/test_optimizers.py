"""What counts as a step, which optimizers are refused, and that weight decay stays off the thresholds."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import iks_plugin
import toys
from iks_plugin import IksError, IksWarning


def test_gradient_accumulation_counts_optimizer_steps_only():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(3):
        for _ in range(4):
            model(torch.randn(1, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.steps == 3


def test_a_second_optimizer_for_another_network_does_not_count():
    generator, critic = toys.plain_sr(), toys.plain_sr()
    controller = iks_plugin.sparsify(generator, 0.8)
    mine, other = (torch.optim.Adam(net.parameters(), 1e-3) for net in (generator, critic))
    for _ in range(5):
        toys.train(critic, other, 2)
        toys.train(generator, mine, 1)
    assert controller.steps == 5


def test_two_optimizers_for_one_network_count_each_round_once():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8)
    halves = [torch.optim.Adam(part.parameters(), 1e-3) for part in (model[:4], model[4:])]
    for _ in range(5):
        model(torch.randn(1, 3, 8, 8)).square().mean().backward()
        for optimizer in halves:
            optimizer.step()
    assert controller.steps == 5


def test_two_models_each_have_their_own_controller():
    models = [toys.plain_sr(), toys.plain_sr()]
    controllers = [
        iks_plugin.sparsify(model, target, ramp_steps=10) for model, target in zip(models, (0.5, 0.9), strict=True)
    ]
    toys.train(nn.Sequential(*models), torch.optim.Adam([*models[0].parameters(), *models[1].parameters()], 1e-3), 10)
    assert [controller.sparsity for controller in controllers] == pytest.approx([0.5, 0.9], abs=1e-3)


def test_decay_is_kept_off_the_thresholds_of_every_model_in_an_optimizer():
    models = nn.ModuleList([toys.plain_sr(), toys.plain_sr(), toys.plain_sr()])
    controllers = [iks_plugin.sparsify(model, 0.5, ramp_steps=10) for model in models]
    optimizer = torch.optim.AdamW(models.parameters(), 1e-3, weight_decay=0.5)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.warns(IksWarning, match="weight decay on the thresholds"):
        toys.train(nn.Sequential(*models), optimizer, 12)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held
    assert [controller.steps for controller in controllers] == [12, 12, 12]
    assert [controller.sparsity for controller in controllers] == pytest.approx([0.5] * 3, abs=1e-3)
    opened = [model[2].threshold[model[2].weight != 0] for model in models]
    assert all(threshold.max() < -11 for threshold in opened)

    def failing_closure() -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(failing_closure)
    assert len(optimizer.state_dict()["param_groups"]) == 1
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held


class CallsItsParent(torch.optim.SGD):
    """Its step calls the step of the class above, which has hooks of its own."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_within_a_step_counts_once():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8)
    toys.train(model, CallsItsParent(model.parameters(), 1e-3), 5)
    assert controller.steps == 5


class Wrapper(torch.optim.Optimizer):
    """Shares the groups of another optimizer, and lets it step, as SAM and Lookahead do."""

    def __init__(self, base):
        self.base = base
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


def halves(model):
    return [torch.optim.SGD(part.parameters(), 1e-2) for part in (model[:4], model[4:])]


OPTIMIZERS = {
    "one for each half": halves,
    "one within another": lambda model: [Wrapper(torch.optim.SGD(model.parameters(), 1e-2))],
    "a step within a step": lambda model: [CallsItsParent(model.parameters(), 1e-2)],
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_of_sparse_layers_are_longer_whoever_makes_them(build):
    ends = []
    for make in (lambda model: [torch.optim.SGD(model.parameters(), 1e-2)], build):
        torch.manual_seed(0)
        model = toys.plain_sr()
        controller = iks_plugin.sparsify(model, 0.8, ramp_steps=10, interval=10)
        toys.train(model, torch.optim.SGD(model.parameters(), 1e-2), 10)
        assert controller.sparsity > 0.7
        optimizers = make(model)
        for step in range(5):
            model.zero_grad()
            model(torch.rand(2, 3, 8, 8, generator=torch.manual_seed(step))).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        assert controller.steps == 15
        ends.append(dict(model.state_dict()))
    assert toys.states_equal(*ends)


def test_a_failed_step_lengthens_nothing_that_follows():
    def failing_closure() -> float:
        raise RuntimeError("no data")

    ends = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = toys.plain_sr()
        controller = iks_plugin.sparsify(model, 0.8, ramp_steps=10, interval=10)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        toys.train(model, optimizer, 11)
        good = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model[2].raw_weight.add_(1)  # as if the training had diverged
        if fails:
            with pytest.raises(RuntimeError, match="no data"):
                optimizer.step(failing_closure)
        model.load_state_dict(good)
        toys.train(model, optimizer, 3, seed=1)
        assert controller.steps == 14
        ends.append(dict(model.state_dict()))
    assert toys.states_equal(*ends)


def test_steps_count_where_the_first_layer_is_frozen():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=10)
    model[2].requires_grad_(False)
    toys.train(model, torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-3), 10)
    assert controller.steps == 10 and controller.sparsity == pytest.approx(0.8, abs=1e-3)


def test_groups_that_change_in_the_middle_are_looked_at_again():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, exclude="4")
    optimizer = torch.optim.AdamW([model[0].weight], 1e-3, weight_decay=0.0)
    toys.train(model, optimizer, 3)
    assert controller.steps == 0
    optimizer.add_param_group({"params": [model[2].raw_weight, model[2].threshold]})
    toys.train(model, optimizer, 3)
    assert controller.steps == 3
    optimizer.param_groups[1]["weight_decay"] = 0.5
    with pytest.warns(IksWarning, match="has weight decay on the thresholds"):
        toys.train(model, optimizer, 3)


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="this torch has no GradScaler for the CPU")
def test_a_step_that_the_grad_scaler_skips_does_not_count():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(1, 3, 8, 8)).float().square().mean()
        scaler.scale(loss).backward()
        if step in (2, 3):
            model[2].raw_weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    assert controller.steps == 4


def test_autocast_and_bfloat16_models_meet_the_target():
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model = toys.plain_sr(24).to(dtype)
        controller = iks_plugin.sparsify(model, 0.9, ramp_steps=30)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for step in range(40):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                toys.train(model, optimizer, 1, seed=step)
        assert controller.sparsity == pytest.approx(0.9, abs=1e-3)


def test_a_step_within_autocast_prunes_as_one_outside_does():
    ends = []
    for within in (False, True):
        torch.manual_seed(0)
        model = toys.plain_sr()
        iks_plugin.sparsify(model, 0.9, ramp_steps=20, interval=20)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(torch.rand(2, 3, 12, 12)).square().mean()
            loss.backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
                optimizer.step()
            optimizer.zero_grad()
        ends.append(model.state_dict())
    assert all(map(torch.equal, ends[0].values(), ends[1].values()))


COMPILED = """
import torch, iks_plugin
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3))
def rewrite(): global controller; controller = iks_plugin.sparsify(model, 0.8, ramp_steps=10)
def build(): global optimizer; optimizer = torch.optim.Adam(model.parameters(), 1e-3)
def compiled(): global network; network = torch.compile(model, backend="aot_eager")
for part in (ORDER): part()
for _ in range(10):
    network(torch.randn(1, 8, 8, 8)).square().mean().backward()
    optimizer.step()
assert controller.steps == 10, controller
assert abs(controller.sparsity - 0.8) < 0.001, controller.sparsity
"""


@pytest.mark.parametrize("order", ["rewrite, build, compiled", "rewrite, compiled, build", "compiled, rewrite, build"])
def test_steps_count_with_torch_compile_in_any_order(order):
    """Each in a process of its own: torch 2.1 and 2.2 strip the step hooks at the first compile of a process."""
    subprocess.run([sys.executable, "-c", COMPILED.replace("ORDER", order)], check=True)


COMPILED_WHOLE = """
import torch, iks_plugin
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3))
controller = iks_plugin.sparsify(model, 0.8, ramp_steps=40, interval=20)
optimizer = torch.optim.AdamW(controller.param_groups(), 1e-3)
def make_step():
    optimizer.step()
def train_step():
    optimizer.zero_grad()
    model(torch.randn(1, 8, 8, 8)).square().mean().backward()
    make_step()
PART = torch.compile(PART, backend="eager")
for _ in range(50):
    train_step()
assert controller.steps == 50, controller
assert abs(controller.sparsity - 0.8) < 0.001, controller.sparsity
"""


OLD_COMPILER = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="torch 2.1 cannot trace the backward pass of an autograd function"
)


@pytest.mark.parametrize("part", ["make_step", pytest.param("train_step", marks=OLD_COMPILER)])
def test_steps_count_within_what_is_compiled(part):
    subprocess.run([sys.executable, "-c", COMPILED_WHOLE.replace("PART", part)], check=True)


COMPILED_EARLY = """
import torch, iks_plugin
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3))
network = torch.compile(model, backend="aot_eager")
x = torch.randn(1, 8, 8, 8)
network(x)
iks_plugin.sparsify(model, 0.8, ramp_steps=5, interval=1)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
for _ in range(10):
    optimizer.zero_grad()
    network(x).square().mean().backward()
    assert model[0].threshold.grad is not None
    optimizer.step()
torch.testing.assert_close(network(x), model(x))
iks_plugin.finalize(model)
torch.testing.assert_close(network(x), model(x))
"""


def test_a_network_that_was_compiled_and_run_before_follows_both_changes():
    subprocess.run([sys.executable, "-c", COMPILED_EARLY], check=True)


def stale(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, iks_plugin.SparsityController]:
    model = toys.plain_sr()
    if kind == "built before":
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        return model, optimizer, iks_plugin.sparsify(model, 0.8)
    controller = iks_plugin.sparsify(model, 0.8)
    chosen = [p for name, p in model.named_parameters() if "threshold" not in name]
    return model, torch.optim.Adam(chosen, 1e-3), controller


@pytest.mark.parametrize("kind", ["built before", "thresholds left out"])
def test_an_optimizer_without_the_thresholds_is_refused_at_its_first_step(kind):
    model, optimizer, controller = stale(kind)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(
            IksError, match="weights but not the thresholds of 2 rewritten layers .2, 4.: it was built before"
        ):
            toys.train(model, optimizer, 1)
    assert toys.states_equal(dict(model.state_dict()), dict(before)) and controller.steps == 0


def test_the_remedy_in_the_message_works():
    model, optimizer, controller = stale("built before")
    optimizer.add_param_group(controller.param_groups()[1])
    toys.train(model, optimizer, 2)
    assert controller.steps == 2


def test_layers_that_training_does_not_reach_are_named_once_with_the_remedy():
    model = toys.UnusedLayer()
    iks_plugin.sparsify(model, 0.8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with pytest.warns(IksWarning, match=r"1 rewritten layers got no gradient .* exclude=\['unused'\]"):
        toys.train(model, optimizer, 1, channels=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IksWarning)
        toys.train(model, optimizer, 3, channels=8)


def test_an_optimizer_of_frozen_thresholds_is_fine():
    model, optimizer, _ = stale("thresholds left out")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("threshold" not in name)
    toys.train(model, optimizer, 1)


def test_steps_count_where_all_thresholds_are_frozen():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("threshold" not in name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IksWarning)
        toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 8)
    assert controller.steps == 8
    assert controller.sparsity == pytest.approx(0.8, abs=1e-3)


DECAYING = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("build", DECAYING.values(), ids=DECAYING)
def test_decay_is_kept_off_thresholds_as_if_they_had_a_group_of_their_own(build):
    start = toys.plain_sr().state_dict()
    ends = []
    for grouped in (False, True):
        model = toys.plain_sr()
        model.load_state_dict(start)
        controller = iks_plugin.sparsify(model, 0.8, law="exact", ramp_steps=20)
        optimizer = build(controller.param_groups() if grouped else model.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        groups = [len(group["params"]) for group in optimizer.param_groups]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(30):
                toys.train(model, optimizer, 1, seed=step)
                scheduler.step()
        said = [w for w in caught if issubclass(w.category, IksWarning)]
        assert len(said) == (0 if grouped else 1)
        if said:
            assert "has weight decay on the thresholds" in str(said[0].message)
            assert "controller.param_groups()" in str(said[0].message)
        assert [len(group["params"]) for group in optimizer.param_groups] == groups
        ends.append(dict(model.state_dict()))
    assert toys.states_equal(*ends)
    assert max(value.max() for key, value in ends[0].items() if "threshold" in key) < -1


def test_a_failing_step_does_not_leave_the_groups_split():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    groups = [list(group["params"]) for group in optimizer.param_groups]

    def failing_closure() -> float:
        raise RuntimeError("no data")

    saved = optimizer.state_dict()
    with pytest.warns(IksWarning), pytest.raises(RuntimeError, match="no data"):
        optimizer.step(failing_closure)
    assert optimizer.state_dict() == saved
    toys.train(model, optimizer, 1)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [list(map(id, g)) for g in groups]


def test_param_groups_hold_every_parameter_once_and_take_options():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8)
    others, thresholds = controller.param_groups(lr=0.5)
    assert thresholds["weight_decay"] == 0 and thresholds["lr"] == 0.5 and "lr" not in others
    assert [id(p) for p in thresholds["params"]] == [id(model[2].threshold), id(model[4].threshold)]
    held = [id(p) for group in (others, thresholds) for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
