"""A second opinion on the hidden-state loss: float64, written from the formula, sharing no code with the product.

Shapes: P pairs, B batch, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.kernels import HiddenMode, HiddenPair, PairLosses

# Loss: sums of positive terms in fp32. Gradient: one rounding to the storage dtype. The interpreter cuts bf16 off where
# the hardware rounds to nearest, so bf16 gets two half-units here.
LOSS_RTOL = 2e-6
LOSS_ATOL = 1e-13  # a row of one channel has cosine 1 and no loss
GRADIENT_RTOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2.0**-11 * 1.01, torch.bfloat16: 2.0**-7}
GRADIENT_ATOL = {
    torch.float64: 0.0,
    torch.float32: 0.0,
    torch.float16: 2.0**-24,
    torch.bfloat16: 0.0,
}  # fp16 has subnormal gradients


def oracle(pairs: Sequence[HiddenPair], mode: HiddenMode, grad_P: Sequence[float]) -> tuple[list[float], list[Tensor]]:
    """Losses of all pairs, and the gradients for the gradient grad_P of the losses; token by token, padding skipped."""
    losses, gradients = [], []
    for pair, grad in zip(pairs, grad_P, strict=True):
        student, teacher = _array(pair.student_BTD), _array(pair.teacher_BTD)
        error = total = 0.0
        gradient = np.zeros_like(student)
        tokens = list(zip(*np.nonzero(pair.mask_BT.cpu().numpy()), strict=True))
        for where in tokens:
            one, other = student[where], teacher[where]
            if mode == "cosine":
                lengths = np.linalg.norm(one) * np.linalg.norm(other)
                cosine = one @ other / lengths
                error += float(1 - cosine)
                total += 1
                gradient[where] = cosine * one / (one @ one) - other / lengths
                continue
            error += float((one - other) @ (one - other))
            if mode == "span":
                assert pair.start_BTD is not None
                change = other - _array(pair.start_BTD)[where]
                total += float(change @ change)
            else:
                total += len(one)
            gradient[where] = 2 * (one - other)
        losses.append(error / total if tokens else 0.0)
        gradients.append(torch.from_numpy(gradient * (grad / total if tokens else 0.0)))
    return losses, gradients


def _array(state_BTD: Tensor) -> NDArray[np.float64]:
    return state_BTD.detach().cpu().double().numpy()


def make_pair(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    mask_BT: Tensor | None = None,
    seed: int = 0,
) -> HiddenPair:
    """A student near its teacher, as after some training; about a third of the tokens are padding, full of NaN."""
    generator = torch.Generator().manual_seed(seed)
    start_BTD = torch.randn(shape, generator=generator)
    teacher_BTD = start_BTD + 0.7 * torch.randn(shape, generator=generator)
    student_BTD = teacher_BTD + 0.3 * torch.randn(shape, generator=generator)
    if mask_BT is None:
        mask_BT = torch.rand(shape[:2], generator=generator) > 0.35
        mask_BT[0, 0] = True
    states = []
    for state_BTD in (student_BTD, teacher_BTD, start_BTD):
        poisoned = torch.where(mask_BT[..., None].cpu(), state_BTD, torch.nan)
        states.append(poisoned.to(device=device, dtype=dtype))
    return HiddenPair(states[0].requires_grad_(), states[1], mask_BT.to(device), states[2])


def assert_equals_oracle(
    pairs: Sequence[HiddenPair], mode: HiddenMode, got: PairLosses, grad_P: Sequence[float], upstream: float = 1.0
) -> None:
    """Backpropagate grad_P through the shares (of weight 1), and compare losses and gradients with the oracle.

    Args:
        upstream: what the loss was told of grad_P; where it was told wrong, gradients are rounded twice.
    """
    losses, gradients = oracle(pairs, mode, grad_P)
    for values_P in got:
        assert values_P.shape == (len(pairs),)
        torch.testing.assert_close(
            values_P.detach().cpu().double(), torch.tensor(losses, dtype=torch.float64), rtol=LOSS_RTOL, atol=LOSS_ATOL
        )
    assert not got.loss_P.requires_grad
    students = [pair.student_BTD for pair in pairs]
    upstream_P = torch.tensor(grad_P, dtype=got.share_P.dtype, device=got.share_P.device)
    results = torch.autograd.grad(got.share_P, students, upstream_P)
    for pair, gradient_BTD, expected_BTD, grad in zip(pairs, results, gradients, grad_P, strict=True):
        dtype = pair.student_BTD.dtype
        assert gradient_BTD.dtype == dtype
        assert (gradient_BTD[~pair.mask_BT] == 0).all()
        rtol, atol = GRADIENT_RTOL[dtype], GRADIENT_ATOL[dtype]
        if grad != upstream:
            rtol, atol = 2 * rtol, atol * (1 + abs(grad / upstream))
        if mode == "cosine":  # its terms cancel: the error counts against the largest element of a row
            atol = max(atol, rtol * expected_BTD.abs().max().item())
            if expected_BTD.shape[-1] == 1:  # they cancel altogether: rows of one channel have no gradient
                shortest = pair.student_BTD.detach()[pair.mask_BT].abs().min().item()
                atol = max(atol, rtol * abs(grad) / (pair.mask_BT.sum().item() * shortest))
        torch.testing.assert_close(gradient_BTD.cpu().double(), expected_BTD, rtol=rtol, atol=atol)
