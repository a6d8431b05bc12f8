"""Ranks, mixtures and keyed permutations: every item once, whatever the world."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.partition import Mixture, mix, permutation, share_of_rank


@given(st.integers(0, 500), st.integers(1, 64))
def test_ranks_share_the_items_out_in_runs(num_items: int, world: int) -> None:
    shares = [list(share_of_rank(num_items, rank, world)) for rank in range(world)]
    assert [item for share in shares for item in share] == list(range(num_items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="outside a world of 2"):
        share_of_rank(4, rank, 2)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 5000))
def test_a_mixture_keeps_its_weights_exactly(weights: list[int], start: int) -> None:
    mixture = Mixture(weights)
    counts = np.array([mixture.taken(start + position) for position in range(mixture.cycle + 2)])
    steps = np.diff(counts, axis=0)
    assert (steps.sum(axis=1) == 1).all()
    assert (steps >= 0).all()
    assert (counts[mixture.cycle] - counts[0]).tolist() == weights
    shares = counts - np.outer(np.arange(start, start + mixture.cycle + 2), np.array(weights) / sum(weights))
    assert np.abs(shares).max() < len(weights)  # at no point far from the exact share


@given(st.integers(0, 3000), st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_a_permutation_holds_every_item_and_repeats(num_items: int, seed: int, epoch: int) -> None:
    order = permutation(num_items, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_items))
    assert np.array_equal(order, permutation(num_items, seed, epoch))


def test_a_permutation_depends_on_every_part_of_its_key() -> None:
    orders = {tuple(permutation(50, *key)) for key in ((0, 0), (0, 1), (1, 0), (0, 0, 0), (2**40, 0))}
    assert len(orders) == 5


def test_the_order_of_a_cursor_never_changes() -> None:
    assert mix(0) == 16294208416658607535  # the first output of SplitMix64 for seed 0, from the reference code
    assert permutation(8, 0, 0).tolist() == [0, 7, 2, 5, 4, 6, 3, 1]


def test_first_places_are_even() -> None:
    firsts = np.bincount([permutation(10, seed, 0)[0] for seed in range(4000)], minlength=10)
    assert firsts.min() > 330
    assert firsts.max() < 470
