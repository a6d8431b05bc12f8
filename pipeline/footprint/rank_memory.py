"""Memory of a rank while it trains, by what it is for: see pipeline.footprint.estimate for the symbols."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.footprint.sharding import Sharding
from pipeline.footprint.sizes import Sizes, drawn_layers
from pipeline.spans import STACKS, students_of

BYTES_IN_CHECKPOINT = 12
"""Of a trainable parameter: weight and two moments in fp32."""
LOGIT_CHUNK_BYTES = 2**30
"""Logits that pipeline/kernels holds at once on a GPU; fewer on a CPU."""


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
    """Memory of one rank while it trains with AdamW. What dropout keeps is left out.

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
        used = [sizes.kind(layer).num_parameters for layer in set(students_of(sizes.draws))]
        found["weights kept for backward"] = e * max(
            sum(used),
            *(
                sum(leaf.num_parameters for leaf in sizes.leaves if leaf.trained is trained)
                for trained in (True, False)
            ),
        )
    found["activations"] = e * _activations(sizes, tokens_per_micro_batch, recompute=recompute)
    if sizes.num_bias_heads:
        found["attention biases"] = e * _biases(sizes, tokens_per_micro_batch, recompute=recompute)
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


def _biases(sizes: Sizes, num_tokens: int, *, recompute: bool) -> float:
    """Elements of position biases with the mask of each example, at most: where targets are short, nearly all tokens
    are of sources, and each has one for every head and token of its source.

    A whole model of transformers makes them in every layer, and zeros of that shape for cross-attention. Students of
    modular layers take the encoder's from one tensor, repeated for every number of them that goes through a layer
    together, or one in each layer that has biases of its own. The decoder's are the same for all examples."""
    source, target = sizes.longest
    of_encoder, of_decoder = (sizes.num_bias_heads * each for each in (source * num_tokens, target * target))
    depths = Counter(leaf.stack for leaf in sizes.leaves if leaf.trained)
    depth = max(depths.values())
    if sizes.num_trained_of_rest:
        # made again in backward, one layer's at a time: the bias, its gradient and that of what the mask is put into
        return 3 * of_encoder if recompute else depth * of_encoder + depths["decoder"] * of_decoder
    together = Counter(students_of(sizes.draws))
    in_encoder = {layer: count for layer, count in together.items() if layer[0] == "encoder"}
    if any(leaf.has_bias for leaf in sizes.leaves) and not recompute:
        return max(depths["encoder"], sum(in_encoder.values())) * of_encoder + depth * of_decoder
    return sum({1, *in_encoder.values()}) * of_encoder + of_decoder
