"""Two processes over gloo: real DistributedDataParallel on a CPU."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import iks_plugin
import toys

STEPS = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


CASES: dict[str, dict[str, Any]] = {
    "exact": {"ramp_steps": 20},
    "paper": {"law": "paper", "epoch_steps": 1, "total_steps": STEPS},
    "filter": {"ramp_steps": 20, "granularity": "filter"},
    "obs": {"ramp_steps": 20, "law": "obs"},
}


def worker(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for case, options in CASES.items():
        torch.save(trained(rank, options), Path(folder, f"{case}{rank}.pt"))
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


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what both processes have at the end of each case."""
    folder = tmp_path_factory.mktemp("states")
    torch.multiprocessing.spawn(worker, (str(folder), free_port()), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_identical(case, states):
    one, other = (torch.load(states / f"{case}{rank}.pt", weights_only=True) for rank in (0, 1))
    assert toys.states_equal(dict(one["model"]), dict(other["model"]))
    assert one["controller"] == other["controller"] and one["controller"]["steps"] == STEPS
    assert one["sparsity"] == other["sparsity"]
    if "ramp_steps" in CASES[case]:
        assert one["sparsity"] == pytest.approx(0.8, abs=1e-3)
