"""Every path of the vocabulary head's loss against a float64 oracle written from the formula.

Shapes: N tokens, D channels, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import kernels
from pipeline.kernels import HeadLoss, HeadObjective
from pipeline.kernels.head import chunks, cpu, reference
from tests.kernels.paths import PATHS, module_of

pytestmark = pytest.mark.parametrize("path", PATHS)
Path = tuple[str, str]

SHAPES = [(1, 3, 5), (7, 16, 33), (20, 24, 100), (3, 8, 4500)]  # the last is wider than one tile of the kernel
OBJECTIVES = {
    "task": HeadObjective(1.0),
    "forward": HeadObjective(0.0, 1.0),
    "reverse": HeadObjective(0.0, 1.0, reverse=True),
    "both": HeadObjective(0.25, 0.5),
    "forward-hot": HeadObjective(0.25, 0.5, 3.0),
    "reverse-cold": HeadObjective(0.25, 0.5, 0.5, reverse=True),
}
LOSS_RTOL = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# of the largest element; the logits themselves are rounded to 16 bits
GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Inputs(NamedTuple):
    student_ND: Tensor
    teacher_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    bias_V: Tensor


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(sum(shape))
    num_tokens, width, vocabulary = shape
    weight_VD = torch.randn(vocabulary, width, generator=generator)
    teacher_ND = torch.randn(num_tokens, width, generator=generator)
    student_ND = teacher_ND + 0.5 * torch.randn(num_tokens, width, generator=generator)
    labels_N = torch.randint(vocabulary, (num_tokens,), generator=generator)
    bias_V = torch.randn(vocabulary, generator=generator)
    states = [tensor.to(device=device, dtype=dtype) for tensor in (student_ND, teacher_ND, weight_VD)]
    return Inputs(states[0].requires_grad_(), states[1], states[2], labels_N.to(device), bias_V.to(device, dtype))


def loss_of(path: Path, *arguments) -> HeadLoss:
    if path[0] == "reference":
        return reference.head_loss(*arguments)
    student_ND, teacher_ND, weight_VD, labels_N, objective, upstream, bias_V = arguments
    student_UND = student_ND[None]
    return loss_of_students(path, student_UND, (1.0,), teacher_ND, weight_VD, labels_N, objective, upstream, bias_V)


def loss_of_students(path: Path, student_UND: Tensor, *arguments) -> HeadLoss:
    if path[0] == "cpu":
        row_pass = cpu.row_pass
    else:
        module_of(path[0])  # fails where triton compiles in spite of a missing GPU
        from pipeline.kernels.head import gpu

        row_pass = gpu.row_pass
    sums = chunks.head_sums(student_UND, *arguments, student_UND.requires_grad, row_pass)
    return chunks.attach(student_UND, sums, *arguments[4:6])


def oracle(inputs: Inputs, objective: HeadObjective, with_teacher: bool, with_bias: bool) -> SimpleNamespace:
    """(task, logit, gradient of the share for the student) in float64, by distributions."""
    student, teacher, weight, bias = (each.detach().cpu().double().numpy() for each in (*inputs[:3], inputs.bias_V))
    bias = bias * with_bias
    labels = inputs.labels_N.cpu().numpy()

    def distribution(states, temperature):
        logits = (states @ weight.T + bias) / temperature
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    tokens = np.arange(len(labels))
    hard = distribution(student, 1)
    onehot = np.zeros_like(hard)
    onehot[tokens, labels] = 1
    gradient = objective.task * (hard - onehot)
    logit = 0.0
    if with_teacher:
        q, p = distribution(student, objective.temperature), distribution(teacher, objective.temperature)
        first, second = (q, p) if objective.reverse else (p, q)
        terms = (first * np.log(first / second)).sum(1, keepdims=True)
        logit = objective.temperature**2 * terms.sum()
        pull = q * (np.log(q / p) - terms) if objective.reverse else q - p
        gradient = gradient + objective.logit * objective.temperature * pull
    return SimpleNamespace(task=-np.log(hard[tokens, labels]).sum(), logit=logit, gradient_ND=gradient @ weight)


def assert_equals_oracle(
    path: Path, inputs: Inputs, objective: HeadObjective, upstream: float = 1.0, grad: float = 1.0,
    with_teacher: bool = True, with_bias: bool = False, told: Tensor | None = None,
) -> None:  # fmt: skip
    dtype = inputs.student_ND.dtype
    expected = oracle(inputs, objective, with_teacher, with_bias)
    got = loss_of(
        path, inputs.student_ND, inputs.teacher_ND if with_teacher else None, inputs.weight_VD, inputs.labels_N,
        objective, upstream, inputs.bias_V if with_bias else None,
    )  # fmt: skip
    rtol = LOSS_RTOL[dtype]
    assert got.task.item() == pytest.approx(expected.task, rel=rtol)
    assert got.logit.item() == pytest.approx(expected.logit, rel=rtol, abs=rtol)
    share = objective.task * expected.task + objective.logit * expected.logit
    assert got.share.item() == pytest.approx(share, rel=rtol, abs=rtol)
    (gradient_ND,) = torch.autograd.grad(got.share, inputs.student_ND, torch.full_like(got.share, grad))
    assert gradient_ND.dtype == dtype
    expected_ND = torch.from_numpy(expected.gradient_ND) * grad
    tolerance = GRADIENT_TOLERANCE[dtype] * expected_ND.abs().max().item()
    torch.testing.assert_close(gradient_ND.cpu().double(), expected_ND, rtol=0, atol=tolerance)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_students_of_one_teacher(path, objective, dtype, monkeypatch) -> None:
    """The sum of what each gives alone, by their shares; logits in several chunks."""
    if path[0] == "reference":
        pytest.skip("takes one student")
    shares, inputs = (0.5, 0.125, 0.375), make_inputs((23, 16, 50), dtype, path[1])
    monkeypatch.setitem(chunks.LOGIT_BYTES, path[1], 5 * 4 * 64 * 4)
    scales = torch.tensor([1.0, 0.7, -0.4], device=path[1], dtype=dtype)
    student_UND = (inputs.student_ND.detach() * scales[:, None, None]).requires_grad_()
    found = loss_of_students(
        path, student_UND, shares, inputs.teacher_ND, inputs.weight_VD, inputs.labels_N, objective, 2.0, inputs.bias_V
    )
    (gradient_UND,) = torch.autograd.grad(found.share, student_UND, torch.full_like(found.share, 2.0))
    alone = []
    for share, student_ND, gradient_ND in zip(shares, student_UND.detach(), gradient_UND, strict=True):
        own = inputs._replace(student_ND=student_ND.clone().requires_grad_())
        expected = oracle(own, objective, with_teacher=True, with_bias=True)
        alone.append((share * expected.task, share * expected.logit))
        expected_ND = torch.from_numpy(expected.gradient_ND) * 2.0 * share
        tolerance = GRADIENT_TOLERANCE[dtype] * expected_ND.abs().max().item()
        torch.testing.assert_close(gradient_ND.cpu().double(), expected_ND, rtol=0, atol=tolerance)
    task, logit = (sum(each) for each in zip(*alone, strict=True))
    assert found.task.item() == pytest.approx(task, rel=LOSS_RTOL[dtype])
    assert found.logit.item() == pytest.approx(logit, rel=LOSS_RTOL[dtype], abs=LOSS_RTOL[dtype])
    assert found.share.item() == pytest.approx(objective.task * task + objective.logit * logit, rel=LOSS_RTOL[dtype])


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_oracle(path: Path, shape: tuple[int, int, int], objective: HeadObjective) -> None:
    assert_equals_oracle(path, make_inputs(shape, device=path[1]), objective)


@pytest.mark.parametrize("objective", [OBJECTIVES["both"], OBJECTIVES["reverse-cold"]], ids=["both", "reverse-cold"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_in_16_bits(path: Path, dtype: torch.dtype, objective: HeadObjective) -> None:
    # weights as in training: gradients of logits times 1e-6 would vanish in fp16
    objective = objective._replace(task=objective.task * 1e-6, logit=objective.logit * 1e-6)
    assert_equals_oracle(path, make_inputs((7, 16, 33), dtype, path[1]), objective, upstream=2.0**16, grad=2.0**16)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_chunks_of_tokens_bias_and_an_upstream_gradient_that_was_not_told(
    path: Path, objective: HeadObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs((20, 24, 100), device=path[1])
    for device_type in chunks.LOGIT_BYTES:
        monkeypatch.setitem(chunks.LOGIT_BYTES, device_type, 7 * 2 * 128 * 4)
    monkeypatch.setattr(cpu, "SLAB_BYTES", 3 * 100 * 4)
    assert_equals_oracle(path, inputs, objective, upstream=0.5, grad=-3.0, with_bias=True)


def test_without_a_teacher(path: Path) -> None:
    assert_equals_oracle(path, make_inputs((7, 16, 33), device=path[1]), HeadObjective(0.5), with_teacher=False)


def test_rows_that_pad_the_vocabulary_are_left_out(path: Path) -> None:
    """With weight[:num_ids] and bias[:num_ids], NaN behind meets nothing: the oracle's vocabulary ends there."""
    inputs = make_inputs((7, 16, 33), device=path[1])
    padded_VD, padded_V = (torch.full((40, *rest), torch.nan, device=path[1]) for rest in ((16,), ()))
    padded_VD[:33], padded_V[:33] = inputs.weight_VD, inputs.bias_V
    cut = inputs._replace(weight_VD=padded_VD[:33], bias_V=padded_V[:33])
    for objective in (OBJECTIVES["both"], OBJECTIVES["reverse-cold"]):
        assert_equals_oracle(path, cut, objective, with_bias=True)


def test_a_student_near_its_teacher(path: Path) -> None:
    """Distributions that nearly agree: the gradient is a difference of near-equal numbers."""
    inputs = make_inputs((7, 16, 33), device=path[1])
    near_ND = (inputs.teacher_ND + 1e-3 * torch.randn_like(inputs.teacher_ND)).requires_grad_()
    for objective in (OBJECTIVES["forward"], OBJECTIVES["reverse"]):
        expected_ND = torch.from_numpy(oracle(inputs._replace(student_ND=near_ND), objective, True, False).gradient_ND)
        loss = loss_of(
            path, near_ND, inputs.teacher_ND, inputs.weight_VD, inputs.labels_N, objective, 1.0, None
        )  # fmt: skip
        (gradient_ND,) = torch.autograd.grad(loss.share, near_ND)
        cosine = torch.cosine_similarity(gradient_ND.cpu().double().flatten(), expected_ND.flatten(), dim=0)
        assert cosine > 0.99999


def test_inputs_with_strides(path: Path) -> None:
    """States and a weight that are columns of wider ones, labels that are a column."""
    plain = make_inputs((7, 16, 33), device=path[1])
    wide = [torch.cat([each.detach(), torch.full_like(each, torch.nan)], dim=1) for each in plain[:3]]
    student_ND, teacher_ND, weight_VD = (each[:, :16] for each in wide)
    labels_N = torch.stack([plain.labels_N, torch.full_like(plain.labels_N, 32)], dim=1)[:, 0]
    inputs = Inputs(student_ND.requires_grad_(), teacher_ND, weight_VD, labels_N, plain.bias_V)
    assert not any(each.is_contiguous() for each in inputs[:4])
    assert_equals_oracle(path, inputs, OBJECTIVES["both"])


def test_no_token_at_all(path: Path) -> None:
    inputs = make_inputs((1, 16, 33), device=path[1])
    empty_ND = inputs.student_ND.detach()[:0].requires_grad_()
    loss = loss_of(
        path, empty_ND, inputs.teacher_ND[:0], inputs.weight_VD, inputs.labels_N[:0], OBJECTIVES["both"], 1.0, None
    )  # fmt: skip
    assert loss.share.item() == loss.task.item() == loss.logit.item() == 0
    assert torch.autograd.grad(loss.share, empty_ND)[0].shape == (0, 16)


def test_equal_bit_for_bit_over_ten_runs(path: Path) -> None:
    inputs = make_inputs((7, 16, 33), torch.bfloat16, path[1])
    results = []
    for _ in range(10):
        loss = loss_of(path, *inputs[:4], OBJECTIVES["both"], 1.0, None)
        results.append([*(each.detach() for each in loss), torch.autograd.grad(loss.share, inputs.student_ND)[0]])
    for result in results[1:]:
        assert all(torch.equal(got, first) for got, first in zip(result, results[0], strict=True))


def test_backward_twice_is_right_or_refused(path: Path) -> None:
    inputs = make_inputs((7, 16, 33), device=path[1])
    loss = loss_of(path, *inputs[:4], OBJECTIVES["both"], 1.0, None)
    (first_ND,) = torch.autograd.grad(loss.share, inputs.student_ND, retain_graph=True)
    if path[0] == "reference":
        assert torch.equal(first_ND, torch.autograd.grad(loss.share, inputs.student_ND)[0])
    else:
        with pytest.raises(RuntimeError, match="call it again"):
            torch.autograd.grad(loss.share, inputs.student_ND)


@pytest.mark.gpu
def test_never_waits_for_the_device(path: Path) -> None:
    if path != ("fused", "cuda"):
        pytest.skip("of the kernels on a GPU")
    inputs = make_inputs((20, 24, 100), torch.bfloat16, "cuda")
    kernels.head_loss(*inputs[:4], OBJECTIVES["both"]).share.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device="cuda").item()  # so a wait would be seen
        kernels.head_loss(*inputs[:4], OBJECTIVES["both"]).share.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_refuses_bad_input(path: Path) -> None:
    good = make_inputs((7, 16, 33), device=path[1])
    both = OBJECTIVES["both"]
    bad_calls = [
        (good._replace(teacher_ND=None), both, "needs the teacher's states"),
        (good._replace(teacher_ND=good.teacher_ND.clone().requires_grad_()), both, "teacher requires grad"),
        (good._replace(weight_VD=good.weight_VD.clone().requires_grad_()), both, "weight requires grad"),
        (good._replace(weight_VD=good.weight_VD.bfloat16()), both, "weight is torch.bfloat16"),
        (good._replace(teacher_ND=good.teacher_ND[:3]), both, r"teacher is \[3, 16\]"),
        (good._replace(weight_VD=good.weight_VD[:, :3]), both, r"states \[N, D\] and a weight \[V, D\]"),
        (good._replace(labels_N=good.labels_N.int()), both, "labels must be int64"),
        (good._replace(labels_N=good.labels_N[:3]), both, "leave out tokens"),
        (good, both._replace(temperature=0.0), "temperature must be above 0"),
    ]
    for inputs, objective, words in bad_calls:
        with pytest.raises(ValueError, match=words):
            loss_of(path, *inputs[:4], objective, 1.0, None)


def test_dispatch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((7, 16, 33), device=path[1])
    expected = loss_of(path, *inputs[:4], OBJECTIVES["both"], 1.0, None)
    for eager in (False, True):
        loss = kernels.head_loss(*inputs[:4], OBJECTIVES["both"], eager=eager)
        torch.testing.assert_close(loss.share, expected.share, rtol=1e-5, atol=0)
    with torch.no_grad():
        assert not kernels.head_loss(*inputs[:4], OBJECTIVES["both"]).share.requires_grad


def test_chunk_size_fills_the_budget_evenly(path: Path) -> None:
    assert path
    assert chunks.chunk_size(4096, 2 * 250_112 * 2, "cuda") == 1024
    assert chunks.chunk_size(1100, 2**20, "cuda") == 550
    assert chunks.chunk_size(100, 2**40, "cuda") == 1
    assert chunks.chunk_size(0, 1, "cpu") == 1
