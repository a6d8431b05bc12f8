"""The hidden-state loss of all pairs in three launches: partial sums, reduction, gradient. README.md has the numbers.

Shapes: P pairs, B batch, T tokens, D channels; a row is one token of one pair, a block is ROWS rows.
One program works on one block of one pair. Blocks are cut by shape alone, each program writes its own partial sums,
and they are added in a fixed order in fp64: no atomics, so results are equal bit for bit on any number of SMs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.kernels.reference import MIN_DENOMINATOR, HiddenPair, Mode, check_pairs

TILE_ELEMENTS = 4096  # ROWS x COLS: 32 elements a thread with 4 warps, few enough for no spill with three inputs
MAX_COLS = 1024
NUM_WARPS = 4
REDUCE_LANES = 256
ALIGNMENT = 16  # bytes of one vector load; strides and D must be multiples of as many elements

# The table that the kernels read, one line of int64 a pair: rows, T, D, mask address, then (address, batch stride,
# token stride) of three tensors: student, teacher, and the start (forward) or the gradient (backward).
TABLE_FIELDS = 13
FIELDS = tl.constexpr(TABLE_FIELDS)
STUDENT, TEACHER, THIRD = tl.constexpr(4), tl.constexpr(7), tl.constexpr(10)

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def hidden_loss(pairs: Sequence[HiddenPair], mode: Mode) -> Tensor:
    """Same contract as `pipeline.kernels.reference.hidden_loss`, for bf16, fp16 and fp32; never waits for the device.

    Raises ValueError for what `check_pairs` refuses and for other dtypes.
    """
    check_pairs(pairs, mode)
    for dtype in (pairs[0].student_BTD.dtype, pairs[0].teacher_BTD.dtype):
        if dtype not in _TRITON_DTYPES:
            raise ValueError(f"the fused hidden loss has no {dtype}; use pipeline.kernels.reference.hidden_loss")
    loss_P: Tensor = _HiddenLoss.apply(pairs, mode, *(pair.student_BTD for pair in pairs))
    return loss_P


class _HiddenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Sequence[HiddenPair], mode: Mode, *students: Tensor) -> Tensor:
        teachers, masks = [pair.teacher_BTD for pair in pairs], [pair.mask_BT for pair in pairs]
        starts = [pair.start_BTD for pair in pairs] if mode == "span" else [None] * len(pairs)
        with torch.cuda.device_of(students[0]):
            loss_P, scale_P = _launch_forward(_plan(students, teachers, masks, starts), mode)
        ctx.save_for_backward(scale_P, *students, *teachers, *masks)
        return loss_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        scale_P, *saved = ctx.saved_tensors
        num_pairs = len(scale_P)
        students, teachers, masks = (saved[first : first + num_pairs] for first in range(0, len(saved), num_pairs))
        gradients = [torch.empty(state.shape, dtype=state.dtype, device=state.device) for state in students]
        with torch.cuda.device_of(students[0]):
            # A new plan, not the one of forward: under activation checkpointing or saved-tensor hooks the saved
            # tensors that come back lie at other addresses.
            _launch_backward(_plan(students, teachers, masks, gradients), grad_P, scale_P)
        return (None, None, *gradients)


class _Plan(NamedTuple):
    """Everything a launch needs. Holds the tensors that the table points to, so none is freed before the launch."""

    table: Tensor  # int64 [P, TABLE_FIELDS], on the device
    num_blocks: int  # of the pair with the most rows; blocks behind the rows of a smaller pair write zeros
    compile_time: dict[str, Any]  # compile-time arguments
    held: list[Tensor]


def _plan(
    students: Sequence[Tensor], teachers: Sequence[Tensor], masks: Sequence[Tensor], thirds: Sequence[Tensor | None]
) -> _Plan:
    lines, held, aligned = [], [], True
    for student_BTD, teacher_BTD, mask_BT, third_BTD in zip(students, teachers, masks, thirds, strict=True):
        num_batch, num_tokens, width = student_BTD.shape
        mask_BT = mask_BT.contiguous()
        held.append(mask_BT)
        line = [num_batch * num_tokens, num_tokens, width, mask_BT.data_ptr()]
        aligned &= width % ALIGNMENT == 0
        for state_BTD in (student_BTD, teacher_BTD, third_BTD):
            if state_BTD is None:
                line += [0, 0, 0]
                continue
            state_BTD = state_BTD if state_BTD.stride(-1) == 1 else state_BTD.contiguous()
            held.append(state_BTD)
            line += [state_BTD.data_ptr(), state_BTD.stride(0), state_BTD.stride(1)]
            aligned &= not any(value % ALIGNMENT for value in line[-3:])
        lines.append(line)
    device = students[0].device
    # From pinned memory the copy is queued like a kernel; from pageable memory the host would wait for it.
    table = torch.tensor(lines, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    most_rows, widest = max(line[0] for line in lines), max(line[2] for line in lines)
    cols = min(MAX_COLS, triton.next_power_of_2(max(16, widest)))
    rows = TILE_ELEMENTS // cols
    compile_time = {
        "S_DTYPE": _TRITON_DTYPES[students[0].dtype],
        "T_DTYPE": _TRITON_DTYPES[teachers[0].dtype],
        "ALIGNED": aligned,
        "ROWS": rows,
        "COLS": cols,
        "CHUNKS": triton.cdiv(widest, cols),
    }
    return _Plan(table, max(1, triton.cdiv(most_rows, rows)), compile_time, held)


def _launch_forward(plan: _Plan, mode: Mode) -> tuple[Tensor, Tensor]:
    """(loss_P, scale_P): the losses, and 2 / denominator, which is all that backward needs of the sums; both fp32."""
    num_pairs, device = len(plan.table), plan.table.device
    partials = torch.empty(2, num_pairs, plan.num_blocks, dtype=torch.float32, device=device)
    loss_P = torch.empty(num_pairs, dtype=torch.float32, device=device)
    scale_P = torch.empty_like(loss_P)
    partials_kernel[(num_pairs * plan.num_blocks,)](
        plan.table, partials, num_pairs, plan.num_blocks, SPAN=mode == "span", num_warps=NUM_WARPS, **plan.compile_time
    )
    constants = {"EPS": MIN_DENOMINATOR, "LANES": REDUCE_LANES}
    reduce_kernel[(num_pairs,)](partials, loss_P, scale_P, num_pairs, plan.num_blocks, num_warps=NUM_WARPS, **constants)
    return loss_P, scale_P


def _launch_backward(plan: _Plan, grad_P: Tensor, scale_P: Tensor) -> None:
    num_pairs = len(plan.table)
    gradient_kernel[(num_pairs * plan.num_blocks,)](
        plan.table, grad_P, grad_P.stride(0), scale_P, num_pairs, num_warps=NUM_WARPS, **plan.compile_time
    )


@triton.jit
def _rows_of(
    entry: tl.tensor,
    FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    batch: tl.tensor,
    token: tl.tensor,
) -> tl.tensor:
    """Addresses of the first channel of some rows of one of the tensors of a pair."""
    base = tl.load(entry + FIRST).to(tl.pointer_type(DTYPE))
    batch_stride = tl.load(entry + FIRST + 1)
    token_stride = tl.load(entry + FIRST + 2)
    rows = base + (batch * batch_stride + token * token_stride)[:, None]
    if ALIGNED:  # what the compiler cannot know of an address from a table; without it every load is 2 bytes wide
        rows = tl.multiple_of(rows, [16, 16])
    return rows


@triton.jit
def _block_of(table: tl.tensor, num_pairs: tl.tensor, ROWS: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tuple:
    """(pair, block, entry, batch, token, inside, valid, width) of this program; rows are counted in int64.

    Pairs are the fast index: where one span's end is the next span's start, two neighbours read the same rows at about
    the same time, and the second should find them in the L2 cache.
    """
    pair = tl.program_id(0) % num_pairs
    block = tl.program_id(0) // num_pairs
    entry = table + pair.to(tl.int64) * FIELDS
    num_rows = tl.load(entry)
    num_tokens = tl.load(entry + 1)
    width = tl.load(entry + 2)
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    mask = tl.load(entry + 3).to(tl.pointer_type(tl.int8))
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    valid = tl.load(mask + row, mask=inside, other=0) != 0
    return pair, block, entry, row // num_tokens, row % num_tokens, inside, valid, width


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def partials_kernel(
    table: tl.tensor,
    partials: tl.tensor,
    num_pairs: tl.tensor,
    num_blocks: tl.tensor,
    SPAN: tl.constexpr,
    S_DTYPE: tl.constexpr,
    T_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """partials [2, P, blocks]: the error of each block, and what its pair's denominator gets from it."""
    pair, block, entry, batch, token, _inside, valid, width = _block_of(table, num_pairs, ROWS, ALIGNED)
    student_rows = _rows_of(entry, STUDENT, S_DTYPE, ALIGNED, batch, token)
    teacher_rows = _rows_of(entry, TEACHER, T_DTYPE, ALIGNED, batch, token)
    if SPAN:
        start_rows = _rows_of(entry, THIRD, T_DTYPE, ALIGNED, batch, token)
    error = tl.zeros([ROWS, COLS], dtype=tl.float32)
    change = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for chunk in range(CHUNKS):
        col = chunk * COLS + tl.arange(0, COLS)[None, :]
        keep = valid[:, None] & (col < width)  # padded rows are not even read
        student = tl.load(student_rows + col, mask=keep, other=0.0).to(tl.float32)
        teacher = tl.load(teacher_rows + col, mask=keep, other=0.0).to(tl.float32)
        error += (student - teacher) * (student - teacher)
        if SPAN:
            start = tl.load(start_rows + col, mask=keep, other=0.0).to(tl.float32)
            change += (teacher - start) * (teacher - start)
    if SPAN:
        total = tl.sum(tl.sum(change, axis=1), axis=0)
    else:
        total = tl.sum(valid.to(tl.float32), axis=0) * width.to(tl.float32)
    where = pair.to(tl.int64) * num_blocks + block
    tl.store(partials + where, tl.sum(tl.sum(error, axis=1), axis=0))
    tl.store(partials + num_pairs.to(tl.int64) * num_blocks + where, total)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def reduce_kernel(
    partials: tl.tensor,
    loss_P: tl.tensor,
    scale_P: tl.tensor,
    num_pairs: tl.tensor,
    num_blocks: tl.tensor,
    EPS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """One program a pair adds its partial sums in a fixed order in fp64."""
    pair = tl.program_id(0)
    errors = partials + pair.to(tl.int64) * num_blocks
    totals = errors + num_pairs.to(tl.int64) * num_blocks
    error = tl.zeros([LANES], dtype=tl.float64)
    total = tl.zeros([LANES], dtype=tl.float64)
    first = 0
    while first < num_blocks:  # not range: the interpreter cannot make an index of an argument under numpy >= 2.4
        block = first + tl.arange(0, LANES)
        error += tl.load(errors + block, mask=block < num_blocks, other=0.0).to(tl.float64)
        total += tl.load(totals + block, mask=block < num_blocks, other=0.0).to(tl.float64)
        first += LANES
    denominator = tl.maximum(tl.sum(total, axis=0), EPS)
    tl.store(loss_P + pair, (tl.sum(error, axis=0) / denominator).to(tl.float32))
    tl.store(scale_P + pair, (2.0 / denominator).to(tl.float32))


@triton.jit(do_not_specialize=["num_pairs", "grad_stride"])
def gradient_kernel(
    table: tl.tensor,
    grad_P: tl.tensor,
    grad_stride: tl.tensor,
    scale_P: tl.tensor,
    num_pairs: tl.tensor,
    S_DTYPE: tl.constexpr,
    T_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """gradient = grad * (2 / denominator) * (student - teacher), rounded once to the student's dtype."""
    pair, _block, entry, batch, token, inside, valid, width = _block_of(table, num_pairs, ROWS, ALIGNED)
    student_rows = _rows_of(entry, STUDENT, S_DTYPE, ALIGNED, batch, token)
    teacher_rows = _rows_of(entry, TEACHER, T_DTYPE, ALIGNED, batch, token)
    gradient_rows = _rows_of(entry, THIRD, S_DTYPE, ALIGNED, batch, token)
    # grad_P is often one expanded scalar (stride 0), from loss_P.sum()
    scale = tl.load(grad_P + pair * grad_stride) * tl.load(scale_P + pair)
    for chunk in range(CHUNKS):
        col = chunk * COLS + tl.arange(0, COLS)[None, :]
        keep = valid[:, None] & (col < width)
        student = tl.load(student_rows + col, mask=keep, other=0.0).to(tl.float32)
        teacher = tl.load(teacher_rows + col, mask=keep, other=0.0).to(tl.float32)
        gradient = tl.where(keep, (student - teacher) * scale, 0.0)  # zeros in padded rows, whatever the scale is
        tl.store(gradient_rows + col, gradient.to(S_DTYPE), mask=inside[:, None] & (col < width))
