"""Gated layers as modules: what they compute, load, copy and pickle."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import iks_plugin
import toys
from iks_plugin import IksError
from iks_plugin.gate import soft_threshold
from iks_plugin.layers import SUPPORTED_TYPES, Gated, gated_layers, ungated

CASES = pytest.mark.parametrize(("make", "shape"), toys.LAYERS.values(), ids=toys.LAYERS)


def rewritten(layer: nn.Module, **options: object) -> Gated:
    iks_plugin.sparsify(layer, 0.5, layer_types=SUPPORTED_TYPES, **options)
    assert isinstance(layer, Gated)
    return layer


@CASES
@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "layer"])
def test_computes_what_the_plain_layer_computes_with_the_gated_weight(make, shape, granularity):
    plain = make()
    layer = rewritten(copy.deepcopy(plain), granularity=granularity)
    toys.spread_thresholds(layer)
    with torch.no_grad():
        layer.threshold.add_(0.3 * torch.randn_like(layer.threshold))
        plain.weight.copy_(soft_threshold(layer.raw_weight, layer.spread_threshold()))
    x = torch.randn(shape)
    assert 0 < (plain.weight == 0).sum() < plain.weight.numel()
    assert torch.equal(layer(x), plain(x))


@CASES
def test_one_threshold_per_filter_touches_one_output_channel_only(make, shape):
    layer = rewritten(make(), granularity="filter")
    x = torch.randn(shape)
    before = layer(x)
    with torch.no_grad():
        layer.threshold.view(-1)[1] = 20.0
    channel = -1 if isinstance(layer, nn.Linear) else 1
    changed = (layer(x) != before).movedim(channel, 0).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [1]


@CASES
def test_copies_and_pickles_compute_the_same(make, shape):
    layer = rewritten(make())
    toys.spread_thresholds(layer)
    x = torch.randn(shape)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert torch.equal(other(x), layer(x))
        assert other.raw_weight is not layer.raw_weight


@CASES
def test_channels_last_changes_nothing(make, shape):
    if len(shape) != 4:
        pytest.skip("channels_last is for 4 dimensions")
    layer = rewritten(make())
    toys.spread_thresholds(layer)
    x = torch.randn(shape)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)


def test_threshold_shapes():
    conv, transposed = nn.Conv2d(8, 6, 3, groups=2), nn.ConvTranspose2d(8, 6, 3, groups=2)
    table = {
        "weight": ((6, 4, 3, 3), (8, 3, 3, 3)),
        "kernel": ((6, 4, 1, 1), (8, 3, 1, 1)),
        "filter": ((6, 1, 1, 1), (2, 3, 1, 1)),
        "layer": ((1, 1, 1, 1), (1, 1, 1, 1)),
    }
    for granularity, expected in table.items():
        layers = [rewritten(copy.deepcopy(layer), granularity=granularity) for layer in (conv, transposed)]
        assert tuple(tuple(layer.threshold.shape) for layer in layers) == expected


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "layer"])
def test_a_dense_checkpoint_loads_strictly_and_resets_the_thresholds(granularity):
    dense = toys.plain_sr().state_dict()
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5, granularity=granularity, threshold_init=-11)
    toys.spread_thresholds(model)
    model.load_state_dict(dense, strict=True)
    for name, layer in gated_layers(model).items():
        assert torch.equal(layer.raw_weight, dense[f"{name}.weight"])
        assert (layer.threshold == -11).all()
    assert "2.threshold" not in dense


def test_a_checkpoint_of_the_published_code_loads_strictly():
    model = toys.plain_sr()
    published = model.state_dict()
    for name in ("2", "4"):
        published[f"{name}.threshold"] = torch.randn_like(published[f"{name}.weight"]) - 8
    iks_plugin.sparsify(model, 0.5)
    model.load_state_dict(published, strict=True)
    assert all(torch.equal(value, published[key]) for key, value in model.state_dict().items())


def test_a_threshold_of_equal_size_and_other_shape_loads():
    layer = rewritten(nn.Conv2d(8, 8, 3), granularity="filter")
    layer.load_state_dict({**layer.state_dict(), "threshold": torch.arange(8.0)})
    assert torch.equal(layer.threshold.flatten(), torch.arange(8.0))


def test_thresholds_of_another_granularity_are_refused_by_name():
    saved = rewritten(nn.Conv2d(8, 8, 3), granularity="kernel").state_dict()
    layer = rewritten(nn.Conv2d(8, 8, 3))
    with pytest.raises(RuntimeError, match=r"threshold expected \(8, 8, 3, 3\).*got \(8, 8, 1, 1\).*'kernel'"):
        layer.load_state_dict(saved)


def test_a_partial_checkpoint_leaves_other_thresholds_alone():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5)
    toys.spread_thresholds(model)
    before = model[4].threshold.clone()
    model.load_state_dict({"2.weight": torch.randn(16, 16, 3, 3)}, strict=False)
    assert (model[2].threshold == -12).all() and torch.equal(model[4].threshold, before)


def test_a_missing_weight_is_still_an_error():
    layer = rewritten(nn.Conv2d(8, 8, 3))
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": torch.zeros(8)})


def test_initialisation_is_not_lost():
    layer = rewritten(nn.Conv2d(8, 8, 3))
    toys.spread_thresholds(layer)
    before = layer.raw_weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.raw_weight, before) and (layer.threshold == -12).all()
    with ungated(layer):
        nn.init.ones_(layer.weight)
    assert isinstance(layer, Gated) and (layer.raw_weight == 1).all()


def test_a_new_parameter_may_be_assigned():
    layer = rewritten(nn.Conv2d(8, 8, 3))
    new = nn.Parameter(torch.randn(8, 8, 3, 3))
    layer.weight = new
    assert layer.raw_weight is new


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16], ids=["float16", "bfloat16"])
def test_thresholds_stay_float32_when_the_model_becomes_half(convert):
    layer = rewritten(nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        layer.threshold.fill_(-7.123456)
    convert(layer)
    assert layer.raw_weight.dtype != torch.float32 and layer.threshold.dtype == torch.float32
    assert (layer.threshold == torch.tensor(-7.123456)).all()
    assert layer.weight.dtype == layer.raw_weight.dtype


def test_the_replicas_of_data_parallel_are_gated():
    """As torch.nn.parallel.replicate makes them: a shallow copy whose parameters are plain attributes."""
    layer = rewritten(nn.Conv2d(8, 8, 3))
    toys.spread_thresholds(layer)
    replica = layer._replicate_for_data_parallel()
    replica._parameters = {}
    for name, parameter in layer._parameters.items():
        setattr(replica, name, parameter.clone())
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(replica(x), layer(x))


def test_functional_call_uses_the_parameters_it_is_given():
    layer = rewritten(nn.Conv2d(8, 8, 3))
    other = rewritten(nn.Conv2d(8, 8, 3))
    toys.spread_thresholds(other)
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(torch.func.functional_call(layer, dict(other.named_parameters()), (x,)), other(x))


def test_works_under_the_transforms_of_torch_func():
    layer = rewritten(nn.Conv2d(8, 8, 3))
    toys.spread_thresholds(layer)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    x = torch.randn(5, 8, 9, 9)

    def loss(values, image):
        return torch.func.functional_call(layer, values, (image[None],)).square().sum()

    layer(x[:1]).square().sum().backward()
    gradients = torch.func.grad(loss)(parameters, x[0])
    torch.testing.assert_close(gradients["threshold"], layer.threshold.grad)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(each["threshold"][0], layer.threshold.grad, rtol=1e-4, atol=1e-5)


def test_a_half_checkpoint_that_is_assigned_leaves_thresholds_in_float32():
    layer = rewritten(nn.Conv2d(8, 8, 3))
    state = {name: value.half() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.raw_weight.dtype == torch.float16 and layer.threshold.dtype == torch.float32


def test_a_model_in_channels_last_keeps_it():
    model = toys.plain_sr().to(memory_format=torch.channels_last)
    iks_plugin.sparsify(model, 0.5)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[2].threshold.is_contiguous(memory_format=torch.channels_last)


def test_blocks_that_read_the_weight_agree_between_train_and_eval():
    block = toys.ReadsWeightByHand()
    iks_plugin.sparsify(block, 0.5)
    toys.spread_thresholds(block)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(block.train()(x)[..., 1:-1, 1:-1], block.eval()(x)[..., 1:-1, 1:-1])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(backend):
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5)
    toys.spread_thresholds(model)
    x = torch.randn(1, 3, 12, 12)
    expected = model(x)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    value = compiled(x)
    value.square().sum().backward()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], gradients, rtol=1e-3, atol=1e-4)


def test_repr_names_the_granularity():
    assert "granularity='kernel'" in repr(rewritten(nn.Conv2d(8, 8, 3), granularity="kernel"))


REPLACEMENTS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "another": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity()),
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_replacing_the_weight_of_a_rewritten_layer_is_refused_and_nothing_changes(replace):
    layer = rewritten(nn.Conv2d(8, 8, 3))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(IksError, match=r"SparseConv2d cannot .*weight, as weight_norm.*: apply these before sparsify"):
        replace(layer)
    assert type(layer).__name__ == "SparseConv2d" and toys.states_equal(layer.state_dict(), before)
    assert not layer._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_old_weight_norm_of_a_rewritten_layer_is_refused():
    layer = rewritten(nn.Conv2d(8, 8, 3))
    with pytest.raises(IksError, match="SparseConv2d cannot have weight_g in place of weight, as weight_norm"):
        nn.utils.weight_norm(layer)  # it has deleted the parameter by itself before
    with pytest.raises(IksError, match="SparseConv2d has lost its parameter weight, as weight_norm"):
        layer(torch.rand(1, 8, 9, 9))
