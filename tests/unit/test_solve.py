"""The solver against brute force over every assembly, for any scores and any budget."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.spans.solve import Budget, Cost, best_assemblies, best_of, best_tilings, pareto_front, shape_of
from pipeline.spans.spans import Assembly, modular_spans, tilings

SPANS = modular_spans(6, (2, 3, 6))
EVERYTHING = [Assembly(*pair) for pair in product(tilings(6, SPANS), repeat=2)]


def random_scores(seed: int, spans=SPANS):
    generator = random.Random(seed)
    return {span: generator.gauss(0.5, 1.0) for span in spans}  # some spans do better than the teacher


def score_of(assembly: Assembly, scores) -> float:
    return sum(each.get(span, 0.0) for tiling, each in zip((assembly.encoder, assembly.decoder), scores, strict=True)
               for span in tiling.spans)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_the_best_of_all_196_assemblies_of_a_6_6_model_for_every_shape_and_budget(seed, num_best):
    scores = (random_scores(seed), random_scores(seed + 1))
    by_shape = best_assemblies((6, 6), scores, num_best)
    ranked = sorted(EVERYTHING, key=lambda each: score_of(each, scores))
    assert len(ranked) == 196
    for shape in {shape_of(each) for each in EVERYTHING}:
        expected = [each for each in ranked if shape_of(each) == shape][:num_best]
        assert [each for _, each in by_shape[shape]] == expected
    generator = random.Random(seed)
    for cost in (Cost(0, 1, 1), Cost(3.0, 1.1, 1.6), Cost(5.2, 0.3, 4.4)):
        limit = generator.uniform(cost.of((1, 1)), cost.of((6, 6)))
        allowed = [shape for shape in by_shape if cost.of(shape) <= limit]
        expected = [each for each in ranked if cost.of(shape_of(each)) <= limit][:num_best]
        found = best_of(by_shape, allowed, num_best)
        assert [each for _, each in found] == expected
        assert [score for score, _ in found] == pytest.approx([score_of(each, scores) for each in expected])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(2, 6), min_size=1, max_size=3, unique=True), st.integers(0, 999))
def test_the_best_tilings_of_any_stack(num_layers, granularities, seed):
    spans = modular_spans(num_layers, granularities)
    scores = random_scores(seed, spans)
    found = best_tilings(num_layers, scores, 3)
    ranked = sorted(tilings(num_layers, spans), key=lambda each: sum(scores.get(span, 0.0) for span in each.spans))
    assert {tiling.num_layers for tiling in ranked} == set(found)
    for count, best in found.items():
        assert [tiling for _, tiling in best] == [each for each in ranked if each.num_layers == count][:3]


def test_a_front_holds_what_nothing_beats():
    points = {each: (float(sum(shape_of(each))), score_of(each, (random_scores(3),) * 2)) for each in EVERYTHING}
    front = pareto_front(points)
    for each in EVERYTHING:
        beaten = any(
            points[other][0] <= points[each][0]
            and points[other][1] <= points[each][1]
            and points[other] != points[each]
            for other in EVERYTHING
        )
        assert (each in front) == (not beaten)
    assert [points[each] for each in front] == sorted(points[each] for each in front)


def test_budgets_parse():
    assert Budget.parse("layers=8") == Budget("layers", 8, "layers=8")
    assert Budget.parse("bytes=1.5G").limit == 1.5e9
    assert Budget.parse("parameters=60M").limit == 60e6
    for text in ("", "ms", "ms=", "ms=-3", "ms=4m", "time=3", "ms<=3"):
        with pytest.raises(ValueError, match="is not a budget"):
            Budget.parse(text)
