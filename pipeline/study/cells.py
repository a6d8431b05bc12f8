"""The trainings of a study: what each changes of the recipe, what it costs, and how it did on validation data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.config import Recipe, parse_recipe, recipe_parser
from pipeline.planning import baseline_flops, distill_flops
from pipeline.report import read_jsonl
from pipeline.rundir import RunDir, Stage
from pipeline.study.lines import EQUAL
from pipeline.study.settings import VariantConfig

BASE = "base"
"""The run directory of data and teacher."""
AS_IT_IS = VariantConfig()
MANY_DRAWS = 2000
"""Draws from which the costs of two samplers are held against each other: to about 1 %."""


@dataclass(frozen=True)
class Cell:
    """One training, in a run directory of its own."""

    stage: str
    """distill, baseline or recover."""
    recipe: Recipe
    run: RunDir
    flops: float
    """What it costs: of student, teacher and heads, over all steps."""
    rate: float = 1.0
    """Factor on the recipe's learning rate."""
    method: str = ""
    """As in baseline.methods, of a rival."""
    variant: str = ""
    """The name of a modular run with something changed."""
    uses: Mapping[str, RunDir] = field(default_factory=dict)
    """Stages beside data and teacher that are taken as they are, by name, and the runs that they lie in."""

    @property
    def is_done(self) -> bool:
        try:
            return Stage.of(self.recipe, self.run, self.stage).stamp() is not None
        except FileNotFoundError:  # of a stage before it
            return False

    @property
    def model(self) -> Path | None:
        """The one model that a rival or further training has made; None where that made nothing better."""
        folder = self.run.stage(self.stage)
        return next(iter([*folder.glob("model"), *folder.glob("*/model")]), None)

    @property
    def measures(self) -> Mapping[str, float]:
        """What the last validation found: validation/<assembly> in nats per token, and bleu/<assembly> where the recipe
        has it measured."""
        folder = self.run.stage(self.stage)
        (metrics,) = [*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")]
        found = [measures for record in read_jsonl(metrics) if _losses(measures := _measures(record))]
        return found[-1]

    @property
    def validation_loss(self) -> float:
        """At the end, of the weights that are scored: nats per token, for a modular run the mean over the assemblies
        followed."""
        return statistics.mean(_losses(self.measures))


def _measures(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in record.items()
        if name.startswith(("validation/", "bleu/")) and not name.endswith("/teacher")
    }


def _losses(measures: Mapping[str, float]) -> list[float]:
    return [value for name, value in measures.items() if name.startswith("validation/")]


@dataclass(frozen=True)
class Cells:
    """Makes the trainings of one study.

    Args:
        configs: recipes as `run --config` takes them.
        out: the folder of all run directories.
    """

    configs: Sequence[str]
    out: Path

    def recipe(self, name: str, settings: Mapping[str, Any], change: Sequence[str] = ()) -> Recipe:
        """The recipe with a change, as on the command line, and some fields, by dotted names, set anew; its run
        directory is called `name`."""
        settings = {"run_dir": self.out / name, "assemble.presets": "[size-first]", **settings}
        arguments = [*(part for each in self.configs for part in ("--config", each)), *change]
        arguments += [part for field_name, value in settings.items() for part in (f"--{field_name}", str(value))]
        return _parsed(tuple(arguments))

    def modular(self, budget: int, rate: float, seed: int, variant: VariantConfig = AS_IT_IS) -> Cell:
        """The run for all sizes: as it is for so many steps, otherwise for as many as cost the same."""
        name = "-".join(["modular", *filter(None, [variant.name]), f"{budget}{_by(rate)}", f"seed{seed}"])
        num_steps, local_steps = self._steps(budget, seed, variant)
        rate_as_it_is = self.recipe(BASE, {}, variant.arguments).distill.optim.learning_rate
        settings = {
            "seed": seed,
            "distill.local_steps": local_steps,
            "distill.optim.num_steps": num_steps,
            "distill.optim.learning_rate": rate * rate_as_it_is,
            "baseline.optim.num_steps": 0,
        }
        recipe = self.recipe(name, settings, variant.arguments)
        return Cell("distill", recipe, RunDir(self.out / name), _distill_flops(recipe), rate, variant=variant.name)

    def _steps(self, budget: int, seed: int, variant: VariantConfig) -> tuple[int, int]:
        """(steps, those of them that are local): the recipe's share of local ones, and as many others as make it cost
        what the run as it is costs; local ones alone where all are local."""
        distill = self.recipe(BASE, {}, variant.arguments).distill
        local_steps = round(budget * distill.local_steps / distill.optim.num_steps)
        if variant == AS_IT_IS:
            return budget, local_steps
        _, local_as_it_is = self._steps(budget, seed, AS_IT_IS)
        local, replacing = self._flops_of_phases(seed, AS_IT_IS)
        flops = local_as_it_is * local + (budget - local_as_it_is) * replacing
        local, replacing = self._flops_of_phases(seed, variant)
        if local_steps == budget:
            return (num_steps := round(flops / local)), num_steps
        return local_steps + max(0, round((flops - local_steps * local) / replacing)), local_steps

    def _flops_of_phases(self, seed: int, variant: VariantConfig) -> tuple[float, float]:
        """Of a local and of a replacing step."""
        local, replacing = (
            self.recipe(
                BASE,
                {"seed": seed, "distill.optim.num_steps": MANY_DRAWS, "distill.local_steps": local_steps},
                variant.arguments,
            )
            for local_steps in (MANY_DRAWS, 0)
        )
        return _distill_flops(local, MANY_DRAWS) / MANY_DRAWS, _distill_flops(replacing, MANY_DRAWS) / MANY_DRAWS

    def rival(self, method: str, ratio: float, flops: float, rate: float, seed: int, share: str) -> Cell:
        """A model of one size, trained for as many FLOPs as whole steps can make.

        Args:
            share: what its part of the modular run's cost is called in names.
        """
        name = f"{method}-{ratio:g}x-{share}{_by(rate)}-seed{seed}"
        settings: dict[str, Any] = {"seed": seed, "baseline.methods": f"[{method}]", "baseline.ratios": f"[{ratio}]"}
        optim = self.recipe(name, settings).baseline.optim
        step = self._step_flops(method, ratio)
        num_steps = max(1, round(flops / step))
        settings |= {
            "baseline.optim.num_steps": num_steps,
            "baseline.optim.learning_rate": rate * optim.learning_rate,
            "baseline.optim.warmup_steps": min(optim.warmup_steps, num_steps // 4),
        }
        return Cell("baseline", self.recipe(name, settings), RunDir(self.out / name), num_steps * step, rate, method)

    def equal_rival(self, method: str, ratio: float, rate: float, budget: int, seed: int) -> Cell:
        """A model of one size, for its part of the modular run's cost: all ratios have the same."""
        modular = self.modular(budget, 1.0, seed)
        part = modular.flops / len(modular.recipe.assemble.ratios)
        return self.rival(method, ratio, part, rate, seed, f"{EQUAL}-{budget}")

    def recovered(self, modular: Cell, ratio: float, assembly: str) -> Cell:
        """An assembly of the modular run, trained further as the recipe's recover says."""
        name = f"recover-{ratio:g}x-{modular.run.root.name}"
        distill = modular.recipe.distill
        settings = {
            "seed": modular.recipe.seed,
            "distill.local_steps": distill.local_steps,
            "distill.optim.num_steps": distill.optim.num_steps,
            "distill.optim.learning_rate": distill.optim.learning_rate,
            "recover.assembly": assembly,
        }
        recipe = self.recipe(name, settings)
        cost = self._step_flops("finetune", ratio) * recipe.recover.optim.num_steps
        return Cell("recover", recipe, RunDir(self.out / name), cost, uses={"distill": modular.run})

    def _step_flops(self, method: str, ratio: float) -> float:
        """Of one step of one baseline."""
        named = {"baseline.methods": f"[{method}]", "baseline.ratios": f"[{ratio}]"}
        return _baseline_flops(self.recipe(BASE, {**named, "baseline.optim.num_steps": 1}))


# the same recipes are asked for again and again
_distill_flops, _baseline_flops = cache(distill_flops), cache(baseline_flops)


@cache
def _parsed(arguments: tuple[str, ...]) -> Recipe:
    return parse_recipe(recipe_parser("study", ""), arguments)[0]


def _by(rate: float) -> str:
    return "" if rate == 1 else f"-rate{rate:g}"
