"""`iks demo`: a small EDSR x2 is trained on photographs, dense and 90 % sparse, and the two are compared.

Needs Pillow, scikit-image (unless given a folder), tqdm and matplotlib: pip install ".[demo]" in a checkout.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import iks_plugin

from ..errors import IksWarning
from ..options import check_sparsity
from .edsr import EDSR
from .interrupt import Interrupt
from .optional import require
from .outcome import Outcome, judge
from .photos import PhotoSet, load_photos
from .quality import enlarge, enlarge_bicubic
from .recipe import Recipe, check_count, make_recipe
from .results import Say, make_folder, say_aloud, tell, write
from .training import Learner, train

__all__ = ["run"]


def run(
    *,
    out: str | Path = "iks-demo",
    data: str | Path | None = None,
    target_sparsity: float = 0.9,
    steps: int | None = None,
    seed: int = 0,
    quick: bool = False,
    threads: int = 1,
    say: Say = say_aloud,
) -> Outcome | None:
    """Train a dense and a sparse EDSR, compare them on held-out photographs, and write what there is to see.

    Both networks share the first part of the training. From there on a copy is made sparse, and the two go on side by
    side, with the same batches and learning rates, to the same number of steps. The same seed gives the same result on
    the same machine with the same number of threads.

    The first Ctrl-C stops the training only: what exists by then is compared and written, the sparse network with the
    zeros that it has by then. A second one aborts.

    Args:
        out: folder for the pictures, the figures and the state dicts; made where it does not exist.
        data: folder of images to use instead of scikit-image's photographs; the last few are held out.
        target_sparsity: fraction of the rewritten layers' weights that become zero, in [0, 1).
        steps: optimizer steps of each network, at least 20.
        seed: in [0, 2**63).
        quick: train a tiny network for seconds instead.
        threads: CPU threads for each of the two networks, which train at the same time.
        say: takes each line or paragraph of output.

    Returns:
        The figures, or None where an interrupt came before the first step.

    Raises:
        IksError: an option is wrong, the images do not do, or a package is missing. Nothing has been trained then.
    """
    target = check_sparsity(target_sparsity)
    recipe = make_recipe(steps, seed, quick)
    check_count("threads", threads, 1)
    for module, package in (("PIL.Image", "Pillow"), ("matplotlib.figure", "matplotlib"), ("tqdm", "tqdm")):
        require(module, package)
    folder = make_folder(Path(out))

    photos = load_photos(data)
    with Interrupt() as interrupt, _threads(threads):
        start = time.perf_counter()
        say(_announcement(photos, recipe, target))
        learners = _train_all(photos, recipe, target, interrupt, say)
        if not learners:
            say("interrupted before the first step: nothing has been trained or written")
            return None
        if interrupt.requested:
            say("interrupted: comparing and writing what there is by now; press Ctrl-C again to abort")
        outcome = _evaluate(learners, photos, recipe, target, interrupt)
        written = write(outcome, learners, folder)
        outcome = replace(outcome, interrupted=interrupt.requested)
    tell(outcome, folder, written, time.perf_counter() - start, say)
    return outcome


def _train_all(photos: PhotoSet, recipe: Recipe, target: float, interrupt: Interrupt, say: Say) -> dict[str, Learner]:
    """The trained learners by name; without "sparse" where an interrupt came first, empty where none has learned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = EDSR(recipe.channels, recipe.blocks)
    dense = Learner(network, torch.optim.Adam(network.parameters(), lr=recipe.lr))
    say(f"training: steps 1 to {recipe.branch:,}, which both networks share")
    train({"dense": dense}, photos.training, recipe, recipe.branch, interrupt, "shared")
    if interrupt.requested:
        return {"dense": dense} if dense.steps_done else {}

    sparse_network = copy.deepcopy(network)
    controller = iks_plugin.sparsify(sparse_network, target, total_steps=recipe.steps - recipe.branch)
    sparse = Learner(sparse_network, torch.optim.Adam(controller.param_groups(), lr=recipe.lr), dense.steps_done)
    learners = {"dense": dense, "sparse": sparse}
    say(f"training: steps {recipe.branch + 1:,} to {recipe.steps:,}, dense and sparse side by side")
    train(learners, photos.training, recipe, recipe.steps, interrupt, "dense and sparse")
    return learners


def _evaluate(
    learners: dict[str, Learner], photos: PhotoSet, recipe: Recipe, target: float, interrupt: Interrupt
) -> Outcome:
    """Finalize the sparse network, if there is one, and let every candidate enlarge the held-out photographs.

    A sparse network that was interrupted on its way to the target keeps the sparsity it has: cut to the target
    untrained, it would lose what it has learned.
    """
    notes: list[str] = []
    report = None
    if "sparse" in learners:
        network = learners["sparse"].network
        unfinished = learners["sparse"].steps_done < recipe.steps
        reachable = min(target, iks_plugin.report(network).sparsity) if unfinished else target
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", IksWarning)
            iks_plugin.finalize(network, reachable if reachable < target else None)
        notes = [str(warning.message) for warning in caught if issubclass(warning.category, IksWarning)]
        report = iks_plugin.report(network)
    candidates = [judge("bicubic", None, [enlarge_bicubic(photo) for photo in photos.held_out], photos)]
    for name, learner in learners.items():
        images = [enlarge(learner.network, photo) for photo in photos.held_out]
        candidates.append(judge(name, learner.steps_done, images, photos))
    return Outcome(photos, recipe, target, tuple(candidates), report, interrupt.requested, tuple(notes))


def _announcement(photos: PhotoSet, recipe: Recipe, target: float) -> str:
    names = ", ".join(photo.name for photo in photos.held_out)
    return (
        f"EDSR x2 ({recipe.blocks} blocks of {recipe.channels} channels), {recipe.steps:,} steps, "
        f"sparsity {target:g}, seed {recipe.seed}\n"
        f"photographs: {photos.source}; {len(photos.training)} to train on; held out: {names}"
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
