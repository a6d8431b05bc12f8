"""Span corruption: T5's lengths, nothing lost, and all ways of placing the spans."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corruption import corrupt, corrupted_lengths, segment_tokens, span_counts
from data_prep.partition import mix

SENTINELS = np.arange(1000, 900, -1)
EOS = 1


def keys(*seeds: int) -> np.ndarray:
    return np.array([mix(seed) for seed in seeds], dtype=np.uint64)


@pytest.mark.parametrize(
    ("source", "raw", "target"), [(512, 568, 114), (114, 126, 26), (128, 141, 29), (256, 284, 58), (1024, 1137, 229)]
)
def test_lengths_are_those_of_t5(source: int, raw: int, target: int) -> None:
    assert segment_tokens(source, 0.15, 3.0) == raw
    assert corrupted_lengths(raw, 0.15, 3.0) == (source, target)


def test_a_source_too_short_for_two_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.max_source_tokens is 2: too short"):
        segment_tokens(2, 0.15, 3.0)


@settings(deadline=None)
@given(st.integers(2, 300), st.floats(0.01, 0.99), st.floats(1, 10), st.integers(0, 99))
def test_source_and_target_give_the_text_back(num_tokens: int, density: float, mean: float, seed: int) -> None:
    _, num_spans = span_counts(num_tokens, density, mean)
    sentinels = np.arange(10_000, 10_000 + num_spans)
    tokens = np.arange(100, 100 + num_tokens)[None]
    source, target = corrupt(tokens, keys(seed), sentinels, EOS, density, mean)
    assert (source.shape[1], target.shape[1]) == corrupted_lengths(num_tokens, density, mean)
    assert source[0, -1] == target[0, -1] == EOS
    masked: dict[int, list[int]] = {}
    for each in target[0, :-1].tolist():
        if each >= 10_000:
            masked[each] = []
        else:
            masked[list(masked)[-1]].append(each)
    assert list(masked) == sentinels.tolist(), "every sentinel once, in order"
    assert all(masked.values())
    restored = [token for each in source[0, :-1].tolist() for token in masked.get(each, [each])]
    assert restored == tokens[0].tolist()
    assert source[0, 0] < 10_000, "a kept span comes first"


def test_every_placing_of_the_spans_is_equally_likely() -> None:
    """8 tokens, 3 masked in 2 spans: 2 ways to cut the masked and 4 to cut the kept tokens."""
    tokens = np.tile(np.arange(8), (8000, 1)) + 100
    source, target = corrupt(tokens, keys(*range(8000)), SENTINELS, EOS, 3 / 8, 1.5)
    counts = Counter(zip(map(tuple, source.tolist()), map(tuple, target.tolist()), strict=True))
    assert len(counts) == 8
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_masks_depend_on_the_key_of_the_example_alone() -> None:
    tokens = np.arange(5 * 568).reshape(5, 568) + 2000
    together = corrupt(tokens, keys(*range(5)), SENTINELS, EOS, 0.15, 3.0)
    for row in range(5):
        alone = corrupt(tokens[row : row + 1], keys(row), SENTINELS, EOS, 0.15, 3.0)
        assert all(np.array_equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))
    other = corrupt(tokens[:1], keys(77), SENTINELS, EOS, 0.15, 3.0)
    assert not np.array_equal(other[0], together[0][:1])


def test_too_few_sentinels_are_refused() -> None:
    with pytest.raises(ValueError, match="28 masked spans need as many sentinels, there are 5"):
        corrupt(np.zeros((1, 568), dtype=int), keys(0), SENTINELS[:5], EOS, 0.15, 3.0)
