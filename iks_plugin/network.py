"""A super-resolution network that is asked for images: where it is, what it takes, what it answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import IksError, OptionError
from .receptive import NoAnswerError, Reach, Sizes, find_reach, find_sizes
from .runtime import PackedWeight


class Network:
    """`model`, for inference. What is found out about it is kept: its structure must not change meanwhile.

    Args:
        model: maps images (N, C, H, W) to (N, C', s * H, s * W), with a whole number s.
        scale: the s that is expected, or None.
    """

    def __init__(self, model: nn.Module, scale: int | None = None) -> None:
        self.model, self.scale = model, scale
        self._sizes: dict[int, Sizes] = {}
        self._reaches: dict[tuple[int, int], Reach] = {}

    def __call__(self, image: Tensor) -> Tensor:
        """The answer to `image`, (N, C, H, W): floating and given as it is, or uint8 and given as values in [0, 1].

        Raises:
            NoAnswerError: the model fails, or its answer is no such image.
            OptionError: the scale is another one than expected.
            IksError: there is not enough memory, or the model has no weights yet.
        """
        device, dtype = _place(self.model, image)
        values = image.to(device).to(dtype)
        if image.dtype == torch.uint8:
            values /= 255
        try:
            answer = self.model(values)
        except IksError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, MemoryError) or "out of memory" in reason or "allocate memory" in reason:
                raise IksError(
                    f"not enough memory for an image of {_size(image)} ({reason}): take tiles, or smaller ones"
                ) from error
            raise NoAnswerError(f"the network fails on an image of shape {tuple(image.shape)}: {reason}") from error
        self._check(answer, image)
        return answer  # type: ignore[no-any-return]

    def sizes(self, channels: int) -> Sizes:
        """What images of so many channels it takes; see `find_sizes`."""
        if channels not in self._sizes:
            self._sizes[channels] = find_sizes(self, channels)
        return self._sizes[channels]

    def reach(self, channels: int, dim: int) -> Reach:
        """How far it looks along `dim`; see `find_reach`."""
        if (channels, dim) not in self._reaches:
            self._reaches[channels, dim] = find_reach(self, channels, self.sizes(channels), dim)
        return self._reaches[channels, dim]

    def channels(self) -> int:
        """How many channels its images have: 3 if it takes that, else 1.

        Raises:
            NoAnswerError: it takes neither.
        """
        try:
            self.sizes(3)
        except NoAnswerError as error:
            try:
                self.sizes(1)
            except NoAnswerError:
                raise error from None
            return 1
        return 3

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Eval mode without gradients. What was in training mode is again afterwards, module by module."""
        training = {module: module.training for module in self.model.modules()}
        try:
            if any(training.values()):
                self.model.eval()
            with torch.inference_mode():
                yield
        finally:
            if any(training.values()):
                # Some networks merge layers in eval mode, and part them again in this call.
                self.model.train(training[self.model])
                for module, was in training.items():
                    module.training = was

    def _check(self, answer: Any, image: Tensor) -> None:
        if not isinstance(answer, Tensor) or answer.ndim != 4 or len(answer) != len(image):
            got = f"a tensor of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise NoAnswerError(
                f"the network must make images (N, C, H, W) of images, got {got} for one of shape {tuple(image.shape)}"
            )
        scale, rest = divmod(answer.shape[2], image.shape[2])
        if scale < 1 or rest or answer.shape[3] != scale * image.shape[3]:
            raise NoAnswerError(
                "the network must make images a whole number of times as high and as wide, got "
                f"{_size(answer)} for {_size(image)}"
            )
        if self.scale not in (None, scale):
            raise OptionError(
                f"scale is {self.scale}, but the network upscales by {scale}: leave scale out, or take another network"
            )


def _size(image: Tensor) -> str:
    return f"{image.shape[3]} x {image.shape[2]} pixels"


def _place(model: nn.Module, image: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where the model is and what it computes in; packed layers hold narrower values than they compute in."""
    found: Tensor | None = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), None)
    if found is None:
        packed = next((module for module in model.modules() if isinstance(module, PackedWeight)), None)
        if packed is not None:
            return packed.values.device, packed.dtype
        found = next((buffer for buffer in model.buffers() if buffer.is_floating_point()), image)
    if found.is_meta:
        raise IksError('the network is on the device "meta", without weights: iks_plugin.load(path, model) gives them')
    return found.device, found.dtype if found.is_floating_point() else torch.float32
