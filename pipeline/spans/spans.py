"""Spans, tilings and assemblies: the arithmetic of which layers stand for which.

A span is a run of consecutive teacher layers in one stack. A tiling is a list of spans that covers each layer of a
stack exactly once. An assembly is an encoder tiling and a decoder tiling. Everything here is integers and text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

STACKS = ("encoder", "decoder")
PRESETS = ("size-first", "speed-first")


@dataclass(frozen=True, order=True)
class Span:
    """Teacher layers first..last (inclusive, counted from 0) of one stack."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"a span runs forward from a layer >= 0, not {self.first}..{self.last}")

    @property
    def num_layers(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @staticmethod
    def parse(text: str) -> Span:
        """Inverse of str()."""
        match = re.fullmatch(r"(\d+)-(\d+)", text)
        if not match:
            raise ValueError(f"{text!r} is not a span: write its first and last layer, such as 2-3")
        return Span(int(match[1]), int(match[2]))


def modular_spans(num_layers: int, granularities: Sequence[int]) -> tuple[Span, ...]:
    """All spans of two or more layers that get a modular layer, in order of (first, last).

    Spans of granularity g start at the multiples of g; one shorter span may end the stack. A shorter span that equals a
    span of another granularity is the same modular layer; one of a single layer is the teacher layer itself.
    """
    spans = set()
    for granularity in granularities:
        if granularity < 2:
            raise ValueError(f"granularity {granularity} is the teacher layer itself: granularities start at 2")
        for first in range(0, num_layers, granularity):
            last = min(first + granularity, num_layers) - 1
            if last > first:
                spans.add(Span(first, last))
    return tuple(sorted(spans))


@dataclass(frozen=True)
class Tiling:
    """Span lengths of one stack in order; (2, 2, 1) covers layers 0-1, 2-3 and 4."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"a tiling needs span lengths >= 1, not {self.lengths}")

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return tuple(Span(end - length, end - 1) for end, length in zip(ends, self.lengths, strict=True))

    @property
    def num_teacher_layers(self) -> int:
        return sum(self.lengths)

    @property
    def num_layers(self) -> int:
        """Layers of the assembled stack."""
        return len(self.lengths)

    def __str__(self) -> str:
        runs = [(length, len(list(group))) for length, group in groupby(self.lengths)]
        return ".".join(f"{length}" if count == 1 else f"{length}x{count}" for length, count in runs)

    @staticmethod
    def parse(text: str) -> Tiling:
        """Inverse of str(); also takes uncompressed forms such as 2.2.1."""
        lengths: list[int] = []
        for run in text.split("."):
            match = re.fullmatch(r"(\d+)(?:x(\d+))?", run)
            if not match:
                raise ValueError(f"{text!r} is not a tiling: write span lengths such as 2x3 or 1x4.2")
            lengths += [int(match[1])] * int(match[2] or 1)
        return Tiling(tuple(lengths))


@dataclass(frozen=True)
class Assembly:
    """One choice of teacher and modular layers for both stacks."""

    encoder: Tiling
    decoder: Tiling

    @property
    def num_layers(self) -> int:
        return self.encoder.num_layers + self.decoder.num_layers

    @property
    def num_teacher_layers(self) -> int:
        return self.encoder.num_teacher_layers + self.decoder.num_teacher_layers

    @property
    def ratio_of_layers(self) -> float:
        return self.num_teacher_layers / self.num_layers

    def tiling(self, stack: str) -> Tiling:
        return {"encoder": self.encoder, "decoder": self.decoder}[stack]

    def __str__(self) -> str:
        return f"e{self.encoder}-d{self.decoder}"

    @staticmethod
    def parse(text: str) -> Assembly:
        match = re.fullmatch(r"e([\dx.]+)-d([\dx.]+)", text)
        if not match:
            raise ValueError(f"{text!r} is not an assembly: write e<tiling>-d<tiling>, such as e2x3-d1x4.2")
        return Assembly(Tiling.parse(match[1]), Tiling.parse(match[2]))


def teacher_assembly(num_encoder_layers: int, num_decoder_layers: int) -> Assembly:
    """The assembly that is the teacher itself: every span a single layer."""
    return Assembly(Tiling((1,) * num_encoder_layers), Tiling((1,) * num_decoder_layers))


def pure_tiling(num_layers: int, granularity: int) -> Tiling:
    """Every span of this granularity, the last one shorter where it must be."""
    full, rest = divmod(num_layers, granularity)
    return Tiling((granularity,) * full + ((rest,) if rest else ()))


def tilings(num_layers: int, spans: Sequence[Span]) -> Iterator[Tiling]:
    """Every tiling that the teacher's layers and these spans allow, in lexicographic order of their lengths."""
    lengths_at = _lengths_by_first(num_layers, spans)

    def extend(prefix: tuple[int, ...], first: int) -> Iterator[Tiling]:
        if first == num_layers:
            yield Tiling(prefix)
            return
        for length in lengths_at[first]:
            yield from extend((*prefix, length), first + length)

    return extend((), 0)


def count_tilings(num_layers: int, spans: Sequence[Span]) -> list[int]:
    """How many tilings the layers from each one on have, [num_layers + 1]; the first entry counts all of `tilings`.

    c(first) = sum of c(first + length) over the lengths that may start there, c(num_layers) = 1.
    """
    lengths_at = _lengths_by_first(num_layers, spans)
    counts = [0] * num_layers + [1]
    for first in reversed(range(num_layers)):
        counts[first] = sum(counts[first + length] for length in lengths_at[first])
    return counts


def gentlest_tilings(num_layers: int, spans: Sequence[Span]) -> dict[int, Tiling]:
    """For each number of layers that a stack can be given, fewest first, the tiling that merges most gently.

    Gently: the smallest sum of squared span lengths, so that no span is longer than it must be; among equals the long
    spans lie late in the stack, where dropping layers was seen to cost least.
    """
    lengths_at = _lengths_by_first(num_layers, spans)
    # for the layers from each one on: (sum of squares, lengths) by number of spans
    best: list[dict[int, tuple[int, tuple[int, ...]]]] = [{} for _ in range(num_layers)] + [{0: (0, ())}]
    for first in reversed(range(num_layers)):
        for length in lengths_at[first]:
            for count, (squares, lengths) in best[first + length].items():
                found = (squares + length * length, (length, *lengths))
                best[first][count + 1] = min(found, best[first].get(count + 1, found))
    return {count: Tiling(lengths) for count, (_, lengths) in sorted(best[0].items())}


def _lengths_by_first(num_layers: int, spans: Sequence[Span]) -> list[list[int]]:
    """For each layer, the lengths of the spans that may start there (1 is always possible)."""
    lengths = [{1} for _ in range(num_layers)]
    for span in spans:
        if span.last >= num_layers:
            raise ValueError(f"span {span} does not fit a stack of {num_layers} layers")
        lengths[span.first].add(span.num_layers)
    return [sorted(each) for each in lengths]


def kept_layers(tiling: Tiling) -> tuple[int, ...]:
    """Layers that layer dropping keeps to reach the size of this tiling: evenly spaced, the first and last among them.

    A single layer is the first one. This is the baseline that costs nothing and trains nothing.
    """
    count, total = tiling.num_layers, tiling.num_teacher_layers
    if count == 1:
        return (0,)
    return tuple(round(i * (total - 1) / (count - 1)) for i in range(count))
