"""Draws are a pure function of (seed, step, micro-batch) and come as often as they should."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.sampler import Sampler
from pipeline.spans import modular_spans, tilings

SPANS = modular_spans(6, (2, 3, 6))


def sampler(coarse_weight: float, seed: int = 1) -> Sampler:
    return Sampler(
        seed=seed, num_layers=(6, 6), spans=(SPANS, SPANS), granularities=(2, 3, 6), coarse_weight=coarse_weight
    )


def test_a_draw_depends_on_nothing_but_its_place():
    first, second = sampler(0.5), sampler(0.5)
    forwards = [first.draw(step, 3) for step in range(50)]
    backwards = [second.draw(step, 3) for step in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert forwards != [sampler(0.5, seed=2).draw(step, 3) for step in range(50)]
    assert len({str(first.draw(9, index)) for index in range(50)}) > 10


def test_uniform_draws_are_uniform_over_all_tilings():
    everything = {str(tiling) for tiling in tilings(6, SPANS)}
    counts = Counter(str(sampler(0.0).draw(step, 0).decoder) for step in range(4000))
    assert set(counts) == everything
    expected = 4000 / len(everything)
    assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values())


def test_coarse_draws_come_in_proportion_to_their_granularity():
    counts = Counter(str(sampler(1.0).draw(step, 0).encoder) for step in range(4000))
    assert set(counts) == {"2x3", "3x2", "6"}
    for tiling, weight in (("2x3", 2), ("3x2", 3), ("6", 6)):
        assert counts[tiling] / 4000 == pytest.approx(weight / 11, abs=0.04)


def test_every_draw_holds_a_modular_layer():
    draws = [sampler(0.0).draw(step, 0) for step in range(2000)]
    assert all(draw.num_layers < draw.num_teacher_layers for draw in draws)
