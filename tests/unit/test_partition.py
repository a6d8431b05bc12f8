"""Units, ranks and keyed permutations: every record once, whatever the world."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.partition import mix, permutation, units_of_rank, units_of_split


@given(st.integers(0, 5000), st.integers(1, 700))
def test_units_cover_every_record_once_in_order(num_records: int, records_per_unit: int) -> None:
    units = units_of_split("train", num_records, records_per_unit)
    assert [record for unit in units for record in range(unit.start, unit.stop)] == list(range(num_records))
    assert [unit.index for unit in units] == list(range(len(units)))
    assert all(unit.stop - unit.start == records_per_unit for unit in units[:-1])


@given(st.integers(0, 500), st.integers(1, 64))
def test_ranks_share_the_units_out(num_units: int, world: int) -> None:
    shares = [list(units_of_rank(num_units, rank, world)) for rank in range(world)]
    assert sorted(unit for share in shares for unit in share) == list(range(num_units))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="outside a world of 2"):
        units_of_rank(4, rank, 2)


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
