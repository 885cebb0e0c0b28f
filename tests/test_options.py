"""Every wrong option is refused by name, with what is expected, and the model stays as it was."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

import iks_plugin
import toys
from iks_plugin import IksError, OptionError
from iks_plugin.options import Options

WRONG = {
    "percent": (dict(target_sparsity=80), r"target_sparsity must be a number in \[0, 1\), got 80: did you mean 0.8\?"),
    "hundreds": (dict(target_sparsity=800), r"in \[0, 1\), got 800: give the fraction"),
    "negative": (dict(target_sparsity=-0.1), r"in \[0, 1\), got -0.1"),
    "all": (dict(target_sparsity=1.0), "got 1.0 .1.0 would leave no weight at all"),
    "nan": (dict(target_sparsity=math.nan), "got nan: give the fraction"),
    "text": (dict(target_sparsity="0.8"), "got the text '0.8': write 0.8, as a number"),
    "text with a percent sign": (dict(target_sparsity="80%"), "got the text '80%': write 0.8, as a number"),
    "text with a comma": (dict(target_sparsity="0,8"), "got the text '0,8': write 0.8, as a number"),
    "text without a dot": (dict(target_sparsity="1e-1"), "got the text '1e-1': write 0.1, as a number"),
    "word": (dict(target_sparsity="high"), "got the text 'high': give the fraction of weights"),
    "true": (dict(target_sparsity=True), "got True of type bool"),
    "list": (dict(target_sparsity=[0.8]), r"got \[0.8\] of type list"),
    "no goal": ({}, "needs a goal, got none: give target_sparsity"),
    "two goals": (dict(target_sparsity=0.8, max_bytes="500KB"), "exclude each other: give only one"),
    "no size": (dict(max_bytes="large"), "max_bytes must be a number of bytes, or a text such as '500KB'"),
    "an unknown unit": (dict(max_bytes="500 KBit"), "max_bytes must be a number of bytes"),
    "a fraction of bytes": (dict(max_bytes=0.5), "max_bytes must be a number of bytes"),
    "no bytes": (dict(max_bytes=0), "max_bytes must be a number of bytes"),
    "true bytes": (dict(max_bytes=True), "max_bytes must be a number of bytes"),
    "a value type without a size": (
        dict(target_sparsity=0.8, value_dtype="float16"),
        "value_dtype .* belongs to max_b",
    ),
    "an unknown value type": (dict(max_bytes=500, value_dtype="float12"), "value_dtype must be one of 'float32'"),
    "granularity": (
        dict(target_sparsity=0.8, granularity="kernels"),
        "one of 'weight', .*got 'kernels': did you mean 'kernel'",
    ),
    "law": (
        dict(target_sparsity=0.8, law="exakt"),
        "law must be one of 'exact', 'obs', 'paper', got 'exakt': did you mean 'exact'",
    ),
    "law type": (dict(target_sparsity=0.8, law=3), "law must be one of 'exact', 'obs', 'paper', got 3"),
    "unknown": (dict(target_sparsity=0.8, granularty="kernel"), "no option 'granularty': did you mean 'granularity'"),
    "unknown, no hint": (dict(target_sparsity=0.8, zzz=1), "no option 'zzz': expected one of 'epoch_steps', "),
    "steps": (dict(target_sparsity=0.8, total_steps=0), "total_steps must be a number of optimizer steps.*got 0"),
    "float steps": (
        dict(target_sparsity=0.8, ramp_steps=10.0),
        "ramp_steps must be a number of optimizer steps.*got 10.0",
    ),
    "ramp that starts before the training": (
        dict(target_sparsity=0.8, ramp_start=-1),
        "ramp_start must be a number of optimizer steps, a whole number of at least 0, got -1",
    ),
    "ramp that starts at the end": (
        dict(target_sparsity=0.8, total_steps=5, ramp_start=5),
        r"ramp_start must be less than total_steps \(5\), got 5: the sparsity would never rise",
    ),
    "late and long ramp": (
        dict(target_sparsity=0.8, total_steps=5, ramp_start=3, ramp_steps=3),
        r"ramp_start \+ ramp_steps must be at most total_steps \(5\), got 6",
    ),
    "late ramp for paper": (
        dict(target_sparsity=0.8, law="paper", epoch_steps=1, ramp_start=1),
        "law='paper' has no ramp, and ramp_start belongs to law='exact' and 'obs'",
    ),
    "long ramp": (
        dict(target_sparsity=0.8, total_steps=5, ramp_steps=6),
        r"ramp_steps must be at most total_steps \(5\), got 6",
    ),
    "epochs for exact": (dict(target_sparsity=0.8, epoch_steps=10), "epoch_steps belongs to law='paper'"),
    "obs with shared thresholds": (
        dict(target_sparsity=0.8, law="obs", granularity="kernel"),
        "law='obs' decides for each weight by itself, and granularity='kernel' shares thresholds: leave one",
    ),
    "ramp for paper": (
        dict(target_sparsity=0.8, law="paper", epoch_steps=1, ramp_steps=1),
        "law='paper' has no ramp, and ramp_steps belongs to law='exact' and 'obs'",
    ),
    "no epochs": (dict(target_sparsity=0.8, law="paper"), "law='paper' acts every 10 epochs.*give epoch_steps"),
    "short paper": (
        dict(target_sparsity=0.8, law="paper", epoch_steps=100, total_steps=1500),
        "acts every 1000 steps, and not in the last 1000: it would never act within total_steps=1500",
    ),
    "nothing left": (
        dict(target_sparsity=0.9999),
        "0.9999 of 4608 weights, rounded, is all of them: none would be left",
    ),
    "between": (dict(target_sparsity=1.5), r"got 1.5: give the fraction"),
    "init": (dict(target_sparsity=0.8, threshold_init=0), r"threshold_init must be a number in \[-60, 0\), got 0"),
    "include type": (dict(target_sparsity=0.8, include=3), "include must be a shell pattern.*got 3"),
    "include nothing": (dict(target_sparsity=0.8, include=[]), "include must hold at least one pattern, got none"),
    "exclude type": (dict(target_sparsity=0.8, exclude=[nn.Conv2d]), "exclude must be a shell pattern"),
    "layer name": (
        dict(target_sparsity=0.8, layer_types=["Conv2"]),
        "layer_types cannot hold 'Conv2': did you mean 'Conv2d'",
    ),
    "layer class": (dict(target_sparsity=0.8, layer_types=[nn.ReLU]), "layer_types cannot hold 'ReLU'"),
    "layer types": (
        dict(target_sparsity=0.8, layer_types=7),
        "layer_types must be a list of layer classes or their names, got 7",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_refused_and_nothing_changes(options, message):
    model = toys.plain_sr()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(OptionError, match=message) as caught:
        iks_plugin.sparsify(model, **options)
    assert isinstance(caught.value, IksError) and isinstance(caught.value, ValueError)
    assert toys.states_equal(dict(model.state_dict()), before)
    assert all(type(layer) in (nn.Conv2d, nn.ReLU) and "threshold" not in layer._parameters for layer in model)


@pytest.mark.parametrize("name", [name for name in WRONG if name != "nothing left"])  # that depends on the model
def test_options_are_refused_without_a_model_in_the_same_words(name):
    options, message = WRONG[name]
    with pytest.raises(OptionError, match=message):
        iks_plugin.check_options(**options)


def test_options_that_are_right_pass_without_a_model():
    iks_plugin.check_options(target_sparsity=0.9, include="body.*", granularity="filter", total_steps=100)


def test_the_defaults_are_those_of_sparsify():
    ours = inspect.signature(Options.check).parameters
    for name, parameter in inspect.signature(iks_plugin.sparsify).parameters.items():
        if name not in ("model", "unknown"):
            assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("target", [0, 0.0, 0.5, np.float32(0.5), np.float64(0.99), 0.999])
def test_numbers_of_every_kind_are_targets(target):
    controller = iks_plugin.sparsify(toys.plain_sr(), target)
    assert controller.target_sparsity == float(target) and type(controller.target_sparsity) is float


@pytest.mark.parametrize("types", ["Conv2d", nn.Conv2d, ["Conv2d", nn.Linear], (nn.Conv2d,)])
def test_layer_types_by_class_or_name(types):
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5, layer_types=types)
    assert type(model[2]).__name__ == "SparseConv2d"


@pytest.mark.parametrize(
    "call", [lambda c: setattr(c, "target_sparsity", 80), lambda c: setattr(c, "target_sparsity", "0.8")]
)
def test_a_wrong_new_target_leaves_the_old_one(call):
    controller = iks_plugin.sparsify(toys.plain_sr(), 0.5)
    with pytest.raises(OptionError, match="target_sparsity must be a number"):
        call(controller)
    assert controller.target_sparsity == 0.5


def test_finalize_refuses_a_wrong_target():
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(OptionError, match="did you mean 0.9"):
        iks_plugin.finalize(model, 90)
    assert toys.states_equal(dict(model.state_dict()), before)
    assert not torch.equal(model[2].weight, model[2].raw_weight)
