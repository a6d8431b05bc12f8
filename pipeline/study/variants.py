"""Variants of the modular run against the run as it is: what validation found, as mean and spread over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from pipeline.study.cells import Cell

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Spread:
    """A measure of one variant over its seeds."""

    mean: float
    half_range: float
    num_seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.mean(values), (max(values) - min(values)) / 2, len(values))

    def differs_from(self, other: Spread) -> bool:
        """By more than both half ranges together; one seed has no range to compare with."""
        both = self.half_range + other.half_range
        return min(self.num_seeds, other.num_seeds) > 1 and abs(self.mean - other.mean) > both


@dataclass(frozen=True)
class Variant:
    """One variant at one budget."""

    name: str
    num_steps: int
    local_steps: int
    flops: float
    """What one seed costs."""
    measures: Mapping[str, Spread]


def variants_of(cells: Sequence[Cell]) -> list[Variant]:
    """The variants of one budget, in the order of their first cells; the run as it is has no name of its own."""
    found = []
    for name in dict.fromkeys(cell.variant for cell in cells):
        runs = [cell for cell in cells if cell.variant == name]
        distill = runs[0].recipe.distill
        measures = {key: Spread.of([cell.measures[key] for cell in runs]) for key in runs[0].measures}
        steps = distill.optim.num_steps, distill.local_steps
        found.append(Variant(name or AS_IT_IS, *steps, runs[0].flops, measures))
    return found


def text_of(budget: int, variants: Sequence[Variant]) -> str:
    """One budget as Markdown."""
    keys = list(dict.fromkeys(key for variant in variants for key in variant.measures))
    rows = [["variant", "steps", "of them local", *keys], [":--", *["--:"] * (len(keys) + 2)]]
    rows += [
        [variant.name, f"{variant.num_steps:,}", f"{variant.local_steps:,}", *_cells(variant, variants[0], keys)]
        for variant in variants
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"\n## Variants of the modular run, {budget:,} steps as it is\n\nEach costs {variants[0].flops:.3g} FLOPs. "
        f"validation: nats per target token; ± is half the range over the seeds. * differs from the run as it is by "
        f"more than both half ranges together.\n\n{table}\n"
    )


def figures_of(budget: int, variants: Sequence[Variant]) -> list[dict[str, object]]:
    """The same for study.json."""
    return [{"budget": budget, **asdict(variant)} for variant in variants]


def _cells(variant: Variant, as_it_is: Variant, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        found, reference = variant.measures.get(key), as_it_is.measures.get(key)
        if found is None:
            yield ""
            continue
        digits = 2 if key.startswith("bleu/") else 4
        mark = " *" if reference is not None and found.differs_from(reference) else ""
        yield f"{found.mean:.{digits}f} ± {found.half_range:.{digits}f}{mark}"
