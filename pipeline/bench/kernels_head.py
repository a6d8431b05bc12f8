"""The vocabulary head's loss, forward and backward, against the ways in which others compute it.

Shapes: N tokens, D channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.bench import Measure
from pipeline.bench.timing import Step, median_ms, peak_mib, works
from pipeline.kernels import HeadObjective, head_loss

TASK, LOGIT = 0.5, 0.25
LOSS_RTOL = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CHUNK = 256  # tokens of TRL's chunks


class Case(NamedTuple):
    num_tokens: int
    width: int
    vocabulary: int
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = f"{self.num_tokens}x{self.width}x{self.vocabulary}"
        return f"{sizes} {str(self.dtype).removeprefix('torch.')}"


class Inputs(NamedTuple):
    student_ND: Tensor
    teacher_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor


Loss = Callable[[Inputs], Tensor]  # TASK x cross entropy + LOGIT x KL(teacher || student), means over tokens

GPU_CASES = [  # 8 x 512 and 8 x 128 tokens of T5-large, mT5-large, mT5-XL and mT5-XXL
    Case(4096, 1024, 32_128, torch.bfloat16),
    Case(4096, 1024, 250_112, torch.bfloat16),
    Case(4096, 2048, 250_112, torch.bfloat16),
    Case(4096, 4096, 250_112, torch.bfloat16),
    Case(1024, 1024, 250_112, torch.bfloat16),
]
CPU_CASES = [  # mT5-small, T5-large
    Case(256, 512, 250_112, torch.float32),
    Case(256, 1024, 32_128, torch.float32),
]


def make_inputs(case: Case, device: str) -> Inputs:
    """A student near its teacher, and logits with a deviation of about 4, as trained models have."""
    torch.manual_seed(0)
    teacher_ND = torch.randn(case.num_tokens, case.width, device=device)
    student_ND = teacher_ND + 0.3 * torch.randn(case.num_tokens, case.width, device=device)
    weight_VD = torch.randn(case.vocabulary, case.width, device=device).mul_(4 * case.width**-0.5)
    labels_N = torch.randint(case.vocabulary, (case.num_tokens,), device=device)
    states = [each.to(case.dtype) for each in (student_ND, teacher_ND, weight_VD)]
    return Inputs(states[0].requires_grad_(), states[1], states[2], labels_N)


def measure_case(case: Case, device_type: str, rounds: int) -> list[Measure]:
    """Time and peak memory of ours and of every baseline that runs here; ours must equal eager first."""
    inputs = make_inputs(case, device_type)
    device = inputs.student_ND.device
    with torch.no_grad():
        expected = eager(inputs)
        torch.testing.assert_close(ours(inputs), expected, rtol=LOSS_RTOL[case.dtype], atol=0.0)
    losses = {
        name: loss
        for name, loss in baselines(device_type, case.dtype).items()
        if works(name, partial(step, loss, inputs))
    }
    steps: dict[str, Step] = {name: partial(step, loss, inputs) for name, loss in {"ours": ours, **losses}.items()}
    memory = {name: peak_mib(run, device) for name, run in steps.items()}
    title = f"head_loss {case}"
    time_ms = median_ms(title, {**steps, "gemms": partial(bare_gemms, inputs)}, device, rounds)
    gradient_mib = inputs.student_ND.numel() * inputs.student_ND.element_size() / 2**20
    measures = []
    for name in losses:
        measures += [
            Measure("kernels", f"{title} time", time_ms["ours"], time_ms[name], name, "ms", time_ms["gemms"]),
            Measure("kernels", f"{title} memory", memory["ours"], memory[name], name, "MiB", gradient_mib),
        ]
    return measures


def step(loss: Loss, inputs: Inputs) -> object:
    return torch.autograd.grad(loss(inputs), inputs.student_ND)


def ours(inputs: Inputs) -> Tensor:
    objective = HeadObjective(TASK / len(inputs.labels_N), LOGIT / len(inputs.labels_N))
    return head_loss(*inputs, objective).share


def eager(inputs: Inputs, upcast: bool = True) -> Tensor:
    """What toolkits write: both logits, cross entropy, log-softmax of both, kl_div."""
    student_NV = functional.linear(inputs.student_ND, inputs.weight_VD)
    with torch.no_grad():
        teacher_NV = functional.linear(inputs.teacher_ND, inputs.weight_VD)
    if upcast:
        student_NV, teacher_NV = student_NV.float(), teacher_NV.float()
    task = functional.cross_entropy(student_NV, inputs.labels_N, reduction="sum")
    student_NV, teacher_NV = torch.log_softmax(student_NV, -1), torch.log_softmax(teacher_NV, -1)
    logit = functional.kl_div(student_NV, teacher_NV, reduction="sum", log_target=True)
    return (TASK * task + LOGIT * logit) / len(inputs.labels_N)


def chunked(inputs: Inputs) -> Tensor:
    """As TRL's trainers do: eager in chunks of tokens, each under activation checkpointing."""
    total = inputs.student_ND.new_zeros((), dtype=torch.float32)
    for first in range(0, len(inputs.labels_N), CHUNK):
        part = slice(first, first + CHUNK)
        few = Inputs(inputs.student_ND[part], inputs.teacher_ND[part], inputs.weight_VD, inputs.labels_N[part])
        share = len(few.labels_N) / len(inputs.labels_N)
        total = total + share * checkpoint(eager, few, use_reentrant=False)
    return total


def bare_gemms(inputs: Inputs) -> object:
    """The matrix products alone, each in one call: the floor."""
    student_NV = torch.mm(inputs.student_ND.detach(), inputs.weight_VD.t())
    gradient_ND = torch.mm(student_NV, inputs.weight_VD)
    del student_NV
    return gradient_ND, torch.mm(inputs.teacher_ND, inputs.weight_VD.t())


def baselines(device_type: str, dtype: torch.dtype) -> dict[str, Loss]:
    found: dict[str, Loss] = {"eager_fp32": eager, "trl_chunked": chunked}
    if dtype != torch.float32:
        found["eager_storage"] = partial(eager, upcast=False)
    if device_type == "cuda":
        torch.compiler.reset()  # or the next shapes would be compiled for any shape
        found["compile"] = torch.compile(eager)
        found |= {
            "liger_jsd": _liger_jsd,
            "liger_jsd_loss": _liger_jsd_loss,
            "liger_kl_div": _liger_kl_div,
            "orda": _orda,
        }
    return found


def _liger_jsd(inputs: Inputs) -> Tensor:
    """LigerFusedLinearJSD with beta 0: the divergence only."""
    loss: Any = import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.0)
    return LOGIT * loss(inputs.student_ND, inputs.weight_VD, inputs.teacher_ND, inputs.weight_VD)


def _liger_jsd_loss(inputs: Inputs) -> Tensor:
    """LigerFusedLinearJSDLoss, compiled, in chunks of 1,024: both terms, and a gradient for the head in any case."""
    loss: Any = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=TASK, weight_soft_loss=LOGIT, beta=0.0
    )
    return loss(inputs.student_ND, inputs.weight_VD, inputs.teacher_ND, inputs.weight_VD, inputs.labels_N)


def _liger_kl_div(inputs: Inputs) -> Tensor:
    """LigerFusedLinearKLDiv: the divergence only, to the teacher's distribution, which must exist whole."""
    function: Any = import_module("liger_kernel.ops.fused_linear_kl_div").LigerFusedLinearKLDivFunction
    with torch.no_grad():
        teacher_NV = functional.linear(inputs.teacher_ND, inputs.weight_VD).softmax(-1)
    return LOGIT * function.apply(inputs.student_ND, inputs.weight_VD, teacher_NV)


def _orda(inputs: Inputs) -> Tensor:
    """orda-kernel with a tied and frozen teacher: both terms."""
    orda: Any = import_module("orda_kernel")
    output = orda.distillation_loss(
        inputs.student_ND, inputs.weight_VD, inputs.labels_N, orda.TiedTeacher(hidden=inputs.teacher_ND),
        student_ce_weight=TASK, teacher_ce_weight=0.0, kl_weight=LOGIT,
    )  # fmt: skip
    return output.loss
