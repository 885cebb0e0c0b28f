"""The block of the adapters: its schedule, and what several networks make of its patterns.

Its other options are in the adapters' own tests.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import iks_plugin
from iks_plugin import OptionError
from iks_plugin.block import Patterns, parse_block


def networks() -> dict[str, nn.Module]:
    def convolution() -> nn.Module:
        return nn.Conv2d(8, 8, 3)

    return {
        "generator": nn.ModuleDict({"body": nn.Sequential(convolution(), convolution()), "tail": convolution()}),
        "discriminator": nn.ModuleDict({"conv0": convolution(), "conv1": convolution(), "tail": convolution()}),
    }


def rewritten(**options: Any) -> dict[str, list[str]]:
    """The layers that are made sparse in each network, one after the other as BasicSR builds them."""
    made, patterns = networks(), Patterns(["generator", "discriminator"])
    for name, network in made.items():
        iks_plugin.sparsify(network, **patterns.keywords_for(name, network, {"target_sparsity": 0.5, **options}))
    return {
        name: [layer.name for layer in iks_plugin.report(network).layers if layer.rewritten]
        for name, network in made.items()
    }


@pytest.mark.parametrize(
    ("options", "generator", "discriminator"),
    [
        ({}, ["body.0", "body.1", "tail"], ["conv0", "conv1", "tail"]),
        ({"exclude": "body.1"}, ["body.0", "tail"], ["conv0", "conv1", "tail"]),
        ({"exclude": ["body.*", "conv1"]}, ["tail"], ["conv0", "tail"]),
        ({"exclude": ["tail"]}, ["body.0", "body.1"], ["conv0", "conv1"]),
        ({"include": ["body", "conv?"], "exclude": "conv0"}, ["body.0", "body.1"], ["conv1"]),
        ({"include": "tail"}, ["tail"], ["tail"]),
    ],
)
def test_each_network_gets_the_patterns_that_match_in_it(options, generator, discriminator):
    assert rewritten(**options) == {"generator": generator, "discriminator": discriminator}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exclude": ["body.1", "conv7"]},
            "exclude pattern 'conv7' matches none of generator's and discriminator's 6 layers .*; near misses: 'conv",
        ),
        (
            {"include": ["body", "conv?", "head"]},
            "include pattern 'head' matches none of generator's and discriminator's 6 layers",
        ),
        (
            {"include": ["body.0", "body.1"]},
            "none of the patterns of include, 'body.0', 'body.1', matches one of its 3 layers .*: add one that does "
            r"\(the others go to the other networks of the block\), or take it out of network; ",
        ),
        ({"include": "boody"}, "none of the patterns of include, 'boody', matches .*; near misses: 'body'"),
    ],
)
def test_patterns_that_match_in_no_network_and_networks_without_any_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        rewritten(**options)


def test_a_network_that_is_built_again_gets_the_same():
    patterns, keywords = (
        Patterns(["generator", "discriminator"]),
        {"target_sparsity": 0.5, "exclude": ["conv1", "tail"]},
    )
    made, copied = networks(), networks()
    for name, network in (*made.items(), *copied.items()):
        assert patterns.keywords_for(name, network, keywords)["exclude"] == (
            ("tail",) if name == "generator" else ("conv1", "tail")
        )


def test_a_single_network_takes_its_options_as_they_are():
    keywords = {"target_sparsity": 0.5, "include": "nothing"}
    assert Patterns(["generator"]).keywords_for("generator", nn.Conv2d(8, 8, 3), keywords) is keywords


@pytest.mark.parametrize(
    ("options", "from_scratch", "ramp"),
    [
        ({}, False, (0, 600)),
        ({}, True, (200, 480)),
        ({"ramp_start": 0}, True, (0, 600)),
        ({"ramp_start": 100}, False, (100, 540)),
        ({"ramp_steps": 300}, True, (200, 300)),
        ({"ramp_steps": 900}, True, (100, 900)),
        ({"ramp_steps": 1000}, True, (0, 1000)),
        ({"total_steps": 500}, True, (100, 240)),
        ({"law": "exact"}, True, (200, 480)),
        ({"law": "paper", "epoch_steps": 10}, True, (None, None)),
    ],
)
def test_a_network_from_scratch_is_dense_at_first(options, from_scratch, ramp):
    block = parse_block({"target_sparsity": 0.9, **options}, network="network_g", example="")
    schedule = block.schedule(1000, "total_iter", from_scratch=from_scratch)
    assert (schedule["ramp_start"], schedule["ramp_steps"]) == ramp


def test_a_schedule_that_is_to_be_seen_has_no_start_yet():
    block = parse_block(0.9, network="generator", example="")
    assert "ramp_start" not in block.keywords(None, "max_epochs", from_scratch=True)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_the_shortest_trainings_have_a_ramp(steps):
    block = parse_block(0.9, network="network_g", example="")
    schedule = block.schedule(steps, "total_iter", from_scratch=True)
    assert 1 <= schedule["ramp_start"] + schedule["ramp_steps"] <= steps
