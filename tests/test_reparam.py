"""Layers that their block writes in eval mode are found in the block's source and left alone."""

from __future__ import annotations

import torch
from torch import nn

import iks_plugin
import toys
from iks_plugin.reparam import written_layers


class WritesInManyWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by_data, self.by_copy, self.by_parameter, self.read = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.inner = nn.ModuleDict({"deep": nn.Conv2d(8, 8, 1)})
        self.weight = nn.Parameter(torch.zeros(8))
        self.read.weight.data = torch.ones(8, 8, 1, 1)

    def reset_parameters(self) -> None:
        self.read.weight.data = torch.zeros(8, 8, 1, 1)

    def merge(self) -> None:
        kernel = self.read.weight.data
        self.by_data.weight.data = kernel
        self.by_copy.weight.data.copy_(kernel)
        self.by_parameter.weight = nn.Parameter(kernel)
        self.weight.data = kernel[0]
        self.inner.deep.weight.copy_(kernel)


class Inherits(WritesInManyWays):
    pass


def test_every_way_of_writing_is_found_but_not_initialisation():
    expected = dict.fromkeys(("by_data", "by_copy", "by_parameter", "inner.deep"), "merge")
    assert written_layers(WritesInManyWays) == written_layers(Inherits) == expected


def test_where_there_is_no_source_nothing_is_found():
    made = type("Made", (nn.Module,), {"forward": lambda self, x: x})
    assert written_layers(made) == written_layers(nn.Conv2d) == written_layers(nn.Sequential) == {}


def test_such_a_layer_is_left_alone_with_its_reason_and_train_and_eval_agree():
    model = toys.MergesInEvalMode()
    iks_plugin.sparsify(model, 0.5, ramp_steps=5)
    rows = {row.name: row.left_alone for row in iks_plugin.report(model).layers}
    assert rows == {
        "first": None,
        "second": None,
        "merged": "written by its block: MergesInEvalMode.forward computes its weight",
    }
    toys.train(model, torch.optim.Adam(model.parameters(), 1e-3), 10, channels=8)
    x = torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    iks_plugin.finalize(model)
    torch.testing.assert_close(model.train()(x), model.eval()(x))
