"""Pruning as a surgeon does it: the weights that matter least for the loss go, and the others take over their work.

With H = E[u u^T] + damping the loss grows, to second order, by w_i^2 / [H^-1]_ii * E[g^2] / 2 when weight i goes and
the other weights of its output channel adapt as well as they can (Hassibi & Stork 1992, "Optimal Brain Surgeon";
Frantar & Alistarh 2022 for layers). By that and by their magnitude (`SurgeonLaw.score`) weights of all layers are
compared. The weights that stay are then the ones of least squared error on the layer's inputs: H_SS w_S = (H w)_S for
the support S of an output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .curvature import Curvature, parts_of
from .distributed import take_the_first
from .laws import CLOSED
from .layers import Gated
from .measure import zeros_in

Score = Callable[[Tensor, Tensor], Tensor]
"""From the magnitudes of weights and their sensitivities, shaped alike, to scores: the smallest go first."""

DAMPING = 0.01
"""What is added to the diagonal of E[u u^T], as a share of its mean, or of each entry."""
_FLOOR = 1e-12
"""What is added besides where it is a share of each entry, as a share of the mean: next to nothing."""
_LEAST = 1e-30
"""What E[g^2] counts as where it is zero, so that magnitude decides among the weights of such a channel."""
_HIGHEST = 0.5
"""Magnitude up to which a weight that has gone is kept: far below a closed gate."""
_AT_ONCE = 1 << 24
"""Numbers in the matrices that are solved in one go."""


@torch.no_grad()
def prune(layers: Mapping[str, Gated], curvature: Mapping[str, Curvature], zeros: int, score: Score) -> None:
    """Bring the layers to exactly `zeros` zeros, by their thresholds; weights and biases that stay take over.

    Weights come back, where there are too many zeros, as good as zero: for training to make something of them.

    Args:
        layers: gated ones, with a threshold for each weight, all of them finite.
        curvature: of as many layers as it could be measured of.
        zeros: between the number of raw zeros and that of all weights.
        score: the law's.
    """
    device = next(iter(layers.values())).raw_weight.device.type
    with torch.autocast(device, enabled=False):  # an optimizer may step within one, which would solve in bfloat16
        missing = zeros - zeros_in(layer.weight for layer in layers.values())
        if missing < 0:
            _wake(layers, -missing)
        elif missing:
            weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
            staying = _choose(layers, weights, all_scores(layers, weights, curvature, score), missing)
            for name, layer in layers.items():
                _operate(layer, weights[name], staying[name], curvature.get(name))
        _agree(layers)


def _choose(
    layers: Mapping[str, Gated], weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], going: int
) -> dict[str, Tensor]:
    """Which weights of each layer stay when `going` of all that are not zero go."""
    device = next(iter(scores.values())).device
    flat = torch.cat([scores[name].flatten().to(device) for name in layers])
    alive = torch.cat([weights[name].flatten().to(device) != 0 for name in layers])
    flat = torch.where(alive, flat, torch.inf)
    stays = alive.clone()
    stays[torch.topk(flat, going, largest=False, sorted=False).indices] = False
    parts = torch.split(stays, [weights[name].numel() for name in layers])
    return {
        name: part.view(weights[name].shape).to(weights[name].device) for name, part in zip(layers, parts, strict=True)
    }


def all_scores(
    layers: Mapping[str, Gated], weights: Mapping[str, Tensor], curvature: Mapping[str, Curvature], score: Score
) -> dict[str, Tensor]:
    """The scores of all weights, up to a common factor; shaped as the weights.

    A layer without curvature is scored by magnitude, scaled so that its typical score is that of the layers that
    get gradients.
    """
    scores = {
        name: score(weights[name].abs().float(), sensitivities(layers[name], known))
        for name, known in curvature.items()
        if name in layers
    }
    ratios = [
        float(scores[name].mean() / weights[name].abs().float().mean().clamp(min=1e-30))
        for name in scores
        if bool(curvature[name].gradients.any())
    ]
    typical = sorted(ratios)[len(ratios) // 2] if ratios else 1.0
    return {name: scores[name] if name in scores else weights[name].abs().float() * typical for name in layers}


def sensitivities(layer: Gated, curvature: Curvature) -> Tensor:
    """sqrt(E[g^2] / [H^-1]_ii) for the weights of one layer, shaped as they are, float32.

    Times |w_i| it is the square root of what the loss grows by when weight i goes, up to a common factor.
    """
    weight = layer.raw_weight
    rows = _rows(layer, weight, None)
    inverse = torch.cholesky_inverse(_factor(damped_each(curvature.inputs)))
    spread = inverse.diagonal(dim1=-2, dim2=-1)[..., : rows.shape[-1]].clamp(min=1e-30).rsqrt()  # (groups, parts, n)
    gradients = curvature.gradients.view(len(rows), 1, -1, 1).clamp(min=_LEAST).sqrt()
    return _unrows(spread.unsqueeze(2) * gradients, weight.shape)


def damped(inputs: Tensor, share: float = DAMPING) -> Tensor:
    """H with a little more on the diagonal, as much for all inputs: the others are to stay near what they were."""
    mean = inputs.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(inputs.shape[-1], device=inputs.device, dtype=inputs.dtype)
    return inputs + (share * mean + 1e-12)[..., None, None] * identity


def damped_each(inputs: Tensor) -> Tensor:
    """H with a little more of each input's own, for scores: with as much for all, inputs that are zero would count."""
    own = inputs.diagonal(dim1=-2, dim2=-1)
    return inputs + torch.diag_embed(DAMPING * own + _FLOOR * own.mean(-1, keepdim=True) + 1e-30)


def _factor(matrices: Tensor) -> Tensor:
    """Cholesky factors, with more damping where rounding has made a matrix indefinite."""
    factors: Tensor
    factors, failed = torch.linalg.cholesky_ex(matrices)
    more = DAMPING
    while bool(failed.any()):
        factors, failed = torch.linalg.cholesky_ex(damped(matrices, more))
        more *= 10
    return factors


def _rows(layer: Gated, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight as (groups, parts, outputs of a group, n), with the bias behind where it belongs to the solution."""
    groups, parts = getattr(layer, "groups", 1), parts_of(layer)
    rows = weight.reshape(groups, weight.shape[0] // groups, parts, -1).permute(0, 2, 1, 3)
    if bias is not None:
        rows = torch.cat([rows, bias.view(groups, 1, -1, 1).to(rows)], dim=-1)
    return rows


def _unrows(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows.permute(0, 2, 1, 3).reshape(shape)


def _operate(layer: Gated, weight: Tensor, stays: Tensor, curvature: Curvature | None) -> None:
    """Close the gates of the weights that go, and give the others the values that make up for it."""
    going = (weight != 0) & ~stays
    if not bool(going.any()):
        return
    if curvature is not None:
        moments, n = curvature.inputs, _rows(layer, weight, None).shape[-1]
        bias: Tensor | None = layer.bias if moments.shape[-1] > n else None  # type: ignore[assignment]
        if bias is not None and not bias.requires_grad:  # it is to stay what it is
            bias, moments = None, moments[..., :n, :n]
        rows = _rows(layer, weight.float(), None if bias is None else bias.detach().float())
        support = _rows(layer, stays, None if bias is None else torch.ones_like(bias, dtype=torch.bool))
        solved = compensated(rows, support, damped(moments))
        if bias is not None:
            bias.copy_(solved[..., -1].reshape(bias.shape))
            solved = solved[..., :-1]
        weight = _unrows(solved, weight.shape)
    raw, threshold = layer.raw_weight, layer.threshold
    cut = torch.sigmoid(threshold.float())
    opened = weight.float() + torch.sign(weight.float()) * cut
    raw.copy_(torch.where(stays, opened, torch.where(going, raw.float().clamp(-_HIGHEST, _HIGHEST), raw.float())))
    threshold.masked_fill_(going, CLOSED)


def compensated(rows: Tensor, support: Tensor, moments: Tensor) -> Tensor:
    """The rows that are zero outside of `support` and closest to `rows`: min (w - w0)^T H (w - w0).

    Args:
        rows: (groups, parts, outputs, n) float32.
        support: bool, of the same shape.
        moments: H, (groups, parts, n, n).

    Returns:
        A tensor like `rows`. Those that are zero outside of their support already stay what they are.
    """
    result = rows.clone()
    for group in range(rows.shape[0]):
        for part in range(rows.shape[1]):
            w, keep, h = rows[group, part], support[group, part], moments[group, part]
            touched = torch.nonzero(((w != 0) & ~keep).any(dim=1)).flatten()
            if len(touched):
                result[group, part, touched] = _solve(w[touched], keep[touched], h)
    return result


def _solve(w: Tensor, keep: Tensor, h: Tensor) -> Tensor:
    """By the weights that stay, or by those that are zero, whichever are fewer in the fullest row."""
    staying, zero = int(keep.sum(1).max()), int((~keep).sum(1).max())
    inverse = torch.cholesky_inverse(_factor(h)) if zero < staying else None
    size = max(1, min(staying, zero))
    solved = []
    step = max(1, _AT_ONCE // size**2)
    for start in range(0, len(w), step):
        some, kept = w[start : start + step], keep[start : start + step]
        if inverse is None:
            place, valid = _places(kept, size)
            factor = _factor(_compact(h, place, valid))
            right = (some @ h).gather(1, place) * valid
            values = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2) * valid
            solved.append(torch.zeros_like(some).scatter_add_(1, place, values))
        else:
            place, valid = _places(~kept, size)
            factor = _factor(_compact(inverse, place, valid))
            right = some.gather(1, place) * valid
            values = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2) * valid
            solved.append((some - torch.zeros_like(some).scatter_add_(1, place, values) @ inverse) * kept)
    return torch.cat(solved)


def _places(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The columns of each row's ones, filled up with others to `size`; and 1 for the real ones, 0 for the others."""
    valid, place = mask.to(torch.float32).topk(size, dim=1)
    return place, valid


def _compact(matrix: Tensor, place: Tensor, valid: Tensor) -> Tensor:
    """For each row the square of `matrix` at its places, and the identity where they are not real."""
    square = matrix[place[:, :, None], place[:, None, :]] * valid[:, :, None] * valid[:, None, :]
    return square + torch.diag_embed(1 - valid)


def _wake(layers: Mapping[str, Gated], count: int) -> None:
    """Open the gates of the `count` largest of the raw weights that are gated to zero."""
    asleep = {name: (layer.weight == 0) & (layer.raw_weight != 0) for name, layer in layers.items()}
    device = next(iter(asleep.values())).device
    flat = torch.cat(
        [
            torch.where(asleep[name], layer.raw_weight.abs().float(), -1.0).flatten().to(device)
            for name, layer in layers.items()
        ]
    )
    wakes = torch.zeros_like(flat, dtype=torch.bool)
    wakes[torch.topk(flat, count, sorted=False).indices] = True
    parts = torch.split(wakes, [mask.numel() for mask in asleep.values()])
    for (name, layer), part in zip(layers.items(), parts, strict=True):
        raw, threshold = layer.raw_weight, layer.threshold
        mine = part.view(raw.shape).to(raw.device) & asleep[name]
        threshold.masked_fill_(mine, layer._iks.threshold_init)
        least = torch.sign(raw.float()) * torch.sigmoid(threshold.float()) * 1.05  # gated, it is a little above zero
        raw.copy_(torch.where(mine, least, raw.float()))


def _agree(layers: Mapping[str, Gated]) -> None:
    """In a distributed training, take what the first process has: rounding may differ between machines."""
    take_the_first(
        tensor
        for layer in layers.values()
        for tensor in (layer.raw_weight, layer.threshold, getattr(layer, "bias", None))
        if tensor is not None
    )
