"""Two processes over gloo: real DistributedDataParallel on a CPU."""

from __future__ import annotations

import socket
from pathlib import Path

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


def worker(rank: int, folder: str, port: int, options: dict[str, object]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(rank)  # different weights: DDP must bring them together, thresholds included
    model = toys.plain_sr()
    controller = iks_plugin.sparsify(model, 0.8, **options)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(wrapped.parameters(), 1e-3)
    for step in range(STEPS):
        toys.train(wrapped, optimizer, 1, seed=2 * step + rank)  # different data
    state = {"model": model.state_dict(), "controller": controller.state_dict(), "sparsity": controller.sparsity}
    torch.save(state, Path(folder, f"rank{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        {"ramp_steps": 20},
        {"law": "paper", "epoch_steps": 1, "total_steps": STEPS},
        {"ramp_steps": 20, "granularity": "filter"},
        {"ramp_steps": 20, "law": "obs"},
    ],
    ids=["exact", "paper", "filter", "obs"],
)
def test_two_processes_end_identical(options, tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path), free_port(), options), nprocs=2)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert toys.states_equal(dict(one["model"]), dict(other["model"]))
    assert one["controller"] == other["controller"] and one["controller"]["steps"] == STEPS
    assert one["sparsity"] == other["sparsity"]
    if "ramp_steps" in options:
        assert one["sparsity"] == pytest.approx(0.8, abs=1e-3)
