"""The training loop: an ordinary one, for one or two networks at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import torch
from torch import Tensor, nn

from .interrupt import Interrupt
from .optional import progress_bar
from .photos import SCALE, Photo, Pixels
from .recipe import Recipe

Batch = tuple[Tensor, Tensor]


class Learner:
    """A network, its optimizer, and the number of steps it has had."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, steps_done: int = 0) -> None:
        self.network = network
        self.optimizer = optimizer
        self.steps_done = steps_done

    def learn(self, batch: Batch, lr: float) -> float:
        """One optimizer step on `batch` by the L1 loss (EDSR, section 4.2). Returns the loss."""
        small, large = batch
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.l1_loss(self.network(small), large)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.steps_done += 1
        return float(loss.detach())


def train(
    learners: dict[str, Learner],
    photos: tuple[Photo, ...],
    recipe: Recipe,
    until: int,
    interrupt: Interrupt,
    title: str,
) -> None:
    """Take every learner to step `until`, all with the same batches and learning rates; stop early on an interrupt.

    The learners work at the same time and wait for each other after every step, so that an interrupt finds them at the
    same one. Two networks on a thread each use two cores as well as one network on two threads does. But the latter is
    many times slower as soon as another program wants a core, because torch's threads wait for each other in every
    layer, and spin while they wait.
    """
    start = min(learner.steps_done for learner in learners.values())
    threads = torch.get_num_threads()
    with (
        ThreadPoolExecutor(len(learners), initializer=torch.set_num_threads, initargs=(threads,)) as pool,
        progress_bar(range(start, until), title, unit="step") as steps,
    ):
        for step in steps:
            if interrupt.requested:
                return
            batch = make_batch(photos, recipe, step)
            losses = list(pool.map(Learner.learn, learners.values(), repeat(batch), repeat(recipe.lr_at(step))))
            if step % 20 == 0:
                postfix = {f"{name} loss": f"{loss:.4f}" for name, loss in zip(learners, losses, strict=True)}
                steps.set_postfix(postfix, refresh=False)


def make_batch(photos: tuple[Photo, ...], recipe: Recipe, step: int) -> Batch:
    """The batch of `step`: random patches, turned and mirrored at random, the same ones for the same seed and step.

    Returns:
        small: float32 (batch, 3, patch, patch) in [0, 1].
        large: float32 (batch, 3, SCALE * patch, SCALE * patch) in [0, 1].
    """
    random = np.random.default_rng((recipe.seed, step))
    # A large photograph holds more to learn from, so each is drawn in proportion to its pixels.
    pixels = np.array([photo.small[..., 0].size for photo in photos], dtype=np.float64)
    small: list[Pixels] = []
    large: list[Pixels] = []
    for index in random.choice(len(photos), size=recipe.batch, p=pixels / pixels.sum()):
        photo = photos[index]
        top = int(random.integers(photo.small.shape[0] - recipe.patch + 1))
        left = int(random.integers(photo.small.shape[1] - recipe.patch + 1))
        turns, mirrored = int(random.integers(4)), bool(random.integers(2))
        for image, scale, patches in ((photo.small, 1, small), (photo.large, SCALE, large)):
            side = recipe.patch * scale
            patch = np.rot90(image[top * scale : top * scale + side, left * scale : left * scale + side], turns)
            patches.append(patch[:, ::-1] if mirrored else patch)
    return _to_tensor(small), _to_tensor(large)


def _to_tensor(patches: list[Pixels]) -> Tensor:
    images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2)
    # channels_last is the layout in which a CPU convolves fastest.
    return images.to(torch.float32, memory_format=torch.channels_last) / 255
