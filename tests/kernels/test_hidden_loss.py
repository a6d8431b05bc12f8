"""Every path of the hidden-state loss against a float64 oracle. Padded rows are full of NaN in all of these tests."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pipeline import kernels
from pipeline.bench.timing import num_launches
from pipeline.kernels import HiddenMode, HiddenPair
from pipeline.kernels.hidden import cpu, reference
from tests.kernels.oracle import assert_equals_oracle, make_pair
from tests.kernels.paths import PATHS, module_of

SHAPES = [(1, 1, 1), (3, 7, 33), (2, 5, 96), (4, 63, 100), (2, 3, 1100)]  # the last is wider than one tile
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.parametrize("path", PATHS)
all_modes = pytest.mark.parametrize("mode", ["mse", "span", "cosine"])
Path = tuple[str, str]


@all_modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_oracle(path: Path, shape: tuple[int, int, int], dtype: torch.dtype, mode: HiddenMode) -> None:
    name, device = path
    pairs = [make_pair(shape, dtype, device)]
    assert_equals_oracle(pairs, mode, module_of(name).hidden_loss(pairs, mode, upstream=-3.25), [-3.25], upstream=-3.25)


@all_modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_upstream_gradient_that_was_not_told_is_right_too(path: Path, dtype: torch.dtype, mode: HiddenMode) -> None:
    name, device = path
    shapes = [(3, 7, 33), (2, 5, 96), (4, 2, 33)]
    pairs = [make_pair(shape, dtype, device, seed=seed) for seed, shape in enumerate(shapes)]
    assert_equals_oracle(pairs, mode, module_of(name).hidden_loss(pairs, mode, upstream=0.5), [-3.25, 0.5, 0.0], 0.5)


@all_modes
def test_weight_is_a_factor_of_the_share(path: Path, mode: HiddenMode) -> None:
    name, device = path
    pair = make_pair((3, 7, 33), device=device)
    plain, weighted = (module_of(name).hidden_loss([pair], mode, weight, 2.0) for weight in (1.0, 0.25))
    assert torch.equal(weighted.loss_P, plain.loss_P)
    assert torch.equal(weighted.share_P, plain.share_P * 0.25)
    gradients = [torch.autograd.grad(loss.share_P.sum() * 2, pair.student_BTD)[0] for loss in (plain, weighted)]
    assert torch.equal(gradients[1], gradients[0] * 0.25)


@all_modes
def test_pairs_of_different_shapes_in_one_call(path: Path, mode: HiddenMode) -> None:
    name, device = path
    shapes = [(2, 9, 64), (3, 130, 64), (1, 4, 33), (2, 9, 96)]
    pairs = [make_pair(shape, device=device, seed=seed) for seed, shape in enumerate(shapes)]
    assert_equals_oracle(pairs, mode, module_of(name).hidden_loss(pairs, mode), [1.0, 0.5, -2.0, 1e-3])


@all_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_on_a_cpu(path: Path, dtype: torch.dtype, mode: HiddenMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several, of different sizes, with padding in some; the second pair has the cut of the first."""
    if path[0] != "cpu":
        pytest.skip("others have no chunks")
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 5 * 4 * 33 // torch.get_num_threads())
    mask_BT = torch.ones(3, 7, dtype=torch.bool)
    mask_BT[0, 3:], mask_BT[2, 6] = False, False
    pairs = [make_pair((3, 7, 33), dtype, mask_BT=mask_BT, seed=seed) for seed in range(2)]
    pairs.append(make_pair((2, 9, 20), dtype))
    assert len(cpu._cut(pairs[0].mask_BT, 33, torch.float32).chunks) == 5
    assert_equals_oracle(pairs, mode, cpu.hidden_loss(pairs, mode), [1.0, -2.0, 0.5])


@all_modes
@pytest.mark.parametrize("num_pairs", [1, 50])
def test_number_of_pairs_that_share_a_mask(path: Path, num_pairs: int, mode: HiddenMode) -> None:
    name, device = path
    mask_BT = torch.tensor([[True] * 5, [True, True, False, False, False]])
    pairs = [make_pair((2, 5, 32), torch.float32, device, mask_BT, seed) for seed in range(num_pairs)]
    pairs = [pair._replace(mask_BT=pairs[0].mask_BT) for pair in pairs]
    assert_equals_oracle(pairs, mode, module_of(name).hidden_loss(pairs, mode), [1.0] * num_pairs)


@all_modes
def test_gradient_of_a_sum(path: Path, mode: HiddenMode) -> None:
    """`sum` hands one expanded scalar (stride 0) to backward, with memory for one number only."""
    name, device = path
    pairs = [make_pair((3, 7, 33), device=device, seed=seed) for seed in range(3)]
    (module_of(name).hidden_loss(pairs, mode).share_P.sum() * 3).backward()
    students = [pair.student_BTD for pair in pairs]
    share_P = module_of(name).hidden_loss(pairs, mode).share_P
    one_by_one = torch.autograd.grad(share_P, students, torch.full_like(share_P, 3.0))
    for student_BTD, other_BTD in zip(students, one_by_one, strict=True):
        assert student_BTD.grad is not None
        assert torch.equal(student_BTD.grad, other_BTD)
    assert_equals_oracle(pairs, mode, module_of(name).hidden_loss(pairs, mode), [3.0] * 3)


@all_modes
def test_student_and_teacher_of_different_dtypes(path: Path, mode: HiddenMode) -> None:
    name, device = path
    half = make_pair((3, 7, 48), torch.bfloat16, device)
    pairs = [half._replace(student_BTD=half.student_BTD.detach().float().requires_grad_())]
    assert_equals_oracle(pairs, mode, module_of(name).hidden_loss(pairs, mode), [1.0])


@all_modes
def test_padding_only_gives_zero(path: Path, mode: HiddenMode) -> None:
    name, device = path
    padded = make_pair((2, 3, 40), device=device, mask_BT=torch.zeros(2, 3, dtype=torch.bool))
    pairs = [padded, make_pair((2, 3, 40), device=device)]
    loss = module_of(name).hidden_loss(pairs, mode)
    assert loss.loss_P[0] == 0
    assert_equals_oracle(pairs, mode, loss, [2.0**16, 1.0])


def test_span_loss_of_a_student_that_copies_its_input_is_one(path: Path) -> None:
    name, device = path
    pair = make_pair((3, 7, 33), device=device)
    assert pair.start_BTD is not None
    copying = pair._replace(student_BTD=pair.start_BTD)
    assert module_of(name).hidden_loss([copying], "span").loss_P.item() == 1.0


@all_modes
def test_inputs_with_strides(path: Path, mode: HiddenMode) -> None:
    """Swapped batch and tokens, a slice of the channels (aligned or not), channels that are not the last stride."""
    name, device = path
    mask_BT = torch.ones(3, 7, dtype=torch.bool)
    mask_BT[1, 4:] = False
    wide = make_pair((3, 7, 64), device=device, mask_BT=mask_BT)
    views = [
        lambda state: state.transpose(0, 1).contiguous().transpose(0, 1),
        lambda state: state[..., 16:48],
        lambda state: state[..., 5:38],
        lambda state: state.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    pairs = []
    for view in views:
        student, teacher, start = (view(state.detach()) for state in (wide[0], wide[1], wide[3]) if state is not None)
        mask = wide.mask_BT.t().contiguous().t()
        pairs.append(HiddenPair(student.requires_grad_(), teacher, mask, start))
    assert not any(pair.student_BTD.is_contiguous() for pair in pairs)
    for group in ([pair] for pair in pairs):
        assert_equals_oracle(group, mode, module_of(name).hidden_loss(group, mode), [1.5])
    assert_equals_oracle(pairs, mode, module_of(name).hidden_loss(pairs, mode), [1.5] * 4)


@all_modes
def test_equal_bit_for_bit_over_ten_runs(path: Path, mode: HiddenMode) -> None:
    name, device = path
    results = []
    for _ in range(10):
        pairs = [make_pair(shape, torch.bfloat16, device) for shape in ((3, 7, 33), (4, 63, 100))]
        loss = module_of(name).hidden_loss(pairs, mode)
        loss.share_P.sum().backward()
        results.append([loss.loss_P, *(pair.student_BTD.grad for pair in pairs)])
    for result in results[1:]:
        assert all(torch.equal(got, first) for got, first in zip(result, results[0], strict=True))


@all_modes
def test_backward_reads_what_saved_tensor_hooks_return(path: Path, mode: HiddenMode) -> None:
    """Activation checkpointing returns other tensors than were saved; stale addresses would read freed memory."""
    name, device = path
    pair = make_pair((3, 7, 33), device=device)

    def layer_and_loss(input_BTD: torch.Tensor) -> torch.Tensor:
        loss = module_of(name).hidden_loss([pair._replace(student_BTD=input_BTD * 2 - 1)], mode)
        return loss.share_P.sum() * 3  # not what the loss was told, so backward writes

    gradients = []
    for use_checkpoint in (False, True):
        input_BTD = pair.student_BTD.detach().clone().requires_grad_()
        run = partial(checkpoint, layer_and_loss, use_reentrant=False) if use_checkpoint else layer_and_loss
        gradients.append(torch.autograd.grad(run(input_BTD), input_BTD)[0])
    assert torch.equal(*gradients)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda saved: saved.clone()):
        loss = layer_and_loss(input_BTD)
    pair.teacher_BTD.fill_(torch.nan)  # a GPU would by now use this memory for something else
    assert torch.equal(torch.autograd.grad(loss, input_BTD)[0], gradients[0])


@all_modes
def test_backward_twice_is_right_or_refused(path: Path, mode: HiddenMode) -> None:
    """The fused paths hand out the one gradient that they made in forward."""
    name, device = path
    pair = make_pair((3, 7, 33), device=device)
    loss = module_of(name).hidden_loss([pair], mode).share_P.sum()
    first = torch.autograd.grad(loss, pair.student_BTD, retain_graph=True)[0].clone()
    if name == "reference":
        assert torch.equal(first, torch.autograd.grad(loss, pair.student_BTD)[0])
    else:
        with pytest.raises(RuntimeError, match="call it again"):
            torch.autograd.grad(loss, pair.student_BTD)


@all_modes
def test_only_students_that_require_grad_get_one(path: Path, mode: HiddenMode) -> None:
    name, device = path
    pairs = [make_pair((3, 7, 33), device=device, seed=seed) for seed in range(2)]
    expected = module_of(name).hidden_loss(pairs, mode)
    expected_BTD = torch.autograd.grad(expected.share_P.sum() * 2, pairs[1].student_BTD)[0]
    pairs[0] = pairs[0]._replace(student_BTD=pairs[0].student_BTD.detach())
    loss = module_of(name).hidden_loss(pairs, mode)
    assert torch.equal(loss.loss_P, expected.loss_P)
    assert torch.equal(torch.autograd.grad(loss.share_P.sum() * 2, pairs[1].student_BTD)[0], expected_BTD)
    with torch.no_grad():
        assert torch.equal(module_of(name).hidden_loss(pairs, mode).share_P, loss.share_P)


@pytest.mark.parametrize("mode", ["mse", "cosine"])
def test_strides_beyond_two_to_the_31(path: Path, mode: HiddenMode) -> None:
    """Elements more than 2^31 apart, in memory that is reserved and almost nowhere touched."""
    name, device = path
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("less than 12 GiB of free GPU memory")
    pair = make_pair((2, 2, 16), torch.bfloat16, device)
    far = []
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        for state_BTD in (pair.student_BTD, pair.teacher_BTD):
            memory = torch.empty(2**31 + 2**30 + 64, dtype=torch.bfloat16, device=device)
            view_BTD = memory.as_strided((2, 2, 16), (2**31, 2**30, 1))
            far.append(view_BTD.copy_(state_BTD.detach()))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    pairs = [HiddenPair(far[0].requires_grad_(), far[1], pair.mask_BT)]
    assert_equals_oracle(pairs, mode, module_of(name).hidden_loss(pairs, mode), [1.0])


def test_refuses_bad_input(path: Path) -> None:
    name, device = path
    good = make_pair((2, 3, 8), device=device)
    assert good.start_BTD is not None
    bad_calls = [
        ([], "mse", "at least one pair"),
        ([good], "l1", "unknown hidden loss mode 'l1'; use one of mse, span, cosine"),
        ([good._replace(start_BTD=None)], "span", "needs start_BTD"),
        ([good._replace(teacher_BTD=good.teacher_BTD.clone().requires_grad_())], "mse", "teacher_BTD requires grad"),
        ([good._replace(start_BTD=good.start_BTD.clone().requires_grad_())], "span", "start_BTD requires grad"),
        ([good._replace(teacher_BTD=good.teacher_BTD[:, :2])], "mse", "teacher_BTD is torch.float32"),
        ([good._replace(start_BTD=good.start_BTD.half())], "span", "start_BTD is torch.float16"),
        ([good._replace(mask_BT=good.mask_BT.long())], "mse", r"attention_mask.bool\(\)"),
        ([good._replace(mask_BT=good.mask_BT[:1])], "mse", "mask_BT must be bool"),
        ([good._replace(student_BTD=good.student_BTD[0])], "mse", "floating point"),
        ([good, good._replace(student_BTD=good.student_BTD.half())], "mse", "once for each dtype"),
    ]
    for pairs, mode, words in bad_calls:
        with pytest.raises(ValueError, match=words):
            module_of(name).hidden_loss(pairs, mode)


@pytest.mark.gpu
@all_modes
def test_never_waits_for_the_device(path: Path, mode: HiddenMode) -> None:
    name, device = path
    if device != "cuda":
        pytest.skip("nothing to wait for")
    pairs = [make_pair((3, 7, 33), device=device)]
    module_of(name).hidden_loss(pairs, mode).share_P.sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device=device).item()  # so a wait would be seen
        module_of(name).hidden_loss(pairs, mode).share_P.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@all_modes
def test_launches_do_not_grow_with_the_number_of_pairs(
    path: Path, mode: HiddenMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, device = path
    if path != ("fused", "cuda"):
        pytest.skip("of the kernels on a GPU")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # which is launches, too
    for num_pairs in (1, 50):
        pairs = [make_pair((3, 7, 33), device=device, seed=seed) for seed in range(num_pairs)]
        assert num_launches(partial(module_of(name).hidden_loss, pairs, mode)) == (3 if mode == "span" else 2)


def test_fused_refuses_float64(path: Path) -> None:
    name, device = path
    pairs = [make_pair((2, 3, 8), torch.float64, device)]
    if name == "fused":
        with pytest.raises(ValueError, match=r"no torch\.float64"):
            module_of(name).hidden_loss(pairs, "mse")
    else:
        good = pairs[0]._replace(student_BTD=pairs[0].student_BTD.detach().nan_to_num().requires_grad_())
        for mode in ("mse", "span", "cosine"):
            assert_equals_oracle([good], mode, module_of(name).hidden_loss([good], mode), [1.5])


def test_dispatch_takes_the_path_of_the_device(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, device = path
    module = module_of(name)
    chosen = {("cpu", "cpu"): cpu, ("reference", "cuda"): reference, ("fused", "cuda"): module}.get(path)
    if chosen is None:
        pytest.skip("dispatch never takes this path on this device")
    monkeypatch.setattr(kernels, "_has_triton", lambda: name == "fused")
    monkeypatch.setattr(chosen, "hidden_loss", lambda *arguments: (name, *arguments[1:]))
    pairs = [make_pair((2, 3, 8), device=device)]
    assert kernels.hidden_loss(pairs, "mse", 0.5, 4.0) == (name, "mse", 0.5, 4.0)
    monkeypatch.setattr(reference, "hidden_loss", lambda *arguments: "eager")
    assert kernels.hidden_loss(pairs, "mse", eager=True) == "eager"
