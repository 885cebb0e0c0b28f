"""The controller in training loops: it meets the target, resumes to the bit, and says when something is wrong."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
import weakref

import pytest
import torch
from torch import nn

import iks_plugin
import toys
from iks_plugin import IksError, IksWarning, OptionError

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.0),
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
def test_after_the_ramp_the_target_holds_at_every_action(optimizer, target):
    model = toys.plain_sr(24)
    controller = iks_plugin.sparsify(model, target, ramp_steps=60, interval=5)
    trained = optimizer(model.parameters())
    reached = []
    for step in range(1, 121):
        toys.train(model, trained, 1, seed=step)
        assert controller.steps == step
        if step >= 60 and step % 5 == 0:
            reached.append(controller.sparsity)
    assert all(abs(sparsity - target) <= 0.001 for sparsity in reached) and len(reached) == 13


def test_the_sparsity_rises_along_the_ramp():
    model = toys.plain_sr(24)
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=40, interval=1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(1, 41):
        toys.train(model, optimizer, 1, seed=step)
        assert controller.sparsity == pytest.approx(0.8 * (1 - (1 - step / 40) ** 3), abs=0.001)


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "layer"])
@pytest.mark.parametrize("law", [{"ramp_steps": 20}, {"law": "paper", "epoch_steps": 1, "total_steps": 60}])
def test_every_granularity_and_law_trains_without_a_line_more(granularity, law):
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.7, granularity=granularity, **law)
    losses = toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 60)
    assert losses[-1] < losses[0]
    assert iks_plugin.report(model).sparsity > 0.1


def test_the_last_of_the_total_steps_ends_at_the_target():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, total_steps=37)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 37)
    assert controller.sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"total_steps": 40}, {"law": "exact", "total_steps": 40}, {"law": "paper", "epoch_steps": 1, "total_steps": 60}],
)
@pytest.mark.parametrize("stop", [7, 20, 33])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_resumed_run_is_the_straight_run_to_the_bit(options, stop, optimizer):
    start = toys.plain_sr().state_dict()

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, iks_plugin.SparsityController]:
        model = toys.plain_sr()
        model.load_state_dict(start)
        controller = iks_plugin.sparsify(model, 0.8, **options)
        return model, optimizer(model.parameters()), controller

    def run(model: nn.Module, trained: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            toys.train(model, trained, 1, seed=step)

    straight = begin()
    run(*straight[:2], range(45))
    first = begin()
    run(*first[:2], range(stop))
    saved = [copy.deepcopy(part.state_dict()) for part in first]
    resumed = begin()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    run(*resumed[:2], range(stop, 45))
    for one, other in zip(straight, resumed, strict=True):
        assert toys.states_equal(dict(one.state_dict()), dict(other.state_dict()))


def test_the_state_survives_torch_save_with_weights_only(tmp_path):
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8)
    torch.save(controller.state_dict(), tmp_path / "state.pt")
    controller.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_a_loaded_state_brings_its_target_and_schedule():
    models = toys.plain_sr(), toys.plain_sr()
    saved = iks_plugin.sparsify(models[0], 0.8, total_steps=40).state_dict()
    controller = iks_plugin.sparsify(models[1], 0.5)
    said = r"goal \(target_sparsity 0.8\) replaces .*\(target_sparsity 0.5\).*\*\*state, \*\*\{'target_sparsity': 0.5\}"
    with pytest.warns(IksWarning, match=said):
        controller.load_state_dict(saved)
    assert controller.target_sparsity == 0.8 and controller.state_dict() == saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.load_state_dict(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"law": "paper"}, "law expected 'obs', got 'paper': rewrite the model with the options"),
        ({"granularity": "kernel"}, "granularity expected 'weight', got 'kernel'"),
        ({"weights": 7}, "weights expected 4608, got 7"),
        ({"version": 99}, "version expected 1, got 99"),
        ({"target_sparsity": 80}, "target_sparsity in the controller state must be a number in .*did you mean 0.8"),
        ({"steps": None}, "steps has the impossible value None: the state is damaged"),
        ({"ramp_start": None}, "ramp_start has the impossible value None: the state is damaged"),
        ({"ramp_steps": "x"}, "ramp_steps has the impossible value 'x': the state is damaged"),
        ({"interval": 0}, "interval has the impossible value 0"),
        ({"postponed_to": 0}, "postponed_to has the impossible value 0"),
        ({"total_steps": True}, "total_steps has the impossible value True"),
        ({"start_sparsity": 2.0}, "start_sparsity has the impossible value 2.0"),
        ({"update_factors": {"2": 1.0}}, "update_factors or measured do not belong to the layers 2, 4: the state is"),
        ({"update_factors": {"2": 0.0, "4": 1.0}}, "update_factors or measured do not belong to the layers 2, 4"),
        ({"measured": {"7": []}}, "update_factors or measured do not belong to the layers 2, 4"),
        ({"measured": {"2": [1, 2]}}, "update_factors or measured do not belong to the layers 2, 4"),
        (None, "expected the keys .*got none for .'granularity', 'interval'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(change, message):
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.5)
    before = controller.state_dict()
    with pytest.raises(IksError, match=message):
        controller.load_state_dict({} if change is None else {**before, **change})
    assert controller.state_dict() == before


def test_a_state_of_an_earlier_time_or_another_schedule_loads():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.5, total_steps=40)
    early = controller.state_dict()
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 20)
    controller.load_state_dict(early)
    assert controller.state_dict() == early
    controller.load_state_dict({**early, "total_steps": None, "ramp_steps": 7, "start_sparsity": 0.25, "steps": 3})
    assert controller.steps == 3


@pytest.mark.parametrize("options", [{}, {"law": "exact"}, {"law": "paper", "epoch_steps": 1}])
def test_a_state_from_before_ramps_could_start_late_loads(options):
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.5, total_steps=40, **options)
    state = controller.state_dict()
    before = {key: value for key, value in state.items() if key != "ramp_start"}
    controller.load_state_dict(before)
    assert controller.state_dict() == state


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["raw_weight", "threshold"])
@pytest.mark.parametrize("options", [{"interval": 10}, {"law": "exact"}, {"law": "paper", "interval": 10}])
def test_weights_that_are_not_finite_stop_the_training_by_name(value, tensor, options):
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.5, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    toys.train(model, optimizer, 9)
    with torch.no_grad():
        getattr(model[4], tensor)[0, 0, 0, 0] = value
    thresholds = [layer.threshold.clone() for layer in (model[2], model[4])]
    for parameter in model.parameters():
        parameter.grad = None
    with pytest.raises(IksError, match=r"1 layers are not finite .4.: expected finite numbers, got nan or inf"):
        optimizer.step()
    assert all(
        torch.equal(layer.threshold.nan_to_num(), old.nan_to_num())
        for layer, old in zip((model[2], model[4]), thresholds, strict=True)
    )
    assert controller.steps == 10


def test_the_dial_turns_under_the_law_of_the_paper_once_its_training_is_over():
    model = toys.plain_sr(32)
    controller = iks_plugin.sparsify(model, 0.8, law="paper", epoch_steps=1, total_steps=40)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    toys.train(model, optimizer, 30)
    before = controller.sparsity
    controller.target_sparsity = 0.9
    assert controller.sparsity == before
    toys.train(model, optimizer, 10)
    controller.target_sparsity = 0.95
    assert controller.sparsity == pytest.approx(0.95, abs=0.001)


def test_the_dial_gives_any_sparsity_without_training():
    model = toys.plain_sr(32)
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=20)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 40)
    for target in (0.95, 0.5, 0.99, 0.8):
        controller.target_sparsity = target
        assert controller.sparsity == pytest.approx(target, abs=0.001)
        assert iks_plugin.report(model).target_sparsity == target


def test_a_new_target_before_the_end_of_the_ramp_moves_nothing_at_once():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=20)
    controller.target_sparsity = 0.5
    assert controller.sparsity < 0.01
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 20)
    assert controller.sparsity == pytest.approx(0.5, abs=0.001)


def resumed_after_the_ramp(target: float, **options: int | str) -> tuple[nn.Module, iks_plugin.SparsityController]:
    """Trained for 40 steps at 0.8, and then resumed with another target."""
    torch.manual_seed(0)
    models = toys.plain_sr(32), toys.plain_sr(32)
    goals = zip(models, (0.8, target), strict=True)
    trained, resumed = (iks_plugin.sparsify(model, goal, ramp_steps=20, **options) for model, goal in goals)
    toys.train(models[0], torch.optim.Adam(models[0].parameters(), 1e-3), 40)
    resumed.load_state_dict({**trained.state_dict(), "target_sparsity": target})
    models[1].load_state_dict(models[0].state_dict())
    return models[1], resumed


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 12), ({"interval": 5}, 12), ({"interval": 1000, "total_steps": 47}, 7), ({"law": "exact"}, 0)],
)
@pytest.mark.parametrize("target", [0.95, 0.5])
def test_a_resumed_training_measures_before_it_takes_a_new_goal_up(target, options, steps):
    model, controller = resumed_after_the_ramp(target, **options)
    controller.aim_when_measured()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        assert controller.sparsity == pytest.approx(0.8, abs=0.001)
        toys.train(model, optimizer, 1, seed=step)
    assert controller.sparsity == pytest.approx(target, abs=0.001)
    assert controller.state_dict()["postponed_to"] is None and not controller.state_dict()["measured"]


def test_a_new_goal_that_is_taken_up_measured_costs_less_than_one_that_is_set():
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    changes = []
    for measured in (True, False):
        model, controller = resumed_after_the_ramp(0.95)
        before = model(x).detach()
        if measured:
            controller.aim_when_measured()
        else:
            controller.target_sparsity = controller.target_sparsity
        toys.train(model, torch.optim.SGD(model.parameters(), 0.0), 12)
        assert controller.sparsity == pytest.approx(0.95, abs=0.001)
        changes.append(float((model(x) - before).detach().square().mean()))
    assert changes[0] < 0.8 * changes[1]


@pytest.mark.parametrize("stop", [0, 5, 11])
def test_a_goal_that_waits_for_its_measurement_survives_another_resume(stop):
    results = []
    for again in (False, True):
        model, controller = resumed_after_the_ramp(0.95, interval=1000)
        controller.aim_when_measured()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for step in range(15):
            if again and step == stop:
                states = copy.deepcopy(model.state_dict()), copy.deepcopy(controller.state_dict())
                model = toys.plain_sr(32)
                controller = iks_plugin.sparsify(model, 0.95, ramp_steps=20, interval=1000)
                controller.load_state_dict(states[1])
                model.load_state_dict(states[0])
                optimizer = torch.optim.SGD(model.parameters(), 0.05)
            toys.train(model, optimizer, 1, seed=step)
        assert controller.sparsity == pytest.approx(0.95, abs=0.001)
        results.append(model.state_dict())
    assert toys.states_equal(*results)


def test_a_new_goal_within_the_ramp_is_not_postponed():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=20)
    controller.aim_when_measured()
    assert controller.state_dict()["postponed_to"] is None


def test_a_model_that_is_sparse_already_is_never_driven_below_its_zeros():
    model = toys.plain_sr()
    with torch.no_grad():
        for layer in (model[2], model[4]):
            layer.weight[torch.rand_like(layer.weight) < 0.6] = 0
    controller = iks_plugin.sparsify(model, 0.5, ramp_steps=20)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 40)
    assert 0.55 < controller.sparsity < 0.65
    assert all(layer.threshold.min() > -30 for layer in (model[2], model[4]))


def test_ema_copies_know_the_target_and_are_not_driven():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=20)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(40):
        toys.train(model, optimizer, 1, seed=step)
        with torch.no_grad():
            for mean, current in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(current, 0.1)
    controller.target_sparsity = 0.7
    iks_plugin.finalize(average)
    assert iks_plugin.report(average).sparsity == pytest.approx(0.7, abs=1e-4)
    assert controller.sparsity == pytest.approx(0.7, abs=1e-3) and isinstance(model[2].threshold, nn.Parameter)


def test_the_controller_works_unheld_and_goes_away_with_its_model():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8, ramp_steps=20)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    toys.train(model, optimizer, 20)
    assert iks_plugin.report(model).sparsity == pytest.approx(0.8, abs=1e-3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    for _ in range(20):
        optimizer.step()


def test_a_held_controller_of_a_lost_model_says_so():
    controller = iks_plugin.sparsify(toys.plain_sr(), 0.8)
    gc.collect()
    for call in (lambda: controller.sparsity, controller.param_groups, controller.state_dict):
        with pytest.raises(IksError, match="the controller's model is gone: keep a reference"):
            call()


def test_a_model_whose_layers_were_all_replaced_does_not_disturb_others():
    model, other = toys.plain_sr(), toys.plain_sr()
    iks_plugin.sparsify(model, 0.8)
    iks_plugin.sparsify(other, 0.5)
    model[2] = model[4] = nn.Identity()
    gc.collect()
    iks_plugin.finalize(other, 0.5)


def test_the_target_counts_over_the_layers_that_are_left():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=10)
    copied_before = copy.deepcopy(model)
    old = model[4]
    model[4] = nn.Conv2d(16, 16, 3, padding=1)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 10)
    with pytest.raises(IksError, match="only a part of a rewritten model .* delete what still refers to the old ones"):
        iks_plugin.finalize(model)
    del old
    gc.collect()
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 15)
    assert controller.sparsity == pytest.approx(0.8, abs=1e-3)
    controller.load_state_dict(controller.state_dict())
    for each in (copy.deepcopy(model), model):
        iks_plugin.finalize(each)
        assert int((each[2].weight == 0).sum()) == round(0.8 * 2304)
    with pytest.raises(IksError, match="only a part"):
        iks_plugin.finalize(copied_before)


def test_a_copy_that_outlives_its_original_keeps_its_goal():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8)
    copied = copy.deepcopy(model)
    del model
    gc.collect()
    iks_plugin.finalize(copied)
    assert iks_plugin.report(copied).zeros == round(0.8 * 4608)


def test_a_model_whose_layers_were_replaced_lets_other_optimizers_step():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8)
    model[2] = model[4] = nn.Identity()
    other = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(other.parameters(), 1e-3)
    for _ in range(12):
        other(torch.ones(4)).sum().backward()
        optimizer.step()


def test_the_module_given_may_be_a_passing_one():
    nets = [toys.plain_sr(), toys.plain_sr()]
    controller = iks_plugin.sparsify(nn.ModuleList(nets), 0.8, ramp_steps=10)
    gc.collect()
    toys.train(nn.Sequential(*nets), torch.optim.Adam([p for net in nets for p in net.parameters()], 1e-3), 20)
    assert controller.steps == 20 and controller.sparsity == pytest.approx(0.8, abs=1e-3)


def test_tied_weights_are_counted_and_driven_once():
    model = toys.TiedConvs()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=10)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 20, channels=8)
    assert controller.sparsity == pytest.approx(0.8, abs=1 / 576)
    assert controller.state_dict()["weights"] == 576


def test_of_tied_layers_the_others_go_on_where_the_first_is_replaced():
    model = toys.TiedConvs()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=20)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 10, channels=8)
    model.first = nn.Conv2d(8, 8, 3, padding=1)
    gc.collect()
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 20, channels=8)
    assert controller.steps == 30
    assert controller.sparsity == pytest.approx(0.8, abs=1 / 576)
    iks_plugin.finalize(model)
    assert int((model.second.weight == 0).sum()) == round(0.8 * 576)


LEAVES_NONE = {
    "the setter": lambda model, controller: setattr(controller, "target_sparsity", 0.9999),
    "finalize": lambda model, controller: iks_plugin.finalize(model, 0.9999),
    "finalized": lambda model, controller: iks_plugin.finalized(model, 0.9999).__enter__(),
    "a copy's sparsify": lambda model, controller: iks_plugin.sparsify(copy.deepcopy(model), 0.9999),
}


@pytest.mark.parametrize("act", LEAVES_NONE.values(), ids=LEAVES_NONE)
def test_a_target_that_leaves_no_weight_is_refused_everywhere(act):
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match="0.9999 of 4608 weights, rounded, is all of them: none would be left"):
        act(model, controller)
    assert controller.target_sparsity == 0.5
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@pytest.mark.parametrize("state", [None, [1], "state"])
def test_what_is_no_state_at_all_is_refused(state):
    controller = iks_plugin.sparsify(toys.plain_sr(), 0.5)
    with pytest.raises(IksError, match="expected what controller.state_dict\\(\\) gave, got (NoneType|list|str)"):
        controller.load_state_dict(state)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_gets_a_controller_of_its_own_by_sparsify(copied):
    model = toys.plain_sr()
    original = iks_plugin.sparsify(model, 0.8, ramp_steps=10)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 5)
    other = copied(model)
    thresholds = other[2].threshold.clone()
    controller = iks_plugin.sparsify(other, 0.5, ramp_steps=10)
    assert torch.equal(other[2].threshold, thresholds) and original.target_sparsity == 0.8
    toys.train(other, torch.optim.Adam(other.parameters(), 1e-3), 20)
    assert controller.sparsity == pytest.approx(0.5, abs=1e-3) and original.steps == 5
    iks_plugin.finalize(other)


def test_zeros_that_were_there_before_are_told_of_once():
    model = toys.plain_sr()
    with torch.no_grad():
        for layer in (model[2], model[4]):
            layer.weight.mul_(torch.rand_like(layer.weight) > 0.9)
    controller = iks_plugin.sparsify(model, 0.5, ramp_steps=10)
    with pytest.warns(iks_plugin.IksWarning) as caught:
        toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 20)
    (warning,) = caught
    assert re.match(r"4,\d+ of 4,608 weights were zero before .* target of 50.00% asks for", str(warning.message))
    assert controller.sparsity > 0.85


def test_a_module_may_hold_its_controller_but_not_be_pickled_with_it():
    model = toys.plain_sr()
    model.controller = controller = iks_plugin.sparsify(model, 0.8, ramp_steps=10)
    copied = copy.deepcopy(model)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 12)
    assert copied.controller is controller and controller.steps == 12
    assert iks_plugin.report(copied).sparsity == 0 and controller.sparsity == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(IksError, match=r"cannot be pickled.*save controller.state_dict\(\) instead"):
        pickle.dumps(model)


def test_a_copy_is_not_adopted_with_another_granularity():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8, granularity="kernel")
    with pytest.raises(iks_plugin.OptionError, match="rewritten already, with granularity 'kernel', got 'weight'"):
        iks_plugin.sparsify(copy.deepcopy(model), 0.8)


def test_counting_by_hand_as_well_is_warned_of_once():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 2)
    with pytest.warns(iks_plugin.IksWarning, match="counts a step that the controller has counted by itself"):
        controller.step()


def test_a_finalized_model_needs_a_new_rewrite():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.5, ramp_steps=1, interval=1)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 1)
    iks_plugin.finalize(model)
    assert controller.sparsity == 0.5
    with pytest.raises(IksError, match="has been finalized: rewrite it with sparsify"):
        controller.target_sparsity = 0.9
    assert controller.target_sparsity == 0.5


def test_detached_it_acts_only_by_hand():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=10)
    controller.detach()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    toys.train(model, optimizer, 10)
    assert controller.steps == 0 and controller.sparsity < 0.01
    for _ in range(10):
        controller.step()
    assert controller.sparsity == pytest.approx(0.8, abs=1e-3)


def test_tensorboard_gets_the_total_and_each_layer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=10)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            toys.train(model, optimizer, 10, seed=step)
            controller.log(writer)
        controller.log(writer, step=77)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = events.Scalars("iks/sparsity")
    assert [event.step for event in scalars] == [10, 20, 30, 77]
    assert scalars[-1].value == pytest.approx(0.8, abs=1e-3)
    assert events.Scalars("iks/target_sparsity")[0].value == pytest.approx(0.8)
    by_layer = [events.Scalars(f"iks_layers/{name}")[-1].value for name in ("2", "4")]
    assert sum(by_layer) / 2 == pytest.approx(0.8, abs=1e-3)


def test_repr():
    text = repr(iks_plugin.sparsify(toys.plain_sr(), 0.8))
    assert text == "SparsityController(target_sparsity=0.8, law='obs', layers=2, steps=0)"
