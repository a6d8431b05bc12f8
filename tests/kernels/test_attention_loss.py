"""The attention loss against a float64 oracle, one row of one head at a time; padding is full of NaN on both sides.

Shapes: B batch, Q queries, S keys, H heads, K width of a head.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from pipeline import kernels
from pipeline.kernels import AttentionPair
from pipeline.kernels.attention import cpu, reference
from tests.kernels.paths import PATHS, module_of

Path = tuple[str, str]
Shape = tuple[int, int, int, int, int]  # B, Q, S, H, K

# By path "fused" or not. The kernels round the gradients of scores to 16 bits, and the interpreter cuts bf16 off.
LOSS_RTOL = 2e-5
GRADIENT_TOLERANCE = {  # of the largest element
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2.0**-11, 2.0**-10),
    torch.bfloat16: (2.0**-8, 2.0**-7),
}
CASES: list[tuple[Shape, torch.dtype, str]] = [
    ((1, 1, 1, 1, 1), torch.float32, "encoder"),
    ((2, 33, 33, 1, 20), torch.float32, "encoder"),
    ((3, 7, 7, 2, 8), torch.float32, "decoder"),
    ((2, 5, 19, 3, 16), torch.float32, "cross"),
    ((2, 19, 5, 1, 4), torch.float32, "encoder"),
    ((2, 19, 19, 2, 8), torch.bfloat16, "decoder"),
    ((2, 17, 33, 1, 16), torch.bfloat16, "cross"),
    ((2, 7, 7, 2, 16), torch.float16, "encoder"),
]

pytestmark = pytest.mark.parametrize("path", PATHS)


def loss_module(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    name, device = path
    if name != "fused":
        return {"reference": reference, "cpu": cpu}[name]
    module_of(name)  # fails where triton compiles in spite of a missing GPU
    from pipeline.kernels.attention import gpu

    if device == "cpu":  # several tiles of small maps; the interpreter is slow
        monkeypatch.setattr(gpu, "BLOCK", {2: 16, 4: 16})
        monkeypatch.setattr(gpu, "STEP", {2: 16, 4: 16})
    return gpu


def make_pair(
    shape: Shape, dtype: torch.dtype = torch.float32, kind: str = "encoder", device: str = "cpu", noise: float = 0.4
) -> AttentionPair:
    """A student near its teacher; about a third of queries and keys are padding, full of NaN; the first query of a
    decoder sees no real key."""
    num_batch, num_queries, num_keys, num_heads, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    masks = [torch.rand(num_batch, length, generator=generator) > 0.35 for length in (num_queries, num_keys)]
    masks[0][:, 0] = masks[1][:, -1] = True
    masks[1][0, 0] = kind != "decoder"
    states = []
    for length, mask in zip((num_queries, num_keys), masks, strict=True):
        teacher = torch.randn(num_batch, length, num_heads, width, generator=generator)
        student = teacher + noise * torch.randn(teacher.shape, generator=generator)
        poisoned = (torch.where(mask[:, :, None, None], each, torch.nan) for each in (student, teacher))
        states.append([each.to(device, dtype) for each in poisoned])
    bias_HR = None
    if kind != "cross":
        bias_HR = torch.randn(num_heads, num_queries + num_keys - 1, generator=generator).to(device, dtype)
    (student_query, teacher_query), (student_key, teacher_key) = states
    student_query.requires_grad_(), student_key.requires_grad_()
    states_and_masks = (student_query, student_key, teacher_query, teacher_key, *(mask.to(device) for mask in masks))
    return AttentionPair(*states_and_masks, bias_HR, kind == "decoder", scale=0.7)


def oracle(pair: AttentionPair, grad: float) -> tuple[float, list[np.ndarray]]:
    """(loss, gradients of queries and keys and of the student's own bias), row by row; padding is never touched."""
    states = [each.detach().cpu().double().numpy() for each in pair[:4]]
    query_mask, key_mask = pair.query_mask_BQ.cpu().numpy(), pair.key_mask_BS.cpu().numpy()
    _, num_queries, num_heads, _ = states[0].shape
    biases = [None if each is None else each.detach().cpu().double().numpy() for each in pair.biases]
    loss, num_rows = 0.0, 0
    gradients = [np.zeros(student.shape) for student in pair.students]
    for batch in np.flatnonzero(key_mask.any(1)):
        for query in np.flatnonzero(query_mask[batch]):
            keys = np.flatnonzero(key_mask[batch])
            keys = keys[keys <= query] if pair.causal else keys
            num_rows += num_heads
            for head in range(num_heads if len(keys) else 0):
                rows = []
                for (queries, all_keys), bias in zip((states[:2], states[2:]), biases, strict=True):
                    scores = all_keys[batch, keys, head] @ queries[batch, query, head] * pair.scale
                    if bias is not None:
                        scores = scores + bias[head, keys - query + num_queries - 1]
                    powers = np.exp(scores - scores.max())
                    rows.append(powers / powers.sum())
                q, p = rows
                loss += (p * np.log(p / q)).sum()
                pull = (q - p) * pair.scale
                gradients[0][batch, query, head] += pull @ states[1][batch, keys, head]
                gradients[1][batch, keys, head] += np.outer(pull, states[0][batch, query, head])
                for own in gradients[2:]:
                    own[head, keys - query + num_queries - 1] += q - p
    num_rows = max(1, num_rows)
    return loss / num_rows, [gradient * grad / num_rows for gradient in gradients]


def assert_equals_oracle(module: ModuleType, pairs: list[AttentionPair], grads: list[float], upstream: float) -> None:
    got = module.attention_loss(pairs, upstream=upstream)
    students = [state for pair in pairs for state in pair.students]
    grad_P = torch.tensor(grads, dtype=got.share_P.dtype, device=got.share_P.device)
    results = torch.autograd.grad(got.share_P, students, grad_P)
    assert not got.loss_P.requires_grad
    for index, (pair, grad) in enumerate(zip(pairs, grads, strict=True)):
        loss, gradients = oracle(pair, grad)
        dtype = pair.student_query_BQHK.dtype
        rtol = 1e-12 if dtype == torch.float64 else LOSS_RTOL
        for values_P in got:
            assert values_P[index].item() == pytest.approx(loss, rel=rtol, abs=1e-7)
        tolerance = GRADIENT_TOLERANCE[dtype][module not in (reference, cpu)]
        each = len(gradients)
        for result, expected in zip(results[each * index : each * (index + 1)], gradients, strict=True):
            assert result.dtype == dtype
            scale = max(1e-3, np.abs(expected).max())
            torch.testing.assert_close(
                result.cpu().double(), torch.from_numpy(expected), rtol=0, atol=tolerance * scale
            )


@pytest.mark.parametrize(("shape", "dtype", "kind"), CASES, ids=str)
def test_equals_oracle(path, shape, dtype, kind, monkeypatch):
    pair = make_pair(shape, dtype, kind, path[1])
    assert_equals_oracle(loss_module(path, monkeypatch), [pair], [-2.5], upstream=-2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_student_with_a_position_bias_of_its_own(path, dtype, monkeypatch):
    """As every layer of a umT5 has; in chunks of one example."""
    monkeypatch.setitem(cpu.CHUNK_BYTES, "cpu", 1)
    module, pairs = loss_module(path, monkeypatch), []
    for shape, kind in (((3, 7, 7, 2, 8), "decoder"), ((2, 19, 5, 1, 4), "encoder")):
        pair = make_pair(shape, dtype, kind, path[1])
        own_HR = (pair.bias_HR + 0.4 * torch.randn_like(pair.bias_HR)).requires_grad_()
        pairs.append(pair._replace(student_bias_HR=own_HR))
    if path[0] == "fused":
        assert not module.takes(pairs)
    else:
        assert_equals_oracle(module, pairs, [-2.5, -2.5], upstream=-2.5)


def test_float64_is_left_to_the_chunked_path(path, monkeypatch):
    module, pair = loss_module(path, monkeypatch), make_pair((3, 7, 7, 2, 8), torch.float64, "decoder", path[1])
    if path[0] == "fused":
        assert not module.takes([pair])
        assert module.takes([make_pair((3, 7, 7, 2, 8))])
        assert not module.takes([make_pair((1, 1, 1, 1, 129))])
    else:
        assert_equals_oracle(module, [pair], [-2.5], upstream=-2.5)


def test_pairs_of_different_shapes_chunks_and_an_upstream_gradient_that_was_not_told(path, monkeypatch):
    for device_type in cpu.CHUNK_BYTES:
        monkeypatch.setitem(cpu.CHUNK_BYTES, device_type, 1)
    cases = [((3, 7, 7, 2, 8), "decoder"), ((2, 5, 19, 3, 16), "cross"), ((1, 4, 4, 1, 4), "encoder")]
    pairs = [make_pair(shape, kind=kind, device=path[1]) for shape, kind in cases]
    assert_equals_oracle(loss_module(path, monkeypatch), pairs, [1.0, 0.5, -3.0], upstream=0.5)


def test_strides_and_masks_that_pairs_share(path, monkeypatch):
    """Heads in front of tokens, a slice of wider heads; masks in columns, which the second pair has, too."""
    module, pair = loss_module(path, monkeypatch), make_pair((2, 5, 19, 3, 16), device=path[1])
    moved = [each.detach().transpose(1, 2).contiguous().transpose(1, 2) for each in pair[:4]]
    sliced = [each.detach()[..., 3:] for each in pair[:4]]
    masks = [mask.t().contiguous().t() for mask in pair[4:6]]
    pairs = []
    for states in (moved, sliced):
        assert not any(each.is_contiguous() for each in (*states, *masks))
        pairs.append(AttentionPair(*(each.requires_grad_() for each in states[:2]), *states[2:], *masks, *pair[6:]))
    assert_equals_oracle(module, pairs, [1.0, 1.0], upstream=1.0)


def test_padding_only_gives_zero(path, monkeypatch):
    module, pair = loss_module(path, monkeypatch), make_pair((2, 3, 3, 2, 4), device=path[1])
    for name in ("query_mask_BQ", "key_mask_BS"):
        empty = pair._replace(**{name: torch.zeros_like(getattr(pair, name))})
        loss = module.attention_loss([empty])
        assert loss.loss_P.item() == 0
        for gradient in torch.autograd.grad(loss.share_P.sum(), empty[:2]):
            assert (gradient == 0).all()


def test_weight_is_a_factor_of_the_share_and_equal_students_have_no_loss(path, monkeypatch):
    module, pair = loss_module(path, monkeypatch), make_pair((2, 7, 7, 2, 8), device=path[1])
    loss = module.attention_loss([pair], weight=0.25, upstream=2.0)
    assert torch.equal(loss.share_P, loss.loss_P * 0.25)
    expected = torch.autograd.grad(module.attention_loss([pair]).share_P.sum(), pair[:2])
    for got, whole in zip(torch.autograd.grad(loss.share_P.sum() * 2, pair[:2]), expected, strict=True):
        torch.testing.assert_close(got, whole * 0.5)
    same = pair._replace(student_query_BQHK=pair.teacher_query_BQHK, student_key_BSHK=pair.teacher_key_BSHK)
    assert module.attention_loss([same]).loss_P.item() == pytest.approx(0, abs=1e-6)


def test_an_example_without_a_real_key_counts_nowhere(path, monkeypatch):
    """Its queries are real, but see nothing: the mean is over the others."""
    pair = make_pair((3, 5, 19, 2, 8), kind="cross", device=path[1])
    pair.key_mask_BS[1] = False
    assert pair.query_mask_BQ[1].any()
    assert_equals_oracle(loss_module(path, monkeypatch), [pair], [1.0], upstream=1.0)


def test_a_student_near_its_teacher(path, monkeypatch):
    """Distributions that nearly agree: loss and gradient are differences of near-equal numbers."""
    module, pair = loss_module(path, monkeypatch), make_pair((2, 7, 19, 2, 8), device=path[1], noise=1e-2)
    loss = module.attention_loss([pair])
    expected, gradients = oracle(pair, 1.0)
    assert loss.loss_P.item() == pytest.approx(expected, rel=1e-3 if path[0] == "fused" else 2e-2)
    for got, wanted in zip(torch.autograd.grad(loss.share_P.sum(), pair[:2]), gradients, strict=True):
        cosine = torch.cosine_similarity(got.cpu().double().flatten(), torch.from_numpy(wanted).flatten(), dim=0)
        assert cosine > 0.99999


def test_equal_bit_for_bit_over_three_runs(path, monkeypatch):
    module, pair = loss_module(path, monkeypatch), make_pair((2, 19, 19, 2, 8), torch.bfloat16, "decoder", path[1])
    results = []
    for _ in range(3):
        loss = module.attention_loss([pair])
        results.append([loss.loss_P, *torch.autograd.grad(loss.share_P.sum(), pair[:2])])
    for result in results[1:]:
        assert all(torch.equal(got, first) for got, first in zip(result, results[0], strict=True))


def test_without_gradients_and_backward_twice(path, monkeypatch):
    module, pair = loss_module(path, monkeypatch), make_pair((2, 7, 7, 2, 8), device=path[1])
    loss = module.attention_loss([pair])
    with torch.no_grad():
        assert torch.equal(module.attention_loss([pair]).share_P, loss.share_P)
    torch.autograd.grad(loss.share_P.sum(), pair[:2], retain_graph=True)
    if path[0] != "reference":
        with pytest.raises(RuntimeError, match="call it again"):
            torch.autograd.grad(loss.share_P.sum(), pair[:2])


def test_refuses_bad_input(path, monkeypatch):
    module, good = loss_module(path, monkeypatch), make_pair((2, 3, 5, 2, 4), device=path[1])
    bad_calls = [
        ([], "at least one pair"),
        ([good._replace(teacher_key_BSHK=good.teacher_key_BSHK.clone().requires_grad_())], "teacher_key_BSHK requires"),
        ([good._replace(bias_HR=good.bias_HR.clone().requires_grad_())], "bias_HR requires grad"),
        ([good._replace(bias_HR=good.bias_HR[:, 1:])], r"bias_HR must be \[2, 7\], got \[2, 6\]"),
        ([good._replace(student_bias_HR=good.bias_HR[:, 1:])], r"student_bias_HR must be \[2, 7\], got \[2, 6\]"),
        ([good, good._replace(student_bias_HR=good.bias_HR)], "of their own and some do not"),
        ([good._replace(teacher_query_BQHK=good.teacher_query_BQHK[:, :2])], "different shapes"),
        ([good._replace(student_key_BSHK=good.student_key_BSHK[:, :, :1])], r"\[B, Q, H, K\]"),
        ([good._replace(key_mask_BS=good.key_mask_BS.long())], "key_mask_BS must be bool"),
    ]
    for pairs, words in bad_calls:
        with pytest.raises(ValueError, match=words):
            module.attention_loss(pairs)


@pytest.mark.gpu
def test_never_waits_for_the_device_and_never_holds_a_map(path, monkeypatch):
    if path != ("fused", "cuda"):
        pytest.skip("of the kernels on a GPU")
    module, pair = loss_module(path, monkeypatch), make_pair((2, 1024, 1024, 4, 64), torch.bfloat16, "decoder", "cuda")
    module.attention_loss([pair]).share_P.sum().backward()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device="cuda").item()  # so a wait would be seen
        module.attention_loss([pair]).share_P.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradients = 2 * 2 * pair.student_query_BQHK.nbytes  # made, and added to those of the first call
    assert torch.cuda.max_memory_allocated() - before < gradients + 2**20  # one map in fp32 is 32 MiB


def test_dispatch(path, monkeypatch):
    name, device = path
    module, pairs = loss_module(path, monkeypatch), [make_pair((1, 2, 2, 1, 4), device=device)]
    if (name, device) in (("reference", "cpu"), ("fused", "cpu")):
        pytest.skip("dispatch never takes this path on this device")
    monkeypatch.setattr(kernels, "_has_triton", lambda: name == "fused")
    if name == "reference":  # on CUDA without triton
        module = cpu
    monkeypatch.setattr(module, "attention_loss", lambda *arguments: (name, *arguments[1:]))
    assert kernels.attention_loss(pairs, 0.5, 2.0) == (name, 0.5, 2.0)
    monkeypatch.setattr(reference, "attention_loss", lambda *arguments: "eager")
    assert kernels.attention_loss(pairs, eager=True) == "eager"
