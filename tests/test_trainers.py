"""Real trainings in Lightning and Accelerate, by the snippets of docs/trainers.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import iks_plugin
import toys
from iks_plugin.__main__ import main
from pages import block_after

BATCHES, STEPS = 5, 20
ZEROS = round(0.9 * 2 * 16 * 16 * 9)

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|isinstance|dirpath has changed).*")


def run(*markers: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for marker in markers:
        exec(block_after("docs/trainers.md", f"test: {marker}"), names)
    return names


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return toys.plain_sr()


def data() -> DataLoader:
    blurred, sharp = torch.rand(2, 2 * BATCHES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(blurred, sharp), batch_size=2)


def zeros(model: torch.nn.Module) -> int:
    return sum(int((model[index].weight == 0).sum()) for index in (2, 4))


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning")


def fit(lightning: Any, module: Any, steps: int, folder: Path, resume: Path | None = None, **options: Any) -> Path:
    """Train, and return the last checkpoint."""
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=folder, save_last=True, every_n_train_steps=BATCHES
    )
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint, *options.pop("callbacks", ())],
        **options,
    )
    trainer.fit(module, data(), data(), ckpt_path=resume, **({} if resume is None else {"weights_only": False}))
    return folder / "last.ckpt"


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    accelerate = pytest.importorskip("accelerate")
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


OPTIONS = {
    "plain": {},
    "clipped and accumulated": dict(gradient_clip_val=0.1, accumulate_grad_batches=5),
    "bfloat16": dict(precision="bf16-mixed"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lightning(tmp_path: Path, lightning: Any, options: dict[str, Any]) -> None:
    module_class = run("lightning")["SparseSR"]
    straight = module_class(network(), STEPS)
    last = fit(lightning, straight, STEPS, tmp_path / "straight", **options)
    assert straight.controller.steps == STEPS
    assert straight.controller.sparsity == pytest.approx(0.9, abs=1e-3)

    resumed = module_class(network(), STEPS)
    half = fit(lightning, resumed, STEPS // 2, tmp_path / "half", **options)
    assert resumed.controller.steps == STEPS // 2
    resumed = module_class(network(), STEPS)
    fit(lightning, resumed, STEPS, tmp_path / "rest", half, **options)
    assert toys.states_equal(straight.state_dict(), resumed.state_dict())

    assert main(["export", str(last), str(tmp_path / "sr.iks"), "--prefix", "network."]) == 0
    iks_plugin.finalize(straight.network)
    assert zeros(straight.network) == ZEROS
    assert toys.states_equal(iks_plugin.load(tmp_path / "sr.iks"), straight.network.state_dict())


def test_lightning_averages_gated_weights(tmp_path: Path, lightning: Any, recwarn: pytest.WarningsRecorder) -> None:
    names = run("lightning", "lightning ema")
    module = names["SparseSR"](network(), STEPS)
    average = names["SparseEMA"](decay=0.5)
    expected = {"mean": None}

    class Expected(lightning.pytorch.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            gated = pl_module.network[2].weight.detach().clone()
            expected["mean"] = gated if expected["mean"] is None else expected["mean"].lerp(gated, 0.5)

    fit(lightning, module, STEPS, tmp_path, callbacks=[Expected(), average])
    torch.testing.assert_close(module.network[2].weight.detach(), expected["mean"], rtol=0, atol=1e-7)
    assert zeros(module.network) < ZEROS
    iks_plugin.finalize(module.network)
    assert zeros(module.network) == ZEROS
    assert not [warning for warning in recwarn if issubclass(warning.category, iks_plugin.IksWarning)]


class Killed(TensorDataset):
    """Ends a training in its third epoch."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        if self.read > 5 * BATCHES:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = run("accelerate")["train"]
    straight = train(network(), data(), STEPS)
    assert zeros(straight) == ZEROS
    assert main(["export", "state/model.safetensors", "sr.iks"]) == 0
    assert toys.states_equal(iks_plugin.load("sr.iks"), straight.state_dict())

    with pytest.raises(KeyboardInterrupt):
        train(network(), DataLoader(Killed(*data().dataset.tensors), batch_size=2), STEPS)
    resumed = train(network(), data(), STEPS, resume_from="state")
    assert toys.states_equal(resumed.state_dict(), straight.state_dict())
