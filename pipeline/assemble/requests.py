"""What a recipe asks for: assemblies, and the baselines that stand beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import SAMPLED, SEARCHED, DistillConfig, LossConfig, Recipe
from pipeline.families import family_of
from pipeline.rundir import RunDir, read_json
from pipeline.spans import Assembly, Stacks, pure_tiling


def stacks_of(recipe: Recipe, run: RunDir) -> Stacks:
    """The stacks of a run's teacher, as the recipe's granularities divide them."""
    config = json.loads((run.teacher_model / "config.json").read_text(encoding="utf-8"))
    return recipe.distill.stacks(family_of(config["model_type"]).depths(config))


def check_granularities(recipe: Recipe, run: RunDir) -> None:
    """Hold a recipe against the module library that it is used with.

    Raises:
        FileNotFoundError: no library.
        ValueError: it was trained with other granularities.
    """
    library = read_json(run.library / "library.json")
    if library is None:
        raise FileNotFoundError(f"{run.library / 'library.json'} is missing: run stage distill first")
    for stack, _, spans in stacks_of(recipe, run):
        if sorted(library["spans"][stack]) != sorted(map(str, spans)):
            raise ValueError(
                f"{run.library} has modular layers for {stack} {', '.join(library['spans'][stack]) or 'layers: none'}, "
                f"not those of granularities {list(recipe.distill.granularities_of(stack))}: set the recipe's back, or "
                "run stage distill"
            )


def requested_assemblies(
    recipe: Recipe, stacks: Stacks, choices: dict[str, Any] | None = None
) -> dict[Assembly, list[tuple[str, float]]]:
    """Each assembly that the recipe asks for, the teacher first, with the (preset, ratio) pairs that ask for it.

    Args:
        choices: what stage search has chosen; None: it has not yet, and what it will choose is left out.

    Raises:
        ValueError: a ratio beyond the coarsest assembly, or an assembly that the granularities do not allow.
    """
    requests: dict[Assembly, list[tuple[str, float]]] = {stacks.teacher(): []}
    for preset in recipe.assemble.presets:
        for ratio in recipe.assemble.ratios:
            assembly = stacks.preset("size-first" if preset == SEARCHED else preset, ratio)
            if preset == SEARCHED:
                if choices is None:
                    continue
                assembly = Assembly.parse(choices["ratios"][f"{ratio:g}"])
            requests.setdefault(assembly, []).append((preset, ratio))
    within_budgets = choices["budgets"].values() if choices and SEARCHED in recipe.assemble.presets else ()
    for text in (*recipe.assemble.assemblies, *within_budgets):
        assembly = Assembly.parse(text)
        stacks.refuse_misfit(assembly)
        requests.setdefault(assembly, [])
    return requests


def assembly_to_recover(recipe: Recipe, stacks: Stacks) -> Assembly:
    """The assembly that recover tunes.

    Raises:
        ValueError: none is named, or one that the granularities do not allow, or there is nothing to train.
    """
    settings = recipe.recover
    if not settings.assembly:
        raise ValueError("recover.assembly is empty: name the assembly to tune, such as e2x3-d6")
    if settings.optim.num_steps == 0:
        raise ValueError("recover.optim.num_steps is 0: there would be nothing to compare")
    assembly = Assembly.parse(settings.assembly)
    stacks.refuse_misfit(assembly)
    return assembly


@dataclass(frozen=True)
class Baseline:
    """One model that is trained to stand beside an assembly."""

    method: str
    assembly: Assembly
    """The assembly whose depth it has."""

    @property
    def name(self) -> str:
        return f"{self.method}-{self.assembly}"

    def model(self, run: RunDir) -> Path:
        """Its checkpoint folder."""
        return run.stage("baseline") / self.name / "model"


def baselines_of(recipe: Recipe, stacks: Stacks) -> list[Baseline]:
    """What the recipe asks for.

    Raises:
        ValueError: a ratio beyond the coarsest assembly, or for theseus one that no single granularity makes.
    """
    settings = recipe.baseline
    if settings.optim.num_steps == 0:
        return []
    assemblies = [stacks.preset("size-first", ratio) for ratio in settings.ratios]
    assemblies = list(dict.fromkeys(assemblies)) or [stacks.coarsest()]
    found = [Baseline(method, assembly) for method in settings.methods for assembly in assemblies]
    for each in found:
        if each.method == "theseus":
            one_granularity(each.assembly)
    return found


def one_granularity(assembly: Assembly) -> int:
    """The one granularity of an assembly that BERT-of-Theseus can make.

    Raises:
        ValueError: it mixes several.
    """
    granularity = max(assembly.encoder.lengths + assembly.decoder.lengths)
    for tiling in (assembly.encoder, assembly.decoder):
        if tiling != pure_tiling(tiling.num_teacher_layers, granularity):
            raise ValueError(
                f"baseline theseus has one granularity, which does not make {assembly}: give it baseline.ratios that "
                "one granularity makes, such as 2, 3 or 6"
            )
    return granularity


def theseus_settings(recipe: Recipe, granularity: int) -> DistillConfig:
    """BERT-of-Theseus as settings of a distillation: the task loss alone; the rate and the ramp are the recipe's."""
    return replace(
        recipe.distill,
        granularities=(granularity,),
        encoder_granularities=None,
        decoder_granularities=None,
        init="first",
        local_steps=0,
        sampler="theseus-constant",
        draws=(SAMPLED,),
        losses=LossConfig(hidden=0.0, logit=0.0, task=1.0, fused=recipe.distill.losses.fused),
        optim=recipe.baseline.optim,
    )
