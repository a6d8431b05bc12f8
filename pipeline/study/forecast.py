"""What a study would train: how many trainings of each kind, how many of them are done, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.planning import Planned
from pipeline.study.cells import Cell, Cells
from pipeline.study.lines import FULL
from pipeline.study.settings import StudyConfig

Choice = Sequence[Cell]
"""One training: the cells that it may turn out to be, which differ by the learning rate or method that was best."""


def forecast(config: StudyConfig, cells: Cells, out: Path) -> str:
    """A table for people, from nothing but the recipes and what is trained already."""
    kinds: dict[str, list[Choice]] = {}
    for kind, choices in _trainings(config, cells):
        kinds.setdefault(kind, []).extend(choices)
    figures = {kind: _figures(choices) for kind, choices in kinds.items()}
    figures["all"] = [sum(column) for column in zip(*figures.values(), strict=True)]
    rows = [["", "trainings", "done", "FLOPs", "left"]]
    rows += [[kind, *map(str, of[:2]), *(f"{flops:.3g}" for flops in of[2:])] for kind, of in figures.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    about = f"{config.name} trains into {out}, after data and teacher. FLOPs are of student, teacher and heads."
    return "\n".join([about, "", *lines])


def _figures(choices: Sequence[Choice]) -> list[float]:
    """Trainings, those that are done, FLOPs of all, FLOPs left."""
    left = [choice[0].flops for choice in choices if not any(cell.is_done for cell in choice)]
    return [len(choices), len(choices) - len(left), sum(choice[0].flops for choice in choices), sum(left)]


def _trainings(config: StudyConfig, cells: Cells) -> Iterator[tuple[str, list[Choice]]]:
    """(kind, trainings of that kind)."""
    for budget in config.budgets:
        steps = f"{budget:,} steps"
        for seed in config.seeds:
            # the first seed and budget try every learning rate, the others take the best
            tries_all = (budget, seed) == (config.budgets[0], config.seeds[0])
            modular = [cells.modular(budget, rate, seed) for rate in config.rates]
            yield f"modular run, {steps}", _apart(modular) if tries_all else [modular]
            for variant in config.variants:
                changed = [cells.modular(budget, rate, seed, variant) for rate in config.rates]
                yield f"variants, {steps}", [changed]
            if not config.rivals:
                continue
            for ratio in modular[0].recipe.assemble.ratios:
                for method in config.rivals:
                    rivals = [cells.equal_rival(method, ratio, rate, budget, seed) for rate in config.rates]
                    yield f"{method} at equal cost, {steps}", _apart(rivals) if tries_all else [rivals]
            for ratio in config.full_ratios if seed == config.seeds[0] else ():
                rivals = [
                    cells.rival(method, ratio, modular[0].flops, rate, seed, f"{FULL}-{budget}")
                    for method in config.rivals for rate in config.rates
                ]  # fmt: skip
                yield f"better rival at full cost, {steps}", [rivals]
            for ratio in config.recover_ratios:
                assembly = str(Planned.of(modular[0].recipe).stacks.preset("size-first", ratio))
                yield f"trained further, {steps}", [[cells.recovered(each, ratio, assembly) for each in modular]]


def _apart(cells: Sequence[Cell]) -> list[Choice]:
    return [[cell] for cell in cells]
