"""Packed layers: what they compute, hold in memory, copy, move and refuse."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import iks_plugin
import toys
from iks_plugin import IksError, IksWarning
from iks_plugin.entries import split
from iks_plugin.runtime import Packed, PackedWeight

CASES = pytest.mark.parametrize(("make", "shape"), toys.LAYERS.values(), ids=toys.LAYERS)


def pruned(model: nn.Module, share: float = 0.9) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim >= 2:
                weight[torch.rand(weight.shape) < share] = 0
    return model.eval()


def memory_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@CASES
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_packed_layer_computes_the_same(make: Callable[[], nn.Module], shape: tuple[int, ...], share: float) -> None:
    layer = pruned(nn.Sequential(make()), share)
    x = torch.randn(shape)
    expected = layer(x)
    iks_plugin.pack(layer)
    assert isinstance(layer[0], Packed)
    assert torch.equal(layer(x), expected)
    iks_plugin.unpack(layer)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16", "int8"])
@CASES
def test_narrower_values_compute_what_their_file_would(
    tmp_path: Path, make: Callable[[], nn.Module], shape: tuple[int, ...], value_dtype: str
) -> None:
    layer = pruned(nn.Sequential(make()), 0.8)
    iks_plugin.save(layer, tmp_path / "l.iks", value_dtype)
    x = torch.randn(shape)
    expected = iks_plugin.load(tmp_path / "l.iks", pruned(nn.Sequential(make())))(x)
    loaded = iks_plugin.load(tmp_path / "l.iks", nn.Sequential(make()), packed=True)
    assert torch.equal(loaded(x), expected)
    assert torch.equal(iks_plugin.pack(layer, value_dtype)(x), expected)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_any_weight_comes_back(shape: list[int], share: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[torch.rand(shape, generator=generator) < share] = 0
    sparse, axis = split(weight, torch.float32, 0)
    assert torch.equal(PackedWeight(sparse, tuple(shape), dtype, axis)(), weight)


@pytest.mark.parametrize(
    ("share", "value_dtype", "most"),
    [
        (0.5, "float32", 0.54),
        (0.9, "float32", 0.135),
        (0.9, "float16", 0.085),
        (0.9, "int8", 0.06),
        (0.99, "float32", 0.02),
        (0.99, "float16", 0.015),
    ],
)
def test_packed_weights_are_small(share: float, value_dtype: str, most: float) -> None:
    layer = pruned(nn.Conv2d(64, 64, 3, bias=False), share)
    dense = memory_of(layer)
    iks_plugin.pack(layer, value_dtype)
    assert memory_of(layer) <= most * dense
    assert memory_of(layer) == layer.packed_weight.nbytes


LARGE = {
    "1d": (lambda: nn.Conv1d(700, 600, 3, padding=1), (2, 700, 9)),
    "2d": (lambda: nn.Conv2d(512, 300, 3, padding=1), (1, 512, 5, 6)),
    "2d, no bias, reflected": (
        lambda: nn.Conv2d(512, 300, 3, padding=1, padding_mode="reflect", bias=False),
        (1, 512, 5, 6),
    ),
    "2d, no batch": (lambda: nn.Conv2d(512, 300, 3, padding=1), (512, 5, 6)),
    "3d": (lambda: nn.Conv3d(256, 200, 3, padding=1), (1, 256, 3, 3, 3)),
    "linear": (lambda: nn.Linear(1200, 1000), (3, 1200)),
    "groups": (lambda: nn.Conv2d(512, 512, 5, groups=2), (1, 512, 5, 6)),
}


@pytest.mark.parametrize(("make", "shape"), LARGE.values(), ids=LARGE)
def test_large_layers_compute_the_same_in_parts(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer = pruned(make())
    x = torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
        assert torch.allclose(iks_plugin.pack(layer)(x), expected, atol=1e-5)
    layer.train()
    with pytest.raises(IksError, match="cannot be trained"):
        layer(x)


def test_layers_too_full_to_gain_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[0].weight.data[0, 0, 0, 0] = 0
    pruned(model[1])
    before = model[0].weight
    iks_plugin.pack(model)
    assert type(model[0]) is nn.Conv2d
    assert model[0].weight is before
    assert isinstance(model[1], Packed)


def test_a_finalized_model() -> None:
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.9, ramp_steps=20)
    toys.train(model, torch.optim.Adam(controller.param_groups(), 1e-3), steps=30)
    with pytest.raises(IksError, match=r"the model has gates \(2 is a SparseConv2d\).*finalize"):
        iks_plugin.pack(model)
    iks_plugin.finalize(model)
    model.eval()
    x = torch.randn(1, 3, 9, 11)
    expected = model(x)
    assert torch.equal(iks_plugin.pack(model)(x), expected)
    assert iks_plugin.report(model).sparsity == pytest.approx(0.9, abs=1e-3)


@pytest.fixture
def packed() -> nn.Module:
    return iks_plugin.pack(pruned(toys.plain_sr()))


X = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))


def test_state_dict_is_the_plain_dense_one() -> None:
    model = pruned(toys.plain_sr())
    before = copy.deepcopy(model.state_dict())
    iks_plugin.pack(model)
    assert toys.states_equal(dict(before), dict(model.state_dict()))
    plain = toys.plain_sr()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(X), model(X))
    assert list(iks_plugin.unpack(model).state_dict()) == list(before)


def test_a_packed_model_can_be_saved(packed: nn.Module, tmp_path: Path) -> None:
    iks_plugin.save(packed, tmp_path / "packed.iks")
    again = iks_plugin.load(tmp_path / "packed.iks", toys.plain_sr()).eval()
    assert torch.equal(again(X), packed(X))


def test_copies_and_pickles(packed: nn.Module) -> None:
    expected = packed(X)
    stream = io.BytesIO()
    torch.save(packed, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(packed),
        pickle.loads(pickle.dumps(packed)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(other(X), expected)
        assert memory_of(other) == memory_of(packed)


def test_compiled(packed: nn.Module) -> None:
    expected = packed(X)
    assert torch.allclose(torch.compile(packed, backend="eager")(X), expected)


@CASES
@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
def test_every_layer_compiles_as_a_whole(
    make: Callable[[], nn.Module], shape: tuple[int, ...], value_dtype: str
) -> None:
    x, layer = torch.randn(shape), iks_plugin.pack(pruned(nn.Sequential(make())), value_dtype)
    if "Transpose" in type(layer[0]).__name__ and not hasattr(torch.compiler, "is_compiling"):
        pytest.skip("torch 2.1 fails at super() in a transposed convolution")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), layer(x), atol=1e-6)


def test_a_deep_network_compiles_once_and_lets_gradients_through() -> None:
    """Not once for each layer, which would end at torch's limit of recompilations."""
    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(12)), nn.Conv2d(8, 400, 9, padding=4))
    iks_plugin.pack(pruned(model))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ours, theirs = (torch.ones(1, 8, 20, 20, requires_grad=True) for _ in range(2))
    for x, run in ((ours, compiled), (theirs, model)):
        run(x).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6 * float(theirs.grad.abs().max()))
    assert len(graphs) == 1


@pytest.mark.parametrize("value_dtype", ["float32", "float16", "int8"])
def test_a_change_of_dtype(value_dtype: str) -> None:
    model = pruned(toys.plain_sr())
    iks_plugin.pack(model, value_dtype)
    dense = iks_plugin.unpack(copy.deepcopy(model))
    stored = model[2].packed_weight.values.dtype
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.deepcopy(model).to(dtype)
        assert other[2].weight.dtype == dtype
        assert other[2].packed_weight.values.dtype == (dtype if stored == torch.float32 else stored)
        assert torch.allclose(other[2].weight, dense[2].weight.to(dtype))
        assert other(X.to(dtype)).dtype == dtype
    back = copy.deepcopy(model).double().float()
    assert torch.equal(back[2].weight, model[2].weight)


def test_a_change_of_device(packed: nn.Module) -> None:
    """The only other device that every machine has is "meta": shapes and dtypes arrive there."""
    moved = copy.deepcopy(packed).to("meta")
    assert all(tensor.is_meta for tensor in (*moved.parameters(), *moved.buffers()))
    shared = copy.deepcopy(packed).share_memory()
    assert all(tensor.is_shared() for tensor in shared.buffers())
    assert torch.equal(shared(X), packed(X))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(packed: nn.Module) -> None:
    expected = packed(X)
    moved = packed.to("cuda")
    assert torch.allclose(moved(X.to("cuda")).cpu(), expected, atol=1e-4)


def test_channels_last_weights_stay_so() -> None:
    model = pruned(toys.plain_sr()).to(memory_format=torch.channels_last)
    expected = model(X.to(memory_format=torch.channels_last))
    iks_plugin.pack(model)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model(X.to(memory_format=torch.channels_last)), expected)


def test_gradients_reach_input_and_bias_in_eval_mode(packed: nn.Module) -> None:
    x = X.clone().requires_grad_()
    packed(x).sum().backward()
    grads = [x.grad, packed[2].bias.grad]
    dense = iks_plugin.unpack(packed)
    dense.zero_grad()
    x.grad = None
    dense(x).sum().backward()
    for packed_grad, dense_grad in zip(grads, [x.grad, dense[2].bias.grad], strict=True):
        assert torch.equal(packed_grad, dense_grad)
    assert dense[2].weight.grad is not None


def test_training_is_refused_where_it_would_go_wrong(packed: nn.Module) -> None:
    assert not packed.training
    packed.train()
    with pytest.raises(
        IksError, match="has packed weights, which cannot be trained, and is in training mode: call model"
    ):
        packed(X)
    with torch.no_grad():
        packed(X)
    iks_plugin.unpack(packed)
    packed(X).sum().backward()


def test_setting_and_loading_are_refused(packed: nn.Module) -> None:
    with pytest.raises(
        IksError, match=r"the weight of a PackedConv2d is packed and cannot be set: call iks_plugin\.unp"
    ):
        packed[2].weight = torch.zeros(16, 16, 3, 3)
    before = packed(X)
    with pytest.raises(RuntimeError, match=r"2\.weight is packed and cannot be loaded into: call iks_plugin\.unpack"):
        packed.load_state_dict(copy.deepcopy(packed.state_dict()))
    assert torch.equal(packed(X), before)


def test_tied_layers_share_their_packed_weight() -> None:
    model = pruned(toys.TiedConvs())
    before = [name for name, parameter in model.named_parameters()]
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    iks_plugin.pack(model)
    assert layers[0].packed_weight is layers[1].packed_weight
    moved = copy.deepcopy(model).double()
    assert len({id(module.packed_weight) for module in moved.modules() if isinstance(module, Packed)}) == 1
    assert torch.allclose(moved(WIDE.double()).float(), model(WIDE), atol=1e-5)
    iks_plugin.unpack(model)
    assert layers[0].weight is layers[1].weight
    assert [name for name, parameter in model.named_parameters()] == before


def test_tied_layers_of_a_file_share_theirs(tmp_path: Path) -> None:
    model = pruned(toys.TiedConvs())
    iks_plugin.save(model, tmp_path / "tied.iks")
    loaded = iks_plugin.load(tmp_path / "tied.iks", toys.TiedConvs(), packed=True)
    layers = [module for module in loaded.modules() if isinstance(module, Packed)]
    assert len(layers) == 2
    assert layers[0].packed_weight is layers[1].packed_weight


def test_a_weight_that_others_hold_too_is_left_alone() -> None:
    model = pruned(toys.BorrowsWeight())
    expected = model(WIDE)
    iks_plugin.pack(model)
    assert torch.equal(model(WIDE), expected)
    assert type(model.conv) is nn.Conv2d


def test_a_weight_that_its_block_writes_is_left_alone() -> None:
    model = pruned(toys.MergesInEvalMode())
    expected = model(WIDE)
    iks_plugin.pack(model)
    assert [isinstance(layer, Packed) for layer in model.children()] == [True, True, False]
    assert torch.equal(model(WIDE), expected)


def test_a_packed_model_is_not_packed_again(packed: nn.Module) -> None:
    with pytest.raises(IksError, match=r"the model is packed already \(0\): call iks_plugin.unpack"):
        iks_plugin.pack(packed, "int8")


def test_nothing_to_pack() -> None:
    with pytest.warns(IksWarning, match=r"none has zeros enough to become smaller.*finalize"):
        iks_plugin.pack(toys.plain_sr())


def test_a_value_type_that_does_not_fit_changes_nothing() -> None:
    model = pruned(toys.plain_sr())
    model[2].weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(IksError, match=r"2\.weight: expected weights that float16 can hold"):
        iks_plugin.pack(model, "float16")
    with pytest.raises(IksError, match="value_dtype must be one of"):
        iks_plugin.pack(model, "float12")
    assert not any(isinstance(module, Packed) for module in model.modules())


@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
def test_loaded_onto_the_meta_device(tmp_path: Path, value_dtype: str) -> None:
    model = pruned(toys.plain_sr())
    iks_plugin.save(model, tmp_path / "m.iks", value_dtype)
    with torch.device("meta"):
        other = toys.plain_sr()
    iks_plugin.load(tmp_path / "m.iks", other, packed=True)
    expected = iks_plugin.load(tmp_path / "m.iks", model)(X)
    assert torch.equal(other(X), expected)


def test_loading_makes_no_dense_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest float tensor that is made in loading is one of non-zeros."""
    model = pruned(nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.Conv2d(64, 64, 3, bias=False)))
    iks_plugin.save(model, tmp_path / "m.iks")
    monkeypatch.setattr(PackedWeight, "forward", lambda self: pytest.fail("a dense weight was made"))
    monkeypatch.setattr("iks_plugin.entries._dense", lambda *_: pytest.fail("a dense weight was made"))
    with torch.device("meta"):
        other = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.Conv2d(64, 64, 3, bias=False))
    iks_plugin.load(tmp_path / "m.iks", other, packed=True)
    assert all(isinstance(layer, Packed) for layer in other)


def test_what_is_printed_tells_sizes(packed: nn.Module) -> None:
    assert "PackedConv2d" in repr(packed)
    assert "float32 values" in repr(packed)


def test_the_package_can_be_imported_anew() -> None:
    """The operation for torch.compile is torch's for as long as the process lives."""
    code = """
import sys
import iks_plugin
for name in [name for name in sys.modules if name.startswith("iks_plugin")]:
    del sys.modules[name]
import iks_plugin
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(iks_plugin.__file__).parents[1])
