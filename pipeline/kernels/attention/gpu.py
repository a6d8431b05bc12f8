"""The attention loss on CUDA, in two launches a pair: attention maps exist tile by tile, in registers. README.md has
the numbers.

`queries_kernel`: one program for a tile of queries of one head goes over the keys twice, first for the normaliser of
each distribution, then for the loss and the gradient of the queries. `keys_kernel`: one program for a tile of keys goes
over the queries for the gradient of the keys. Each program writes what is its own: no atomics, equal bit for bit.

Shapes: P pairs, B batch, Q queries, S keys, H heads, K width of a head, R = Q + S - 1 distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.attention.reference import AttentionPair, check_attention, counted_queries
from pipeline.kernels.common import PairLosses, empty_gradient, needs_gradient, with_gradients
from pipeline.kernels.common_gpu import TRITON_DTYPES, rescale

WIDEST = 128  # channels of a head that fits in registers beside the maps
BLOCK = {2: 64, 4: 32}  # queries or keys of a program, by bytes of an element
STEP = {2: 32, 4: 16}  # keys or queries that it takes at a time
MAX_REGISTERS = 255  # of a thread: all there are, for maps, states and a gradient


def num_warps(width: int) -> int:
    """So many that nothing spills."""
    return 4 if width <= 64 else 8


def takes(pairs: Sequence[AttentionPair]) -> bool:
    """Whether the kernels have these dtypes and widths, and one bias for both; attention/cpu.py has all."""
    if any(pair.student_bias_HR is not None for pair in pairs):
        return False
    return len({pair.student_query_BQHK.dtype for pair in pairs}) == 1 and all(
        state.dtype in TRITON_DTYPES and state.shape[-1] <= WIDEST for pair in pairs for state in pair[:4]
    )


def attention_loss(pairs: Sequence[AttentionPair], weight: float = 1.0, upstream: float = 1.0) -> PairLosses:
    """Same contract as `pipeline.kernels.attention.reference.attention_loss`, for pairs that `takes` says yes to; never
    waits for the device. Backward runs once."""
    check_attention(pairs)
    students = [state for pair in pairs for state in (pair.student_query_BQHK, pair.student_key_BSHK)]
    gradients = [empty_gradient(student) for student in students if needs_gradient(*students)]
    loss_P = _losses(pairs, weight * upstream, gradients)
    return PairLosses(with_gradients(loss_P * weight, students, gradients, upstream, rescale), loss_P)


@torch.no_grad()
def _losses(pairs: Sequence[AttentionPair], pull: float, gradients: Sequence[Tensor]) -> Tensor:
    """Loss of each pair; writes the gradients, if there are any, for a gradient `pull` of each."""
    # masks as int32: of 8 bits, the compiler would lay out the states as if they had 8 bits, too
    counted = {
        _masks_of(pair): (counted_queries(pair).int().contiguous(), pair.key_mask_BS.int().contiguous())
        for pair in pairs
    }
    num_counted = {masks: counted_BQ.sum() for masks, (counted_BQ, _) in counted.items()}
    num_programs = max(math.prod(_grid(pair.student_query_BQHK)) for pair in pairs)
    device = pairs[0].student_query_BQHK.device
    partials = torch.zeros(len(pairs), num_programs, dtype=torch.float32, device=device)
    with torch.cuda.device_of(partials):
        for index, pair in enumerate(pairs):
            masks, own = _masks_of(pair), gradients[2 * index : 2 * index + 2]
            _launch(pair, *counted[masks], num_counted[masks], pull, partials[index], own)
    return partials.sum(1, dtype=torch.float64).float()


def _masks_of(pair: AttentionPair) -> tuple[int, int]:
    """The same for pairs that share their masks, as the layers of a stack do."""
    return id(pair.query_mask_BQ), id(pair.key_mask_BS)


def _grid(state_BLHK: Tensor) -> tuple[int, int]:
    """Programs that have a tile of queries or keys each."""
    num_batch, length, num_heads, _ = state_BLHK.shape
    return num_batch * num_heads, triton.cdiv(length, BLOCK[state_BLHK.itemsize])


def _launch(
    pair: AttentionPair,
    counted_BQ: Tensor,
    key_mask_BS: Tensor,
    num_counted: Tensor,
    pull: float,
    partials: Tensor,
    gradients: Sequence[Tensor],
) -> None:
    """Write what each program gives to the loss and, if there are any, the gradients of queries and keys for a gradient
    `pull` of the loss."""
    num_batch, num_queries, num_heads, width = pair.student_query_BQHK.shape
    num_keys, device = pair.student_key_BSHK.shape[1], counted_BQ.device
    student, teacher = pair.student_query_BQHK.dtype, pair.teacher_query_BQHK.dtype
    states = [state.contiguous() for state in pair[:4]]
    logs = torch.empty(num_batch * num_heads, 2, num_queries * bool(gradients), dtype=torch.float32, device=device)
    inputs = (
        *states, pair.bias_HR.contiguous() if pair.bias_HR is not None else states[0],
        counted_BQ, key_mask_BS, num_counted, logs,
        pair.scale, pull, num_queries, num_keys, num_heads, width,
    )  # fmt: skip
    constants = {
        "WITH_BIAS": pair.bias_HR is not None,
        "CAUSAL": pair.causal,
        "BLOCK": BLOCK[student.itemsize],
        "STEP": STEP[student.itemsize],
        "WIDTH": triton.next_power_of_2(max(16, width)),
        "S_DOT": _dot_dtype(student),
        "T_DOT": _dot_dtype(teacher),
        "num_warps": num_warps(width),
        "maxnreg": MAX_REGISTERS,
    }
    query_grid, key_grid = _grid(pair.student_query_BQHK), _grid(pair.student_key_BSHK)
    query_gradient, key_gradient = gradients or (logs, logs)
    queries_kernel[query_grid](*inputs, partials, query_gradient, WITH_GRADIENT=bool(gradients), **constants)
    if gradients:
        keys_kernel[key_grid](*inputs, key_gradient, **constants)


def _dot_dtype(dtype: torch.dtype) -> Any:
    """What the operands of a matrix product are converted to."""
    if triton.knobs.runtime.interpret and dtype == torch.bfloat16:
        return tl.float32  # the interpreter would multiply the bit patterns of bf16
    return TRITON_DTYPES[dtype]


@triton.jit
def _rows(
    first: tl.tensor,
    index: tl.tensor,
    real: tl.tensor,
    num_heads: tl.tensor,
    width: tl.tensor,
    WIDTH: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Rows of one head, from the address of its first one; zeros where not real: those are not even read."""
    col = tl.arange(0, WIDTH)
    where = (index * num_heads * width)[:, None] + col[None, :]
    return tl.load(first + where, mask=real[:, None] & (col < width)[None, :], other=0.0).to(DOT)


@triton.jit
def _maps(
    student: tl.tensor, teacher: tl.tensor, own: tl.tensor,
    s_others: tl.tensor, t_others: tl.tensor, others: tl.tensor, real: tl.tensor,
    biases: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor,
    scale: tl.tensor, num_heads: tl.tensor, width: tl.tensor,
    OF_QUERIES: tl.constexpr, WITH_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr, S_DOT: tl.constexpr, T_DOT: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """One tile of both maps, own positions down and others across: (student's scaled products, teacher's, what both
    have added to them: bias, and -inf at keys that the query does not see; the student's rows of the others).

    Args:
        biases: address of the bias of distance 0.
        OF_QUERIES: own positions are queries and the others keys, or else the other way round.
    """
    distance = others[None, :] - own[:, None] if OF_QUERIES else own[:, None] - others[None, :]  # key - query
    s_rows = _rows(s_others, others, real, num_heads, width, WIDTH, S_DOT)
    t_rows = _rows(t_others, others, real, num_heads, width, WIDTH, T_DOT)
    s_products = tl.dot(student, tl.trans(s_rows), input_precision="ieee") * scale
    t_products = tl.dot(teacher, tl.trans(t_rows), input_precision="ieee") * scale
    added = tl.zeros(s_products.shape, dtype=tl.float32)
    if WITH_BIAS:  # the distance is held inside the table, not masked: a mask would tie the maps to the load's layout
        inside = tl.minimum(tl.maximum(distance, 1 - num_queries), num_keys - 1)
        added = tl.load(biases + inside).to(tl.float32)
    if OF_QUERIES:
        added += tl.where(real, 0.0, -float("inf"))[None, :]
    if CAUSAL:
        added = tl.where(distance <= 0, added, -float("inf"))
    return s_products, t_products, added, s_rows


@triton.jit
def _grow(highest: tl.tensor, total: tl.tensor, scores: tl.tensor) -> tl.tuple:
    """(maximum, sum of e^(score - maximum)) of rows after more scores. `highest` starts finite, so that a row of -inf
    alone gives a sum of 0 and no NaN."""
    new = tl.maximum(highest, tl.max(scores, axis=1))
    return new, total * tl.exp(highest - new) + tl.sum(tl.exp(scores - new[:, None]), axis=1)


@triton.jit
def _store_rows(
    first: tl.tensor, index: tl.tensor, values: tl.tensor, real: tl.tensor, num_rows: tl.tensor,
    num_heads: tl.tensor, width: tl.tensor, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Write rows of one head, zeros where not real."""
    col = tl.arange(0, WIDTH)
    where = (index * num_heads * width)[:, None] + col[None, :]
    keep = (index < num_rows)[:, None] & (col < width)[None, :]
    tl.store(first + where, tl.where(real[:, None], values, 0.0).to(first.dtype.element_ty), mask=keep)


@triton.jit
def _normalisers(
    student: tl.tensor, teacher: tl.tensor, query: tl.tensor,
    s_keys: tl.tensor, t_keys: tl.tensor, key_mask: tl.tensor,
    biases: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor,
    scale: tl.tensor, num_heads: tl.tensor, width: tl.tensor,
    WITH_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, S_DOT: tl.constexpr, T_DOT: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Logarithms of the sums of e^score over all keys, of student and teacher, for each query."""
    s_max = tl.full([BLOCK], -1e38, dtype=tl.float32)
    t_max = tl.full([BLOCK], -1e38, dtype=tl.float32)
    s_sum = tl.zeros([BLOCK], dtype=tl.float32)
    t_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in range(tl.cdiv(num_keys, STEP)):
        key = tile * STEP + tl.arange(0, STEP)
        real_key = tl.load(key_mask + key, mask=key < num_keys, other=0) != 0
        s_products, t_products, added, _s_rows = _maps(
            student, teacher, query, s_keys, t_keys, key, real_key,
            biases, num_queries, num_keys, scale, num_heads, width, True, WITH_BIAS, CAUSAL, WIDTH, S_DOT, T_DOT,
        )  # fmt: skip
        s_max, s_sum = _grow(s_max, s_sum, s_products + added)
        t_max, t_sum = _grow(t_max, t_sum, t_products + added)
    s_log = s_max + tl.log(tl.maximum(s_sum, 1.0))  # less than 1 is 0: a row that sees nothing
    t_log = t_max + tl.log(tl.maximum(t_sum, 1.0))
    return s_log, t_log


@triton.jit(do_not_specialize=["num_queries", "num_keys"])  # compiled once for all lengths
def queries_kernel(
    s_query: tl.tensor, s_key: tl.tensor, t_query: tl.tensor, t_key: tl.tensor, bias_HR: tl.tensor,
    query_mask: tl.tensor, key_mask: tl.tensor, num_counted: tl.tensor, logs: tl.tensor,
    scale: tl.tensor, pull: tl.tensor,
    num_queries: tl.tensor, num_keys: tl.tensor, num_heads: tl.tensor, width: tl.tensor,
    partials: tl.tensor, gradient: tl.tensor,
    WITH_GRADIENT: tl.constexpr, WITH_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, S_DOT: tl.constexpr, T_DOT: tl.constexpr,
) -> None:  # fmt: skip
    """Logarithms of both normalisers, share of the loss and gradient, of BLOCK queries of one head."""
    item = tl.program_id(0)
    batch, head = (item // num_heads).to(tl.int64), item % num_heads
    first_query = (batch * num_queries * num_heads + head) * width
    first_key = (batch * num_keys * num_heads + head) * width
    biases = bias_HR + head * (num_queries + num_keys - 1) + num_queries - 1
    query = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(query_mask + batch * num_queries + query, mask=query < num_queries, other=0) != 0
    student = _rows(s_query + first_query, query, real, num_heads, width, WIDTH, S_DOT)
    teacher = _rows(t_query + first_query, query, real, num_heads, width, WIDTH, T_DOT)
    s_log, t_log = _normalisers(
        student, teacher, query, s_key + first_key, t_key + first_key, key_mask + batch * num_keys,
        biases, num_queries, num_keys, scale, num_heads, width, WITH_BIAS, CAUSAL, BLOCK, STEP, WIDTH, S_DOT, T_DOT,
    )  # fmt: skip
    loss = tl.zeros([BLOCK], dtype=tl.float32)
    result = tl.zeros([BLOCK, WIDTH], dtype=tl.float32)
    for tile in range(tl.cdiv(num_keys, STEP)):
        key = tile * STEP + tl.arange(0, STEP)
        real_key = tl.load(key_mask + batch * num_keys + key, mask=key < num_keys, other=0) != 0
        s_products, t_products, added, s_rows = _maps(
            student, teacher, query, s_key + first_key, t_key + first_key, key, real_key,
            biases, num_queries, num_keys, scale, num_heads, width, True, WITH_BIAS, CAUSAL, WIDTH, S_DOT, T_DOT,
        )  # fmt: skip
        probability = tl.exp(t_products + added - t_log[:, None])
        pull_of_scores = tl.exp(s_products + added - s_log[:, None]) - probability
        # what is added to both has no part in the difference, so that no key brings inf - inf. The pulls sum to 0, but
        # for the rounding of the logarithms, whose first order they take out of the loss
        difference = t_products - s_products - (t_log - s_log)[:, None]
        loss += tl.sum(probability * difference + pull_of_scores, axis=1)
        if WITH_GRADIENT:
            result += tl.dot(pull_of_scores.to(S_DOT), s_rows, input_precision="ieee")
    share = 1 / (tl.maximum(tl.load(num_counted), 1) * num_heads).to(tl.float32)
    loss = tl.where(real, loss, 0.0)
    tl.store(partials + item * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, axis=0) * share)
    if WITH_GRADIENT:
        own_logs = logs + item.to(tl.int64) * 2 * num_queries + query
        tl.store(own_logs, s_log, mask=query < num_queries)
        tl.store(own_logs + num_queries, t_log, mask=query < num_queries)
        result *= scale * pull * share
        _store_rows(gradient + first_query, query, result, real, num_queries, num_heads, width, WIDTH)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])  # compiled once for all lengths
def keys_kernel(
    s_query: tl.tensor, s_key: tl.tensor, t_query: tl.tensor, t_key: tl.tensor, bias_HR: tl.tensor,
    query_mask: tl.tensor, key_mask: tl.tensor, num_counted: tl.tensor, logs: tl.tensor,
    scale: tl.tensor, pull: tl.tensor,
    num_queries: tl.tensor, num_keys: tl.tensor, num_heads: tl.tensor, width: tl.tensor,
    gradient: tl.tensor,
    WITH_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, S_DOT: tl.constexpr, T_DOT: tl.constexpr,
) -> None:  # fmt: skip
    """Gradient of BLOCK keys of one head, from the normalisers that `queries_kernel` has left."""
    item = tl.program_id(0)
    batch, head = (item // num_heads).to(tl.int64), item % num_heads
    first_query = (batch * num_queries * num_heads + head) * width
    first_key = (batch * num_keys * num_heads + head) * width
    biases = bias_HR + head * (num_queries + num_keys - 1) + num_queries - 1
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(key_mask + batch * num_keys + key, mask=key < num_keys, other=0) != 0
    student = _rows(s_key + first_key, key, real, num_heads, width, WIDTH, S_DOT)
    teacher = _rows(t_key + first_key, key, real, num_heads, width, WIDTH, T_DOT)
    own_logs = logs + item.to(tl.int64) * 2 * num_queries
    result = tl.zeros([BLOCK, WIDTH], dtype=tl.float32)
    for tile in range(tl.cdiv(num_queries, STEP)):
        query = tile * STEP + tl.arange(0, STEP)
        real_query = tl.load(query_mask + batch * num_queries + query, mask=query < num_queries, other=0) != 0
        s_products, t_products, added, s_rows = _maps(
            student, teacher, key, s_query + first_query, t_query + first_query, query, real_query,
            biases, num_queries, num_keys, scale, num_heads, width, False, WITH_BIAS, CAUSAL, WIDTH, S_DOT, T_DOT,
        )  # fmt: skip
        s_log = tl.load(own_logs + query, mask=real_query, other=float("inf"))  # no probability of padded queries
        t_log = tl.load(own_logs + num_queries + query, mask=real_query, other=float("inf"))
        pull_of_scores = tl.exp(s_products + added - s_log[None, :]) - tl.exp(t_products + added - t_log[None, :])
        result += tl.dot(pull_of_scores.to(S_DOT), s_rows, input_precision="ieee")
    result *= scale * pull / (tl.maximum(tl.load(num_counted), 1) * num_heads).to(tl.float32)
    _store_rows(gradient + first_key, key, result, real, num_keys, num_heads, width, WIDTH)
