"""The soft threshold that makes weights exactly zero: a differentiable function of two tensors, and nothing else.

    w' = sign(w) * max(|w| - sigmoid(t), 0)

(Individual Kernel Sparsity, ACM MM 2022, doi 10.1145/3503161.3547768). Its gradients, with alive = |w| > sigmoid(t):

    dw'/dw = alive
    dw'/dt = -alive * sign(w) * sigmoid(t) * (1 - sigmoid(t))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def soft_threshold(weight: Tensor, threshold: Tensor) -> Tensor:
    """Shrink `weight` towards zero by sigmoid(`threshold`), and to exactly zero where it is smaller than that.

    Args:
        weight: floating point, any shape.
        threshold: floating point, broadcastable to the shape of `weight`; one threshold per weight where the shapes
            are equal, a shared one where a dimension is 1.

    Returns:
        A tensor of the shape, dtype and memory format of `weight`. The arithmetic is float32 at least, also under
        autocast and for half-precision weights. Differentiable in both arguments, twice as well.
    """
    gated: Tensor = _SoftThreshold.apply(weight, threshold)
    return gated


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _SoftThreshold(torch.autograd.Function):
    """Saves its threshold and output, which the layer keeps anyway: the gate costs no memory until backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor) -> Tensor:
        precise = _at_least_float32(weight)
        cut = torch.sigmoid(_at_least_float32(threshold)).to(precise.dtype)
        # w - clamp(w, -s, s) is the formula above, to the bit, in fewer operations.
        return (precise - torch.clamp(precise, -cut, cut)).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        threshold, output = ctx.saved_tensors
        sign = torch.sign(output)  # 0 where the weight is gated to zero
        signed_grad = grad * sign
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            cut = torch.sigmoid(_at_least_float32(threshold))
            # -signed_grad * cut * (1 - cut), in one launch
            per_weight = torch.ops.aten.sigmoid_backward(signed_grad.to(cut.dtype), cut.expand_as(output)).neg()
            grad_threshold = per_weight.sum_to_size(threshold.shape).to(threshold.dtype)
        return (signed_grad * sign if ctx.needs_input_grad[0] else None), grad_threshold
