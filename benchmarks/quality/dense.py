"""The dense network that every method starts from: trained once for each seed, then kept in a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from iks_plugin import IksError
from iks_plugin.files import whole_file

from .data import ImageSet, batches
from .methods import make_method
from .methods.base import Schedule
from .networks import make_network
from .settings import Budget
from .training import Tick, train


def dense_path(out: Path, network: str, seed: int, budget: Budget) -> Path:
    """The file of the dense network; its name holds a digest of all that it depends on."""
    settings = {**asdict(budget), "network": network, "seed": seed}
    del settings["steps"]  # those of the sparse phase
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return out / "dense" / f"{network}-seed{seed}-{digest}.pt"


def train_dense(path: Path, network: str, seed: int, budget: Budget, images: ImageSet, tick: Tick) -> None:
    """Train the network from scratch for `dense_steps` and write its state dict to `path`, whole or not at all."""
    model = make_network(network, seed).to(budget.device)
    method = make_method("dense")
    method.start(model, {}, 0.0, Schedule(budget.dense_steps, 0))
    source = batches(images, seed, 0, budget.batch, budget.patch)
    train(model, method, source, budget.dense_steps, budget.dense_lr, tick, budget.precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, unfinished)


def load_dense(path: Path) -> dict[str, Tensor]:
    """The state dict in the file `path`.

    Raises:
        IksError: the file cannot be read.
    """
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch and pickle make of a damaged file
        raise IksError(f"{path} is no dense network: {error}. Remove it, and it is trained again") from error
    return state
