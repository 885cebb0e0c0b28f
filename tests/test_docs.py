"""The snippets of the documentation on compact files run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pages import block_after

PAGE = "docs/compact_files.md"


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with pytest.warns(UserWarning, match="training ended at"):  # the snippet does not train
        exec(block_after(PAGE, "test"), names)
    return names


def test_save_and_load(names: dict[str, object]) -> None:
    model, state = names["model"], names["state"]
    assert isinstance(model, torch.nn.Sequential) and isinstance(state, dict)
    assert type(model[1]).__name__ == "PackedConv2d"
    assert int((state["1.weight"] == 0).sum()) == round(0.9 * state["1.weight"].numel())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx(names: dict[str, object]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    exec(block_after(PAGE, "test: onnx"), names)
    model = names["model"]
    assert isinstance(model, torch.nn.Sequential)
    session = onnxruntime.InferenceSession("sr.onnx")
    for size in ((64, 64), (33, 50)):
        image = torch.rand(1, 3, *size)
        (result,) = session.run(None, {"image": image.numpy()})
        np.testing.assert_allclose(result, model(image).detach().numpy(), atol=1e-5)
