"""A network on a GPU becomes what it becomes on the CPU, to the bit, and stays where it is; the GPU is pretended."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import iks_plugin
import toys
from pretended_gpu import OnGpu, moved, pretended_gpu

pytestmark = pytest.mark.filterwarnings("ignore:training ended at:iks_plugin.IksWarning")

STEPS = 16
IMAGE = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with pretended_gpu():
        yield


def network(device: str, *, tied: bool = True) -> nn.Module:
    """Plain, grouped, dilated, transposed and tied convolutions, with what they stand among."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.PReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2, padding_mode="reflect", bias=False),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ConvTranspose2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 3, 3, padding=1),
    ).to(device)
    if tied:
        model[6].weight = model[3].weight
    return model


def optimizer_of(controller: iks_plugin.SparsityController) -> torch.optim.Optimizer:
    return torch.optim.Adam(controller.param_groups(), 2e-3)


def trained(device: str, **options: Any) -> tuple[nn.Module, iks_plugin.SparsityController]:
    model = network(device)
    controller = iks_plugin.sparsify(model, **{"target_sparsity": 0.9, "total_steps": STEPS, **options})
    toys.train(model, optimizer_of(controller), STEPS)
    return model, controller


@cache
def _finalized(device: str) -> nn.Module:
    model, _ = trained(device)
    iks_plugin.finalize(model)
    return model.eval()


def finalized(device: str) -> nn.Module:
    return copy.deepcopy(_finalized(device))


def assert_on_gpu(model: nn.Module) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(isinstance(tensor, OnGpu) for tensor in tensors.values()), {k: v.device for k, v in tensors.items()}


def assert_same(on_gpu: nn.Module, on_cpu: nn.Module) -> None:
    assert_on_gpu(on_gpu)
    for (name, one), (_, other) in zip(on_gpu.state_dict().items(), on_cpu.state_dict().items(), strict=True):
        assert torch.equal(one.cpu(), other), name


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "exact": {"law": "exact"},
    "kernels": {"law": "exact", "granularity": "kernel", "target_sparsity": 0.7},
    "layers": {"law": "exact", "granularity": "layer", "target_sparsity": 0.5},
    "paper": {"law": "paper", "epoch_steps": 4, "interval": 1},
    "a size": {"target_sparsity": None, "max_bytes": 12_000},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_is_that_on_the_cpu(options: dict[str, Any]) -> None:
    (on_gpu, ours), (on_cpu, theirs) = (trained(device, **options) for device in ("cuda", "cpu"))
    assert_same(on_gpu, on_cpu)
    assert ours.sparsity == theirs.sparsity > 0.3
    for model in (on_gpu, on_cpu):
        iks_plugin.finalize(model)
    assert_same(on_gpu, on_cpu)
    assert str(iks_plugin.report(on_gpu)) == str(iks_plugin.report(on_cpu))


@pytest.mark.parametrize("moment", ["before training", "while training"])
def test_a_rewritten_network_can_be_moved(moment: str) -> None:
    models = [network("cpu", tied=False) for _ in range(2)]  # torch 2.1 would move what is tied to two places
    for model, device in zip(models, ("cuda", "cpu"), strict=True):
        controller = iks_plugin.sparsify(model, 0.9, total_steps=STEPS)
        if moment == "while training":
            toys.train(model, optimizer_of(controller), STEPS // 2)
        toys.train(model.to(device), optimizer_of(controller), STEPS // 2, seed=1)
    assert_same(*models)


@pytest.mark.parametrize("saved_on", ["cpu", "cuda"])
def test_a_training_is_resumed_from_states_of_either_device(saved_on: str) -> None:
    model = network("cuda")
    controller = iks_plugin.sparsify(model, 0.9, total_steps=STEPS)
    optimizer = optimizer_of(controller)
    toys.train(model, optimizer, STEPS // 2)
    parts = (model, optimizer, controller)
    states = [moved(copy.deepcopy(part.state_dict()), saved_on) for part in parts]

    resumed = network("cuda")
    its_controller = iks_plugin.sparsify(resumed, 0.9, total_steps=STEPS)
    its_parts = (resumed, optimizer_of(its_controller), its_controller)
    for part, state in zip(its_parts, states, strict=True):
        part.load_state_dict(state)
    for one, its_optimizer, _ in (parts, its_parts):
        toys.train(one, its_optimizer, STEPS // 2, seed=1)
        iks_plugin.finalize(one)
    assert_same(resumed, model.cpu())


def test_validation_ema_and_the_dial() -> None:
    pairs = [trained(device) for device in ("cuda", "cpu")]
    copies = [copy.deepcopy(model) for model, _ in pairs]
    for context in (iks_plugin.finalized, iks_plugin.gates_applied):
        states = []
        for model, _ in pairs:
            with context(model):
                states.append({name: value.cpu().clone() for name, value in model.state_dict().items()})
        assert toys.states_equal(*states)
    for (model, controller), ema in zip(pairs, copies, strict=True):
        controller.target_sparsity = 0.95
        iks_plugin.finalize(model)
        iks_plugin.finalize(ema)
    assert_same(pairs[0][0], pairs[1][0])
    assert_same(*copies)


@pytest.mark.parametrize("value_dtype", ["float32", "float16", "int8"])
def test_files(tmp_path: Path, value_dtype: str) -> None:
    on_gpu, on_cpu = finalized("cuda"), finalized("cpu")
    for name, model in (("gpu", on_gpu), ("cpu", on_cpu)):
        iks_plugin.save(model, tmp_path / name, value_dtype)
    assert (tmp_path / "gpu").read_bytes() == (tmp_path / "cpu").read_bytes()

    expected = network("cpu").eval()
    iks_plugin.load(tmp_path / "cpu", expected)
    for packed in (False, True):
        loaded = network("cuda").eval()
        iks_plugin.load(tmp_path / "gpu", loaded, packed=packed)
        assert_on_gpu(loaded)
        with torch.no_grad():
            assert torch.equal(loaded(IMAGE.to("cuda")).cpu(), expected(IMAGE))


def test_packing_and_unpacking() -> None:
    model, expected = finalized("cuda"), finalized("cpu")
    iks_plugin.pack(model)
    assert_on_gpu(model)
    with torch.no_grad():
        assert torch.equal(model(IMAGE.to("cuda")).cpu(), expected(IMAGE))
    iks_plugin.unpack(model)
    assert_same(model, expected)


IMAGES: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: IMAGE,
    "an array": lambda: (IMAGE[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8),
}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("tile", [None, 16])
def test_an_image_of_the_cpu_is_enlarged(image: Callable[[], Any], tile: int | None) -> None:
    one, other = (iks_plugin.upscale(finalized(device), image(), tile=tile) for device in ("cuda", "cpu"))
    assert type(one) is type(other)
    assert np.array_equal(np.asarray(one), np.asarray(other))


MIXED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda gpu, cpu: gpu + cpu,
    "in place": lambda gpu, cpu: cpu.add_(gpu.sum()),
    "convolution": lambda gpu, cpu: nn.functional.conv2d(gpu[None, None], cpu[None, None]),
    "concatenation": lambda gpu, cpu: torch.cat([gpu, cpu]),
    "indexed": lambda gpu, cpu: cpu[(gpu > 0).nonzero()],
    "NumPy": lambda gpu, cpu: np.asarray(gpu),
    "gradient": lambda gpu, cpu: (gpu * torch.ones_like(gpu).requires_grad_()).sum().backward(cpu.sum()),
}
"""What must fail, or nothing here could."""


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_the_pretended_gpu_refuses_what_a_gpu_does(mix: Callable[[Tensor, Tensor], Any]) -> None:
    plain = torch.ones(4, 4)
    with pytest.raises((RuntimeError, TypeError)):
        mix(plain.to("cuda"), plain)


def test_the_pretended_gpu_takes_scalars_and_indices_of_the_cpu() -> None:
    on_gpu = torch.ones(4, 4, device="cuda")
    assert isinstance(on_gpu * torch.tensor(2.0), OnGpu)
    assert isinstance(on_gpu[torch.tensor([0, 2])], OnGpu)
    assert torch.equal(on_gpu.cpu(), torch.ones(4, 4))
