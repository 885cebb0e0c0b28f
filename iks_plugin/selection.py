"""Which layers of a model are rewritten, and why each other one is left alone. Reads the model, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import IksError, OptionError
from .layers import GATE_ATTRIBUTES, Gated, sparse_class, threshold_shape
from .options import Options, near_misses
from .reparam import written_layers

IMAGE_CHANNELS = 4
"""A convolution with this many channels or fewer on either side faces the image (RGB, RGBA, gray)."""


@dataclass(frozen=True)
class Selection:
    """The layers to rewrite by qualified name, and every other layer that holds a kernel with the reason."""

    chosen: dict[str, nn.Module]
    left_alone: dict[str, tuple[nn.Module, str]]


def select(model: nn.Module, options: Options) -> Selection:
    """Decide for every layer of `model` whether it is rewritten.

    Raises:
        IksError: the model is rewritten already, wrapped for distributed training, on the meta device, has layers
            without weights yet (lazy ones), or nothing in it can be rewritten.
        OptionError: a pattern of `include` or `exclude` matches no layer.
    """
    _check_model(model)
    names = _names_of(model)
    layers = {known_as[0]: (module, known_as) for module, known_as in names.items() if holds_kernel(module)}
    check_patterns(options, names_of_layers(model, options.layer_types), "the model's")

    written = written_by_blocks(names)
    chosen: dict[str, nn.Module] = {}
    left_alone: dict[str, tuple[nn.Module, str]] = {}
    for name, (module, known_as) in layers.items():
        reason = _out_of_scope(module, known_as, options) or _unfit(name, module) or written.get(module)
        if reason is None and options.include is None:
            reason = _faces_image(module)
        if reason is None:
            chosen[name] = module
        else:
            left_alone[name] = (module, reason)
    for name, reason in _tied_to_others(model, names, chosen, options).items():
        left_alone[name] = (chosen.pop(name), reason)
    if not chosen:
        raise IksError(_nothing_chosen(left_alone))
    order = {name: index for index, name in enumerate(layers)}
    return Selection(chosen, dict(sorted(left_alone.items(), key=lambda item: order[item[0]])))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise IksError(f"sparsify expects a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, Gated):
            raise IksError(
                f"the model is rewritten already ({name or 'the model itself'} is a {type(module).__name__}): "
                "set controller.target_sparsity for another target, or finalize(model) before a new sparsify"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise IksError(
                "the model is wrapped in DistributedDataParallel, which would never synchronise the new thresholds: "
                "call sparsify on the bare model first and wrap it afterwards"
            )


def _names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all the qualified names that lead to it."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def holds_kernel(module: nn.Module) -> bool:
    """Whether a user might expect `module` to be rewritten: it has a weight of two or more dimensions."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return False
    weight = module.__dict__.get("weight", module._parameters.get("weight"))
    if "weight" in getattr(module, "parametrizations", ()):
        # Not `module.weight`: computing it may have side effects, such as spectral norm's power iteration.
        return any(original.ndim >= 2 for original in module.parametrizations["weight"].parameters())  # type: ignore[index,union-attr]
    return isinstance(weight, Tensor) and (is_lazy(weight) or weight.ndim >= 2)


def names_of_layers(model: nn.Module, layer_types: tuple[type[nn.Module], ...]) -> list[list[str]]:
    """What patterns are matched with: of each layer of `layer_types` all the names that lead to it."""
    names = _names_of(model).items()
    return [known_as for module, known_as in names if holds_kernel(module) and isinstance(module, layer_types)]


def matching(patterns: Iterable[str], layers: list[list[str]]) -> tuple[str, ...]:
    """Those of `patterns` that match one of `layers`, given by all their names."""
    return tuple(pattern for pattern in patterns if any(_matches(pattern, known_as) for known_as in layers))


def _matches(pattern: str, known_as: Iterable[str]) -> bool:
    """Whether `pattern` matches one of a module's names, or a container around it ("body" covers "body.0.conv1")."""
    return any(
        fnmatchcase(".".join(parts[:length]), pattern)
        for parts in (name.split(".") for name in known_as)
        for length in range(1, len(parts) + 1)
    )


def check_patterns(options: Options, layers: list[list[str]], whose: str) -> None:
    """Raise an `OptionError` for a pattern of `include` or `exclude` that matches none of `layers`.

    Args:
        layers: all the names of each.
        whose: such as "the model's", for messages.
    """
    for option, patterns in (("include", options.include or ()), ("exclude", options.exclude)):
        found = matching(patterns, layers)
        for pattern in patterns:
            if pattern not in found:
                raise OptionError(
                    f"{option} pattern {pattern!r} matches none of {whose} {len(layers)} layers of the chosen "
                    f"layer_types; {near_layers(pattern, layers)}"
                )


def near_layers(pattern: str, layers: list[list[str]]) -> str:
    """How a message about a `pattern` that matches none of `layers` ends."""
    names = {known_as[0] for known_as in layers}
    containers = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    near = near_misses(pattern, names | containers)
    return f"near misses: {', '.join(map(repr, near))}" if near else f"the first are {sorted(names)[:5]}"


def _out_of_scope(module: nn.Module, known_as: list[str], options: Options) -> str | None:
    if not isinstance(module, options.layer_types):
        return f"unsupported type: {type(module).__name__} is not in layer_types"
    for pattern in options.exclude:
        if _matches(pattern, known_as):
            return f"excluded by {pattern!r}"
    if options.include is not None and not any(_matches(pattern, known_as) for pattern in options.include):
        return "not in include"
    return None


def _faces_image(module: nn.Module) -> str | None:
    channels_in, channels_out = getattr(module, "in_channels", None), getattr(module, "out_channels", None)
    if channels_in is not None and channels_in <= IMAGE_CHANNELS:
        return f"faces the image: {channels_in} input channels"
    if channels_out is not None and channels_out <= IMAGE_CHANNELS:
        return f"faces the image: {channels_out} output channels"
    return None


def _unfit(name: str, module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return "parametrised: its weight is computed from other parameters"
    if is_lazy(weight):
        raise IksError(
            f"layer {name!r} ({type(module).__name__}) has no weight yet: "
            "run the model once on an input before sparsify, so that lazy layers get their shapes"
        )
    if weight.is_meta:
        raise IksError(f"layer {name!r} is on the meta device: load its weights before sparsify")
    if not weight.is_floating_point():
        return f"unsupported type: its weight is {weight.dtype}"
    if hasattr(type(module), "weight"):
        return f"unsupported type: {type(module).__name__} defines weight by itself"
    for attribute in GATE_ATTRIBUTES:
        if hasattr(module, attribute):
            return f"unsupported type: it has an attribute {attribute!r} of its own"
    try:
        sparse_class(type(module))
    except Exception:  # whatever a class makes of being subclassed
        return f"unsupported type: {type(module).__name__} cannot be subclassed"
    if not weight.requires_grad:
        return "frozen: its weight does not require gradients"
    if not torch.isfinite(weight.detach()).all():
        raise IksError(f"layer {name!r} has weights that are not finite: initialise or load it before sparsify")
    if not torch.count_nonzero(weight.detach()):
        return "all zero: under a soft threshold a zero weight would never get a gradient"
    return None


def written_by_blocks(blocks: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """The layers whose weight a block around them writes by itself, with the reason to leave them alone."""
    reasons = {}
    for block in blocks:
        for path, method in written_layers(type(block)).items():  # type: ignore[arg-type]
            try:
                layer = block.get_submodule(path)
            except AttributeError:
                continue
            reasons[layer] = f"written by its block: {type(block).__name__}.{method} computes its weight"
    return reasons


def _tied_to_others(
    model: nn.Module, names: dict[nn.Module, list[str]], chosen: dict[str, nn.Module], options: Options
) -> dict[str, str]:
    """Chosen layers that must be left alone because a partner shares their weight and cannot share their threshold."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, key))
    gated = set(chosen.values())
    reasons = {}
    for name, module in chosen.items():
        weight = module._parameters["weight"]
        shape = _shape_of_threshold(module, options.granularity)
        for partner, key in owners[id(weight)]:
            alike = partner in gated and key == "weight" and _shape_of_threshold(partner, options.granularity) == shape
            if not alike:
                partner_name = ".".join(filter(None, (names[partner][0], key)))
                reasons[name] = f"tied: shares its weight with {partner_name}, which cannot share its threshold"
    return reasons


def _shape_of_threshold(module: nn.Module, granularity: str) -> tuple[int, ...]:
    weight = module._parameters["weight"]
    assert weight is not None
    return threshold_shape(type(module), weight, granularity, getattr(module, "groups", 1))


def _nothing_chosen(left_alone: dict[str, tuple[nn.Module, str]]) -> str:
    if not left_alone:
        return "the model has no layers to make sparse: it holds no convolution (and no linear layer)"
    reasons = "\n".join(
        f"  {name or 'the model itself'}: {reason}" for name, (_, reason) in list(left_alone.items())[:20]
    )
    more = f"\n  ... and {len(left_alone) - 20} more" if len(left_alone) > 20 else ""
    return (
        f"the model has no layer that can be made sparse. Left alone were:\n{reasons}{more}\n"
        "Change include, exclude or layer_types (such as layer_types=['Conv2d', 'Linear'])"
    )
