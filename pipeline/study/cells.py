"""The trainings of a study: what each changes of the recipe, what it costs, and how it did on validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.config import Recipe, parse_recipe, recipe_parser
from pipeline.planning import baseline_flops, distill_flops
from pipeline.report import read_jsonl
from pipeline.rundir import RunDir, Stage

BASE = "base"
"""The run directory of data and teacher."""


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
    def validation_loss(self) -> float:
        """Of the weights that were kept: nats per token, for a modular run the mean over the assemblies followed."""
        folder = self.run.stage(self.stage)
        (metrics,) = [*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")]
        losses = [loss for record in read_jsonl(metrics) if (loss := _mean_loss(record)) is not None]
        return min(losses) if self.recipe.distill.loop.keep_best else losses[-1]


def _mean_loss(record: Mapping[str, Any]) -> float | None:
    losses = [v for k, v in record.items() if k.startswith("validation/") and k != "validation/teacher"]
    return sum(losses) / len(losses) if losses else None


@dataclass(frozen=True)
class Cells:
    """Makes the trainings of one study.

    Args:
        configs: recipes as `run --config` takes them.
        out: the folder of all run directories.
    """

    configs: Sequence[str]
    out: Path

    def recipe(self, name: str, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with some fields, by dotted names, set anew; its run directory is called `name`."""
        settings = {"run_dir": self.out / name, "assemble.presets": "[size-first]", **settings}
        arguments = [part for each in self.configs for part in ("--config", each)]
        arguments += [part for field_name, value in settings.items() for part in (f"--{field_name}", str(value))]
        return _parsed(tuple(arguments))

    def modular(self, budget: int, rate: float, seed: int) -> Cell:
        """The run for all sizes, of so many steps."""
        distill = self.recipe(BASE, {}).distill
        settings = {
            "seed": seed,
            "distill.local_steps": round(budget * distill.local_steps / distill.optim.num_steps),
            "distill.optim.num_steps": budget,
            "distill.optim.learning_rate": rate * distill.optim.learning_rate,
            "baseline.optim.num_steps": 0,
        }
        name = f"modular-{budget}{_by(rate)}-seed{seed}"
        recipe = self.recipe(name, settings)
        return Cell("distill", recipe, RunDir(self.out / name), _distill_flops(recipe), rate)

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
