"""Sizes of files: what a user may write for one, and the budget that a model is trained for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .errors import OptionError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """The most bytes that the compact file may have, with its non-zeros in the type called `value_dtype`."""

    max_bytes: int
    value_dtype: str = "float32"


def check_size(value: Any, name: str = "max_bytes") -> int:
    """`value`, a whole number of bytes or a text such as "500KB" or "1.5 MiB", in bytes; or an `OptionError`."""
    size: Any = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
        if match and match[2] in _UNITS:
            size = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        raise OptionError(
            f"{name} must be a number of bytes, or a text such as '500KB' (1000 bytes each) or '500KiB' (1024), "
            f"got {value!r}"
        )
    return int(size)
