"""Finds layers whose weight their block computes and writes by itself, as re-parametrised blocks do in eval mode.

Such a layer (SPAN's `eval_conv`) takes no part in training, and what is written into a gated weight would be lost. It
can be told only from the source: a method other than those that initialise assigns `self.<layer>.weight`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from torch import nn

_INITIALISING = ("init", "reset", "load")
"""Parts of the names of methods that may write weights as they like: they run before training, if at all."""


@cache
def written_layers(block: type[nn.Module]) -> dict[str, str]:
    """The layers, by their path below the block, whose weight a method of `block` writes; with the method's name.

    Empty where the source cannot be read, and for torch's own modules.
    """
    found: dict[str, str] = {}
    for cls in block.__mro__:
        if cls.__module__.split(".")[0] in ("torch", "builtins", "iks_plugin"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            continue
        for method in ast.walk(tree):
            if not isinstance(method, ast.FunctionDef) or any(word in method.name for word in _INITIALISING):
                continue
            paths = map(_layer_path, _written_expressions(method))
            found.update({path: method.name for path in paths if path is not None})
    return found


def _written_expressions(method: ast.FunctionDef) -> list[ast.expr]:
    """What a method assigns to, or calls `copy_` on."""
    written: list[ast.expr] = []
    for node in ast.walk(method):
        if isinstance(node, ast.Assign):
            written += node.targets
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "copy_":
            written.append(node.func.value)
    return written


def _layer_path(written: ast.expr) -> str | None:
    """The path "a.b" of `self.a.b.weight` or `self.a.b.weight.data`; None for anything else."""
    names: list[str] = []
    while isinstance(written, ast.Attribute):
        names.append(written.attr)
        written = written.value
    if names[:1] == ["data"]:
        names = names[1:]
    if names[:1] != ["weight"] or not isinstance(written, ast.Name) or written.id != "self":
        return None
    return ".".join(reversed(names[1:])) or None
