"""Networks that others wrote, in full: rewritten, trained for a step, gated hard, finalized, in train and eval mode.

They hold what nobody would think of in a toy model: blocks that read `.weight` themselves and convolve by hand, that
are merged in eval mode, that write into their weights, or whose layers are parametrised, frozen, zero or unused.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iks_plugin
import networks_basicsr
import networks_spandrel
from networks import CONVOLUTIONS, Network, seed_everything

MODES = [pytest.param(False, id="eval"), pytest.param(True, id="train")]


def _cases(library: str, table: tuple[Network, ...]) -> list[Any]:
    missing = pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")
    return [pytest.param(network, id=f"{library}-{network.name}", marks=missing) for network in table]


@dataclass(frozen=True)
class Subject:
    """A network as its authors built it, which the tests only copy, and one input for it."""

    network: Network
    dense: nn.Module
    inputs: tuple[Any, ...]

    @cached_property
    def dense_outputs(self) -> dict[bool, list[Tensor]]:
        """Those of the network as it was built, in eval (False) and train mode (True)."""
        return {training: self.run(self.copy(), training) for training in (False, True)}

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.dense)

    def rewritten(self) -> tuple[nn.Module, iks_plugin.SparsityController]:
        model = self.copy()
        return model, iks_plugin.sparsify(model, 0.8)

    def run(self, model: nn.Module, training: bool) -> list[Tensor]:
        """The outputs, without gradients; the model's buffers stay as they are."""
        with torch.no_grad(), _buffers_kept(model):
            return self.forward(model, training)

    def forward(self, model: nn.Module, training: bool) -> list[Tensor]:
        model.train(training)
        seed_everything(2)
        return _floats(model(*copy.deepcopy(self.inputs)))


# Of module scope, so that pytest runs all tests of one network together and builds it once.
@pytest.fixture(
    scope="module",
    params=_cases("basicsr", networks_basicsr.BASICSR) + _cases("spandrel", networks_spandrel.SPANDREL),
)
def subject(request: pytest.FixtureRequest) -> Subject:
    network: Network = request.param
    return Subject(network, network.build(seed=0), network.inputs(seed=1))


def test_the_body_is_rewritten_and_every_other_convolution_has_its_reason(subject: Subject) -> None:
    model, _ = subject.rewritten()
    rows = {row["name"]: row for row in iks_plugin.report(model).to_dict()["layers"]}
    reasons = {name: _reasons_against(subject.network, name, layer) for name, layer in _convolutions(subject.dense)}
    for name, row in rows.items():
        if row["rewritten"]:
            assert reasons[name] == (), name
        else:
            assert row["left_alone"].startswith(reasons.get(name, ("unsupported type",))), name
    assert rows.keys() >= reasons.keys()


def test_gates_at_their_start_change_nothing_and_dense_checkpoints_load(subject: Subject) -> None:
    model, controller = subject.rewritten()
    outputs = subject.run(model, training=False)
    _assert_close(outputs, subject.dense_outputs[False], subject.network.tolerance)
    for layer in _gated(model).values():
        torch.testing.assert_close(layer.weight, _raw(layer), rtol=0, atol=6.2e-6)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.load_state_dict(subject.dense.state_dict(), strict=True)
    _assert_close(subject.run(model, training=False), outputs, 0)
    assert all((layer.threshold == -12).all() for layer in _gated(model).values())
    assert controller.sparsity < 0.05


def test_one_step_trains_weights_and_thresholds(subject: Subject) -> None:
    model, controller = subject.rewritten()
    layers = _gated(model)
    before = {name: (_raw(layer).clone(), layer.threshold.clone()) for name, layer in layers.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    _backward(subject.forward(model, training=True))
    optimizer.step()

    assert controller.steps == 1
    without_gradient = {name for name, layer in layers.items() if _raw(layer).grad is None}
    assert without_gradient == {name for name in layers if _matches(name, subject.network.unused)}
    moved = 0
    for name, layer in layers.items():
        if name in without_gradient:
            continue
        for parameter, old, reach in zip((_raw(layer), layer.threshold), before[name], (1e-9, 1e-10), strict=True):
            gradient = parameter.grad
            assert gradient is not None and gradient.isfinite().all(), name
            # Below `reach` a step of Adam, whose eps is 1e-8, may be too small to change a float32.
            if gradient.abs().max() > reach:
                assert not torch.equal(parameter, old), name
                moved += parameter is layer.threshold
    assert moved, "no threshold has moved"
    # The weights of a layer that the output does not depend on might be wrong, and nothing in this file would see it.
    asleep = {name for name in layers.keys() - without_gradient if not _raw(layers[name]).grad.any()}
    assert asleep == {name for name in layers if _matches(name, subject.network.asleep)}


@pytest.mark.parametrize("training", MODES)
def test_half_gated_it_is_the_network_with_the_gated_weights(subject: Subject, training: bool) -> None:
    model, controller = subject.rewritten()
    reference = subject.copy()
    expected = _gate_half(model, reference)
    assert 0.4 < controller.sparsity < 0.6

    outputs = subject.run(reference, training)
    _assert_close(subject.run(model, training), outputs, 1e-6)
    pairs = zip(outputs, subject.dense_outputs[training], strict=True)
    change = max(_distance(output, other) for output, other in pairs)
    assert change > 1e-3, "the gates do not show in the output"
    if training:
        _assert_same_gradients(subject, model, reference, expected)


def test_packed_it_gives_the_same_row_by_row(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    model = subject.copy()
    for _, layer in _convolutions(model):
        layer.weight.data.mul_(torch.rand_like(layer.weight) >= 0.8)
    expected = subject.run(copy.deepcopy(model), training=False)
    iks_plugin.pack(model)

    def first(ways: dict[str, Callable[[], object]]) -> str:
        name, way = next(iter(ways.items()))
        way()
        return name

    monkeypatch.setattr("iks_plugin.fast._fastest", first)
    subject.run(model, training=False)  # with trials, which draw random numbers where the network does
    _assert_close(subject.run(model, training=False), expected, 1e-5)


@pytest.mark.parametrize("target", [None, 0.9], ids=["as-it-is", "dialled"])
def test_finalized_it_is_the_plain_network_with_exact_zeros(subject: Subject, target: float | None) -> None:
    model, controller = subject.rewritten()
    names = list(_gated(model))
    untouched = subject.copy()
    _gate_half(model, untouched)
    weights = sum(_raw(layer).numel() for layer in _gated(model).values())
    zeros = round(controller.sparsity * weights)
    gated = {training: subject.run(model, training) for training in (False, True)} if target is None else {}

    iks_plugin.finalize(model, zeros / weights if target is None else target)
    assert list(model.state_dict()) == list(subject.dense.state_dict())
    assert _types(model) == _types(subject.dense)
    layers = dict(model.named_modules())
    wanted = zeros if target is None else round(target * weights)
    assert sum(int((layers[name].weight == 0).sum()) for name in names) == wanted

    untouched.load_state_dict(model.state_dict(), strict=True)
    for training in (False, True):
        outputs = subject.run(model, training)
        _assert_close(outputs, subject.run(untouched, training), 0)
        if gated:
            _assert_close(outputs, gated[training], 0)


@pytest.mark.parametrize(("library", "tables"), [("basicsr", networks_basicsr), ("spandrel", networks_spandrel)])
def test_no_architecture_of_the_library_is_forgotten(library: str, tables: ModuleType) -> None:
    pytest.importorskip(library)
    if importlib.metadata.version(library) != tables.VERSION:
        pytest.skip(f"the table is for {library} {tables.VERSION}")
    table = getattr(tables, library.upper())
    covered = {network.name.split("-")[0] for network in table}
    registered = {"basicsr": _registered_in_basicsr, "spandrel": _registered_in_spandrel}[library]()
    assert registered - covered - tables.LEFT_OUT.keys() == set()
    assert tables.LEFT_OUT.keys() <= registered


def _registered_in_basicsr() -> set[str]:
    from basicsr.archs import ARCH_REGISTRY

    return {name.removesuffix("_basicsr") for name, _ in ARCH_REGISTRY}


def _registered_in_spandrel() -> set[str]:
    from spandrel import MAIN_REGISTRY

    return {support.architecture.id for support in MAIN_REGISTRY.architectures()}


def _reasons_against(network: Network, name: str, layer: nn.Module) -> tuple[str, ...]:
    """Every reason to leave a convolution alone, as its explanation begins."""
    weight = layer._parameters.get("weight")
    reasons = {
        "written by its block": _matches(name, network.written),
        "faces the image": min(layer.in_channels, layer.out_channels) <= 4,
        "parametrised": weight is None,
        "frozen": weight is not None and not weight.requires_grad,
        "all zero": weight is not None and not weight.any(),
    }
    return tuple(reason for reason, holds in reasons.items() if holds)


def _gate_half(model: nn.Module, reference: nn.Module) -> dict[str, Tensor]:
    """Raise the thresholds until about half of each layer is zero, and give `reference` the weights that this makes.

    Returns the derivative of each gated weight by its threshold; by its raw weight it is 1 where that is not zero.
    """
    seed_everything(3)
    plain = dict(reference.named_modules())
    slopes = {}
    with torch.no_grad():
        for name, layer in _gated(model).items():
            raw = _raw(layer)
            middle = raw.abs().median().clamp(1e-6, 0.99)
            layer.threshold.copy_(torch.logit(middle) + 0.5 * torch.randn_like(layer.threshold))
            cut = torch.sigmoid(layer.threshold)
            gated = torch.sign(raw) * torch.clamp(raw.abs() - cut, min=0)
            torch.testing.assert_close(layer.weight, gated, rtol=1e-6, atol=1e-9)
            plain[name].weight.copy_(gated)
            slopes[name] = -torch.sign(gated) * cut * (1 - cut)
    return slopes


def _assert_same_gradients(subject: Subject, model: nn.Module, reference: nn.Module, slopes: dict[str, Tensor]) -> None:
    """By the chain rule from the gradients of the reference."""
    for each in (model, reference):
        each.zero_grad()
        with _buffers_kept(each):
            _backward(subject.forward(each, training=True))
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, slope in slopes.items():
        gradient = gradients[f"{name}.weight"]
        if gradient is not None:
            gradients[f"{name}.weight"] = gradient * (slope != 0)
            gradients[f"{name}.threshold"] = gradient * slope
    for name, parameter in model.named_parameters():
        expected = gradients.get(name)
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None and expected.numel():
            assert _distance(parameter.grad, expected) <= 1e-5, name


def _backward(outputs: list[Tensor]) -> None:
    """The gradients of a projection of all outputs on fixed noise, so that no part of them cancels out."""
    generator = torch.Generator().manual_seed(4)
    terms = [
        (output * torch.randn(output.shape, generator=generator)).sum() / output.numel() ** 0.5
        for output in outputs
        if output.requires_grad
    ]
    # In torch 2.1 oneDNN's GELU turns some strided gradients into whatever lay in memory (pytorch issue 112006).
    is_sound = torch.__version__ >= "2.2"
    with nullcontext() if is_sound else torch.backends.mkldnn.flags(enabled=False):
        torch.stack(terms).sum().backward()


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward does to running statistics and power iterations."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def _floats(output: Any) -> list[Tensor]:
    """The floating-point tensors in whatever a forward returns."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if is_dataclass(output):
        output = vars(output)
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output for tensor in _floats(part)] if isinstance(output, (list, tuple)) else []


def _assert_close(outputs: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(outputs) == len(expected) > 0
    for output, other in zip(outputs, expected, strict=True):
        assert other.isfinite().all()
        assert _distance(output, other) <= tolerance


def _distance(output: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    difference = (output - expected).abs().max()
    return float(difference / expected.abs().max()) if difference != 0 else 0.0


def _convolutions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]


def _gated(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if "threshold" in module._parameters}


def _raw(layer: nn.Module) -> nn.Parameter:
    """The parameter itself, where `layer.weight` is the gated one."""
    return layer._parameters["weight"]


def _types(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
