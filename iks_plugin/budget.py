"""The sparsity whose compact file just fits a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from .container import to_bytes
from .errors import OptionError
from .laws import count_for, critical_shifts, project
from .layers import Gated
from .measure import all_shifts, zeros_in
from .quantize import VALUE_DTYPES
from .sizes import Budget
from .state import checked, file_info, output_axes, unwrapped

RESOLVE_STEPS = 500
"""Optimizer steps after which a training asks again for the sparsity: its weights change how well they compress."""
RESOLVE_TIMES = 10
"""How often it asks in a training too short for that, along `total_steps`."""

_CLOSE = 0.99
"""A file of this share of the budget is close enough; a search that ends above it has found its sparsity."""
_AIM = 0.996
_LEAST = 0.01
"""Below this sparsity a budget asks for nothing that is worth a training."""
_MOST_TRIALS = 40
_SLACK = 64
"""Bytes by which files of the same weights may differ: the digits of the target compress by chance."""
_TYPICAL_TARGET = 0.8765432109876543


@torch.no_grad()
def sparsity_for(
    model: nn.Module, layers: Mapping[str, Gated], budget: Budget, guess: float, *, trains_on: bool = True
) -> float:
    """The sparsity of the rewritten `layers` of `model` with which its finalized compact file fits the budget.

    Args:
        guess: the sparsity to try first.
        trains_on: whether weights that come back will be trained. If not, none does: where the file fits, zeros stay.

    Raises:
        OptionError, IksError: as `first_sparsity_for`, or weights are not finite.
    """
    gated, raw = [layer.weight for layer in layers.values()], [layer.raw_weight for layer in layers.values()]
    thresholds = [layer.threshold for layer in model.modules() if isinstance(layer, Gated)]
    shifts = all_shifts(layers)
    return _fitting_zeros(model, gated, raw, shifts, budget, guess, trains_on, thresholds) / shifts.numel()


@torch.no_grad()
def first_sparsity_for(model: nn.Module, weights: Sequence[nn.Parameter], budget: Budget) -> float:
    """The same before a model is rewritten, by the magnitudes of the `weights` that will be.

    Raises:
        OptionError: there is no such sparsity; the message says what to change.
        IksError: the model's state dict holds what a compact file cannot.
    """
    shifts = torch.cat([critical_shifts(weight, weight.new_zeros(())).to(weights[0].device) for weight in weights])
    sparsity = _fitting_zeros(model, weights, weights, shifts, budget, guess=0.9, trains_on=True) / shifts.numel()
    refuse_idle(sparsity, budget)
    return sparsity


def refuse_idle(sparsity: float, budget: Budget) -> None:
    """Raise an OptionError where `sparsity`, which fits the budget, is next to nothing."""
    if sparsity < 1.5 * _LEAST:
        raise OptionError(
            f"max_bytes is {budget.max_bytes:,}, and the file fits that with {_LEAST:.0%} of zeros already: no "
            "need to make it sparse. Give a smaller max_bytes, or a target_sparsity"
        )


def _fitting_zeros(
    model: nn.Module,
    gated: Sequence[Tensor],
    raw: Sequence[Tensor],
    shifts: Tensor,
    budget: Budget,
    guess: float,
    trains_on: bool,
    thresholds: Sequence[Tensor] = (),
) -> int:
    """How many of the weights must be zero for the compact file of `model` to have at most the budget's bytes.

    The files are really made, one for every sparsity that is tried, usually four to eight. Weights that come back are
    next to nothing at first, and in narrow types nothing at all: each counts as if it took the bytes of its type.

    Args:
        gated, raw, shifts: of the layers that become sparse, as `laws.project` takes them; `raw` are the model's own
            parameters.
        guess, trains_on: as in `sparsity_for`.
        thresholds: parameters of the model that are not in the file.

    Returns:
        1 % of the weights where even that fits.

    Raises:
        OptionError: not even with a single weight left the file is small enough.
    """
    bare = unwrapped(model)
    left_out = set(map(id, thresholds))
    state = checked(bare.state_dict(keep_vars=True))
    state = {name: value for name, value in state.items() if id(value) not in left_out}
    places = {id(parameter): place for place, parameter in enumerate(raw)}
    info, axes = file_info(bare, _TYPICAL_TARGET, budget.value_dtype), output_axes(bare)

    @cache
    def size_at(zeros: int) -> int:
        weights = project(gated, raw, shifts, zeros)
        replaced = {name: weights[places[id(value)]] if id(value) in places else value for name, value in state.items()}
        return len(to_bytes(replaced, info, axes)[0]) + _SLACK

    reached, per_weight = zeros_in(gated), VALUE_DTYPES[budget.value_dtype].itemsize
    if not trains_on and size_at(reached) <= budget.max_bytes:
        return reached

    def size_when_trained(zeros: int) -> int:
        if zeros >= reached:
            return size_at(zeros)
        return max(size_at(zeros), size_at(reached) + per_weight * (reached - zeros))

    return search(size_when_trained, shifts.numel(), budget.max_bytes, count_for(guess, shifts.numel()), per_weight)


def search(size_at: Callable[[int], int], weights: int, max_bytes: int, guess: int, bytes_per_zero: float) -> int:
    """The fewest zeros, nearly, for which `size_at` is at most `max_bytes`; `size_at` falls as zeros rise.

    It goes along secants, and halves the interval that is left where they lead out of it.

    Raises:
        OptionError: `size_at(weights - 1)` is too large still.
    """
    least, most = count_for(_LEAST, weights), weights - 1
    low, high = least - 1, most + 1  # too few zeros, and enough of them
    zeros = min(max(guess, least), most)
    previous: tuple[int, int] | None = None
    for _ in range(_MOST_TRIALS):
        size = size_at(zeros)
        if size > max_bytes:
            low = zeros
        else:
            high = zeros
        if high - low <= 1 or _CLOSE * max_bytes <= size <= max_bytes:
            break
        if previous is not None and previous[1] != size:
            bytes_per_zero = (previous[1] - size) / (zeros - previous[0])
        previous = zeros, size
        step = round((size - _AIM * max_bytes) / bytes_per_zero) if bytes_per_zero > 0 else 0
        zeros = zeros + step if low < zeros + step < high and step else (low + high) // 2
    if high > most:
        raise OptionError(
            f"max_bytes is {max_bytes:,}, and with a single weight left in the layers that become sparse the file "
            f"still takes {size:,} bytes: allow more, or let more layers become sparse (include, layer_types)"
        )
    return high
