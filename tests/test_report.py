"""The report: rows, totals, table, dictionary and picture."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch import nn

import iks_plugin
import toys
from iks_plugin import IksError


def halved() -> nn.Module:
    model = toys.plain_sr()
    iks_plugin.sparsify(model, 0.8)
    toys.spread_thresholds(model, 0.5)
    return model


def test_rows_and_totals():
    model = halved()
    report = iks_plugin.report(model)
    assert [row.name for row in report.layers] == ["0", "2", "4", "5"]
    assert [row.rewritten for row in report.layers] == [False, True, True, False]
    row = report.layers[1]
    assert (row.type, row.shape, row.weights, row.zeros) == ("SparseConv2d", (16, 16, 3, 3), 2304, 1152)
    assert (
        row.threshold_min
        == row.threshold_mean
        == row.threshold_max
        == pytest.approx(model[2].threshold[0, 0, 0, 0].item())
    )
    assert report.layers[0].threshold_mean is None and "3 input channels" in report.layers[0].left_alone
    assert (report.weights, report.zeros, report.sparsity, report.target_sparsity) == (4608, 2304, 0.5, 0.8)
    assert report.model_weights == sum(p.numel() for p in toys.plain_sr().parameters())
    assert report.model_zeros == 2304 and report.model_sparsity == 2304 / report.model_weights


def test_table():
    text = str(iks_plugin.report(halved()))
    assert "2      SparseConv2d  16x16x3x3    2,304  1,152    50.00%" in text
    assert "rewritten layers (2 of 4): 2,304 of 4,608 weights are zero, 50.00% (target 80.00%)" in text
    assert "whole model: 2,304 of 5,507 parameters are zero, 41.84%" in text


def test_after_finalize_the_report_still_tells_the_layers_apart():
    model = iks_plugin.finalize(halved(), 0.5)
    report = iks_plugin.report(model)
    assert [row.rewritten for row in report.layers] == [False, True, True, False]
    assert (report.zeros, report.target_sparsity) == (2304, 0.5)
    assert report.layers[1].type == "Conv2d" and report.layers[1].threshold_mean is None


def test_any_model_has_a_report():
    report = iks_plugin.report(toys.plain_sr())
    assert (report.weights, report.sparsity, len(report.layers)) == (0, 0.0, 4)
    assert "rewritten" not in str(report) and "whole model: 0 of 5,507" in str(report)
    lazy = iks_plugin.report(nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()))
    assert lazy.layers[0].left_alone == "it has no weight yet" and lazy.model_weights == 0 and str(lazy)
    assert str(iks_plugin.report(nn.ReLU())) and iks_plugin.report(toys.LeftAlone()).layers


def test_a_report_changes_nothing():
    model = toys.LeftAlone()
    iks_plugin.sparsify(model, 0.5)
    model.old_spectral(torch.randn(1, 8, 5, 5))  # after a forward its weight is no leaf and cannot be copied
    before = {key: value.clone() for key, value in model.state_dict().items()}
    iks_plugin.report(model)
    assert toys.states_equal(dict(model.state_dict()), before)


def test_dictionary_is_ready_for_json():
    report = iks_plugin.report(halved())
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded == report.to_dict()
    assert loaded["rewritten"] == {"weights": 4608, "zeros": 2304, "sparsity": 0.5}
    assert loaded["layers"][1]["shape"] == [16, 16, 3, 3] and loaded["target_sparsity"] == 0.8


@pytest.mark.parametrize(
    "model", [halved, toys.LeftAlone, lambda: nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(150)))]
)
def test_plot_draws_a_picture(model, tmp_path):
    path = iks_plugin.report(model()).plot(tmp_path / "new folder" / "chart.png")
    with Image.open(path) as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(2**24)) > 20


def test_plot_without_matplotlib_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch, iks_plugin\n"
        "try: iks_plugin.report(torch.nn.Conv2d(8, 8, 3)).plot('x.png')\n"
        "except iks_plugin.IksError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "drawing needs matplotlib: pip install matplotlib"


def test_a_model_without_values_has_no_report():
    with torch.device("meta"):
        model = toys.plain_sr()
    with pytest.raises(IksError, match="on the meta device, where weights have no values: load them before a report"):
        iks_plugin.report(model)


def test_compiled_and_wrapped_models_have_reports():
    model = halved()
    assert iks_plugin.report(nn.DataParallel(model)).zeros == 2304
    assert iks_plugin.report(torch.compile(model, backend="eager")).zeros == 2304
