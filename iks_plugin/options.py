"""Every option of `sparsify`, checked in one place, so that no part of a model changes for options that are wrong."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from torch import nn

from .errors import OptionError
from .laws import LAWS, PAPER_EPOCHS, ExactLaw, PaperLaw, count_for, make_law
from .layers import CONVOLUTIONS, GRANULARITIES, SUPPORTED_TYPES
from .quantize import check_value_dtype
from .sizes import Budget, check_size


@dataclass(frozen=True)
class Options:
    """The checked options of one rewrite. `Options.check` makes them from what a user gave."""

    target_sparsity: float | None
    budget: Budget | None
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    layer_types: tuple[type[nn.Module], ...]
    granularity: str
    law: str
    total_steps: int | None
    ramp_start: int
    ramp_steps: int | None
    epoch_steps: int | None
    interval: int | None
    threshold_init: float

    @staticmethod
    def check(
        *,
        target_sparsity: Any = None,
        max_bytes: Any = None,
        value_dtype: Any = None,
        include: Any = None,
        exclude: Any = (),
        layer_types: Any = None,
        granularity: Any = "weight",
        law: Any = None,
        total_steps: Any = None,
        ramp_start: Any = 0,
        ramp_steps: Any = None,
        epoch_steps: Any = None,
        interval: Any = None,
        threshold_init: Any = -12.0,
        **unknown: Any,
    ) -> Options:
        """Raise an `OptionError` that names the offending option, or return all of them in their final types."""
        for name in unknown:
            raise OptionError(f"sparsify has no option {name!r}{did_you_mean(name, option_names())}")
        _check_goal(target_sparsity, max_bytes)
        _check_choice("granularity", granularity, GRANULARITIES)
        law = default_law(granularity) if law is None else law
        _check_choice("law", law, tuple(LAWS))
        if law == "paper":
            for name, value in (("ramp_start", ramp_start or None), ("ramp_steps", ramp_steps)):
                if value is not None:
                    raise OptionError(
                        f"law='paper' has no ramp, and {name} belongs to law='exact' and 'obs': leave it out"
                    )
            if epoch_steps is None and interval is None:
                raise OptionError(
                    "law='paper' acts every 10 epochs and must know their length: "
                    "give epoch_steps, the optimizer steps of one epoch (or interval, the steps between two actions)"
                )
        elif epoch_steps is not None:
            raise OptionError(f"epoch_steps belongs to law='paper'; the law {law!r} counts steps alone: leave it out")
        if law == "obs" and granularity != "weight":
            raise OptionError(
                f"law='obs' decides for each weight by itself, and granularity={granularity!r} shares thresholds: "
                "leave one of them out"
            )
        counts = {
            name: None if value is None else _check_count(name, value)
            for name, value in (
                ("total_steps", total_steps),
                ("ramp_steps", ramp_steps),
                ("epoch_steps", epoch_steps),
                ("interval", interval),
            )
        }
        pause = counts["interval"] or PAPER_EPOCHS * (counts["epoch_steps"] or 1)
        if law == "paper" and total_steps is not None and total_steps < 2 * pause:
            raise OptionError(
                f"law='paper' acts every {pause} steps, and not in the last {pause}: it would never act within "
                f"total_steps={total_steps}. Train for {2 * pause} steps at least, or give a shorter interval"
            )
        start = _check_count("ramp_start", ramp_start, least=0)
        if total_steps is not None and start >= total_steps:
            raise OptionError(
                f"ramp_start must be less than total_steps ({total_steps}), got {start}: the sparsity would never rise"
            )
        if total_steps is not None and ramp_steps is not None and start + ramp_steps > total_steps:
            raise OptionError(
                f"{'ramp_start + ' if start else ''}ramp_steps must be at most total_steps ({total_steps}), got "
                f"{start + ramp_steps}: the target would not be reached within the training"
            )
        return Options(
            target_sparsity=None if target_sparsity is None else check_sparsity(target_sparsity),
            budget=_check_budget(max_bytes, value_dtype),
            include=None if include is None else _check_patterns("include", include),
            exclude=_check_patterns("exclude", exclude),
            layer_types=_check_layer_types(layer_types),
            granularity=granularity,
            law=law,
            threshold_init=_check_threshold_init(threshold_init),
            ramp_start=start,
            **counts,
        )

    def make_law(self) -> ExactLaw | PaperLaw:
        """The law with these lengths, and its defaults for those that are not given."""
        return make_law(
            self.law,
            total_steps=self.total_steps,
            ramp_start=self.ramp_start,
            ramp_steps=self.ramp_steps,
            epoch_steps=self.epoch_steps,
            interval=self.interval,
        )


def option_names() -> set[str]:
    """The keywords of `sparsify`."""
    return {field.name for field in fields(Options)} - {"budget"} | {"max_bytes", "value_dtype"}


def default_law(granularity: str) -> str:
    """The law where none is given: "obs" decides for single weights, "exact" for whatever shares a threshold."""
    return "obs" if granularity == "weight" else "exact"


def check_options(**options: Any) -> None:
    """Raise the `OptionError` that `sparsify` would raise for these keyword arguments, whatever the model.

    For code that reads options from a file and wants to refuse wrong ones before it starts anything.
    """
    Options.check(**options)


def check_sparsity(value: Any, name: str = "target_sparsity") -> float:
    """`value` as a float in [0, 1), or an `OptionError`."""
    expected = f"{name} must be a number in [0, 1)"
    if isinstance(value, str):
        raise OptionError(f"{expected}, got the text {value!r}: {_number_meant(value)}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OptionError(f"{expected}, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if math.isnan(number):
        raise OptionError(f"{expected}, got nan: give the fraction of weights that are to become zero, such as 0.9")
    if 2 <= number < 100:
        raise OptionError(f"{expected}, got {value}: did you mean {number / 100:g}?")
    if not 0 <= number < 1:
        why = " (1.0 would leave no weight at all)" if number == 1 else ""
        raise OptionError(
            f"{expected}, got {value}{why}: give the fraction of weights that are to become zero, such as 0.9"
        )
    return number


def check_leaves_some(target_sparsity: float, weights: int) -> None:
    """Raise an OptionError where so many zeros, rounded, are all of the `weights`."""
    if count_for(target_sparsity, weights) == weights:
        raise OptionError(
            f"target_sparsity {target_sparsity} of {weights} weights, rounded, is all of them: none would be left"
        )


def _number_meant(text: str) -> str:
    """What to write in place of `text`, which YAML and shells make of numbers that are not quite theirs."""
    try:
        number = float(text.strip().rstrip("%").replace(",", "."))
    except ValueError:
        return "give the fraction of weights that are to become zero, such as 0.9"
    return f"write {number / 100 if '%' in text or number >= 2 else number:g}, as a number"


def near_misses(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the `known` names that `name` may have been meant to be, best first."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return matches or [other for other in names if name and name.strip("*") and name.strip("*") in other][:3]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """How a message about an unknown `name` ends: with what it may have been meant to be, or with all that is known."""
    known = sorted(known)
    near = near_misses(name, known)
    if near:
        return f": did you mean {' or '.join(map(repr, near))}?"
    return f": expected one of {', '.join(map(repr, known))}"


def _check_goal(target_sparsity: Any, max_bytes: Any) -> None:
    if target_sparsity is None and max_bytes is None:
        raise OptionError(
            "sparsify needs a goal, got none: give target_sparsity, a fraction such as 0.9, or max_bytes, the size of "
            "the compact file, such as '500KB'"
        )
    if target_sparsity is not None and max_bytes is not None:
        raise OptionError(
            f"target_sparsity ({target_sparsity!r}) and max_bytes ({max_bytes!r}) exclude each other: give only one"
        )


def _check_budget(max_bytes: Any, value_dtype: Any) -> Budget | None:
    if max_bytes is not None:
        dtype = check_value_dtype("float32" if value_dtype is None else value_dtype)
        return Budget(check_size(max_bytes), str(dtype).removeprefix("torch."))
    if value_dtype is not None:
        raise OptionError(
            f"value_dtype ({value_dtype!r}) belongs to max_bytes, the size of a file: with target_sparsity leave it "
            "out here, and give it to iks_plugin.save"
        )
    return None


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        near = near_misses(value, choices) if isinstance(value, str) else []
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"{name} must be one of {listed}, got {value!r}{hint}")


def _check_count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise OptionError(
            f"{name} must be a number of optimizer steps, a whole number of at least {least}, got {value!r}"
        )
    return int(value)


def _check_patterns(name: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(f"{name} must be a shell pattern over module names or a list of them, got {value!r}")
    if name == "include" and not patterns:
        raise OptionError("include must hold at least one pattern, got none: leave it out to use the default scope")
    return patterns


def _check_layer_types(value: Any) -> tuple[type[nn.Module], ...]:
    if value is None:
        return CONVOLUTIONS
    by_name = {cls.__name__: cls for cls in SUPPORTED_TYPES}
    items = (value,) if isinstance(value, (str, type)) else value
    if not isinstance(items, (list, tuple, set, frozenset)) or not items:
        raise OptionError(f"layer_types must be a list of layer classes or their names, got {value!r}")
    types = []
    for item in items:
        cls = by_name.get(item) if isinstance(item, str) else item
        if not isinstance(cls, type) or not issubclass(cls, SUPPORTED_TYPES):
            given = item.__name__ if isinstance(item, type) else str(item)
            raise OptionError(f"layer_types cannot hold {given!r}{did_you_mean(given, by_name)}")
        types.append(cls)
    return tuple(types)


def _check_threshold_init(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not -60 <= float(value) < 0:
        raise OptionError(
            f"threshold_init must be a number in [-60, 0), got {value!r}: "
            "training starts with sigmoid(threshold_init) taken off every weight, 6e-6 at the default of -12"
        )
    return float(value)
