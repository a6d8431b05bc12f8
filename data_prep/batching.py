"""Bucketing on both lengths: which examples share a micro-batch, so that little of it is padding."""

from __future__ import annotations

import numpy as np

_BUCKETS_PER_DOUBLING = 8  # of source lengths: finer fills the encoder better, coarser the decoder


def sort_by_lengths(source_lengths: np.ndarray, target_lengths: np.ndarray) -> np.ndarray:
    """An order in which neighbours are alike in both lengths, int64 [n].

    By bucket of source lengths, inside a bucket by target length, up in one bucket and down in the next, so that
    a micro-batch that spans two buckets still holds similar targets.
    """
    fraction, exponent = np.frexp(source_lengths)  # exact, unlike a logarithm: source = fraction * 2^exponent
    bucket = exponent * _BUCKETS_PER_DOUBLING + np.floor((2 * fraction - 1) * _BUCKETS_PER_DOUBLING).astype(int)
    return np.lexsort((source_lengths, np.where(bucket % 2 == 0, target_lengths, -target_lengths), bucket))


def cut_by_tokens(source_lengths: np.ndarray, target_lengths: np.ndarray, max_tokens: int) -> list[slice]:
    """Cut examples in their order into micro-batches of at most `max_tokens` padded tokens, both sides together."""
    cuts: list[slice] = []
    first = longest_source = longest_target = 0
    for position, (source, target) in enumerate(zip(source_lengths.tolist(), target_lengths.tolist(), strict=True)):
        longest_source, longest_target = max(longest_source, source), max(longest_target, target)
        if (position + 1 - first) * (longest_source + longest_target) > max_tokens:
            cuts.append(slice(first, position))
            first, longest_source, longest_target = position, source, target
    return [*cuts, slice(first, len(source_lengths))]


def cut_by_examples(num_examples: int, examples_per_micro_batch: int) -> list[slice]:
    """Cut examples in their order into micro-batches of a fixed number; the last one may have fewer."""
    starts = range(0, num_examples, examples_per_micro_batch)
    return [slice(start, min(start + examples_per_micro_batch, num_examples)) for start in starts]


def padding_efficiency(lengths: np.ndarray, cuts: list[slice]) -> float:
    """Real tokens over padded tokens of one side, examples in the order of the micro-batches."""
    padded = sum((cut.stop - cut.start) * int(lengths[cut].max()) for cut in cuts)
    return int(lengths.sum()) / padded
