"""Every test starts from the same seed, on one thread: the models are too small to gain from more."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
