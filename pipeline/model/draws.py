"""Draws: which assembly the student takes for one micro-batch: a pure function of (seed, step, micro-batch index)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, partial

from pipeline.config import SAMPLERS, DistillConfig
from pipeline.spans import Assembly, Span, Stacks, Tiling, count_tilings, modular_spans, pure_tiling

DrawTiling = Callable[[int, random.Random], Tiling]  # (0 for the encoder or 1 for the decoder, randomness) -> tiling


class Sampler:
    """Draws for the replacing phase, by the rule that `settings.sampler` names (documented there).

    At least one modular layer is always drawn: the teacher by itself would train nothing.

    Args:
        stacks: what there is to draw from.

    Raises:
        ValueError: there is no modular span.
    """

    def __init__(self, settings: DistillConfig, *, seed: int, stacks: Stacks) -> None:
        self.settings = settings
        self.seed = seed
        self.stacks = stacks
        self._coarsest = stacks.coarsest()
        if self._coarsest == stacks.teacher():
            layers = "+".join(map(str, stacks.num_layers))
            raise ValueError(f"the granularities leave all of {layers} layers as they are: nothing to draw")
        self._walks = cache(self._make_walks)

    def draw(self, step: int, micro_batch: int) -> Assembly:
        """The assembly of micro-batch `micro_batch` of the global batch of a step."""
        generator = random.Random(f"draw/{self.seed}/{step}/{micro_batch}")
        draw_tiling = self._rule(step, micro_batch)
        while True:
            encoder, decoder = (draw_tiling(stack, generator) for stack in (0, 1))
            assembly = Assembly(encoder, decoder)
            if assembly.num_layers < assembly.num_teacher_layers:
                return assembly

    def progress(self, step: int) -> float:
        """How far rates and curricula have come: 0 at the first replacing step, 1 from the end of the ramp on."""
        num_steps = self.settings.optim.num_steps - self.settings.local_steps
        return min(1.0, (step - self.settings.local_steps) / max(1.0, self.settings.ramp * num_steps))

    def _rule(self, step: int, micro_batch: int) -> DrawTiling:
        name, everything = self.settings.sampler, self.settings.all_granularities
        if name == "stratified":
            return partial(self._stratified, everything)
        if name == "uniform":
            return partial(self._uniform, everything)
        if name == "sandwich":
            if (step + micro_batch) % 2 == 0:
                return lambda stack, generator: (self._coarsest.encoder, self._coarsest.decoder)[stack]
            return partial(self._uniform, everything)
        if name in ("theseus-constant", "theseus-linear"):
            return partial(self._bernoulli, self._rate(self.progress(step)))
        assert name in ("coarse-to-fine", "fine-to-coarse"), f"{name!r} is not one of {SAMPLERS}"
        return partial(self._stratified, self._admitted(self.progress(step)))

    def _rate(self, progress: float) -> float:
        """Chance that a span is replaced, as in BERT-of-Theseus (Xu et al. 2020): constant and then one, or linear."""
        rate = self.settings.replace_rate
        if self.settings.sampler == "theseus-linear":
            return rate + (1 - rate) * progress
        return rate if progress < 1 else 1.0

    def _admitted(self, progress: float) -> tuple[int, ...]:
        """Granularities of a curriculum so far, in the recipe's order: one at first, all after the ramp."""
        stacks = list(zip(self.stacks.num_layers, self.settings.by_stack, strict=True))
        granularities = [
            each
            for each in self.settings.all_granularities
            if any(each in own and modular_spans(n, [each]) for n, own in stacks)  # a stack of one layer has no span
        ]
        in_turn = sorted(granularities, reverse=self.settings.sampler == "coarse-to-fine")
        admitted = in_turn[: 1 + int(progress * (len(in_turn) - 1))]
        return tuple(granularity for granularity in granularities if granularity in admitted)

    def _stratified(self, granularities: tuple[int, ...], stack: int, generator: random.Random) -> Tiling:
        if generator.random() < self.settings.coarse_weight:
            own = [each for each in granularities if each in self.settings.by_stack[stack]]
            (granularity,) = generator.choices(own, weights=own) if own else (1,)
            return pure_tiling(self.stacks.num_layers[stack], granularity)
        return self._uniform(granularities, stack, generator)

    def _uniform(self, granularities: tuple[int, ...], stack: int, generator: random.Random) -> Tiling:
        return self._walks(granularities)[stack].draw(generator)

    def _make_walks(self, granularities: tuple[int, ...]) -> list[_UniformTilings]:
        walks = []
        for _, num_layers, spans in self.stacks:
            admitted = set(modular_spans(num_layers, granularities))
            walks.append(_UniformTilings(num_layers, [span for span in spans if span in admitted]))
        return walks

    def _bernoulli(self, rate: float, stack: int, generator: random.Random) -> Tiling:
        """A walk from the first layer: where spans start, one of them takes its place with chance `rate`.

        With one granularity every span is an independent coin, as in BERT-of-Theseus.
        """
        lengths: list[int] = []
        first = 0
        while first < self.stacks.num_layers[stack]:
            starting = [span.num_layers for span in self.stacks.spans[stack] if span.first == first]
            replaced = bool(starting) and generator.random() < rate
            lengths.append(generator.choice(starting) if replaced else 1)
            first += lengths[-1]
        return Tiling(tuple(lengths))


class _UniformTilings:
    """Uniform draws from all tilings of a stack, without listing them: a walk weighted by how many tilings remain."""

    def __init__(self, num_layers: int, spans: Sequence[Span]) -> None:
        self.num_layers = num_layers
        self.lengths_at = [[1] for _ in range(num_layers)]
        for span in spans:
            self.lengths_at[span.first].append(span.num_layers)
        self.counts = count_tilings(num_layers, spans)

    def draw(self, generator: random.Random) -> Tiling:
        lengths: list[int] = []
        first = 0
        while first < self.num_layers:
            weights = [self.counts[first + length] for length in self.lengths_at[first]]
            (length,) = generator.choices(self.lengths_at[first], weights=weights)
            lengths.append(length)
            first += length
        return Tiling(tuple(lengths))
