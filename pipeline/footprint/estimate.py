"""Arithmetic of a training run: memory, bytes moved and useful FLOPs, from what is trained, the batch and the ranks.

P is a number of parameters (P_f frozen, P_m trained), N the ranks, e the bytes of an element (2 in bf16, 4 in fp32).
Per rank, with AdamW:

    stage 3    e (P_f + P_m) / N  weights,   16 P_m / N  fp32 weights, two moments and gradients, and beside them at the
               fullest either what a pass holds or a copy of the gradients that the optimizer steps with
    stage 2    e (P_f + P_m)      weights,   16 P_m / N  the same
    hpZ        adds e (P_f + P_m) / (ranks of a node)
    traffic    stage 3: each leaf gathered once forward and once backward, and P_m reduced, in each micro-batch
               stage 2: P_m reduced in each micro-batch, P_m gathered in each step

(Rajbhandari et al. 2020, sections 5 and 7; hpZ: Wang et al. 2023.) P_m is counted, not assumed: granularities 2, 3 and
6 together train about as many layers as the teacher has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import BatchConfig, LoopConfig
from pipeline.footprint.rank_memory import BYTES_IN_CHECKPOINT, memory
from pipeline.footprint.sharding import AUTO, Sharding
from pipeline.footprint.sizes import Sizes, drawn_layers
from pipeline.spans import Assembly
from pipeline.world import World

GIB = 2**30
SHARE_OF_MEMORY = 0.85
"""What `auto` fills of a device at most: the rest is for the allocator and for buffers of libraries."""
GPU_CANDIDATES = ("zero2_replicated", "zero3_hpz", "zero3", "zero3_offload")
CPU_CANDIDATES = ("zero2_cpu", "zero3_cpu")
"""Configurations for GPUs from the least traffic to the least memory."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in a step, apart from its own share: each counts (N-1)/N of a tensor."""

    gathered: float
    reduced: float
    between_nodes: float
    """Part of both that crosses nodes."""


def traffic(sizes: Sizes, sharding: Sharding, num_micro_batches: int) -> Traffic:
    """Traffic of one step in the replacing phase.

    Args:
        num_micro_batches: micro-batches of one rank in a step.
    """
    e, n, trained = sharding.element_bytes, sharding.num_ranks, sizes.num_trained
    of_others = (n - 1) / n
    reduced = e * trained * num_micro_batches * of_others
    if sharding.stage == 2:
        gathered = e * trained * of_others
    else:
        gathered = 2 * e * (sizes.num_frozen + trained) * num_micro_batches * of_others
    nodes = max(1, n // sharding.ranks_per_node)
    if nodes == 1:
        return Traffic(gathered, reduced, 0.0)
    # what a node holds of itself need not cross
    crossing = (nodes - 1) / nodes / of_others
    if sharding.has_hpz:
        first_gather = e * trained * of_others  # frozen weights cross once in a run, trained ones after each step
        return Traffic(gathered, reduced, (first_gather + reduced) * crossing)
    return Traffic(gathered, reduced, (gathered + reduced) * crossing)


def useful_flops(sizes: Sizes, num_source_tokens: int, num_target_tokens: int, draws: Sequence[Assembly]) -> float:
    """FLOPs that a micro-batch needs in the replacing phase. Attention scores and embeddings are left out.

    Per parameter and token: 2 for the teacher, 2 for a student, 2 for its backward through a frozen layer, 4 through a
    modular one. The head makes logits of the teacher once, and logits and gradients of each student.
    """
    tokens = num_source_tokens, num_target_tokens
    teacher = _flops_of_leaves(sizes, tokens, frozen=2, trained=0)
    students = sum((6 if leaf.trained else 4) * leaf.multiplied(*tokens) for leaf in drawn_layers(sizes, draws))
    return teacher + students + (2 + 4 * len(set(draws))) * max(sizes.rest) * num_target_tokens


def local_flops(sizes: Sizes, num_source_tokens: int, num_target_tokens: int) -> float:
    """FLOPs of a micro-batch in the local phase: the teacher once, every modular layer there and back, and no head. The
    encoder's output is the teacher's, which takes no gradient."""
    no_gradient = sum(2 * leaf.num_over_source * num_source_tokens for leaf in sizes.leaves if leaf.trained)
    return _flops_of_leaves(sizes, (num_source_tokens, num_target_tokens), frozen=2, trained=6) - no_gradient


def training_flops(sizes: Sizes, num_source_tokens: int, num_target_tokens: int) -> float:
    """FLOPs of a micro-batch where a whole model trains on its head's distribution; frozen layers beside it are those
    of a teacher, whose head runs, too."""
    has_teacher = any(not leaf.trained for leaf in sizes.leaves)
    head = (6 + 2 * has_teacher) * max(sizes.rest) * num_target_tokens
    return _flops_of_leaves(sizes, (num_source_tokens, num_target_tokens), frozen=2, trained=6) + head


def _flops_of_leaves(sizes: Sizes, tokens: tuple[int, int], *, frozen: int, trained: int) -> float:
    """FLOPs of every layer, by FLOPs of a parameter and token."""
    return sum((trained if leaf.trained else frozen) * leaf.multiplied(*tokens) for leaf in sizes.leaves)


@dataclass(frozen=True)
class Machine:
    """What the ranks run on."""

    num_ranks: int
    ranks_per_node: int
    device_bytes: float
    """Memory of one rank's device."""
    is_gpu: bool

    @staticmethod
    def of(world: World) -> Machine:
        return Machine(world.size, world.ranks_per_node, world.device_bytes, world.device.type == "cuda")


def choose_ds_config(
    sizes: Sizes, machine: Machine, tokens_per_micro_batch: int, *, recompute: bool
) -> tuple[str, str]:
    """(name in ds_configs/, the reason in a sentence): the least traffic that fits into memory.

    Raises:
        ValueError: nothing fits.
    """
    limit = SHARE_OF_MEMORY * machine.device_bytes
    too_large: list[str] = []
    for name in GPU_CANDIDATES if machine.is_gpu else CPU_CANDIDATES:
        if name == "zero3_hpz" and machine.num_ranks <= machine.ranks_per_node:
            continue  # a node of its own has nothing to keep inside
        sharding = Sharding.of(name, machine.num_ranks, machine.ranks_per_node, is_gpu=machine.is_gpu)
        needed = memory(sizes, sharding, tokens_per_micro_batch, recompute=recompute).device_total
        if needed <= limit:
            reason = f"of those that fit into {limit / GIB:.1f} GiB it sends least between ranks"
            return name, reason + (f" (too large: {', '.join(too_large)})" if too_large else "")
        too_large.append(f"{name} ({needed / GIB:.1f} GiB)")
    raise ValueError(
        f"nothing fits into {limit / GIB:.1f} GiB a device: {', '.join(too_large)}; use more ranks, fewer "
        "tokens_per_micro_batch, fewer granularities, or loop.recompute_activations"
    )


def summary(sizes: Sizes, sharding: Sharding, batch: BatchConfig, loop: LoopConfig, reason: str) -> list[str]:
    """Short lines for people on what a run trains and needs; `python -m pipeline estimate` tells the rest."""
    recompute = loop.recompute_activations
    needs = memory(sizes, sharding, batch.tokens_per_micro_batch, recompute=recompute, save_beside=loop.save_beside)
    num_layers = sum(leaf.trained for leaf in sizes.leaves)
    beside = f" and {readable(needs.host_total)} of host memory" if needs.host else ""
    around = " and around them" if sizes.num_trained_of_rest else ""
    return [
        f"{sizes.num_trained:,} parameters in {num_layers} layers{around} are trained; {sizes.num_frozen:,} are frozen",
        f"DeepSpeed configuration {sharding.name}, {reason}",
        f"{sharding.num_ranks} rank{'s' * (sharding.num_ranks > 1)}: each needs {readable(needs.device_total)} of "
        f"memory{beside}; a checkpoint takes {readable(BYTES_IN_CHECKPOINT * sizes.num_trained)}",
    ]


def readable(num_bytes: float) -> str:
    """A number of bytes for people."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def plan(sizes: Sizes, machine: Machine, batch: BatchConfig, loop: LoopConfig) -> tuple[str, list[str]]:
    """(name of the DeepSpeed configuration, with `auto` decided; short lines for people).

    Raises:
        ValueError: `auto` finds nothing that fits, or there is no such configuration.
    """
    name, reason = loop.ds_config, "as the recipe says"
    if name == AUTO:
        name, reason = choose_ds_config(
            sizes, machine, batch.tokens_per_micro_batch, recompute=loop.recompute_activations
        )
        reason = f"chosen by auto: {reason}"
    sharding = Sharding.of(name, machine.num_ranks, machine.ranks_per_node, is_gpu=machine.is_gpu)
    return name, summary(sizes, sharding, batch, loop, reason)
