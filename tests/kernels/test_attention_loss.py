"""The attention loss against a float64 oracle, one row of one head at a time; padding is full of NaN on both sides.

Shapes: B batch, Q queries, S keys, H heads, K width of a head.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from pipeline import kernels
from pipeline.kernels import AttentionPair, attention_chunked, attention_reference

LOWEST = torch.finfo(torch.float32).min
SHAPES = [(1, 1, 1, 1, 1), (3, 7, 7, 2, 8), (2, 5, 9, 3, 16), (4, 33, 17, 1, 4)]  # B, Q, S, H, K
RTOL = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}  # of the largest element

every_path = pytest.mark.parametrize("path", [attention_reference, attention_chunked], ids=["reference", "chunked"])


def make_pair(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32, *, causal: bool = False, seed: int = 0
) -> AttentionPair:
    """A student near its teacher; about a third of queries and keys are padding, full of NaN."""
    num_batch, num_queries, num_keys, num_heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(num_batch, length, generator=generator) > 0.35 for length in (num_queries, num_keys)]
    masks[1][:, 0] = True
    states = []
    for length, mask in zip((num_queries, num_keys), masks, strict=True):
        teacher = torch.randn(num_batch, length, num_heads, width, generator=generator)
        student = teacher + 0.4 * torch.randn(teacher.shape, generator=generator)
        states.append([torch.where(mask[:, :, None, None], each, torch.nan).to(dtype) for each in (student, teacher)])
    bias = torch.randn(1, num_heads, num_queries, num_keys, generator=generator)
    if causal:
        bias = torch.where(torch.ones(num_queries, num_keys).tril().bool(), bias, LOWEST)
    (student_query, teacher_query), (student_key, teacher_key) = states
    student_query.requires_grad_(), student_key.requires_grad_()
    return AttentionPair(student_query, student_key, teacher_query, teacher_key, *masks, bias, scale=0.7)


def oracle(pair: AttentionPair, grad: float) -> tuple[float, np.ndarray, np.ndarray]:
    """(loss, gradient of the queries, gradient of the keys), row by row; padding is never touched."""
    states = [each.detach().double().numpy() for each in pair[:4]]
    query_mask, key_mask = pair.query_mask_BQ.numpy(), pair.key_mask_BS.numpy()
    bias = np.broadcast_to(
        pair.bias.double().numpy(), (len(states[0]), states[0].shape[2], states[0].shape[1], states[1].shape[1])
    )
    loss, num_rows = 0.0, 0
    gradients = [np.zeros_like(states[0]), np.zeros_like(states[1])]
    for batch in range(len(states[0])):
        keys = np.flatnonzero(key_mask[batch])
        for query in np.flatnonzero(query_mask[batch]):
            for head in range(states[0].shape[2]):
                rows = []
                for queries, all_keys in (states[:2], states[2:]):
                    scores = all_keys[batch, keys, head] @ queries[batch, query, head] * pair.scale
                    scores = scores + bias[batch, head, query, keys]
                    powers = np.exp(scores - scores.max())
                    rows.append(powers / powers.sum())
                q, p = rows
                seen = p > 0
                loss += (p[seen] * np.log(p[seen] / q[seen])).sum()
                num_rows += 1
                pull = (q - p) * pair.scale
                gradients[0][batch, query, head] += pull @ states[1][batch, keys, head]
                gradients[1][batch, keys, head] += np.outer(pull, states[0][batch, query, head])
    num_rows = max(1, num_rows)
    return loss / num_rows, *(gradient * grad / num_rows for gradient in gradients)


def assert_equals_oracle(path: ModuleType, pairs: list[AttentionPair], grads: list[float], upstream: float) -> None:
    got = path.attention_loss(pairs, upstream=upstream)
    students = [state for pair in pairs for state in pair[:2]]
    results = torch.autograd.grad(got.share_P, students, torch.tensor(grads, dtype=got.share_P.dtype))
    for index, (pair, grad) in enumerate(zip(pairs, grads, strict=True)):
        loss, *gradients = oracle(pair, grad)
        dtype = pair.student_query_BQHK.dtype
        assert got.loss_P[index].item() == pytest.approx(loss, rel=RTOL[dtype], abs=1e-7)
        assert got.share_P[index].item() == pytest.approx(loss, rel=RTOL[dtype], abs=1e-7)
        for result, expected in zip(results[2 * index : 2 * index + 2], gradients, strict=True):
            assert result.dtype == dtype
            scale = max(1e-3, np.abs(expected).max())
            torch.testing.assert_close(
                result.double(), torch.from_numpy(expected), rtol=0, atol=GRADIENT_TOLERANCE[dtype] * scale
            )


@every_path
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_oracle(path, shape, dtype, causal):
    assert_equals_oracle(path, [make_pair(shape, dtype, causal=causal)], [-2.5], upstream=-2.5)


@every_path
def test_pairs_of_different_shapes_chunks_and_an_upstream_gradient_that_was_not_told(path, monkeypatch):
    monkeypatch.setitem(attention_chunked.CHUNK_BYTES, "cpu", 1)
    pairs = [make_pair(shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    assert_equals_oracle(path, pairs, [1.0, 0.5, -3.0, 0.0], upstream=0.5)


@every_path
def test_a_mask_as_bias_and_one_bias_for_all_heads(path):
    pair = make_pair((3, 7, 5, 2, 8))
    bias = torch.zeros(3, 1, 1, 5).masked_fill(~pair.key_mask_BS[:, None, None, :], LOWEST)  # as for cross-attention
    assert_equals_oracle(path, [pair._replace(bias=bias)], [1.0], upstream=1.0)


@every_path
def test_padding_only_gives_zero(path):
    pair = make_pair((2, 3, 3, 2, 4))
    for name in ("query_mask_BQ", "key_mask_BS"):
        empty = pair._replace(**{name: torch.zeros_like(getattr(pair, name))})
        loss = path.attention_loss([empty])
        assert loss.loss_P.item() == 0
        for gradient in torch.autograd.grad(loss.share_P.sum(), empty[:2]):
            assert (gradient == 0).all()


@every_path
def test_weight_is_a_factor_of_the_share_and_equal_students_have_no_loss(path):
    pair = make_pair((3, 7, 7, 2, 8))
    loss = path.attention_loss([pair], weight=0.25, upstream=2.0)
    assert torch.equal(loss.share_P, loss.loss_P * 0.25)
    expected = torch.autograd.grad(path.attention_loss([pair]).share_P.sum(), pair[:2])
    for got, whole in zip(torch.autograd.grad(loss.share_P.sum() * 2, pair[:2]), expected, strict=True):
        torch.testing.assert_close(got, whole * 0.5)
    same = pair._replace(student_query_BQHK=pair.teacher_query_BQHK, student_key_BSHK=pair.teacher_key_BSHK)
    assert path.attention_loss([same]).loss_P.item() == pytest.approx(0, abs=1e-6)


@every_path
def test_refuses_bad_input(path):
    good = make_pair((2, 3, 5, 2, 4))
    bad_calls = [
        ([], "at least one pair"),
        ([good._replace(teacher_key_BSHK=good.teacher_key_BSHK.clone().requires_grad_())], "teacher_key_BSHK requires"),
        ([good._replace(bias=good.bias.clone().requires_grad_())], "bias requires grad"),
        ([good._replace(teacher_query_BQHK=good.teacher_query_BQHK[:, :2])], "different shapes"),
        ([good._replace(student_key_BSHK=good.student_key_BSHK[:, :, :1])], r"\[B, Q, H, K\]"),
        ([good._replace(key_mask_BS=good.key_mask_BS.long())], "key_mask_BS must be bool"),
    ]
    for pairs, words in bad_calls:
        with pytest.raises(ValueError, match=words):
            path.attention_loss(pairs)


def test_dispatch(monkeypatch):
    monkeypatch.setattr(attention_chunked, "attention_loss", lambda *arguments: arguments[1:])
    monkeypatch.setattr(attention_reference, "attention_loss", lambda *arguments: "eager")
    assert kernels.attention_loss([], 0.5, 2.0) == (0.5, 2.0)
    assert kernels.attention_loss([], eager=True) == "eager"
