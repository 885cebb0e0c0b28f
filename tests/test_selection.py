"""Which layers are rewritten, and what is said of the others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import iks_plugin
import toys
from iks_plugin import IksError, OptionError
from iks_plugin.layers import gated_layers


def rewritten(model: nn.Module, **options: object) -> list[str]:
    iks_plugin.sparsify(model, 0.5, **options)
    return sorted(gated_layers(model))


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.left_alone for row in iks_plugin.report(model).layers if row.left_alone}


def test_every_layer_that_is_left_alone_has_its_reason():
    model = toys.LeftAlone()
    assert rewritten(model, exclude="unwanted") == ["good"]
    expected = {
        "head": "faces the image: 3 input channels",
        "tail": "faces the image: 4 output channels",
        "frozen": "frozen: its weight does not require gradients",
        "normed": "parametrised: its weight is computed from other parameters",
        "spectral": "parametrised: its weight is computed from other parameters",
        "old_spectral": "parametrised: its weight is computed from other parameters",
        "zero": "all zero: under a soft threshold a zero weight would never get a gradient",
        "unwanted": "excluded by 'unwanted'",
        "linear": "unsupported type: Linear is not in layer_types",
        "own": "unsupported type: DefinesWeightItself defines weight by itself",
    }
    assert reasons(model) == expected
    assert all(text in str(iks_plugin.report(model)) for text in expected.values())


def nested() -> nn.Module:
    body = nn.ModuleDict({"block1": toys.plain_sr(8), "block2": toys.plain_sr(8)})
    return nn.ModuleDict({"head": nn.Conv2d(3, 8, 3), "body": body, "fc": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["body.block1.2", "body.block1.4", "body.block2.2", "body.block2.4"]),
        ({"include": "body.block1.*", "exclude": "*.0"}, ["body.block1.2", "body.block1.4", "body.block1.5"]),
        ({"include": iter(["body.block2.2"])}, ["body.block2.2"]),
        ({"include": ["body.block2"], "exclude": ["*.0", "*.5"]}, ["body.block2.2", "body.block2.4"]),
        ({"include": "head"}, ["head"]),
        ({"exclude": "body.block1"}, ["body.block2.2", "body.block2.4"]),
        ({"exclude": ["*.block?.2"]}, ["body.block1.4", "body.block2.4"]),
        ({"layer_types": "Linear"}, ["fc"]),
        ({"layer_types": ["Linear", "Conv2d"], "exclude": "body"}, ["fc"]),
    ],
)
def test_scope(options, expected):
    assert rewritten(nested(), **options) == expected


def test_what_include_leaves_out_says_so():
    model = nested()
    rewritten(model, include="body.block1.2")
    assert reasons(model)["body.block1.4"] == "not in include"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "bodi.*"}, r"include pattern 'bodi.\*' matches none .*near misses: 'body"),
        (
            {"exclude": ["body", "body.block3"]},
            r"exclude pattern 'body.block3' matches none .*near misses: 'body.block",
        ),
        ({"include": "fc"}, "include pattern 'fc' matches none of the model's 9 layers of the chosen layer_types"),
        ({"include": "zzzz"}, r"matches none .*the first are \['body.block1.0'"),
    ],
)
def test_patterns_that_match_nothing_are_refused_with_the_near_misses(options, message):
    model = nested()
    with pytest.raises(OptionError, match=message):
        iks_plugin.sparsify(model, 0.5, **options)
    assert not gated_layers(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "it holds no convolution"),
        (
            lambda: nn.Sequential(nn.Linear(8, 8)),
            r"(?s)0: unsupported type: Linear.*layer_types=\['Conv2d', 'Linear'\]",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), "(?s)0: faces the image: 3 input channels.*Change include"),
        (lambda: nn.Sequential(*(nn.Conv2d(3, 8, 3) for _ in range(25))), "and 5 more"),
        (
            lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.LazyConv2d(8, 3)),
            "'1' .LazyConv2d. has no weight yet: run the model once",
        ),
        (lambda: nn.Conv2d(8, 8, 3, device="meta"), "is on the meta device: load its weights"),
        (lambda: 3, "expects a torch.nn.Module, got int"),
    ],
)
def test_models_that_cannot_be_rewritten(make, message):
    model = make()
    before = repr(model)
    with pytest.raises(IksError, match=message):
        iks_plugin.sparsify(model, 0.5)
    assert repr(model) == before


class HasThreshold(nn.Conv2d):
    def __init__(self, threshold: object) -> None:
        super().__init__(8, 8, 3)
        self.threshold = threshold


class RefusesSubclasses(nn.Conv2d):
    def __init_subclass__(cls) -> None:
        raise ValueError("final")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: HasThreshold(0.5), "unsupported type: it has an attribute 'threshold' of its own"),
        (
            lambda: HasThreshold(nn.Parameter(torch.ones(1))),
            "unsupported type: it has an attribute 'threshold' of its own",
        ),
        (lambda: RefusesSubclasses(8, 8, 3), "unsupported type: RefusesSubclasses cannot be subclassed"),
    ],
)
def test_layers_that_a_gate_would_break_are_left_alone(make, reason):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), make())
    keys = list(model.state_dict())
    assert rewritten(model) == ["0"] and reasons(model) == {"1": reason}
    iks_plugin.finalize(model, 0.5)
    assert list(model.state_dict()) == keys


def test_weights_that_are_not_finite_are_refused_at_once():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(IksError, match="layer '0' has weights that are not finite"):
        iks_plugin.sparsify(model, 0.5)
    assert type(model[0]) is nn.Conv2d


def test_a_second_rewrite_forgets_the_first():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5)
    iks_plugin.finalize(model, 0.5)
    rewritten(model, include="4")
    assert [row.name for row in iks_plugin.report(model).layers if row.rewritten] == ["4"]


def test_a_model_that_is_rewritten_already():
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IksError, match="rewritten already .2 is a SparseConv2d.: set controller.target_sparsity"):
        iks_plugin.sparsify(model, 0.8)
    assert toys.states_equal(dict(model.state_dict()), dict(before)) and controller.target_sparsity == 0.5


def test_a_finalized_model_may_be_rewritten_again():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5, exclude="2")
    iks_plugin.finalize(model, 0.5)
    assert rewritten(model) == ["2", "4"]
    assert "2" not in reasons(model)


def test_tied_layers_share_one_threshold_and_stay_tied():
    model = toys.TiedConvs()
    assert rewritten(model) == ["first", "second"]
    assert model.first.threshold is model.second.threshold
    assert len(list(model.parameters())) == 4
    report = iks_plugin.report(model)
    assert report.weights == 8 * 8 * 9 and report.model_weights == 8 * 8 * 9 + 16
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 3, channels=8)
    iks_plugin.finalize(model, 0.5)
    assert model.first.weight is model.second.weight
    assert (model.first.weight == 0).sum() == 8 * 8 * 9 // 2


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (toys.BorrowsWeight, {}, {"conv": "tied: shares its weight with kernel, which cannot share its threshold"}),
        (
            lambda: nn.ModuleDict({"tied": toys.TiedConvs(), "free": nn.Conv2d(8, 8, 3)}),
            {"exclude": "tied.second"},
            {"tied.first": "tied: shares its weight with tied.second.weight, which cannot share its threshold"},
        ),
        (
            lambda: nn.ModuleDict(
                {"tied": toys.TiedConvs(lambda: nn.ConvTranspose2d(8, 8, 3)), "free": nn.Conv2d(8, 8, 3)}
            ),
            {"granularity": "filter"},
            {
                "tied.first": "tied: shares its weight with tied.second.weight, which cannot share its threshold",
                "tied.second": "tied: shares its weight with tied.first.weight, which cannot share its threshold",
            },
        ),
    ],
)
def test_tied_layers_that_cannot_share_a_threshold_are_left_alone(make, options, expected):
    model = make()
    rewritten(model, **options)
    assert {name: reason for name, reason in reasons(model).items() if reason.startswith("tied")} == expected


def test_a_module_under_two_names_is_rewritten_once_and_found_by_either():
    conv = nn.Conv2d(8, 8, 3)
    model = nn.ModuleDict({"a": conv, "b": conv})
    assert rewritten(model, include="b") == ["a"]


def test_a_distributed_wrapper_is_refused():
    model = nn.Module()
    model.wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(model.wrapped)
    model.wrapped.module = toys.plain_sr()
    with pytest.raises(IksError, match="call sparsify on the bare model first"):
        iks_plugin.sparsify(model, 0.5)
    assert not gated_layers(model)
