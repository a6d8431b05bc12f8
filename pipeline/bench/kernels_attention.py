"""The attention loss, forward and backward, against code that holds whole attention maps.

Shapes: P pairs, B batch, Q queries, S keys, H heads, K width of a head, N = Q + S - 1 distances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.bench import Measure
from pipeline.bench.timing import Step, median_ms, peak_mib, works
from pipeline.kernels import AttentionPair, attention_loss, distances, position_bias
from pipeline.kernels.attention import cpu as in_chunks

Loss = Callable[[Sequence[AttentionPair]], Tensor]  # the sum over pairs, times WEIGHT

WEIGHT = 0.25
LOSS_RTOL = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    kind: Literal["encoder", "decoder", "cross"]  # self-attention with bias, and causal; without bias
    num_pairs: int
    shape_BQSHK: tuple[int, int, int, int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape_BQSHK))
        return f"{self.kind} {self.num_pairs}x{sizes} {str(self.dtype).removeprefix('torch.')}"


GPU_CASES = [  # T5-large; the pairs of granularity 2
    Case("encoder", 12, (8, 512, 512, 16, 64), torch.bfloat16),
    Case("decoder", 12, (8, 512, 512, 16, 64), torch.bfloat16),
    Case("cross", 12, (8, 512, 512, 16, 64), torch.bfloat16),
    Case("cross", 12, (8, 128, 512, 16, 64), torch.bfloat16),
    Case("encoder", 12, (2, 2048, 2048, 16, 64), torch.bfloat16),
]
CPU_CASES = [  # T5-small
    Case("encoder", 3, (4, 128, 128, 8, 64), torch.float32),
    Case("cross", 3, (4, 32, 128, 8, 64), torch.float32),
    Case("encoder", 3, (2, 512, 512, 8, 64), torch.float32),
]


def make_pairs(case: Case, device: str, valid: float) -> list[AttentionPair]:
    """Students near their teachers; pairs share masks and bias, as the layers of a stack do."""
    torch.manual_seed(0)
    num_batch, num_queries, num_keys, num_heads, width = case.shape_BQSHK
    query_mask_BQ, key_mask_BS = (
        (torch.arange(length, device=device) < round(valid * length)).expand(num_batch, length).contiguous()
        for length in (num_queries, num_keys)
    )
    bias_HN = None
    if case.kind != "cross":
        bias_HN = torch.randn(num_heads, num_queries + num_keys - 1, device=device).to(case.dtype)
    pairs = []
    for _ in range(case.num_pairs):
        teachers = [torch.randn(num_batch, n, num_heads, width, device=device) for n in (num_queries, num_keys)]
        student_query, student_key = (
            (state + 0.3 * torch.randn_like(state)).to(case.dtype).requires_grad_() for state in teachers
        )
        teacher_query, teacher_key = (state.to(case.dtype) for state in teachers)
        pair = AttentionPair(
            student_query, student_key, teacher_query, teacher_key, query_mask_BQ, key_mask_BS, bias_HN,
            case.kind == "decoder", width**-0.5,
        )  # fmt: skip
        pairs.append(pair)
    return pairs


def measure_case(case: Case, device_type: str, valid: float, rounds: int) -> list[Measure]:
    """Time and peak memory of ours and of every baseline; ours must equal the definition first."""
    pairs = make_pairs(case, device_type, valid)
    device = pairs[0].student_query_BQHK.device
    with torch.no_grad():
        expected = WEIGHT * attention_loss(pairs, eager=True).loss_P.sum()
        torch.testing.assert_close(ours(pairs), expected, rtol=LOSS_RTOL[case.dtype], atol=0.0)
    bias_HQS = whole_bias(pairs[0])
    losses: dict[str, Loss] = {"ours": ours, "eager": partial(eager, bias_HQS=bias_HQS)}
    if device.type == "cuda":
        torch.compiler.reset()  # or the next shapes would be compiled for any shape
        losses |= {"compile": partial(torch.compile(eager), bias_HQS=bias_HQS), "chunks": chunks}
    steps: dict[str, Step] = {name: partial(step, loss, pairs) for name, loss in losses.items()}
    steps = {name: run for name, run in steps.items() if works(name, run)}
    memory = {name: peak_mib(run, device) for name, run in steps.items()}
    title = f"attention_loss {case}"
    time_ms = median_ms(title, {**steps, "products": partial(bare_products, pairs)}, device, rounds)
    gradient_mib = sum(state.nbytes for pair in pairs for state in pair[:2]) / 2**20
    measures = []
    for name in memory:
        if name != "ours":
            measures += [
                Measure("kernels", f"{title} time", time_ms["ours"], time_ms[name], name, "ms", time_ms["products"]),
                Measure("kernels", f"{title} memory", memory["ours"], memory[name], name, "MiB", gradient_mib),
            ]
    return measures


def step(loss: Loss, pairs: Sequence[AttentionPair]) -> object:
    return torch.autograd.grad(loss(pairs), [state for pair in pairs for state in pair[:2]])


def ours(pairs: Sequence[AttentionPair]) -> Tensor:
    return attention_loss(pairs, WEIGHT).share_P.sum()


def chunks(pairs: Sequence[AttentionPair]) -> Tensor:
    return in_chunks.attention_loss(pairs, WEIGHT).share_P.sum()


def whole_bias(pair: AttentionPair) -> Tensor | None:
    """The bias as T5 in transformers hands it to its layers: made once, for all of them."""
    return position_bias(pair.bias_HR, pair, pair.bias_HR.dtype) if pair.bias_HR is not None else None


def eager(pairs: Sequence[AttentionPair], bias_HQS: Tensor | None) -> Tensor:
    """What toolkits write: maps of both, log-softmax in fp32, kl_div, times the mask, over the count."""
    losses = []
    for pair in pairs:
        hidden_BHQS = ~pair.key_mask_BS[:, None, None, :]
        if pair.causal:
            hidden_BHQS = hidden_BHQS | (distances(pair) > 0)
        logs = []
        for query_BQHK, key_BSHK in (pair[0:2], pair[2:4]):
            scores_BHQS = query_BQHK.transpose(1, 2) @ key_BSHK.permute(0, 2, 3, 1) * pair.scale
            if bias_HQS is not None:
                scores_BHQS = scores_BHQS + bias_HQS
            scores_BHQS = scores_BHQS.masked_fill(hidden_BHQS, torch.finfo(scores_BHQS.dtype).min)
            logs.append(torch.log_softmax(scores_BHQS.float(), dim=-1))
        terms_BHQ = functional.kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(-1)
        count = pair.query_mask_BQ.sum() * terms_BHQ.shape[1]
        losses.append((terms_BHQ * pair.query_mask_BQ[:, None]).sum() / count)
    return WEIGHT * torch.stack(losses).sum()


def bare_products(pairs: Sequence[AttentionPair]) -> object:
    """The four matrix products of each pair that no way to the gradients goes without: both maps, both gradients."""
    for pair in pairs:
        student_query, student_key, teacher_query, teacher_key = (state.detach().transpose(1, 2) for state in pair[:4])
        student_map = student_query @ student_key.transpose(-1, -2)
        teacher_map = teacher_query @ teacher_key.transpose(-1, -2)
        student_map @ student_key, teacher_map.transpose(-1, -2) @ student_query
    return None
