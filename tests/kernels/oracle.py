"""A second opinion on the hidden-state loss: float64, written from the formula, sharing no code with the product.

Shapes: P pairs, B batch, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.kernels import HiddenPair, Mode

# Loss: sums of positive terms in fp32. Gradient: one rounding to the storage dtype. The interpreter cuts bf16 off where
# the hardware rounds to nearest, so bf16 gets two half-units here.
LOSS_RTOL = 2e-6
GRADIENT_RTOL = {torch.float32: 1e-6, torch.float16: 2.0**-11 * 1.01, torch.bfloat16: 2.0**-7}
GRADIENT_ATOL = {torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}  # fp16 has subnormal gradients


def oracle(pairs: Sequence[HiddenPair], mode: Mode, grad_P: Sequence[float]) -> tuple[list[float], list[Tensor]]:
    """Losses of all pairs, and the gradients for the gradient grad_P of the losses; token by token, padding skipped."""
    losses, gradients = [], []
    for pair, grad in zip(pairs, grad_P, strict=True):
        student, teacher = _array(pair.student_BTD), _array(pair.teacher_BTD)
        error = total = 0.0
        gradient = np.zeros_like(student)
        tokens = list(zip(*np.nonzero(pair.mask_BT.cpu().numpy()), strict=True))
        for where in tokens:
            difference = student[where] - teacher[where]
            error += float(difference @ difference)
            if mode == "span":
                assert pair.start_BTD is not None
                change = teacher[where] - _array(pair.start_BTD)[where]
                total += float(change @ change)
            else:
                total += len(difference)
            gradient[where] = 2 * difference
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


def assert_equals_oracle(pairs: Sequence[HiddenPair], mode: Mode, loss_P: Tensor, grad_P: Sequence[float]) -> None:
    """Backpropagate grad_P through loss_P, and compare losses and gradients with the oracle."""
    losses, gradients = oracle(pairs, mode, grad_P)
    assert loss_P.shape == (len(pairs),)
    torch.testing.assert_close(
        loss_P.detach().cpu().double(), torch.tensor(losses, dtype=torch.float64), rtol=LOSS_RTOL, atol=0.0
    )
    students = [pair.student_BTD for pair in pairs]
    got = torch.autograd.grad(loss_P, students, torch.tensor(grad_P, dtype=loss_P.dtype, device=loss_P.device))
    for pair, gradient_BTD, expected_BTD in zip(pairs, got, gradients, strict=True):
        dtype = pair.student_BTD.dtype
        assert gradient_BTD.dtype == dtype
        assert (gradient_BTD[~pair.mask_BT] == 0).all()
        torch.testing.assert_close(
            gradient_BTD.cpu().double(), expected_BTD, rtol=GRADIENT_RTOL[dtype], atol=GRADIENT_ATOL[dtype]
        )
