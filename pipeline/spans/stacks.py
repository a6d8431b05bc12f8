"""Both stacks of a teacher: how many layers each has, which spans have a modular layer, what can be made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.spans.spans import (
    PRESETS,
    STACKS,
    Assembly,
    Span,
    Tiling,
    gentlest_tilings,
    modular_spans,
    pure_tiling,
    teacher_assembly,
)


@dataclass(frozen=True)
class Stacks:
    """The layers and the modular spans of (encoder, decoder)."""

    num_layers: tuple[int, int]
    """Teacher layers."""
    spans: tuple[tuple[Span, ...], tuple[Span, ...]]
    """Spans with a modular layer, in order of (first, last)."""

    @staticmethod
    def of(num_layers: tuple[int, int], granularities: tuple[Sequence[int], Sequence[int]]) -> Stacks:
        """Stacks whose granularities are given as (encoder's, decoder's); none leave a stack whole."""
        encoder, decoder = (modular_spans(n, own) for n, own in zip(num_layers, granularities, strict=True))
        return Stacks(num_layers, (encoder, decoder))

    def __iter__(self) -> Iterator[tuple[str, int, tuple[Span, ...]]]:
        """(name, teacher layers, modular spans) of each stack."""
        return iter(zip(STACKS, self.num_layers, self.spans, strict=True))

    def spans_of(self, stack: str) -> tuple[Span, ...]:
        """Modular spans of "encoder" or "decoder"."""
        return self.spans[STACKS.index(stack)]

    def teacher(self) -> Assembly:
        """The assembly that is the teacher itself."""
        return teacher_assembly(*self.num_layers)

    def coarsest(self) -> Assembly:
        """The assembly with the fewest layers."""
        encoder, decoder = (next(iter(each.values())) for each in self._gentlest())
        return Assembly(encoder, decoder)

    def pure(self, granularities: tuple[int, int]) -> Assembly:
        """One granularity throughout (encoder, decoder), the last span of a stack shorter where it must be."""
        encoder, decoder = (pure_tiling(n, each) for n, each in zip(self.num_layers, granularities, strict=True))
        return Assembly(encoder, decoder)

    def preset(self, name: str, ratio: float) -> Assembly:
        """The assembly that a preset takes for a ratio of layers, encoder and decoder together.

        size-first spreads the reduction evenly over both stacks; speed-first shortens the decoder first, because
        decoding step by step dominates latency, and the encoder only when the decoder is as short as it gets.
        `ratio` asks for round(layers / ratio) layers. On a preset's way from the teacher to the coarsest assembly each
        step brings one stack to its next smaller size; taken is what lies nearest to those layers, of two the smaller.
        So a larger ratio never makes a stack longer.

        Raises:
            ValueError: unknown preset, a ratio under 1, or one beyond the coarsest assembly.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
        encoder, decoder = self._gentlest()
        total, fewest = sum(self.num_layers), min(encoder) + min(decoder)
        wanted = round(total / ratio) if ratio >= 1 else total + 1
        if not fewest <= wanted <= total:
            raise ValueError(
                f"ratio {ratio:g} asks for {wanted} of {total} layers: these granularities reach 1 to "
                f"{total / fewest:g}"
            )
        way = _way(name, (sorted(encoder, reverse=True), sorted(decoder, reverse=True)))
        sizes = min(way, key=lambda each: (abs(sum(each) - wanted), sum(each)))
        return Assembly(encoder[sizes[0]], decoder[sizes[1]])

    def refuse_misfit(self, assembly: Assembly) -> None:
        """Hold an assembly against these layers.

        Raises:
            ValueError: it has another depth, or a span without a modular layer.
        """
        for stack, total, known in self:
            tiling = assembly.tiling(stack)
            unknown = [span for span in tiling.spans if span.num_layers > 1 and span not in known]
            if tiling.num_teacher_layers != total or unknown:
                raise ValueError(
                    f"assembly {assembly} does not fit: the {stack} has {total} layers and modular layers for "
                    f"{', '.join(map(str, known)) or 'none of them'}"
                )

    def _gentlest(self) -> tuple[dict[int, Tiling], dict[int, Tiling]]:
        """The gentlest tilings of (encoder, decoder) by their number of layers, fewest first."""
        encoder, decoder = (gentlest_tilings(total, spans) for _, total, spans in self)
        return encoder, decoder


def _way(preset: str, sizes: tuple[Sequence[int], Sequence[int]]) -> list[tuple[int, int]]:
    """Layers of (encoder, decoder) from the teacher to the coarsest assembly, in steps to the next size of one stack.

    size-first orders the steps by the share of its layers that a stack has left halfway through a step. Where all sizes
    are there, that is proportional rounding (the method of Webster); what cannot be halved stays in the encoder.

    Args:
        sizes: all that (encoder, decoder) can be given, largest first.
    """
    steps = [
        (-(larger + smaller) / sizes[stack][0] if preset == "size-first" else 0, stack, smaller)
        for stack in (1, 0)  # at equal shares, and at speed-first always, the decoder goes first
        for larger, smaller in pairwise(sizes[stack])
    ]
    way = [(sizes[0][0], sizes[1][0])]
    for _, stack, size in sorted(steps, key=lambda step: step[0]):
        encoder, decoder = way[-1]
        way.append((size, decoder) if stack == 0 else (encoder, size))
    return way
