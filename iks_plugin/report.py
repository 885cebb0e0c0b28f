"""What a model's layers have kept: a per-layer report as a text table, a dictionary and a picture."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import IksError
from .layers import Gated, gated_layers
from .measure import zeros_in
from .rewrite import LEFT_ALONE, REWRITTEN, trained_for
from .runtime import Packed, PackedWeight
from .selection import holds_kernel
from .table import table


@dataclass(frozen=True)
class LayerReport:
    """One layer that holds a kernel. Thresholds are those of the formula, before the sigmoid; None without a gate."""

    name: str
    type: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    sparsity: float
    rewritten: bool
    left_alone: str | None
    threshold_min: float | None = None
    threshold_mean: float | None = None
    threshold_max: float | None = None


@dataclass(frozen=True)
class Report:
    """The layers of one model and their totals. Sparsities are fractions in [0, 1]; shared weights count once.

    `model_weights` counts every parameter of the model but the thresholds, and `model_zeros` the zeros among them as
    the layers compute with them.
    """

    layers: tuple[LayerReport, ...]
    weights: int
    zeros: int
    model_weights: int
    model_zeros: int
    target_sparsity: float | None

    @property
    def sparsity(self) -> float:
        """Over the rewritten layers."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def model_sparsity(self) -> float:
        """Over the whole model."""
        return self.model_zeros / self.model_weights if self.model_weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers, ready for json."""
        return {
            "target_sparsity": self.target_sparsity,
            "rewritten": {"weights": self.weights, "zeros": self.zeros, "sparsity": self.sparsity},
            "model": {"weights": self.model_weights, "zeros": self.model_zeros, "sparsity": self.model_sparsity},
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
        }

    def __str__(self) -> str:
        header = ("layer", "type", "shape", "weights", "zeros", "sparsity", "threshold min / mean / max")
        lines = [table(header, [_cells(layer) for layer in self.layers], right={3, 4, 5})]
        rewritten = sum(layer.rewritten for layer in self.layers)
        goal = "" if self.target_sparsity is None else f" (target {self.target_sparsity:.2%})"
        lines.append("")
        if rewritten:
            lines.append(
                f"rewritten layers ({rewritten} of {len(self.layers)}): "
                f"{self.zeros:,} of {self.weights:,} weights are zero, {self.sparsity:.2%}{goal}"
            )
        whole = f"{self.model_zeros:,} of {self.model_weights:,} parameters are zero, {self.model_sparsity:.2%}"
        lines.append(f"whole model: {whole}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw each layer's sparsity and its share of kept and zero weights; the suffix of `path` sets the format.

        Raises:
            IksError: matplotlib is not installed.
        """
        from .chart import draw

        return draw(self, Path(path))


def report(model: nn.Module) -> Report:
    """Count the zeros of every layer of `model` that holds a kernel: rewritten, finalized, packed or any other model.

    Layers that `sparsify` left alone carry its reason.

    Raises:
        IksError: the model is on the device "meta", where weights have no values.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise IksError("the model is on the meta device, where weights have no values: load them before a report")
    gated = {id(layer.raw_weight): layer for layer in gated_layers(model).values()}
    thresholds = {id(layer.threshold) for layer in gated.values()}
    parameters = [p for p in model.parameters() if id(p) not in thresholds and not is_lazy(p)]
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    with torch.no_grad():
        rows = [_describe(name, module) for name, module in model.named_modules() if _is_listed(module)]
        model_zeros = zeros_in(gated[id(p)].weight if id(p) in gated else p for p in parameters)
    rewritten = {id(_weight_of(module)): name for name, module in model.named_modules() if _is_rewritten(module)}
    counted = [row for row in rows if row.name in rewritten.values()]
    return Report(
        layers=tuple(rows),
        weights=sum(row.weights for row in counted),
        zeros=sum(row.zeros for row in counted),
        model_weights=sum(p.numel() for p in parameters) + sum(weight.shape.numel() for weight in packed),
        model_zeros=model_zeros + sum(weight.zeros for weight in packed),
        target_sparsity=trained_for(model),
    )


def _is_listed(module: nn.Module) -> bool:
    return isinstance(module, Packed) or holds_kernel(module)


def _weight_of(module: nn.Module) -> object:
    """What layers that share a weight have in common."""
    return module.packed_weight if isinstance(module, Packed) else module._parameters["weight"]


def _is_rewritten(module: nn.Module) -> bool:
    return module.__dict__.get(REWRITTEN, False) is True


def _describe(name: str, module: nn.Module) -> LayerReport:
    weight = module._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        return LayerReport(name, type(module).__name__, (), 0, 0, 0.0, False, "it has no weight yet")
    # A parametrised weight is read from a copy: computing it may change buffers (spectral norm in training mode).
    source = copy.deepcopy(module) if hasattr(module, "parametrizations") else module
    effective: Tensor = source.packed_weight() if isinstance(source, Packed) else source.weight  # type: ignore[assignment]
    zeros = zeros_in([effective])
    thresholds: dict[str, float] = {}
    if isinstance(module, Gated):
        threshold = module.threshold
        thresholds = {
            "threshold_min": threshold.min().item(),
            "threshold_mean": threshold.mean().item(),
            "threshold_max": threshold.max().item(),
        }
    return LayerReport(
        name=name,
        type=type(module).__name__,
        shape=tuple(effective.shape),
        weights=effective.numel(),
        zeros=zeros,
        sparsity=zeros / effective.numel() if effective.numel() else 0.0,
        rewritten=_is_rewritten(module),
        left_alone=module.__dict__.get(LEFT_ALONE),
        **thresholds,
    )


def _cells(layer: LayerReport) -> tuple[str, ...]:
    if layer.threshold_mean is None:
        note = f"left alone: {layer.left_alone}" if layer.left_alone else ""
    else:
        note = f"{layer.threshold_min:.2f} / {layer.threshold_mean:.2f} / {layer.threshold_max:.2f}"
    return (
        layer.name or "(the model)",
        layer.type,
        "x".join(map(str, layer.shape)),
        f"{layer.weights:,}",
        f"{layer.zeros:,}",
        f"{layer.sparsity:.2%}",
        note,
    )
