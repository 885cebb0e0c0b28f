"""Where the adapter enters BasicSR: five functions of it that every training and every model class passes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from iks_plugin import IksError

from . import compat
from .block import read_block
from .networks import SparseType
from .state import check_state
from .training import SparseTraining


def install() -> None:
    """Enter BasicSR, once in a process."""
    import basicsr.models
    import basicsr.test
    import basicsr.train
    import basicsr.utils.options
    from basicsr.models.base_model import BaseModel
    from basicsr.utils.registry import ARCH_REGISTRY

    compat.install()
    parse_options = _parse_options(basicsr.utils.options.parse_options)
    for module in (basicsr.utils.options, basicsr.train, basicsr.test):
        module.parse_options = parse_options
    build_model = _build_model(basicsr.models.build_model)
    for module in (basicsr.models, basicsr.train, basicsr.test):
        module.build_model = build_model
    basicsr.train.load_resume_state = _load_resume_state(basicsr.train.load_resume_state)
    BaseModel.__init__ = _base_model_init(BaseModel.__init__)
    ARCH_REGISTRY.get = _architecture(ARCH_REGISTRY.get)


def _parse_options(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse wrong options before BasicSR renames or makes a folder."""

    def parse_options(*args: Any, **kwargs: Any) -> Any:
        opt, arguments = original(*args, **kwargs)
        read_block(opt, arguments.opt)
        return opt, arguments

    return parse_options


def _load_resume_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a state that does not belong to the options before BasicSR writes into the experiment's folder."""

    def load_resume_state(opt: dict[str, Any]) -> Any:
        with compat.loading_without_cuda():
            state = original(opt)
        if state is not None:
            check_resume(opt, state)
        return state

    return load_resume_state


def check_resume(opt: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise an `IksError` unless `state`, the content of a `.state` file, can be resumed with these options."""
    block = read_block(opt)
    path = opt["path"].get("resume_state") or "the training state"
    if block is not None:
        check_state(state, block, path)
    elif "iks" in state:
        raise IksError(f"{path} is of a sparse training, and the option file has no block iks: add that training's")


def _base_model_init(original: Callable[..., None]) -> Callable[..., None]:
    """Every model class calls this first, before it builds its networks."""

    def __init__(self: Any, opt: dict[str, Any]) -> None:  # noqa: N807
        original(self, opt)
        block = read_block(opt)
        if block is not None and self.is_train:
            self.iks_training = SparseTraining(self, block)

    return __init__


def _build_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse models of which nothing would become sparse."""

    def build_model(opt: dict[str, Any]) -> Any:
        model = original(opt)
        if "iks" in opt and opt.get("is_train") and not hasattr(model, "iks_training"):
            raise IksError(
                f"block iks: {type(model).__name__} is not derived from BasicSR's BaseModel, so that nothing would "
                "become sparse: call iks_plugin.sparsify in the model's own code, and leave the block out"
            )
        return model

    return build_model


def _architecture(original: Callable[..., Any]) -> Callable[..., Any]:
    """Every network comes out of the registry of architectures, for training and for its EMA copy alike."""

    def get(name: str, *args: Any, **kwargs: Any) -> Any:
        architecture = original(name, *args, **kwargs)
        return name.made_sparse(architecture) if isinstance(name, SparseType) else architecture

    return get
