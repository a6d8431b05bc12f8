"""Draws: which assembly the student takes for one micro-batch: a pure function of (seed, step, micro-batch index)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pipeline.spans import Assembly, Span, Tiling, pure_tiling


class Sampler:
    """Draws for the replacing phase.

    With probability `coarse_weight` each stack takes one granularity throughout, chosen in proportion to its size
    (coarse spans need most training and a uniform draw hardly ever holds them); otherwise any tiling is as likely as
    any other. At least one modular layer is always drawn.

    Args:
        num_layers: teacher layers of (encoder, decoder).
        spans: modular spans of (encoder, decoder).
    """

    def __init__(
        self,
        *,
        seed: int,
        num_layers: tuple[int, int],
        spans: tuple[Sequence[Span], Sequence[Span]],
        granularities: Sequence[int],
        coarse_weight: float,
    ) -> None:
        self.seed = seed
        self.coarse_weight = coarse_weight
        self.granularities = tuple(granularities)
        self.num_layers = num_layers
        self._walks = [_UniformTilings(n, s) for n, s in zip(num_layers, spans, strict=True)]

    def draw(self, step: int, micro_batch: int) -> Assembly:
        generator = random.Random(f"draw/{self.seed}/{step}/{micro_batch}")
        while True:
            encoder, decoder = (self._tiling(stack, generator) for stack in (0, 1))
            assembly = Assembly(encoder, decoder)
            if assembly.num_layers < assembly.num_teacher_layers:
                return assembly

    def _tiling(self, stack: int, generator: random.Random) -> Tiling:
        if generator.random() < self.coarse_weight:
            (granularity,) = generator.choices(self.granularities, weights=self.granularities)
            return pure_tiling(self.num_layers[stack], granularity)
        return self._walks[stack].draw(generator)


class _UniformTilings:
    """Uniform draws from all tilings of a stack, without listing them: a walk weighted by how many tilings remain."""

    def __init__(self, num_layers: int, spans: Sequence[Span]) -> None:
        self.num_layers = num_layers
        self.lengths_at = [[1] for _ in range(num_layers)]
        for span in spans:
            self.lengths_at[span.first].append(span.num_layers)
        self.counts = [0] * num_layers + [1]
        for first in reversed(range(num_layers)):
            self.counts[first] = sum(self.counts[first + length] for length in self.lengths_at[first])

    def draw(self, generator: random.Random) -> Tiling:
        lengths: list[int] = []
        first = 0
        while first < self.num_layers:
            weights = [self.counts[first + length] for length in self.lengths_at[first]]
            (length,) = generator.choices(self.lengths_at[first], weights=weights)
            lengths.append(length)
            first += length
        return Tiling(tuple(lengths))
