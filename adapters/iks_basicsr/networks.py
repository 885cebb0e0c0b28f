"""The sparse networks of one BasicSR model: how they come to be, and where they are at any time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

import iks_plugin
from iks_plugin import IksError, SparsityController
from iks_plugin.block import Block, Patterns

from .block import keywords


class SparseType(str):
    """The name of an architecture, equal to the plain string, that also knows which network of which model it is for.

    It replaces `type` in the options of a network, so that BasicSR's registry can tell the networks that become sparse
    from others of the same architecture.
    """

    made_sparse: Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]

    def __deepcopy__(self, memo: Any) -> SparseType:
        return self  # build_network copies the options

    def __reduce__(self) -> Any:
        return str, (str(self),)  # a file of options holds plain text


class Networks:
    """Rewrites the networks that BasicSR builds for one model, and finds them again among the model's attributes.

    What BasicSR makes of them after that (copies, wrappers, a network built anew) counts as what it is: every attribute
    of the model that has gates is one of its sparse networks.

    Args:
        model: a BasicSR model that has not built its networks yet.
        block: its `iks:` block.
        tell: called with the report and controller of each network that is the first of its kind.
    """

    def __init__(
        self, model: Any, block: Block, tell: Callable[[str, iks_plugin.Report, SparsityController], None]
    ) -> None:
        self._model = model
        self._block = block
        self._tell = tell
        self._patterns = Patterns(block.networks)
        self._built: dict[str, list[tuple[weakref.ref[nn.Module], SparsityController]]] = {}
        for key in block.networks:
            kind = SparseType(model.opt[key]["type"])
            kind.made_sparse = partial(self._made_sparse, key)
            own = type(model.opt[key])(model.opt[key])  # another network may share these options (a YAML anchor)
            own["type"] = kind
            model.opt[key] = own
            self._built[key] = []

    def _made_sparse(self, key: str, architecture: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """`architecture`, but for networks that are rewritten as soon as they are built."""
        return partial(self._build, key, architecture)

    def _build(self, key: str, architecture: Callable[..., nn.Module], **options: Any) -> nn.Module:
        net = architecture(**options)
        try:
            given = keywords(self._block, key, self._model.opt)
            controller = iks_plugin.sparsify(net, **self._patterns.keywords_for(key, net, given))
        except IksError as error:
            raise type(error)(f"block iks, {key} ({type(net).__name__}): {error}") from None
        if not self._built[key]:
            self._tell(key, iks_plugin.report(net), controller)
        self._built[key].append((weakref.ref(net), controller))
        return net

    def attributes(self) -> dict[str, nn.Module]:
        """The model's attributes that have gates now, by name: network, EMA copy, and whatever a class keeps."""
        modules = {name: value for name, value in vars(self._model).items() if isinstance(value, nn.Module)}
        return {name: module for name, module in modules.items() if iks_plugin.is_sparsified(module)}

    def trained(self) -> Iterator[tuple[str, nn.Module, SparsityController]]:
        """Of each key the network that an optimizer trains; at first, the one that was built first."""
        attributes = [value for value in vars(self._model).values() if isinstance(value, nn.Module)]
        alive = {id(module) for attribute in attributes for module in attribute.modules()}
        for key in self._built:
            candidates = [(net, controller) for net, controller in self._alive(key) if id(net) in alive]
            if candidates:
                yield key, *max(candidates, key=lambda candidate: candidate[1].steps)

    def within(self, module: nn.Module) -> tuple[str, SparsityController] | None:
        """The key and the controller of the network that `module` is or holds; a copy of one has none."""
        ids = {id(inner) for inner in module.modules()}
        for key in self._built:
            for net, controller in self._alive(key):
                if id(net) in ids:
                    return key, controller
        return None

    def thresholds(self) -> dict[int, nn.Parameter]:
        """Every threshold of the networks that were built, by identity."""
        controllers = [controller for key in self._built for _, controller in self._alive(key)]
        return {id(p): p for controller in controllers for p in controller.param_groups()[1]["params"]}

    def missing(self) -> list[str]:
        """Keys of the block without a network among the model's attributes."""
        present = {key for key, _, _ in self.trained()}
        return [key for key in self._built if key not in present]

    def _alive(self, key: str) -> Iterator[tuple[nn.Module, SparsityController]]:
        for reference, controller in self._built[key]:
            net = reference()
            if net is not None:
                yield net, controller
