"""`sparsify` changes nothing but the gates, and `finalize` gives the model back with exactly the target's zeros."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import iks_plugin
import toys
from iks_plugin import IksError, IksWarning
from iks_plugin.layers import gated_layers

TARGETS = [0, 0.1, 0.5, 0.8, 0.9, 0.99, 0.999]


def zeros(model: nn.Module) -> int:
    return sum(int((model[index].weight == 0).sum()) for index in (2, 4))


def trained(target: float, steps: int = 40, channels: int = 24, **options: object) -> nn.Sequential:
    model = toys.plain_sr(channels)
    iks_plugin.sparsify(model, target, ramp_steps=20, **options)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), steps)
    return model


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "layer"])
@pytest.mark.parametrize("target", TARGETS)
def test_zeros_are_exact_after_finalize(target, granularity):
    model = trained(target, granularity=granularity)
    iks_plugin.finalize(model)
    assert zeros(model) == round(target * 2 * 24 * 24 * 9)
    assert torch.isfinite(model(torch.randn(1, 3, 9, 9))).all()


@pytest.mark.parametrize("target", TARGETS)
def test_zeros_are_exact_whatever_the_training_did(target):
    for steps in (0, 3, 47):
        model = trained(0.8, steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IksWarning)
            iks_plugin.finalize(model, target)
        assert zeros(model) == round(target * 2 * 24 * 24 * 9)


def test_a_target_of_zero_that_is_met_does_not_change_the_output_either():
    model = trained(0)
    assert zeros(model) == 0
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    iks_plugin.finalize(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("train", [True, False])
def test_where_the_target_is_met_the_output_does_not_change_by_a_bit(train):
    model = trained(0.8).train(train)
    exact = zeros(model) / (2 * 24 * 24 * 9)
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    iks_plugin.finalize(model, exact)
    assert torch.equal(model(x), expected)


def test_the_model_is_as_it_was_before_the_rewrite():
    original = toys.plain_sr(24)
    model = copy.deepcopy(original)
    hooked = []
    model[2].register_forward_hook(lambda *_: hooked.append(1))
    weights = [model[2].weight, model[4].weight]
    iks_plugin.sparsify(model, 0.8, ramp_steps=5)
    assert [model[2].raw_weight, model[4].raw_weight] == weights
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 10)
    assert iks_plugin.finalize(model) is model
    assert [type(layer) for layer in model] == [type(layer) for layer in original]
    assert list(model.state_dict()) == list(original.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert model[2].weight is weights[0] and model[4].weight is weights[1] and weights[0].requires_grad
    assert len(hooked) == 10
    original.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(original(x), model(x))
    assert repr(model) == repr(original)


def test_finalized_modules_pickle_without_the_package():
    import pickle
    import pickletools

    model = trained(0.8)
    iks_plugin.finalize(model)
    names = [arg for _, arg, _ in pickletools.genops(pickle.dumps(model)) if isinstance(arg, str)]
    assert not any("iks_plugin" in name for name in names)


def test_the_dense_output_is_kept_at_the_start():
    model = toys.plain_sr()
    x = torch.randn(1, 3, 9, 9)
    dense = model(x)
    iks_plugin.sparsify(model, 0.8)
    torch.testing.assert_close(model(x), dense, rtol=0, atol=1e-3)


def test_finalize_at_zero_gives_the_weights_before_the_gate():
    model = trained(0.8)
    raw = [model[index].raw_weight.clone() for index in (2, 4)]
    iks_plugin.finalize(model, 0)
    assert all(torch.equal(model[index].weight, weight) for index, weight in zip((2, 4), raw, strict=True))


def test_more_zeros_leave_the_survivors_as_they_are():
    model = trained(0.8)
    before = torch.cat([model[index].weight.flatten() for index in (2, 4)]).detach()
    iks_plugin.finalize(model, 0.95)
    after = torch.cat([model[index].weight.flatten() for index in (2, 4)]).detach()
    assert torch.equal(after[after != 0], before[after != 0])


def test_the_dial_and_finalize_keep_the_same_weights():
    model = toys.plain_sr(24)
    controller = iks_plugin.sparsify(model, 0.8, law="exact", ramp_steps=20)
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 40)
    for target in (0.9, 0.6):
        finalized = iks_plugin.finalize(copy.deepcopy(model), target)
        controller.target_sparsity = target
        dialled = iks_plugin.finalize(copy.deepcopy(model))
        controller.target_sparsity = 0.8
        for index in (2, 4):
            assert torch.equal(finalized[index].weight == 0, dialled[index].weight == 0)


def test_a_model_in_a_wrapper_and_its_copies_finalize():
    model = trained(0.8)
    wrapped = nn.DataParallel(copy.deepcopy(model))
    iks_plugin.finalize(wrapped)
    iks_plugin.finalize(model)
    assert all(torch.equal(a, b) for a, b in zip(wrapped.module.parameters(), model.parameters(), strict=True))


def test_networks_that_were_rewritten_apart_keep_their_own_targets():
    nets = nn.ModuleList([toys.plain_sr(), toys.plain_sr()])
    for net, target in zip(nets, (0.5, 0.9), strict=True):
        iks_plugin.sparsify(net, target)
    with pytest.warns(IksWarning):
        iks_plugin.finalize(nets)
    assert [zeros(net) for net in nets] == [round(target * 2 * 16 * 16 * 9) for target in (0.5, 0.9)]


def test_training_goes_on_with_the_same_optimizer_after_finalize():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5, ramp_steps=5)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    toys.train(model, optimizer, 10)
    iks_plugin.finalize(model)
    toys.train(model, optimizer, 10)


def test_a_short_training_is_warned_of_with_figures():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8)
    with pytest.warns(IksWarning, match=r"at 0.0% zeros, and the target is 80.0%: .* of 4,608 weights") as caught:
        iks_plugin.finalize(model)
    assert caught[0].filename == __file__


def test_too_many_raw_zeros_are_warned_of():
    model = toys.plain_sr()
    with torch.no_grad():
        model[2].weight[:8] = 0
    iks_plugin.sparsify(model, 0.1)
    with pytest.warns(IksWarning, match="691 more weights are zero than the target asks for"):
        iks_plugin.finalize(model, 0.1)


def test_a_training_that_met_its_target_is_not_warned_of():
    model = trained(0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IksWarning)
        iks_plugin.finalize(model)


def test_a_target_below_the_zeros_that_were_there_before_is_warned_of_as_such():
    model = trained(0.8)
    iks_plugin.finalize(model)
    iks_plugin.sparsify(model, 0.5, ramp_steps=1)
    with pytest.warns(IksWarning) as caught:
        iks_plugin.finalize(model)
    (said,) = [str(warning.message) for warning in caught]
    assert "more weights are zero than the target asks for: they were zero before the gate" in said


def test_a_packed_model_is_not_rewritten():
    model = trained(0.8)
    iks_plugin.finalize(model)
    model.append(nn.Conv2d(16, 16, 3))
    iks_plugin.pack(model)
    with pytest.raises(IksError, match=r"the model is packed: call iks_plugin.unpack\(model\) before sparsify"):
        iks_plugin.sparsify(model, 0.8)
    iks_plugin.sparsify(iks_plugin.unpack(model), 0.9)


def test_a_model_that_is_not_rewritten_cannot_be_finalized():
    model = toys.plain_sr()
    for _ in range(2):
        with pytest.raises(IksError, match="not rewritten: it has no sparse layers. Call iks_plugin.sparsify"):
            iks_plugin.finalize(model)
        iks_plugin.sparsify(model, 0.5, ramp_steps=1, interval=1).step()
        iks_plugin.finalize(model)


def test_a_part_of_a_model_cannot_be_finalized():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5)
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(IksError, match=r"only a part of a rewritten model .2,304 of 4,608 weights."):
            iks_plugin.finalize(each[:4])
        assert len(gated_layers(each)) == 2


@pytest.mark.parametrize("target", [None, 0, 0.5])
def test_weights_that_are_not_finite_cannot_be_finalized(target):
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5)
    with torch.no_grad():
        model[2].raw_weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(IksError, match=r"not finite .2."):
        iks_plugin.finalize(model, target)
    assert len(gated_layers(model)) == 2


def test_a_failed_rewrite_leaves_no_trace():
    model = toys.plain_sr()
    state = copy.deepcopy(model.__dict__)
    with pytest.raises(IksError):
        iks_plugin.sparsify(model, 0.5, include="nowhere")
    assert model.__dict__.keys() == state.keys()
    assert all(not any(key.startswith("_iks") for key in module.__dict__) for module in model.modules())


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "layer"])
@pytest.mark.parametrize("steps", [0, 7, 40])
def test_finalized_for_a_while_is_what_finalize_gives(steps, granularity):
    model = trained(0.8, steps, granularity=granularity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IksWarning)
        expected = iks_plugin.finalize(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a look in the middle of a training is no mistake
        with iks_plugin.finalized(model) as same:
            assert same is model
            assert [type(layer) for layer in model] == [type(layer) for layer in expected]
            assert list(model.state_dict()) == list(expected.state_dict())
            assert toys.states_equal(dict(model.state_dict()), dict(expected.state_dict()))


def test_after_finalized_training_goes_on_as_if_nothing_had_been():
    straight, looked_at = trained(0.8, 0), trained(0.8, 0)
    looked_at.load_state_dict(straight.state_dict())
    for model in (straight, looked_at):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        parameters = [(name, id(p)) for name, p in model.named_parameters()]
        for _ in range(3):
            torch.manual_seed(1)
            toys.train(model, optimizer, 11)
            if model is looked_at:
                with iks_plugin.finalized(model, 0.5):
                    model(torch.randn(1, 3, 9, 9))
        assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert toys.states_equal(dict(straight.state_dict()), dict(looked_at.state_dict()))


def test_finalized_gives_the_gates_back_after_an_error():
    model = trained(0.8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), iks_plugin.finalized(model, 0.95):
        assert zeros(model) == round(0.95 * 2 * 24 * 24 * 9)
        raise ZeroDivisionError
    assert toys.states_equal(dict(model.state_dict()), before)
    assert len(gated_layers(model)) == 2


@pytest.mark.parametrize(
    ("action", "use"),
    [("pack", iks_plugin.pack), ("sparsify", lambda model: iks_plugin.sparsify(model, 0.9)), ("pack", "load")],
)
def test_what_is_finalized_for_a_while_is_packed_and_rewritten_as_a_copy(action, use, tmp_path):
    model = trained(0.8)
    iks_plugin.save(model, tmp_path / "m.iks")
    if use == "load":
        use = functools.partial(iks_plugin.load, tmp_path / "m.iks", packed=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with iks_plugin.finalized(model):
        with pytest.raises(IksError, match=rf"within iks_plugin\.finalized, which .*: {action} a copy\.deepcopy of it"):
            use(model)
        use(copy.deepcopy(model))
    assert toys.states_equal(dict(model.state_dict()), before)


def test_finalized_keeps_the_memory_format():
    model = trained(0.8).to(memory_format=torch.channels_last)
    with iks_plugin.finalized(model):
        assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[2].raw_weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [(toys.plain_sr, None, "not rewritten.*Call iks_plugin.sparsify"), (lambda: trained(0.8), 90, "did you mean 0.9")],
)
def test_finalized_refuses_what_finalize_refuses(model, target, message):
    with pytest.raises(IksError, match=message), iks_plugin.finalized(model(), target):
        pass


def test_with_gates_applied_the_parameters_are_the_gated_weights():
    model = trained(0.8)
    x = torch.randn(1, 3, 9, 9)
    expected, gated = model(x), model[2].weight.detach().clone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mean = copy.deepcopy(model)
    with iks_plugin.gates_applied(model):
        assert torch.equal(model.state_dict()["2.weight"], gated)
        assert torch.equal(model(x), expected)
        mean.load_state_dict(model.state_dict())
    assert toys.states_equal(dict(model.state_dict()), before)
    assert torch.equal(mean(x), expected)
    iks_plugin.finalize(mean, 0.9)
    assert zeros(mean) == round(0.9 * 2 * 24 * 24 * 9)
    survivors = mean[2].weight != 0
    assert torch.equal(mean[2].weight[survivors], gated[survivors])


def test_within_gates_applied_a_model_is_not_finalized_and_its_copy_is():
    model = trained(0.8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with iks_plugin.gates_applied(model):
        with pytest.raises(IksError, match=r"within iks_plugin\.gates_applied, .*: finalize a copy\.deepcopy of it"):
            iks_plugin.finalize(model)
        with iks_plugin.finalized(model):
            assert zeros(model) == round(0.8 * 2 * 24 * 24 * 9)
        with pytest.raises(IksError, match="gates_applied"):  # it is still so after another context
            iks_plugin.finalize(model)
        plain = iks_plugin.finalize(copy.deepcopy(model))
    assert toys.states_equal(dict(model.state_dict()), before)
    assert toys.states_equal(dict(iks_plugin.finalize(model).state_dict()), dict(plain.state_dict()))


def test_contexts_may_end_in_another_order_than_they_began():
    model = trained(0.8)
    outer, inner = iks_plugin.gates_applied(model), iks_plugin.finalized(model)
    outer.__enter__(), inner.__enter__()
    outer.__exit__(None, None, None), inner.__exit__(None, None, None)


@pytest.mark.filterwarnings("error:training ended at:iks_plugin.IksWarning")
def test_a_mean_of_gated_weights_is_finalized_without_a_warning_and_an_untrained_copy_with_one():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, ramp_steps=4)
    untrained = copy.deepcopy(model)
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    optimizer = torch.optim.Adam(controller.param_groups(), 1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 9, 9)).square().mean().backward()
        optimizer.step()
        with iks_plugin.gates_applied(model):
            mean.update_parameters(model)
    assert iks_plugin.report(mean).sparsity < 0.7
    holds_the_mean = copy.deepcopy(model)
    iks_plugin.sparsify(holds_the_mean, 0.8)  # with a controller, as the model in training has
    holds_the_mean.load_state_dict(mean.module.state_dict())
    for averaged in (mean, holds_the_mean, model):
        iks_plugin.finalize(averaged)
    with pytest.warns(iks_plugin.IksWarning, match="training ended at 0.0% zeros, and the target is 80.0%"):
        iks_plugin.finalize(untrained)


def test_gates_applied_refuses_a_model_without_gates_and_gives_them_back_after_an_error():
    with pytest.raises(IksError, match="not rewritten"), iks_plugin.gates_applied(toys.plain_sr()):
        pass
    model = trained(0.8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), iks_plugin.gates_applied(model):
        raise ZeroDivisionError
    assert toys.states_equal(dict(model.state_dict()), before)


def test_a_model_is_sparsified_until_it_is_finalized():
    model = toys.plain_sr()
    assert not iks_plugin.is_sparsified(model)
    iks_plugin.sparsify(model, 0.5)
    assert iks_plugin.is_sparsified(model) and iks_plugin.is_sparsified(nn.Sequential(model))
    with iks_plugin.finalized(model):
        assert not iks_plugin.is_sparsified(model)
    assert iks_plugin.is_sparsified(model)
