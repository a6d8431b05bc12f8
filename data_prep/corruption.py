"""T5's span corruption (Raffel et al. 2020, section 3.1.4), with randomness from counters: the same for one example
on any rank and after any restart.

Shapes: N segments, L tokens of a segment, S source and T target tokens, K masked spans of a segment.
"""

from __future__ import annotations

import numpy as np

from data_prep.partition import keyed_bits


def span_counts(num_tokens: int, noise_density: float, mean_span_tokens: float) -> tuple[int, int]:
    """(masked tokens, masked spans) of a segment; at least one of each, and at least one token is kept."""
    num_masked = min(max(round(num_tokens * noise_density), 1), num_tokens - 1)
    num_spans = max(round(num_masked / mean_span_tokens), 1)
    return num_masked, min(num_spans, num_tokens - num_masked)


def corrupted_lengths(num_tokens: int, noise_density: float, mean_span_tokens: float) -> tuple[int, int]:
    """(source, target) tokens of a corrupted segment, end-of-sequence included."""
    num_masked, num_spans = span_counts(num_tokens, noise_density, mean_span_tokens)
    return num_tokens - num_masked + num_spans + 1, num_masked + num_spans + 1


def segment_tokens(max_source_tokens: int, noise_density: float, mean_span_tokens: float) -> int:
    """Tokens of raw text that fill a source. ValueError where not even two fit."""
    num_tokens = 2
    while corrupted_lengths(num_tokens + 1, noise_density, mean_span_tokens)[0] <= max_source_tokens:
        num_tokens += 1
    if corrupted_lengths(num_tokens, noise_density, mean_span_tokens)[0] > max_source_tokens:
        raise ValueError(f"data.max_source_tokens is {max_source_tokens}: too short for span corruption; raise it")
    return num_tokens


def _parts(total: int, num_parts: int, keys_N: np.ndarray) -> np.ndarray:
    """Cut `total` into parts of at least one, all such cuts equally likely, int64 [N, num_parts]."""
    num_cuts = num_parts - 1
    chosen = np.tile(np.arange(num_cuts), (len(keys_N), 1))
    if 0 < num_cuts < total - 1:  # the places with the smallest random bits
        chosen = np.argpartition(keyed_bits(total - 1, keys_N), num_cuts - 1, axis=1)[:, :num_cuts]
    cuts = chosen + 1
    edges = np.concatenate(
        [np.zeros((len(keys_N), 1), int), np.sort(cuts, axis=1), np.full((len(keys_N), 1), total)], axis=1
    )
    return np.diff(edges, axis=1)


def corrupt(
    tokens_NL: np.ndarray,
    keys_N: np.ndarray,
    sentinels_K: np.ndarray,
    eos_id: int,
    noise_density: float,
    mean_span_tokens: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Sources [N, S] and targets [N, T] of segments of equal length; keys uint64 [N] choose the spans.

    Kept and masked spans alternate and a kept one comes first. In the source each masked span is one sentinel, in the
    target its sentinel is followed by its tokens; both end with end-of-sequence.
    """
    num_segments, num_tokens = tokens_NL.shape
    num_masked, num_spans = span_counts(num_tokens, noise_density, mean_span_tokens)
    if len(sentinels_K) < num_spans:
        raise ValueError(f"{num_spans} masked spans need as many sentinels, there are {len(sentinels_K)}")
    masked_NK = _parts(num_masked, num_spans, keys_N)
    kept_NK = _parts(num_tokens - num_masked, num_spans, ~keys_N)
    lengths = np.stack([kept_NK, masked_NK], axis=2).reshape(num_segments, -1)
    is_masked = np.tile([False, True], num_spans)
    mask_NL = np.repeat(np.tile(is_masked, num_segments), lengths.reshape(-1)).reshape(num_segments, num_tokens)
    begins_NL = mask_NL & ~np.pad(mask_NL, ((0, 0), (1, 0)))[:, :-1]
    sentinels_NK = np.broadcast_to(sentinels_K[:num_spans], (num_segments, num_spans))

    # Two slots for each token: its sentinel (used where a masked span begins), then the token itself.
    slots = np.zeros((num_segments, num_tokens, 2), dtype=np.int64)
    slots[..., 1] = tokens_NL
    slots[..., 0][begins_NL] = sentinels_NK.reshape(-1)
    in_source = np.stack([begins_NL, ~mask_NL], axis=2)
    in_target = np.stack([begins_NL, mask_NL], axis=2)
    end = np.full((num_segments, 1), eos_id)
    source = slots[in_source].reshape(num_segments, -1)
    target = slots[in_target].reshape(num_segments, -1)
    return np.concatenate([source, end], axis=1), np.concatenate([target, end], axis=1)
