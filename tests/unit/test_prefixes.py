"""Trees of common prefixes: every path gets what it would get alone, for no more calls than there are prefixes."""

from __future__ import annotations

import weakref

from hypothesis import given
from hypothesis import strategies as st

from pipeline.spans.prefixes import count_layers, count_prefixes, walk
from pipeline.spans.spans import modular_spans, pure_tiling, tilings

PATHS = st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=12)


@given(PATHS)
def test_every_path_gets_what_it_gets_alone_for_one_call_a_prefix(paths):
    calls = []

    def call(state, layer):
        calls.append((state, layer))
        return (*state, layer)

    found = list(walk(paths, (), call))
    assert [path for path, _ in found] == [state for _, state in found], "the state of a path is what it went through"
    assert sorted(path for path, _ in found) == sorted({tuple(path) for path in paths}), "each distinct path once"
    assert len(calls) == len(set(calls)) == count_prefixes(paths) <= count_layers(paths)


def test_counts_by_hand():
    paths = [(1, 1, 1), (1, 1, 2), (2, 1), (2, 1), (1, 1)]
    assert count_prefixes(paths) == 6  # 1, 11, 111, 112, 2, 21
    assert count_layers(paths) == 3 + 3 + 2 + 2
    assert count_prefixes([]) == count_layers([]) == count_prefixes([()]) == 0


def test_all_tilings_of_a_stack_share_most_of_their_calls():
    spans = modular_spans(12, (2, 3, 6))
    paths = [tiling.spans for tiling in tilings(12, spans)]
    assert count_prefixes(paths) < 0.35 * count_layers(paths)
    assert count_prefixes([pure_tiling(12, 2).spans, pure_tiling(12, 3).spans]) == 6 + 4, "nothing in common"


def test_order_is_that_of_the_paths_and_prefixes_come_first():
    found = [path for path, _ in walk([(2, 1), (1, 1), (2,), (2, 3)], 0, lambda state, layer: state + layer)]
    assert found == [(2,), (2, 1), (2, 3), (1, 1)]


def test_states_are_let_go_once_their_last_branch_has_left():
    class State:
        pass

    alive: list[weakref.ref[State]] = []
    most = 0

    def call(before, layer):
        nonlocal most
        state = State()
        alive.append(weakref.ref(state))
        most = max(most, sum(each() is not None for each in alive))
        return state

    for _ in walk([tuple(range(50)), (*range(25), -1)], State(), call):
        pass
    assert most <= 3, "the state before, the one after, and the one where the paths part"
