"""Two processes over gloo: real DistributedDataParallel on a CPU."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import iks_plugin
import toys
from iks_plugin import distributed
from iks_plugin.curvature import CurvatureWatcher
from iks_plugin.layers import gated_layers

STEPS = 30
CASES: dict[str, dict[str, Any]] = {
    "exact": {"ramp_steps": 20},
    "paper": {"law": "paper", "epoch_steps": 1, "total_steps": STEPS},
    "filter": {"ramp_steps": 20, "granularity": "filter"},
    "obs": {"ramp_steps": 20, "law": "obs"},
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for case, options in CASES.items():
        torch.save(trained(rank, options), Path(folder, f"{case}{rank}.pt"))
    torch.save(exchanged(rank), Path(folder, f"exchanged{rank}.pt"))
    torch.save(measured(rank), Path(folder, f"measured{rank}.pt"))
    torch.distributed.destroy_process_group()


def trained(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(rank)  # different weights: DDP must bring them together, thresholds included
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, **options)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(wrapped.parameters(), 1e-3)
    for step in range(STEPS):
        toys.train(wrapped, optimizer, 1, seed=2 * step + rank)  # different data
    return {"model": model.state_dict(), "controller": controller.state_dict(), "sparsity": controller.sparsity}


def numbers(rank: int) -> list[torch.Tensor]:
    """Of two dtypes, and of several shapes: one that is empty, one in another order of memory, one not sent at once."""
    generator = torch.Generator().manual_seed(rank)
    dtypes = (torch.float32, torch.float64)
    shapes = [(2, 3), (0,), (), (4, 3, 2, 2), (distributed._AT_ONCE + 7,)]
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes for dtype in dtypes]
    return [tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor for tensor in made]


def exchanged(rank: int) -> dict[str, list[torch.Tensor]]:
    first, mean = numbers(rank), numbers(rank)
    distributed.take_the_first(first)
    distributed.average(mean)
    return {"first": first, "mean": mean}


def measured(rank: int) -> dict[str, Any]:
    """What is known of two layers when the second process has used one alone."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Conv2d(3, 3, 3) for name in ("common", "alone")})
    iks_plugin.sparsify(model, 0.5, include="*", ramp_steps=1)
    layers = gated_layers(model)
    watcher = CurvatureWatcher(lambda: layers)
    watcher.start()
    for name in ["common", "alone"] if rank == 0 else ["common"]:
        model[name](torch.full((1, 3, 8, 8), float(rank + 1))).sum().backward()
    own = watcher.unfinished()
    watcher.stop()
    return {"own": own, "found": {name: [known.inputs, known.gradients] for name, known in watcher.found().items()}}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what both processes have at the end of each case."""
    folder = tmp_path_factory.mktemp("states")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_identical(case, states):
    one, other = (torch.load(states / f"{case}{rank}.pt", weights_only=True) for rank in (0, 1))
    assert toys.states_equal(dict(one["model"]), dict(other["model"]))
    assert one["controller"] == other["controller"] and one["controller"]["steps"] == STEPS
    assert one["sparsity"] == other["sparsity"]
    if "ramp_steps" in CASES[case]:
        assert one["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_values_of_all_kinds_reach_every_process(states):
    one, other = (torch.load(states / f"exchanged{rank}.pt", weights_only=True) for rank in (0, 1))
    means = [(first + second) / 2 for first, second in zip(numbers(0), numbers(1), strict=True)]
    for got in (one, other):
        assert all(map(torch.equal, got["first"], numbers(0)))
        torch.testing.assert_close(got["mean"], means, rtol=0, atol=0)


def test_layers_count_as_measured_where_all_processes_have_measured_them(states):
    one, other = (torch.load(states / f"measured{rank}.pt", weights_only=True) for rank in (0, 1))
    assert set(one["own"]) == {"common", "alone"} and set(other["own"]) == {"common"}
    assert set(one["found"]) == set(other["found"]) == {"common"}
    for index, (first, second) in enumerate(zip(one["own"]["common"][:2], other["own"]["common"][:2], strict=True)):
        for got in (one, other):
            torch.testing.assert_close(got["found"]["common"][index], (first + second) / 2)
        assert index or not torch.equal(first, second)


def test_what_was_sent_outlives_the_process_group(monkeypatch):
    """A thread of gloo that is the last to hold it can hang the end of the process group (torch 2.1)."""
    sent: list[weakref.ref[torch.Tensor]] = []
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "get_world_size", lambda: 2)  # it talks to itself
            for name in ("broadcast", "all_reduce"):
                send = getattr(torch.distributed, name)

                def watched(values: torch.Tensor, *more: Any, send: Any = send) -> None:
                    sent.append(weakref.ref(values))
                    send(values, *more)

                patch.setattr(torch.distributed, name, watched)
            for exchange in (distributed.take_the_first, distributed.average):
                exchange([torch.ones(2, 3), torch.ones(2, dtype=torch.float64)])
    finally:
        torch.distributed.destroy_process_group()
    gc.collect()
    assert len(sent) == 4 and all(reference() is not None for reference in sent)
