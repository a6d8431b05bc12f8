"""Spans, tilings, assemblies and presets: integer arithmetic, so properties."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.spans.spans import (
    PRESETS,
    Assembly,
    Span,
    Tiling,
    count_tilings,
    gentlest_tilings,
    kept_layers,
    modular_spans,
    pure_tiling,
    teacher_assembly,
    tilings,
)
from pipeline.spans.stacks import Stacks

LAYERS = st.integers(1, 14)
GRANULARITIES = st.lists(st.integers(2, 7), min_size=1, max_size=3, unique=True)
RATIOS = (1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)


@given(LAYERS, GRANULARITIES)
def test_every_tiling_covers_each_layer_once(num_layers, granularities):
    spans = modular_spans(num_layers, granularities)
    for tiling in tilings(num_layers, spans):
        assert [i for s in tiling.spans for i in range(s.first, s.last + 1)] == list(range(num_layers))
        assert all(span.num_layers == 1 or span in spans for span in tiling.spans)


@given(LAYERS, GRANULARITIES)
def test_there_are_as_many_tilings_as_the_recurrence_says(num_layers, granularities):
    """c(i) = sum of c(i + length) over the spans that start at i: counted here from the definition of spans."""
    everything = list(tilings(num_layers, modular_spans(num_layers, granularities)))
    assert len(set(everything)) == len(everything)

    def count(first: int) -> int:
        if first == num_layers:
            return 1
        lengths = {1} | {min(g, num_layers - first) for g in granularities if first % g == 0}
        return sum(count(first + length) for length in lengths)

    assert len(everything) == count(0) == count_tilings(num_layers, modular_spans(num_layers, granularities))[0]


@pytest.mark.parametrize(("granularities", "block", "each"), [((2,), 2, 2), ((3,), 3, 2), ((2, 3, 6), 6, 14)])
def test_counts_in_closed_form(granularities, block, each):
    """Where all granularities divide a block, blocks are independent: 14 tilings of six layers, 14^4 of 24."""
    for num_layers in (6, 12, 24):
        count = count_tilings(num_layers, modular_spans(num_layers, granularities))[0]
        assert count == each ** (num_layers // block)


@given(LAYERS, GRANULARITIES)
def test_spans_start_at_multiples_and_only_the_last_is_shorter(num_layers, granularities):
    for span in modular_spans(num_layers, granularities):
        assert any(span.first % g == 0 and (span.num_layers == g or span.last == num_layers - 1) for g in granularities)
        assert span.num_layers >= 2


def test_granularities_2_3_6_are_as_many_modular_layers_as_the_teacher_has():
    for num_layers in (6, 12, 24):
        assert len(modular_spans(num_layers, (2, 3, 6))) == num_layers


@given(LAYERS, GRANULARITIES)
def test_the_gentlest_tiling_of_each_size(num_layers, granularities):
    spans = modular_spans(num_layers, granularities)
    everything = list(tilings(num_layers, spans))
    found = gentlest_tilings(num_layers, spans)
    assert list(found) == sorted({tiling.num_layers for tiling in everything})
    for size, tiling in found.items():
        rivals = [t for t in everything if t.num_layers == size]
        assert tiling == min(rivals, key=lambda t: (sum(n * n for n in t.lengths), t.lengths))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_text_form_parses_back_and_is_a_file_name(encoder, decoder):
    assembly = Assembly(Tiling(tuple(encoder)), Tiling(tuple(decoder)))
    text = str(assembly)
    assert Assembly.parse(text) == assembly
    assert set(text) <= set("0123456789edx.-")


@pytest.mark.parametrize("num_layers", [6, 12, 24])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_reach_every_ratio(num_layers, preset):
    stacks = Stacks.of((num_layers, num_layers), ((2, 3, 6), (2, 3, 6)))
    for ratio in RATIOS:
        assembly = stacks.preset(preset, ratio)
        assert assembly.num_layers == round(2 * num_layers / ratio)


def test_speed_first_shortens_the_decoder_first_and_size_first_spreads():
    stacks = Stacks.of((12, 12), ((2, 3, 6), (2, 3, 6)))
    for ratio in RATIOS:
        speed, size = stacks.preset("speed-first", ratio), stacks.preset("size-first", ratio)
        assert speed.encoder.num_layers == 12 or speed.decoder.num_layers == 2
        assert abs(size.encoder.num_layers - size.decoder.num_layers) <= 1
        assert speed.decoder.num_layers <= size.decoder.num_layers


STACK = st.tuples(st.integers(1, 24), st.lists(st.integers(2, 7), max_size=3, unique=True))


@given(STACK, STACK, st.sampled_from(PRESETS))
def test_presets_are_monotone_in_ratio(encoder, decoder, preset):
    """A larger ratio never asks for more layers, in either stack, whatever the depths and granularities, and even
    where one stack is left whole; and the ends are the teacher and the coarsest assembly."""
    stacks = Stacks.of(*zip(encoder, decoder, strict=True))
    coarsest, total = stacks.coarsest(), sum(stacks.num_layers)
    found = [stacks.preset(preset, total / n) for n in range(total, coarsest.num_layers - 1, -1)]
    assert found[0] == stacks.teacher()
    assert found[-1] == coarsest
    for larger, smaller in itertools.pairwise(found):
        assert smaller.encoder.num_layers <= larger.encoder.num_layers
        assert smaller.decoder.num_layers <= larger.decoder.num_layers
        assert smaller.ratio_of_layers >= larger.ratio_of_layers


def way_of(preset: str, num_layers: tuple[int, int], sizes: tuple[set[int], set[int]]) -> list[tuple[int, int]]:
    """A preset's way from the teacher to the coarsest, step by step: which stack is shortened next."""
    way = [num_layers]
    while True:
        shorter = [max((n for n in sizes[i] if n < way[-1][i]), default=None) for i in (0, 1)]
        if shorter == [None, None]:
            return way
        shares = [Fraction(way[-1][i] + n, 2 * num_layers[i]) if n else 0 for i, n in enumerate(shorter)]
        takes_decoder = shorter[1] is not None and (preset == "speed-first" or shares[1] >= shares[0])
        way.append((way[-1][0], shorter[1]) if takes_decoder else (shorter[0], way[-1][1]))


@given(STACK, STACK, st.sampled_from(PRESETS), st.data())
def test_presets_take_what_is_nearest_on_their_way(encoder, decoder, preset, data):
    """Exact where the way leads there, and the teacher only where nothing shorter is as near."""
    stacks = Stacks.of(*zip(encoder, decoder, strict=True))
    num_layers, total = stacks.num_layers, sum(stacks.num_layers)
    sizes = tuple(set(gentlest_tilings(n, spans)) for _, n, spans in stacks)
    ratio = data.draw(st.floats(1, total / sum(map(min, sizes))))
    found = stacks.preset(preset, ratio)
    way = way_of(preset, num_layers, sizes)
    nearest = min(abs(sum(each) - round(total / ratio)) for each in way)
    near = [each for each in way if abs(sum(each) - round(total / ratio)) == nearest]
    assert (found.encoder.num_layers, found.decoder.num_layers) == min(near, key=sum)
    assert found.ratio_of_layers == total / (found.encoder.num_layers + found.decoder.num_layers)


@pytest.mark.parametrize(
    ("granularities", "num_layers", "preset", "ratio", "expected"),
    [
        ((6,), 6, "size-first", 1.5, (6, 1)),
        ((6,), 12, "size-first", 1.2, (12, 7)),
        ((2, 6), 12, "size-first", 4, (4, 2)),
        ((3,), 12, "size-first", 1.1, (12, 10)),
        ((4,), 12, "size-first", 1.1, (12, 9)),
        ((4,), 6, "speed-first", 2, (3, 2)),  # 5 and 7 are as near; 3+3 is off the way
    ],
)
def test_sizes_with_gaps_are_rounded_for_both_stacks_together(granularities, num_layers, preset, ratio, expected):
    found = Stacks.of((num_layers, num_layers), (granularities, granularities)).preset(preset, ratio)
    assert (found.encoder.num_layers, found.decoder.num_layers) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stack_left_whole_keeps_every_layer(preset):
    stacks = Stacks.of((12, 6), ((), (2, 3)))
    for ratio in (1.1, 1.2, 18 / 14):
        assembly = stacks.preset(preset, ratio)
        assert assembly.encoder == Tiling((1,) * 12)
        assert assembly.num_layers == round(18 / ratio)
    with pytest.raises(ValueError, match=r"ratio 1.5"):
        stacks.preset(preset, 1.5)


@pytest.mark.parametrize("ratio", [0.5, 8.5, 100])
def test_what_lies_beyond_the_coarsest_is_refused(ratio):
    with pytest.raises(ValueError, match=f"ratio {ratio:g}"):
        Stacks.of((6, 6), ((2, 3, 6), (2, 3, 6))).preset("size-first", ratio)


def test_the_ends():
    assert str(Stacks.of((6, 6), ((2, 3, 6), (2, 3, 6))).coarsest()) == "e6-d6"
    assert str(teacher_assembly(6, 4)) == "e1x6-d1x4"
    assert pure_tiling(7, 3).lengths == (3, 3, 1)
    assert modular_spans(7, (3,)) == (Span(0, 2), Span(3, 5))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12))
def test_kept_layers_are_as_many_as_the_tiling_has(lengths):
    tiling = Tiling(tuple(lengths))
    kept = kept_layers(tiling)
    assert len(set(kept)) == tiling.num_layers
    assert list(kept) == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] < tiling.num_teacher_layers


@pytest.mark.parametrize("text", ["", "e2", "e2-d", "d2-e2", "e2x-d1", "e0-d1", "e2_d3", "../e1-d1"])
def test_what_is_not_an_assembly_is_refused(text):
    with pytest.raises(ValueError, match=r"tiling|assembly"):
        Assembly.parse(text)
