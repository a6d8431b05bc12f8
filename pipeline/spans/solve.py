"""The best assemblies under additive scores, exactly: dynamic programming over each stack, then over both.

Every modular span has a score (what its use costs in loss), an assembly's score is the sum over its spans. The layers
of a stack are all of one size, so whatever an assembly costs (layers, parameters, bytes, time) depends on how many
layers each stack has and on nothing else: the best tilings for every number of layers answer any budget.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import product

from pipeline.spans.spans import Assembly, Span, Tiling

COSTS = ("layers", "parameters", "bytes", "ms")
_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}

Shape = tuple[int, int]  # layers of (encoder, decoder)
Scored = tuple[float, Assembly]


@dataclass(frozen=True)
class Budget:
    """At most this much of one cost; its text form is that of a recipe, such as ms=40 or bytes=300M."""

    cost: str
    limit: float
    text: str

    @staticmethod
    def parse(text: str) -> Budget:
        """
        Raises:
            ValueError: not a budget.
        """
        match = re.fullmatch(rf"({'|'.join(COSTS)})=(\d+(?:\.\d+)?)([kMG]?)", text)
        if not match:
            raise ValueError(
                f"{text!r} is not a budget: write one of {', '.join(COSTS)} and a number, such as bytes=300M"
            )
        return Budget(match[1], float(match[2]) * _FACTORS[match[3]], text)


@dataclass(frozen=True)
class Cost:
    """What a shape costs: a fixed part and a part for each layer of either stack."""

    fixed: float
    encoder_layer: float
    decoder_layer: float

    def of(self, shape: Shape) -> float:
        return self.fixed + self.encoder_layer * shape[0] + self.decoder_layer * shape[1]


def costs_of_sizes(parameters: Cost, bytes_per_parameter: float) -> dict[str, Cost]:
    """The costs that follow from sizes alone, by name; of COSTS only time must be measured."""
    return {
        "layers": Cost(0, 1, 1),
        "parameters": parameters,
        "bytes": Cost(*(bytes_per_parameter * each for each in astuple(parameters))),
    }


def shape_of(assembly: Assembly) -> Shape:
    return assembly.encoder.num_layers, assembly.decoder.num_layers


def best_tilings(num_layers: int, scores: Mapping[Span, float], num_best: int) -> dict[int, list[tuple[float, Tiling]]]:
    """For every reachable number of spans, the tilings of lowest summed score, best first.

    Exact: of the tilings of layers i.. with n spans only the `num_best` best can be part of the `num_best` best of the
    whole stack, whatever stands before them.

    Args:
        scores: of the modular spans; a single teacher layer scores 0.
    """
    options: list[list[tuple[int, float]]] = [[(1, 0.0)] for _ in range(num_layers)]
    for span, score in scores.items():
        options[span.first].append((span.num_layers, score))
    best: list[dict[int, list[tuple[float, tuple[int, ...]]]]] = [{} for _ in range(num_layers)] + [{0: [(0.0, ())]}]
    for first in reversed(range(num_layers)):
        found: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
        for length, score in options[first]:
            for count, tails in best[first + length].items():
                found.setdefault(count + 1, []).extend((score + rest, (length, *tail)) for rest, tail in tails)
        best[first] = {count: heapq.nsmallest(num_best, each) for count, each in found.items()}
    return {count: [(score, Tiling(lengths)) for score, lengths in each] for count, each in best[0].items()}


def best_assemblies(
    num_layers: tuple[int, int], scores: tuple[Mapping[Span, float], Mapping[Span, float]], num_best: int
) -> dict[Shape, list[Scored]]:
    """For every reachable shape, the assemblies of lowest summed score, best first; arguments as `best_tilings`."""
    encoders, decoders = (best_tilings(n, each, num_best) for n, each in zip(num_layers, scores, strict=True))
    found: dict[Shape, list[Scored]] = {}
    for encoder_layers, decoder_layers in product(sorted(encoders), sorted(decoders)):
        pairs = [
            (encoder_score + decoder_score, Assembly(encoder, decoder))
            for encoder_score, encoder in encoders[encoder_layers]
            for decoder_score, decoder in decoders[decoder_layers]
        ]
        found[encoder_layers, decoder_layers] = heapq.nsmallest(num_best, pairs, key=_order)
    return found


def best_of(by_shape: Mapping[Shape, Sequence[Scored]], allowed: Collection[Shape], num_best: int) -> list[Scored]:
    """The assemblies of lowest score among the allowed shapes, best first."""
    return heapq.nsmallest(num_best, (each for shape in allowed for each in by_shape[shape]), key=_order)


def pareto_front(points: Mapping[Assembly, tuple[float, float]]) -> list[Assembly]:
    """Assemblies whose (cost, loss) no other one matches or beats in both; from cheap to dear."""
    front: list[Assembly] = []
    lowest = float("inf")
    for assembly, (_, loss) in sorted(points.items(), key=lambda each: (each[1], str(each[0]))):
        if loss < lowest:
            front.append(assembly)
            lowest = loss
    return front


def _order(scored: Scored) -> tuple[float, str]:
    return scored[0], str(scored[1])
