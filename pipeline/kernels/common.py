"""What the losses share: the dtype of sums, and gradients that are made in the forward pass.

Shapes: P losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

USED_UP = "the fused loss makes its gradient once, in forward: call it again to run backward again"

Rescale = Callable[[Sequence[Tensor | None], Tensor, float], None]


class PairLosses(NamedTuple):
    """Both fp32 [P] (fp64 for fp64 students).

    share_P  weight x loss: what to sum up and run backward from.
    loss_P   the losses, detached, to log.
    """

    share_P: Tensor
    loss_P: Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def needs_gradient(*students: Tensor) -> bool:
    return torch.is_grad_enabled() and any(student.requires_grad for student in students)


def empty_gradient(student: Tensor) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def rescale_each(gradients: Sequence[Tensor | None], grads: Tensor, upstream: float) -> None:
    """Multiply each gradient, made for `upstream`, in place by its element of grads / upstream."""
    on_cpu = grads.device.type == "cpu"
    factors = grads / upstream
    for gradient, factor in zip(gradients, factors.tolist() if on_cpu else factors.unbind(), strict=True):
        if gradient is not None and not (on_cpu and factor == 1):  # on a GPU the test would wait for the device
            gradient.mul_(factor)


def with_gradients(
    share: Tensor,
    students: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    upstream: float,
    rescale: Rescale = rescale_each,
) -> Tensor:
    """The share (a scalar or [P]), with a backward that hands out gradients made beforehand. Backward runs once.

    Args:
        students: as many for each loss, in the order of the losses.
        gradients: of each student, contiguous, for the gradient `upstream` of the share; rescaled in place.
        rescale: called with the gradients, the gradient that came for each, and `upstream`; never waits for a GPU.
    """
    if all(gradient is None for gradient in gradients):
        return share
    return _MadeInForward.apply(share, gradients, upstream, rescale, *students)


class _MadeInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, share: Tensor, gradients: Sequence[Tensor | None], upstream: float, rescale: Rescale, *_: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.upstream, ctx.rescale, ctx.used_up = upstream, rescale, False
        return share.view_as(share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used_up:
            raise RuntimeError(USED_UP)
        ctx.used_up = True
        # Under saved-tensor hooks these are other tensors than forward wrote, so their addresses are taken now.
        gradients = ctx.saved_tensors
        each = len(gradients) // grad.numel()
        ctx.rescale(gradients, grad.reshape(-1, 1).expand(-1, each).flatten(), ctx.upstream)  # one each: no copy
        return (None, None, None, None, *gradients)
