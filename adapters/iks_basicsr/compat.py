"""What lets BasicSR 1.4.2 run where its own code does not: on a new torchvision, and on a machine without a GPU.

None of it changes anything where BasicSR runs by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def require_basicsr() -> None:
    """Raise an `ImportError` that says what to do where BasicSR is not installed."""
    if importlib.util.find_spec("basicsr") is None:
        raise ImportError(
            "iks_basicsr needs BasicSR, which is not installed here: pip install 'setuptools<80' wheel cython torch "
            "torchvision numpy && pip install --no-build-isolation basicsr==1.4.2"
        )


def restore_functional_tensor() -> None:
    """Give `torchvision.transforms.functional_tensor`, which BasicSR imports, back to torchvision 0.17 and later."""
    name = "torchvision.transforms.functional_tensor"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sys.modules[name] = importlib.import_module("torchvision.transforms._functional_tensor")


@contextmanager
def loading_without_cuda() -> Iterator[None]:
    """While it lasts and there is no GPU, a training state that is to be loaded onto the current one goes to the CPU.

    BasicSR's training pipeline asks for `torch.cuda.current_device()` and maps storages to it when it resumes.
    """
    if torch.cuda.is_available():
        yield
        return
    current_device, load = torch.cuda.current_device, torch.load

    def load_onto_cpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(f, "cpu" if callable(map_location) else map_location, *args, **kwargs)

    torch.cuda.current_device = lambda: 0
    torch.load = load_onto_cpu
    try:
        yield
    finally:
        torch.cuda.current_device = current_device
        torch.load = load


def install() -> None:
    """Let BasicSR's models train in several processes, and video models validate, on CPUs as well."""
    from basicsr.models.base_model import BaseModel
    from basicsr.utils import dist_util

    BaseModel.model_to_device = _model_to_device(BaseModel.model_to_device)
    BaseModel.validation = _validation(BaseModel.validation)
    dist_util._init_dist_pytorch = _init_dist_pytorch(dist_util._init_dist_pytorch)


def _model_to_device(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def model_to_device(self: Any, net: nn.Module) -> nn.Module:
        if not self.opt["dist"] or self.device.type != "cpu":
            return original(self, net)
        find_unused = self.opt.get("find_unused_parameters", False)
        return nn.parallel.DistributedDataParallel(net.to(self.device), find_unused_parameters=find_unused)

    return model_to_device


def _init_dist_pytorch(original: Callable[..., None]) -> Callable[..., None]:
    def init_dist_pytorch(backend: str, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            original(backend, **kwargs)
        else:
            torch.distributed.init_process_group("gloo", **kwargs)

    return init_dist_pytorch


def _validation(original: Callable[..., Any]) -> Callable[..., Any]:
    """Video models count on a GPU in their validation: for their table of metrics, and for a copy of the frames."""
    from basicsr.models.video_base_model import VideoBaseModel

    def validation(self: Any, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, VideoBaseModel) or self.device.type != "cpu":
            return original(self, dataloader, *args, **kwargs)
        metrics = self.opt["val"].get("metrics")
        if metrics and not hasattr(self, "metric_results"):  # a line per frame, a column per metric
            frames = Counter(dataloader.dataset.data_info["folder"])
            self.metric_results = {folder: torch.zeros(count, len(metrics)) for folder, count in frames.items()}
        with _frames_copied(self):
            return original(self, dataloader, *args, **kwargs)

    return validation


@contextmanager
def _frames_copied(model: Any) -> Iterator[None]:
    """BasicSR reshapes the frames in place after it has fed them, which reaches the model's where nothing is moved."""
    feed_data = model.feed_data

    def feed_copies(data: dict[str, Any]) -> Any:
        return feed_data({key: value.clone() if torch.is_tensor(value) else value for key, value in data.items()})

    model.feed_data = feed_copies
    try:
        yield
    finally:
        del model.feed_data
