"""law="paper" against the published formulas, computed step by step without any of the package's code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import iks_plugin
import toys

STEPS, EPOCH, TARGET = 200, 2, 0.8


def plainly(start: dict[str, Tensor], optimizer: str) -> tuple[dict[str, Tensor], list[float]]:
    """Forward, gradients, optimizer and law written out; returns the parameters and the sparsity after each step."""
    values = {name: tensor.clone() for name, tensor in start.items()}
    for name in ("2", "4"):
        values[f"{name}.threshold"] = torch.full_like(values[f"{name}.weight"], -12.0)
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    generator = torch.Generator().manual_seed(0)
    sparsities = []
    for step in range(1, STEPS + 1):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}

        def gated(name: str, leaves: dict[str, Tensor] = leaves) -> Tensor:
            weight, threshold = leaves[f"{name}.weight"], leaves[f"{name}.threshold"]
            return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(threshold))

        x = torch.randn(2, 3, 10, 10, generator=generator, dtype=torch.float64)
        y = F.relu(F.conv2d(x, leaves["0.weight"], leaves["0.bias"], padding=1))
        y = F.relu(F.conv2d(y, gated("2"), leaves["2.bias"], padding=1))
        y = F.conv2d(F.conv2d(y, gated("4"), padding=1), leaves["5.weight"], leaves["5.bias"], padding=1)
        gradients = torch.autograd.grad((y - x).square().mean(), list(leaves.values()))
        for name, gradient in zip(leaves, gradients, strict=True):
            if optimizer == "sgd":
                values[name] = values[name] - 0.05 * gradient
            else:
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                corrected = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
                values[name] = values[name] - 1e-3 * first[name] / (1 - 0.9**step) / corrected

        def zeros(name: str) -> float:
            return float((values[f"{name}.weight"].abs() <= torch.sigmoid(values[f"{name}.threshold"])).sum())

        percent = 100 * (zeros("2") + zeros("4")) / (values["2.weight"].numel() + values["4.weight"].numel())
        in_band = 100 * TARGET <= percent <= 100 * TARGET + 1
        if step % (10 * EPOCH) == 0 and step <= STEPS - 10 * EPOCH and not in_band:
            for name in ("2", "4"):
                values[f"{name}.threshold"] = values[f"{name}.threshold"] * (1 + 0.005 * (percent - 100 * TARGET))
        sparsities.append((zeros("2") + zeros("4")) / (values["2.weight"].numel() + values["4.weight"].numel()))
    return values, sparsities


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_equals_the_published_formulas_over_200_steps(optimizer):
    model = toys.plain_sr().double()
    expected, sparsities = plainly(dict(model.state_dict()), optimizer)
    controller = iks_plugin.sparsify(model, TARGET, law="paper", epoch_steps=EPOCH, total_steps=STEPS)
    build = {"sgd": lambda p: torch.optim.SGD(p, 0.05), "adam": lambda p: torch.optim.Adam(p, 1e-3)}[optimizer]
    trained = build(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for sparsity in sparsities:
        x = torch.randn(2, 3, 10, 10, generator=generator, dtype=torch.float64)
        trained.zero_grad()
        (model(x) - x).square().mean().backward()
        trained.step()
        assert controller.sparsity == pytest.approx(sparsity, abs=1e-6)
    assert sparsities[-1] > 0.5
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
