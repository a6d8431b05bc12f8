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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.config import BatchConfig, LoopConfig
from pipeline.footprint.sharding import AUTO, Sharding
from pipeline.spans import STACKS, Assembly, Span, students_of
from pipeline.world import World

GIB = 2**30
SHARE_OF_MEMORY = 0.85
"""What `auto` fills of a device at most: the rest is for the allocator and for buffers of libraries."""
BYTES_IN_CHECKPOINT = 12
"""Of a trainable parameter: weight and two moments in fp32."""
LOGIT_CHUNK_BYTES = 2**30
"""Logits that pipeline/kernels holds at once on a GPU; fewer on a CPU."""
OVER_SOURCE = re.compile(r"(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj)\.")
"""Names of the weights that make keys and values of cross-attention, in T5 and BART."""
OVER_BOTH = re.compile(r"self_attn\.[kv]_proj\.")
"""Names of those that make them of both texts, in a decoder layer that has none for the source alone: T5Gemma 2's."""
GPU_CANDIDATES = ("zero2_replicated", "zero3_hpz", "zero3", "zero3_offload")
CPU_CANDIDATES = ("zero2_cpu", "zero3_cpu")
"""Configurations for GPUs from the least traffic to the least memory."""


@dataclass(frozen=True)
class Leaf:
    """One layer that is gathered as a whole."""

    stack: str
    num_parameters: int
    trained: bool
    width: int
    """Features into and out of its linear maps: elements that backward keeps for each token."""
    num_over_source: int = 0
    """Of a decoder layer's parameters those that read the encoder's output: keys and values of cross-attention."""
    num_over_both: int = 0
    """Of these those that read the decoder's own states, too."""

    def multiplied(self, num_source_tokens: int, num_target_tokens: int) -> int:
        """Parameters x tokens that they are applied to."""
        if self.stack == "encoder":
            return self.num_parameters * num_source_tokens
        rest = self.num_parameters - self.num_over_source + self.num_over_both
        return rest * num_target_tokens + self.num_over_source * num_source_tokens


@dataclass(frozen=True)
class Sizes:
    """What a module is made of."""

    leaves: tuple[Leaf, ...]
    rest: tuple[int, ...]
    """Sizes of the parameters outside leaves: embeddings, position biases, last norms, head."""
    num_trained_of_rest: int
    vocabulary: int
    draws: tuple[Assembly, ...] = ()
    """Of the replacing phase over modular layers: the dearest that share a micro-batch."""

    @property
    def num_trained(self) -> int:
        """P_m."""
        return sum(leaf.num_parameters for leaf in self.leaves if leaf.trained) + self.num_trained_of_rest

    @property
    def num_frozen(self) -> int:
        """P_f."""
        return sum(leaf.num_parameters for leaf in self.leaves) + sum(self.rest) - self.num_trained

    @property
    def largest_leaf(self) -> int:
        return max(leaf.num_parameters for leaf in self.leaves)

    @property
    def largest_trained_leaf(self) -> int:
        return max(leaf.num_parameters for leaf in self.leaves if leaf.trained)

    @property
    def largest_trained(self) -> int:
        """Of the parameters outside leaves, such as a head, where these are trained; those inside are smaller than any
        buffer."""
        return max(self.rest) if self.num_trained_of_rest else 0


def sizes_of(module: nn.Module, leaf_classes: Sequence[type[nn.Module]]) -> Sizes:
    """Count a module; its parameters may be on the meta device or spread over ranks already."""
    leaves: list[Leaf] = []
    inside: set[int] = set()
    modules: dict[str, nn.Module] = dict(module.named_modules())
    for name in [name for name, each in modules.items() if isinstance(each, tuple(leaf_classes))]:
        leaf = modules[name]
        parameters = list(leaf.parameters())
        inside |= {id(parameter) for parameter in parameters}
        width = sum(each.in_features + each.out_features for each in leaf.modules() if isinstance(each, nn.Linear))
        stack = "decoder" if "decoder" in name.split(".") else "encoder"
        count = sum(map(_num_elements, parameters))
        over_source = _num_named(leaf, OVER_SOURCE)
        over_both = _num_named(leaf, OVER_BOTH) if stack == "decoder" and not over_source else 0
        trained = any(parameter.requires_grad for parameter in parameters)
        leaves.append(Leaf(stack, count, trained, width, over_source + over_both, over_both))
    rest = [parameter for parameter in module.parameters() if id(parameter) not in inside]
    largest: Any = max(rest, key=_num_elements)
    return Sizes(
        leaves=tuple(leaves),
        rest=tuple(map(_num_elements, rest)),
        num_trained_of_rest=sum(_num_elements(each) for each in rest if each.requires_grad),
        vocabulary=getattr(largest, "ds_shape", largest.shape)[0],
    )


def _num_named(leaf: nn.Module, pattern: re.Pattern[str]) -> int:
    return sum(_num_elements(each) for name, each in leaf.named_parameters() if pattern.search(name))


def _num_elements(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest, by what they are for."""

    device: Mapping[str, float]
    host: Mapping[str, float]
    """What offloading and saving beside training keep in the memory of the host of a GPU."""

    @property
    def device_total(self) -> float:
        return sum(self.device.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


def memory(
    sizes: Sizes, sharding: Sharding, tokens_per_micro_batch: int, *, recompute: bool, save_beside: bool = False
) -> Memory:
    """Memory of one rank while it trains with AdamW.

    Args:
        tokens_per_micro_batch: padded source and target tokens of a micro-batch.
        recompute: activations inside layers are computed again in backward.
        save_beside: a copy of what a checkpoint holds is written while training goes on.
    """
    e, trained = sharding.element_bytes, sizes.num_trained
    total = sizes.num_frozen + trained
    share = trained / sharding.num_ranks
    device: dict[str, float] = {}
    host: dict[str, float] = {}
    held, stepped = (
        (host if sharding.offloads_parameters else device),
        (host if sharding.offloads_optimizer else device),
    )
    held["weights"] = e * (total / sharding.num_ranks if sharding.stage == 3 else total)
    if sharding.has_hpz:
        device["weights kept in the node"] = e * total / sharding.ranks_per_node
    stepped["fp32 weights and moments"] = 12 * share
    stepped["gradients"] = 4 * share
    if save_beside:
        (host if sharding.is_gpu else device)["copy for saving"] = BYTES_IN_CHECKPOINT * share
    bucket = max(sharding.reduce_bucket, sizes.largest_trained if sharding.stage == 2 else 0)  # see training/engine.py
    device["reduction buffer"] = e * sharding.num_buckets * min(bucket, max(trained, sizes.largest_trained_leaf))
    # the optimizer steps with a copy of the gradients, when there are no activations; offloaded, the copy stays
    copied = {"gradients to step with": 4 * (min(share, sharding.sub_group) if sharding.stage == 3 else share)}
    passes = _passes(sizes, sharding, tokens_per_micro_batch, recompute=recompute)
    if sharding.offloads_optimizer:
        stepped["gradients"] *= 2
    elif sum(copied.values()) > sum(passes.values()):
        passes = copied
    return Memory(device | passes, host)


def _passes(sizes: Sizes, sharding: Sharding, tokens_per_micro_batch: int, *, recompute: bool) -> dict[str, float]:
    """Bytes that forward and backward take for a while."""
    e = sharding.element_bytes
    found: dict[str, float] = {}
    copies = 1 if sharding.is_gpu else 2  # gloo receives into a buffer of its own
    found["gradients of a layer"] = e * copies * sizes.largest_trained_leaf
    if sharding.stage == 3:
        largest = max([sizes.largest_leaf, *sizes.rest])
        live = min(sharding.max_live + largest, sizes.num_frozen + sizes.num_trained)
        found["gathered layers"] = e * (live + (copies - 1) * largest)
    if sharding.keeps_weights and not recompute:
        # in the local phase of all modular layers, in replacing of those on a path: as much as a teacher's at most for
        # one draw, and for several of each layer once
        used = [_kind(sizes, layer).num_parameters for layer in set(students_of(sizes.draws))]
        found["weights kept for backward"] = e * max(
            sum(used),
            *(
                sum(leaf.num_parameters for leaf in sizes.leaves if leaf.trained is trained)
                for trained in (True, False)
            ),
        )
    found["activations"] = e * _activations(sizes, tokens_per_micro_batch, recompute=recompute)
    logits = sizes.vocabulary * tokens_per_micro_batch / 2
    # a teacher in training holds them whole, with fp32 log-probabilities and gradients; over modular layers the fused
    # loss makes those of student and teacher in chunks
    found["logits"] = (e + 12) * logits if sizes.num_trained_of_rest else min(2 * e * logits, LOGIT_CHUNK_BYTES)
    return found


def _activations(sizes: Sizes, num_tokens: int, *, recompute: bool) -> float:
    """Elements that backward needs. The longest path holds all layers of a kind, several draws those that are computed
    for them; without recomputation each keeps what goes into and comes out of its linear maps, with it only its input,
    and one layer at a time the rest."""
    drawn = drawn_layers(sizes, sizes.draws)
    kinds = {(leaf.stack, leaf.trained) for leaf in sizes.leaves}
    paths = [[leaf for leaf in sizes.leaves if (leaf.stack, leaf.trained) == kind] for kind in kinds]
    paths += [[leaf for leaf in drawn if leaf.stack == stack] for stack in STACKS]
    widest = max(leaf.width for leaf in sizes.leaves)
    if recompute:
        return num_tokens * (max(map(len, paths)) * widest / 8 + widest)
    return num_tokens * max(sum(leaf.width for leaf in path) for path in paths)


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


def drawn_layers(sizes: Sizes, draws: Sequence[Assembly]) -> list[Leaf]:
    """The layers that are computed for the students of draws, each as often as it is."""
    return [_kind(sizes, layer) for layer in students_of(draws)]


def _kind(sizes: Sizes, layer: tuple[str, Span]) -> Leaf:
    """A layer of the same stack and kind, which are all of one size."""
    stack, span = layer
    return next(leaf for leaf in sizes.leaves if (leaf.stack, leaf.trained) == (stack, span.num_layers > 1))


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
