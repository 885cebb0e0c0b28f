"""Every test starts from the same seed, on one thread: the models are too small to gain from more."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("basicsr"):
    import iks_basicsr  # noqa: F401  # BasicSR cannot be imported by itself beside a new torchvision


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
