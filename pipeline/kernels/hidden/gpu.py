"""The hidden-state loss of all pairs in two launches (mode "span": three): losses and gradients, reduction. Backward is
one launch that finds nothing to do when the upstream gradient is the one that was told. README.md has the numbers.

Shapes: P pairs, B batch, T tokens, D channels; a row is one token of one pair, a tile is ROWS rows that fit in
registers, a block is TILES tiles. One program works on one block of one pair. Blocks are cut by shape alone, each
program writes its own partial sums, and they are added in a fixed order in fp64: no atomics, so results are equal bit
for bit on any number of SMs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.common import PairLosses, empty_gradient, needs_gradient, with_gradients
from pipeline.kernels.common_gpu import ALIGNMENT, TILE_ELEMENTS, TRITON_DTYPES, max_registers, rescale, to_device
from pipeline.kernels.hidden.reference import MIN_DENOMINATOR, MIN_NORM, HiddenMode, HiddenPair, check_pairs

TILES = 4
WIDEST = 16384  # channels of a row that fits in the registers of one program
LANES = 1024  # of a program that adds up partial sums or counts a mask: few rounds, each waits for the L2 cache

# The table that the kernels read, one line of int64 a pair: rows, T, D, mask address, then (address, batch stride,
# token stride) of four tensors: student, teacher, start, gradient; address 0 for what there is none of.
TABLE_FIELDS = 16
FIELDS = tl.constexpr(TABLE_FIELDS)
STUDENT, TEACHER, START, GRADIENT = tl.constexpr(4), tl.constexpr(7), tl.constexpr(10), tl.constexpr(13)


def hidden_loss(
    pairs: Sequence[HiddenPair], mode: HiddenMode, weight: float = 1.0, upstream: float = 1.0
) -> PairLosses:
    """Same contract as `hidden.reference.hidden_loss`, for bf16, fp16 and fp32; never waits for the device.

    Raises ValueError for what `check_pairs` refuses, for other dtypes and for more than 16,384 channels.
    """
    check_pairs(pairs, mode)
    for dtype in (pairs[0].student_BTD.dtype, pairs[0].teacher_BTD.dtype):
        if dtype not in TRITON_DTYPES:
            raise ValueError(f"the fused hidden loss has no {dtype}; call it with eager=True")
    widest = max(pair.student_BTD.shape[-1] for pair in pairs)
    if widest > WIDEST:
        raise ValueError(f"the fused hidden loss has at most {WIDEST} channels, not {widest}; call it with eager=True")
    students = [pair.student_BTD for pair in pairs]
    gradients = [empty_gradient(student_BTD) if needs_gradient(student_BTD) else None for student_BTD in students]
    with torch.no_grad(), torch.cuda.device_of(students[0]):
        share_P, loss_P = _launch(_plan(pairs, gradients), mode, weight, upstream)
    return PairLosses(with_gradients(share_P, students, gradients, upstream, rescale), loss_P)


class _Plan(NamedTuple):
    """Everything a launch needs. Holds the tensors that the table points to, so none is freed before the launch."""

    table: Tensor  # int64 [P, TABLE_FIELDS], on the device
    num_blocks: int  # of the pair with the most rows; blocks behind the rows of a smaller pair write zeros
    num_warps: int
    compile_time: dict[str, Any]  # compile-time arguments
    held: list[Tensor]


def _plan(pairs: Sequence[HiddenPair], gradients: Sequence[Tensor | None]) -> _Plan:
    lines, held, aligned = [], [], True
    for pair, gradient_BTD in zip(pairs, gradients, strict=True):
        num_batch, num_tokens, width = pair.student_BTD.shape
        mask_BT = pair.mask_BT.contiguous()
        held.append(mask_BT)
        line = [num_batch * num_tokens, num_tokens, width, mask_BT.data_ptr()]
        aligned &= width % ALIGNMENT == 0
        for state_BTD in (pair.student_BTD, pair.teacher_BTD, pair.start_BTD, gradient_BTD):
            if state_BTD is None:
                line += [0, 0, 0]
                continue
            state_BTD = state_BTD if state_BTD.stride(-1) == 1 else state_BTD.contiguous()
            held.append(state_BTD)
            line += [state_BTD.data_ptr(), state_BTD.stride(0), state_BTD.stride(1)]
            aligned &= not any(value % ALIGNMENT for value in line[-3:])
        lines.append(line)
    cols = triton.next_power_of_2(max(16, *(line[2] for line in lines)))
    rows = rows_of_tile(cols)
    compile_time = {
        "S_DTYPE": TRITON_DTYPES[pairs[0].student_BTD.dtype],
        "T_DTYPE": TRITON_DTYPES[pairs[0].teacher_BTD.dtype],
        "ALIGNED": aligned,
        "TILES": TILES,
        "ROWS": rows,
        "COLS": cols,
    }
    num_blocks = max(1, *(triton.cdiv(line[0], rows * TILES) for line in lines))
    device = pairs[0].student_BTD.device
    return _Plan(to_device(lines, device), num_blocks, rows * cols // 1024, compile_time, held)


def rows_of_tile(cols: int) -> int:
    """Rows of a tile with `cols` channels; never one, on which the compiler's alignment hints for two axes fail."""
    return max(2, TILE_ELEMENTS // cols)


def _launch(plan: _Plan, mode: HiddenMode, weight: float, upstream: float) -> tuple[Tensor, Tensor]:
    """(weight x losses, losses), both fp32 [P]; writes the gradients."""
    num_pairs, device = len(plan.table), plan.table.device
    partials = torch.empty(2, num_pairs, plan.num_blocks, dtype=torch.float32, device=device)
    share_P = torch.empty(num_pairs, dtype=torch.float32, device=device)
    loss_P = torch.empty_like(share_P)
    grid = (num_pairs * plan.num_blocks,)
    sizes = (num_pairs, plan.num_blocks)
    resources = {"num_warps": plan.num_warps, "maxnreg": max_registers(plan.num_warps)}
    if mode == "span":
        constants = {key: value for key, value in plan.compile_time.items() if key != "S_DTYPE"}
        change_kernel[grid](plan.table, partials, *sizes, **resources, **constants)
    loss_kernel[grid](
        plan.table, partials, *sizes, weight * upstream,
        MODE=mode, EPS=MIN_DENOMINATOR, NORM_EPS=MIN_NORM, LANES=LANES, **resources, **plan.compile_time,
    )  # fmt: skip
    reduce_kernel[(num_pairs,)](partials, share_P, loss_P, *sizes, weight, EPS=MIN_DENOMINATOR, LANES=LANES)
    return share_P, loss_P


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
def _block_of(table: tl.tensor, num_pairs: tl.tensor, ALIGNED: tl.constexpr) -> tl.tuple:
    """(pair, block, entry, rows of the pair, mask address, width) of this program.

    Pairs are the fast index: where one span's end is the next span's start, two neighbours read the same rows at about
    the same time, and the second should find them in the L2 cache.
    """
    pair = tl.program_id(0) % num_pairs
    block = tl.program_id(0) // num_pairs
    entry = table + pair.to(tl.int64) * FIELDS
    width = tl.load(entry + 2)
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    return pair, block, entry, tl.load(entry), tl.load(entry + 3).to(tl.pointer_type(tl.int8)), width


@triton.jit
def _tile_of(
    entry: tl.tensor, mask: tl.tensor, num_rows: tl.tensor, block: tl.tensor, tile: tl.tensor,
    TILES: tl.constexpr, ROWS: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """(batch, token, inside, valid) of the rows of one tile; rows are counted in int64."""
    row = (block.to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
    num_tokens = tl.load(entry + 1)
    inside = row < num_rows
    valid = tl.load(mask + row, mask=inside, other=0) != 0
    return row // num_tokens, row % num_tokens, inside, valid


@triton.jit
def _sum(values: tl.tensor, count: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    """Sum of `count` numbers in memory, in a fixed order, in fp64."""
    total = tl.zeros([LANES], dtype=tl.float64)
    first = count * 0
    while first < count:  # not range: the interpreter cannot make an index of an argument under numpy >= 2.4
        index = first + tl.arange(0, LANES)
        total += tl.load(values + index, mask=index < count, other=0).to(tl.float64)
        first += LANES
    return tl.sum(total, axis=0)


@triton.jit
def _inverse_length(rows: tl.tensor, EPS: tl.constexpr) -> tl.tensor:
    """1 / length of each row, rounded correctly: a division for each element, or a square root as sqrt.approx has it,
    would take longer or be less exact."""
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(rows * rows, axis=1)), EPS))


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def change_kernel(
    table: tl.tensor,
    partials: tl.tensor,
    num_pairs: tl.tensor,
    num_blocks: tl.tensor,
    T_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """partials[1] of partials [2, P, blocks]: what each block gives to its span's sum of (teacher - start)^2."""
    pair, block, entry, num_rows, mask, width = _block_of(table, num_pairs, ALIGNED)
    col = tl.arange(0, COLS)[None, :]
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for tile in range(TILES):
        batch, token, _inside, valid = _tile_of(entry, mask, num_rows, block, tile, TILES, ROWS)
        keep = valid[:, None] & (col < width)  # padded rows are not even read
        teacher = tl.load(_rows_of(entry, TEACHER, T_DTYPE, ALIGNED, batch, token) + col, mask=keep, other=0.0)
        start = tl.load(_rows_of(entry, START, T_DTYPE, ALIGNED, batch, token) + col, mask=keep, other=0.0)
        change = teacher.to(tl.float32) - start.to(tl.float32)
        total += change * change
    where = (num_pairs + pair).to(tl.int64) * num_blocks + block
    tl.store(partials + where, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def loss_kernel(
    table: tl.tensor, partials: tl.tensor, num_pairs: tl.tensor, num_blocks: tl.tensor, scale: tl.tensor,
    MODE: tl.constexpr, EPS: tl.constexpr, NORM_EPS: tl.constexpr, LANES: tl.constexpr,
    S_DTYPE: tl.constexpr, T_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    TILES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """partials[0]: the error of each block; in modes other than span partials[1], too: its part of the denominator.
    Writes the gradient for a gradient `scale` of the losses, rounded once, with zeros in padded rows."""
    pair, block, entry, num_rows, mask, width = _block_of(table, num_pairs, ALIGNED)
    totals = partials + num_pairs.to(tl.int64) * num_blocks
    if MODE == "span":
        denominator = _sum(totals + pair.to(tl.int64) * num_blocks, num_blocks, LANES)
    else:
        denominator = _sum(mask, num_rows, LANES)
    if MODE == "mse":
        denominator *= width.to(tl.float64)
    # divided in fp32: a division in fp64 is a function call, which spills registers
    factor = scale / tl.maximum(denominator, EPS).to(tl.float32)
    with_gradient = tl.load(entry + GRADIENT) != 0
    col = tl.arange(0, COLS)[None, :]
    error = tl.zeros([ROWS], dtype=tl.float32)
    count = tl.zeros([ROWS], dtype=tl.float32)
    for tile in range(TILES):
        batch, token, inside, valid = _tile_of(entry, mask, num_rows, block, tile, TILES, ROWS)
        keep = valid[:, None] & (col < width)
        student = tl.load(_rows_of(entry, STUDENT, S_DTYPE, ALIGNED, batch, token) + col, mask=keep, other=0.0)
        teacher = tl.load(_rows_of(entry, TEACHER, T_DTYPE, ALIGNED, batch, token) + col, mask=keep, other=0.0)
        student, teacher = student.to(tl.float32), teacher.to(tl.float32)
        if MODE == "cosine":  # with rows of length 1: e = |s - t|^2 / 2, gradient (s - t - e s) / |student|
            inverse = _inverse_length(student, NORM_EPS)
            student = student * inverse[:, None]
            difference = student - teacher * _inverse_length(teacher, NORM_EPS)[:, None]
            row_error = tl.sum(difference * difference, axis=1) / 2
            gradient = (difference - row_error[:, None] * student) * (factor * inverse)[:, None]
        else:
            difference = student - teacher
            row_error = tl.sum(difference * difference, axis=1)
            gradient = difference * (2 * factor)
        error += row_error
        count += valid.to(tl.float32)
        if with_gradient:
            rows = _rows_of(entry, GRADIENT, S_DTYPE, ALIGNED, batch, token)
            gradient = tl.where(keep, gradient, 0.0)  # zeros in padded rows, whatever the factor is
            tl.store(rows + col, gradient.to(S_DTYPE), mask=inside[:, None] & (col < width))
    where = pair.to(tl.int64) * num_blocks + block
    tl.store(partials + where, tl.sum(error, axis=0))
    if MODE == "mse":
        tl.store(totals + where, tl.sum(count, axis=0) * width.to(tl.float32))
    elif MODE == "cosine":
        tl.store(totals + where, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def reduce_kernel(
    partials: tl.tensor,
    share_P: tl.tensor,
    loss_P: tl.tensor,
    num_pairs: tl.tensor,
    num_blocks: tl.tensor,
    weight: tl.tensor,
    EPS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """One program a pair adds its partial sums in a fixed order in fp64."""
    pair = tl.program_id(0)
    errors = partials + pair.to(tl.int64) * num_blocks
    totals = errors + num_pairs.to(tl.int64) * num_blocks
    loss = _sum(errors, num_blocks, LANES) / tl.maximum(_sum(totals, num_blocks, LANES), EPS)
    tl.store(loss_P + pair, loss.to(tl.float32))
    tl.store(share_P + pair, (loss * weight).to(tl.float32))
