"""The methods of the table by name. Each module says which paper and formula it follows; all code here is our own."""

from __future__ import annotations

import ast
from dataclasses import fields
from typing import Any

from iks_plugin import IksError

from .base import Dense, Method, Schedule
from .gmp import GMP
from .iks import IKS, IKSPaper
from .issp import ISSP
from .oneshot import OneShot
from .rigl import RigL
from .str_ import STR
from .without import IKSWithout

__all__ = ["METHODS", "Method", "Schedule", "make_method", "method_class"]

METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "oneshot": OneShot,
    "gmp": GMP,
    "str": STR,
    "iss-p": ISSP,
    "rigl": RigL,
    "iks-paper": IKSPaper,
    "iks": IKS,
    "iks-without": IKSWithout,
}


def method_class(name: str) -> type[Method]:
    """The class of a method; its options after a colon do not matter."""
    base = name.partition(":")[0]
    if base not in METHODS:
        raise IksError(f"--methods: expected any of {', '.join(METHODS)}, got {base!r}")
    return METHODS[base]


def make_method(name: str) -> Method:
    """A new method by its name, with options after a colon: "gmp", "gmp:interval=5", "iks:interval=5;law=exact"."""
    cls = method_class(name)
    _, colon, text = name.partition(":")
    given: dict[str, Any] = {}
    for item in text.split(";") if colon else ():
        option, equals, value = item.partition("=")
        if not equals or not option.strip():
            raise IksError(f"--methods {name!r}: expected options as name=value;name=value, got {item!r}")
        given[option.strip()] = _value(value.strip())
    known = {entry.name for entry in fields(cls)}
    if "options" in known:
        own = known - {"options"}
        rest = {option: value for option, value in given.items() if option not in own}
        return cls(**{option: given[option] for option in own & given.keys()}, options=rest)  # type: ignore[call-arg]
    unknown = sorted(given.keys() - known)
    if unknown:
        have = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise IksError(f"--methods {name!r}: no option {unknown[0]!r}; {have}")
    return cls(**given)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
