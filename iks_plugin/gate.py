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
    """Saves only its inputs, which live anyway, so the gate costs no memory between forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor) -> Tensor:
        precise = _at_least_float32(weight)
        cut = torch.sigmoid(_at_least_float32(threshold)).to(precise.dtype)
        # w - clamp(w, -s, s) is the formula above, to the bit, in fewer operations.
        return (precise - torch.clamp(precise, -cut, cut)).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, threshold = ctx.saved_tensors
        precise = _at_least_float32(weight)
        cut = torch.sigmoid(_at_least_float32(threshold))
        alive_grad = grad * (precise.abs() > cut)
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            grad_cut = alive_grad.to(precise.dtype) * -torch.sign(precise)
            per_weight = torch.ops.aten.sigmoid_backward(grad_cut, cut)  # grad_cut * cut * (1 - cut) in one launch
            grad_threshold = per_weight.sum_to_size(threshold.shape).to(threshold.dtype)
        return (alive_grad if ctx.needs_input_grad[0] else None), grad_threshold
