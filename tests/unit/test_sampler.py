"""Draws are a pure function of (seed, step, micro-batch) and come as often as they should."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.recipe import SAMPLERS, BatchConfig, DistillConfig, OptimConfig
from pipeline.model.draws import Sampler, text_of
from pipeline.spans.paths import students_of
from pipeline.spans.spans import Assembly, modular_spans, tilings

LOCAL_STEPS, NUM_STEPS = 100, 1100


def sampler(name: str = "stratified", *, seed: int = 1, layers=(6, 6), granularities=(2, 3, 6), **fields) -> Sampler:
    optim = OptimConfig(num_steps=NUM_STEPS)
    config = DistillConfig(sampler=name, granularities=granularities, local_steps=LOCAL_STEPS, optim=optim, **fields)
    return Sampler(config, seed=seed, stacks=config.stacks(layers))


def encoders(draws: Sampler, steps=range(100, 1100), num_micro_batches: int = 4) -> Counter[str]:
    return Counter(str(draws.draw(step, index).encoder) for step in steps for index in range(num_micro_batches))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_draw_depends_on_nothing_but_its_place(name):
    first, second = sampler(name), sampler(name)
    steps = range(100, 1100, 20)
    forwards = [first.draw(step, 3) for step in steps]
    backwards = [second.draw(step, 3) for step in reversed(steps)]
    assert forwards == backwards[::-1]
    assert forwards != [sampler(name, seed=2).draw(step, 3) for step in steps]
    assert len({str(first.draw(900, index)) for index in range(50)}) > 5


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SAMPLERS),
    st.tuples(st.integers(2, 13), st.integers(2, 13)),
    st.lists(st.integers(2, 7), min_size=1, max_size=3, unique=True),
    st.integers(LOCAL_STEPS, NUM_STEPS - 1),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_draw_is_made_of_the_spans_and_holds_a_modular_layer(name, layers, granularities, step, ramp):
    draw = sampler(name, layers=layers, granularities=tuple(granularities), ramp=ramp).draw(step, 0)
    assert draw.num_layers < draw.num_teacher_layers
    for tiling, num_layers in zip((draw.encoder, draw.decoder), layers, strict=True):
        spans = modular_spans(num_layers, granularities)
        assert tiling.num_teacher_layers == num_layers
        assert all(span.num_layers == 1 or span in spans for span in tiling.spans)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("decoder", [(), (3,)])
def test_stacks_of_different_granularities_are_drawn_from_their_own(name, decoder):
    config = DistillConfig(
        sampler=name, granularities=(2, 4), decoder_granularities=decoder, optim=OptimConfig(num_steps=NUM_STEPS)
    )
    draws = Sampler(config, seed=0, stacks=config.stacks((8, 6)))
    found = [draws.draw(step, index) for step in range(400, NUM_STEPS, 25) for index in range(4)]
    for side, own in (("encoder", modular_spans(8, (2, 4))), ("decoder", modular_spans(6, decoder))):
        drawn = {span for draw in found for span in draw.tiling(side).spans if span.num_layers > 1}
        assert drawn == set(own)


def test_the_draws_of_the_demo_are_what_its_figures_were_measured_with():
    config = DistillConfig(local_steps=360, optim=OptimConfig(num_steps=900))
    draws = Sampler(config, seed=0, stacks=config.stacks((6, 6)))
    text = " ".join(str(draws.draw(step, index)) for step in range(360, 900) for index in (0, 1))
    digest = "e6e07515eae7e0fba84feea2b3bd40fddd66cf124d486cfd781b4023ec1655df"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_first_sampled_draw_is_the_one_that_was_alone_and_others_are_independent(name):
    alone, several = sampler(name), sampler(name, draws=("coarsest", "sampled", "pure", "sampled", "sampled"))
    places = [(step, index) for step in range(100, 600, 5) for index in range(3)]
    drawn = [several.draws(*place) for place in places]
    assert drawn == [sampler(name, draws=several.settings.draws).draws(*place) for place in places]
    assert [each[1] for each in drawn] == [alone.draw(*place) for place in places]
    coarsest, *fixed = (str(drawn[0][place]) for place in (0, 2, 3, 4))
    assert coarsest == "e6-d6"
    assert fixed == ["e2x3-d2x3", "e3x2-d3x2", "e6-d6"]
    second, third = ([each[place] for each in drawn] for place in (5, 6))
    differ = sum(len({str(first[1]), str(a), str(b)}) == 3 for first, a, b in zip(drawn, second, third, strict=True))
    assert differ > len(places) / 8
    assert len(set(second)) > 10


def test_pure_draws_are_those_of_the_granularities_that_make_a_span():
    draws = sampler(layers=(6, 1), granularities=(2, 7), draws=("pure", "pure-2"))
    assert [str(draw) for draw in draws.draws(100, 0)] == ["e2x3-d1", "e6-d1", "e2x3-d1"]
    settings = dataclasses.replace(draws.settings, granularities=(2, 3), encoder_granularities=(2,), draws=("pure-3",))
    with pytest.raises(ValueError, match=r"draws has pure-3, .* no span of 6\+1 layers"):
        Sampler(settings, seed=0, stacks=settings.stacks((6, 1)))


def test_crossed_draws_bring_every_decoder_together_with_every_encoder():
    draws = sampler(draws=("crossed",))
    places = [(step, index) for step in range(LOCAL_STEPS, LOCAL_STEPS + 150) for index in range(2)]
    drawn = [draws.draws(*place) for place in places]
    assert drawn == [sampler(draws=("crossed",)).draws(*place) for place in places]
    assert all([str(draw.decoder) for draw in each] == ["2x3", "3x2", "6"] for each in drawn)
    assert all(len({str(draw.encoder) for draw in each}) == 3 for each in drawn)  # three different ones at a time
    met = Counter(str(draw) for each in drawn for draw in each)
    assert set(met) == {
        f"e{encoder}-d{decoder}" for encoder in ("1x6", "2x3", "3x2", "6") for decoder in ("2x3", "3x2", "6")
    }
    assert all(abs(count / len(places) - 1 / 4) < 0.1 for count in met.values())


@pytest.mark.parametrize(
    ("layers", "settings", "expected"),
    [
        ((6, 1), {"granularities": (2, 3)}, ["e2x3-d1", "e3x2-d1"]),  # a stack without spans: the pure ones
        ((6, 6), {"granularities": (2, 3), "encoder_granularities": ()}, ["e1x6-d2x3", "e1x6-d3x2"]),
        ((2, 6), {"granularities": (2, 3), "decoder_granularities": (6,)}, ["e1x2-d6", "e2-d6"]),
    ],
)
def test_crossed_draws_of_stacks_that_differ(layers, settings, expected):
    draws = sampler(layers=layers, draws=("crossed",), **settings)
    found = {str(draw) for step in range(LOCAL_STEPS, LOCAL_STEPS + 50) for draw in draws.draws(step, 0)}
    assert sorted(found) == expected


@pytest.mark.parametrize(
    ("draws", "words"),
    [
        ((), "draws names none"),
        (("sampeld",), "draws has 'sampeld'"),
        (("pure-4",), "choose from sampled, .*pure-6"),
    ],
)
def test_draws_that_are_none_are_refused(draws, words):
    with pytest.raises(ValueError, match=words):
        DistillConfig(draws=draws)


@pytest.mark.parametrize("draws", [("sampled",), ("sampled", "coarsest"), ("sampled", "sampled")])
def test_the_dearest_draws_are_drawn_and_none_are_dearer(draws):
    found = sampler(draws=draws, batch=BatchConfig(micro_batches_per_step=1))
    drawn = [found.draws(step, 0) for step in range(LOCAL_STEPS, NUM_STEPS)]
    assert found.dearest() in drawn
    assert len(students_of(found.dearest())) == max(len(students_of(each)) for each in drawn)
    some = sampler(draws=draws, batch=BatchConfig(micro_batches_per_step=16)).dearest()
    assert len(students_of(some)) >= len(students_of(found.dearest())) - 2


def test_what_draws_are_called():
    assert text_of(None) == "the local phase"
    assert text_of(()) == ""
    assert text_of((Assembly.parse("e2x3-d6"), Assembly.parse("e6-d6"))) == "e2x3-d6 + e6-d6"


@pytest.mark.parametrize("draws", [sampler("uniform"), sampler("stratified", coarse_weight=0.0)])
def test_uniform_draws_are_uniform_over_all_tilings(draws):
    everything = {str(tiling) for tiling in tilings(6, modular_spans(6, (2, 3, 6)))}
    counts = encoders(draws)
    assert set(counts) == everything
    expected = 4000 / len(everything)
    assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values())


def test_coarse_draws_come_in_proportion_to_their_granularity():
    counts = encoders(sampler(coarse_weight=1.0))
    assert set(counts) == {"2x3", "3x2", "6"}
    for tiling, weight in (("2x3", 2), ("3x2", 3), ("6", 6)):
        assert counts[tiling] / 4000 == pytest.approx(weight / 11, abs=0.04)


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3])
def test_a_sandwich_is_half_the_coarsest_whatever_the_batch(num_micro_batches):
    draws = sampler("sandwich")
    drawn = [str(draws.draw(step, index)) for step in range(100, 1100) for index in range(num_micro_batches)]
    expected = 1 / 2 + 1 / 2 / 14**2
    assert drawn.count("e6-d6") / len(drawn) == pytest.approx(expected, abs=0.02)
    assert len(set(drawn)) > 150
    if num_micro_batches > 1:  # both halves in every step
        assert all("e6-d6" in drawn[first : first + 2] for first in range(0, len(drawn), num_micro_batches))


def test_theseus_with_one_granularity_throws_an_independent_coin_for_each_span():
    """The rates of the spans and of their pairs, before and after the jump to 1."""
    draws = sampler("theseus-constant", granularities=(2,), replace_rate=0.3, ramp=0.6, layers=(6, 12))
    early = [draws.draw(step, index) for step in range(100, 700) for index in range(10)]
    replaced = [[1 if length == 2 else 0 for length in _pairs(draw.decoder)] for draw in early]
    num_draws = len(replaced)
    for i in range(6):
        assert sum(each[i] for each in replaced) / num_draws == pytest.approx(0.3, abs=0.035)
        for j in range(i):
            assert sum(each[i] * each[j] for each in replaced) / num_draws == pytest.approx(0.09, abs=0.025)
    assert {str(draws.draw(step, 0)) for step in range(700, 1100)} == {"e2x3-d2x6"}
    assert str(draws.draw(699, 0)) != "e2x3-d2x6"


def _pairs(tiling) -> list[int]:
    """Length of the span that covers each pair of layers (0, 1), (2, 3), ..."""
    by_first = {span.first: span.num_layers for span in tiling.spans}
    return [by_first[first] for first in range(0, tiling.num_teacher_layers, 2)]


def test_the_linear_rate_rises_over_the_ramp():
    draws = sampler("theseus-linear", granularities=(3,), replace_rate=0.2, ramp=0.8, layers=(12, 12))

    def share(steps) -> float:
        tiled = [draws.draw(step, index) for step in steps for index in range(10)]
        return sum(length == 3 for draw in tiled for length in draw.decoder.lengths) / (4 * len(tiled))

    for middle, rate in ((200, 0.3), (500, 0.6), (800, 0.9)):
        assert share(range(middle - 50, middle + 50)) == pytest.approx(rate, abs=0.03)
    assert share(range(900, 1100)) == 1


def test_theseus_with_several_granularities_takes_each_that_starts_there_alike():
    counts = encoders(sampler("theseus-constant", replace_rate=1.0))
    assert set(counts) == {"2x3", "3x2", "6"}
    assert all(count / 4000 == pytest.approx(1 / 3, abs=0.04) for count in counts.values())


@pytest.mark.parametrize(("name", "in_turn"), [("coarse-to-fine", (6, 3, 2)), ("fine-to-coarse", (2, 3, 6))])
def test_a_curriculum_admits_one_granularity_after_the_other(name, in_turn):
    draws = sampler(name, ramp=0.5)
    for part, steps in enumerate([range(100, 350), range(350, 600), range(600, 1100)]):
        admitted = in_turn[: part + 1]
        lengths = {
            length for step in steps for i in range(3) for length in map(int, draws.draw(step, i).encoder.lengths)
        }
        assert lengths == {1, *admitted}


@pytest.mark.parametrize("name", ["coarse-to-fine", "fine-to-coarse"])
def test_a_curriculum_passes_over_granularities_that_make_no_span(name):
    """The one layer of the encoder has none: a draw of 6 or 3 alone would be the teacher for ever."""
    config = DistillConfig(
        sampler=name, encoder_granularities=(3, 6), decoder_granularities=(2,), local_steps=0,
        optim=OptimConfig(num_steps=100),
    )  # fmt: skip
    draws = Sampler(config, seed=0, stacks=config.stacks((1, 12)))
    assert {length for step in (0, 99) for length in map(int, draws.draw(step, 0).decoder.lengths)} <= {1, 2}
    with pytest.raises(ValueError, match=r"leave all of 1\+1 layers as they are"):
        Sampler(config, seed=0, stacks=config.stacks((1, 1)))
