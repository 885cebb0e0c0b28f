"""What says that MMEngine is missing, and lets it train in several processes on a machine without a GPU, over gloo."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def require_mmengine() -> None:
    """Raise an `ImportError` that says what to do where MMEngine is not installed."""
    if importlib.util.find_spec("mmengine") is None:
        raise ImportError(
            "iks_mmagic needs MMagic and MMEngine, which are not installed here: pip install mmagic==1.2.0 "
            "mmengine==0.10.7, beside a torch and an mmcv that MMagic takes"
        )


def install() -> None:
    """Let MMEngine set up processes without asking for a GPU that is not there."""
    from mmengine.dist import utils

    utils._init_dist_pytorch = _init_dist_pytorch(utils._init_dist_pytorch)


def _init_dist_pytorch(original: Callable[..., None]) -> Callable[..., None]:
    def init_dist_pytorch(backend: str, init_backend: str = "torch", **kwargs: Any) -> None:
        if torch.cuda.is_available() or backend != "gloo":
            original(backend, init_backend=init_backend, **kwargs)
        else:
            torch.distributed.init_process_group("gloo", **kwargs)

    return init_dist_pytorch


def wrap_model(
    original: Callable[[dict[str, Any] | None, nn.Module], nn.Module],
    model_wrapper_cfg: dict[str, Any] | None,
    model: nn.Module,
    *,
    runner: Any,
) -> nn.Module:
    """`Runner.wrap_model`, but without the numbers of GPUs that MMEngine gives to models on a CPU as well."""
    from mmengine.device import get_device

    if runner.distributed and get_device() == "cpu":
        model_wrapper_cfg = {
            "type": "MMDistributedDataParallel",
            "find_unused_parameters": runner.cfg.get("find_unused_parameters", False),
            "broadcast_buffers": False,
            **(model_wrapper_cfg or {}),
            "device_ids": None,
        }
    return original(model_wrapper_cfg, model)
