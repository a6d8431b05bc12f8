"""Draws: which assemblies students take for one micro-batch: a pure function of (seed, step, micro-batch index)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, partial

from pipeline.config import COARSEST, CROSSED, PURE, SAMPLED, SAMPLERS, DistillConfig
from pipeline.spans import Assembly, Span, Stacks, Tiling, count_tilings, modular_spans, pure_tiling, students_of

Draws = tuple[Assembly, ...] | None
"""The assemblies that share a micro-batch, none for a model that has no other layers; None in the local phase."""
NUM_COMPARED = 1000
"""Micro-batches, evenly over the replacing phase, among which the dearest is looked for."""

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
        self._pure = pure_assemblies(settings, stacks)
        layers = "+".join(map(str, stacks.num_layers))
        if self._coarsest == stacks.teacher():
            raise ValueError(f"the granularities leave all of {layers} layers as they are: nothing to draw")
        for name in settings.draws:
            if name.startswith(f"{PURE}-") and _granularity(name) not in self._pure:
                raise ValueError(f"draws has {name}, but that granularity makes no span of {layers} layers")
        self._walks = cache(self._make_walks)
        self.dearest = cache(self._dearest)

    def draws(self, step: int, micro_batch: int) -> tuple[Assembly, ...]:
        """The assemblies that share micro-batch `micro_batch` of the global batch of a step, as `settings.draws` names
        them."""
        found: list[Assembly] = []
        num_sampled = 0
        for name in self.settings.draws:
            if name == SAMPLED:
                found.append(self.draw(step, micro_batch, num_sampled))
                num_sampled += 1
            elif name == COARSEST:
                found.append(self._coarsest)
            elif name == PURE:
                found += self._pure.values()
            elif name == CROSSED:
                found += self._crossed(step, micro_batch)
            else:
                found.append(self._pure[_granularity(name)])
        return tuple(found)

    def _crossed(self, step: int, micro_batch: int) -> list[Assembly]:
        """Every granularity of the decoder throughout, each below an encoder of one granularity or the teacher's own.

        Coarse decoders are asked for below every encoder (by speed first, mostly), but pure assemblies know one each.
        """
        if not all(self.stacks.spans):
            return list(self._pure.values())
        encoder, decoder = map(sorted, self.settings.by_stack)
        choices = [1, *encoder]
        generator = random.Random(f"{CROSSED}/{self.seed}/{step}/{micro_batch}")
        drawn = generator.sample(choices * -(-len(decoder) // len(choices)), len(decoder))
        found = map(self.stacks.pure, zip(drawn, decoder, strict=True))
        return [each for each in found if each != self.stacks.teacher()]

    def _dearest(self) -> tuple[Assembly, ...]:
        """Of the draws of many micro-batches of the run those for which most layers are computed."""
        first, last = self.settings.local_steps, self.settings.optim.num_steps
        num_micro_batches = self.settings.batch.micro_batches_per_step
        total = (last - first) * num_micro_batches
        compared = (i * total // NUM_COMPARED for i in range(NUM_COMPARED)) if total > NUM_COMPARED else range(total)
        drawn = (self.draws(first + place // num_micro_batches, place % num_micro_batches) for place in compared)
        return max(drawn, key=lambda draws: len(students_of(draws)))

    def draw(self, step: int, micro_batch: int, index: int = 0) -> Assembly:
        """The assembly number `index` of those that are sampled for a micro-batch."""
        generator = random.Random(f"draw/{self.seed}/{step}/{micro_batch}" + (f"/{index}" if index else ""))
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


def _granularity(name: str) -> int:
    """Of a name such as pure-3."""
    return int(name.removeprefix(f"{PURE}-"))


def pure_assemblies(settings: DistillConfig, stacks: Stacks) -> dict[int, Assembly]:
    """The assembly that has a granularity throughout, for each from the finest to the coarsest that makes a span."""
    encoder, decoder = settings.by_stack
    found = {
        each: stacks.pure((each if each in encoder else 1, each if each in decoder else 1))
        for each in sorted(settings.all_granularities)
    }
    return {each: assembly for each, assembly in found.items() if assembly != stacks.teacher()}


def text_of(draws: Draws) -> str:
    """Draws in a line for people; empty where there are none."""
    return "the local phase" if draws is None else " + ".join(map(str, draws))


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
