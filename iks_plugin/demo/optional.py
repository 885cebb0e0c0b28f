"""The packages that only the demo needs, imported where they are used."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from ..errors import IksError


def require(module: str, package: str) -> Any:
    """Import an optional `module`, or raise an IksError that says how to install `package`."""
    try:
        return import_module(module)
    except ImportError as error:
        remedy = "run pip install pillow scikit-image tqdm matplotlib"
        raise IksError(f"the demo needs {package} ({error}): {remedy}") from error


def progress_bar(items: Iterable[Any], title: str, unit: str) -> Any:
    """A tqdm progress bar over `items`, silent where stderr is not a terminal."""
    return require("tqdm", "tqdm").tqdm(items, desc=title, unit=unit, disable=None, dynamic_ncols=True)
