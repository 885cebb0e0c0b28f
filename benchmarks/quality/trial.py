"""One row: a method on a copy of the dense network, trained and measured."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

import iks_plugin

from .data import ImageSet, batches
from .methods import make_method
from .methods.base import Method, Schedule
from .networks import make_network
from .results import Row, pairs
from .scores import Score, evaluate
from .settings import Budget, Case
from .training import DivergedError, Tick, train


def counted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that `iks_plugin.sparsify` would rewrite by default; every method prunes these and no others."""
    rewritten = copy.deepcopy(model)
    iks_plugin.sparsify(rewritten, 0.5).detach()
    names = [layer.name for layer in iks_plugin.report(rewritten).layers if layer.rewritten]
    return {name: model.get_submodule(name) for name in names}


def run_case(case: Case, budget: Budget, images: ImageSet, dense: dict[str, Tensor], tick: Tick) -> Row:
    """Train and measure one row; a training that diverges gives a row with a PSNR of NaN."""
    start = time.perf_counter()
    model = make_network(case.network, case.seed)
    model.load_state_dict(dense)
    model.to(budget.device)
    layers = counted_layers(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", iks_plugin.IksWarning)
        try:
            train_case(model, layers, case, budget, images, tick).finish()
            score = evaluate(model, images.test, images.scale)
        except DivergedError as error:
            nan = {image.name: float("nan") for image in images.test}
            score = Score(nan, nan)
            warnings.warn(str(error), iks_plugin.IksWarning, stacklevel=1)
    notes = [str(warning.message) for warning in caught if issubclass(warning.category, iks_plugin.IksWarning)]
    return make_row(case, budget, model, layers, score, time.perf_counter() - start, " | ".join(notes))


def train_case(
    model: nn.Module, layers: dict[str, nn.Module], case: Case, budget: Budget, images: ImageSet, tick: Tick
) -> Method:
    """Train `model` by the case's method for the steps of the budget; the method is still to finish it."""
    method = make_method(case.method)
    method.start(model, layers, case.sparsity, Schedule(budget.steps, max(1, round(case.ramp * budget.steps))))
    source = batches(images, case.seed, 1, budget.batch, budget.patch)
    train(model, method, source, budget.steps, case.lr, tick, budget.precision)
    return method


def make_row(
    case: Case, budget: Budget, model: nn.Module, layers: dict[str, nn.Module], score: Score, seconds: float, note: str
) -> Row:
    """What the weights and images of a finished `model` amount to."""
    weights: list[Tensor] = [layer.weight.detach() for layer in layers.values()]  # type: ignore[operator]
    total, nonzeros = sum(weight.numel() for weight in weights), sum(int(weight.count_nonzero()) for weight in weights)
    return Row(
        **asdict(case),
        **asdict(budget),
        weights=total,
        nonzeros=nonzeros,
        reached=1 - nonzeros / total,
        psnr=round(score.mean_psnr, 5),
        ssim=round(score.mean_ssim, 6),
        psnr_images=pairs(score.psnr, 4),
        ssim_images=pairs(score.ssim, 5),
        file_bytes=file_size(model),
        seconds=round(seconds, 1),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        iks_plugin=iks_plugin.__version__,
        note=" ".join(note.split()),
    )


def file_size(model: nn.Module) -> int:
    """Bytes of the compact file of `model`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.iks")
        iks_plugin.save(model, path)
        return path.stat().st_size
