"""The rules of gradients that are made in forward, apart from any loss.

Shapes: P losses.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.kernels.common import with_gradients


def attached(upstream: float, num_losses: int = 2, device: str = "cpu") -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(share_P, students, their gradients), two students for each loss."""
    students = [torch.ones(3, device=device, requires_grad=True) for _ in range(2 * num_losses)]
    gradients = [torch.full((3,), float(place + 1), device=device) for place in range(2 * num_losses)]
    share_P = torch.ones(num_losses, device=device)
    return with_gradients(share_P, students, gradients, upstream), students, gradients


@pytest.mark.parametrize("upstream", [1.0, 2.0**16, 1 / 3, 0.7])
def test_a_gradient_that_was_told_is_handed_out_as_it_is(upstream: float) -> None:
    share_P, students, gradients = attached(upstream)
    got = torch.autograd.grad(share_P, students, torch.full_like(share_P, upstream))
    assert [each.data_ptr() for each in got] == [each.data_ptr() for each in gradients]
    assert [each[0].item() for each in got] == [1, 2, 3, 4]


def test_each_loss_has_its_own_factor() -> None:
    share_P, students, _ = attached(upstream=2.0)
    got = torch.autograd.grad(share_P, students, torch.tensor([-1.0, 4.0]))
    assert [each[0].item() for each in got] == [-0.5, -1, 6, 8]


def test_backward_runs_once_and_says_so() -> None:
    share_P, students, _ = attached(upstream=1.0)
    torch.autograd.grad(share_P.sum(), students, retain_graph=True)
    with pytest.raises(RuntimeError, match="call it again to run backward again"):
        torch.autograd.grad(share_P.sum(), students)


def test_backward_reads_no_number_off_the_device() -> None:
    """Tensors without data: whoever waited for a number of theirs would get an error."""
    share_P, students, _ = attached(upstream=0.5, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        bool(share_P[0] == 1)
    assert all(each.is_meta for each in torch.autograd.grad(share_P.sum(), students))


def test_students_without_a_gradient_get_none() -> None:
    students = [torch.ones(3, requires_grad=True), torch.ones(3)]
    share_P = with_gradients(torch.ones(2), students, [torch.full((3,), 5.0), None], 1.0)
    share_P.sum().backward()
    assert students[0].grad is not None
    assert students[0].grad[0].item() == 5
    assert students[1].grad is None
    assert not with_gradients(torch.ones(2), students, [None, None], 1.0).requires_grad
