"""The distill stage: one run that trains every modular layer over the frozen teacher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.checkpoints import checkpoints
from pipeline.config import DistillConfig, Recipe
from pipeline.families import family_of
from pipeline.kernels import HeadObjective
from pipeline.library import export_library, product_of
from pipeline.model import (
    Draws,
    GlobalCounts,
    LossTerms,
    ModularLeaf,
    ModularModel,
    ModularOutputs,
    Objectives,
    Sampler,
    TeacherLeaf,
    Wanted,
    check_losses,
    compile_layers,
    granularity_label,
    granularity_of,
    load_model,
    pure_assemblies,
)
from pipeline.rundir import Stage
from pipeline.scoring import bleu
from pipeline.spans import Assembly, Stacks
from pipeline.tokenizer import Wording, language_ids, load_tokenizer
from pipeline.training import Task, Trainer, Translation, Watchdog, begin_stage
from pipeline.world import World, logger_of


def train_modular(recipe: Recipe, stage: Stage, world: World, watchdog: Watchdog, *, extend: bool = False) -> None:
    """Make RUN/distill/library, the modular layers of all granularities. Collective over all ranks."""
    started_at, run = time.time(), stage.run
    if begin_stage(stage, world, extend=extend):
        return
    settings = recipe.distill
    teacher = load_model(run.teacher_model)
    check_losses(teacher.config.model_type, settings.losses)
    family = family_of(teacher.config.model_type)
    model = ModularModel(teacher, family, settings.by_stack, settings.init, share_memory=True)
    task = modular_task(model, family, teacher.config, settings, recipe.seed)
    task = replace(
        task,
        product=product_of(model, run, settings),
        translation=translation(
            model, settings, run.tokenizer, recipe.evaluate.bleu_tokenizer, family.max_positions(teacher.config)
        )
        if settings.loop.validation_bleu_examples
        else None,
    )
    trainer = Trainer(
        task,
        stage, world, watchdog, optim=settings.optim, batch=settings.batch, loop=settings.loop,
    )  # fmt: skip
    if settings.compile_layers:
        logger_of(world).info("distill: %s", compile_layers(model, lambda good: not world.any(not good)))
    trainer.train()
    if world.is_main:
        export_library(checkpoints(stage.folder / "checkpoints")[-1], run.library)
        stage.publish([run.library], started_at=started_at)


def modular_task(model: ModularModel, family: Any, hf_config: Any, settings: DistillConfig, seed: int) -> Task:
    """The two phases: local, where every modular layer learns its span, then replacing, where draws are trained."""
    sampler = Sampler(settings, seed=seed, stacks=model.stacks)
    objectives = Objectives(settings.losses)

    def draws(step: int, micro_batch: int) -> Draws:
        return None if step < settings.local_steps else sampler.draws(step, micro_batch)

    def forward_args(step: int, draws: Draws, counts: GlobalCounts) -> tuple[Draws, Wanted]:
        return draws, objectives.wanted(step, counts)

    def loss_terms(step: int, outputs: ModularOutputs, counts: GlobalCounts) -> LossTerms:
        if step < settings.local_steps:
            return objectives.local_terms(step, outputs, counts)
        terms = objectives.replacing_terms(step, outputs, counts)
        replaced = sum(granularity_of(use.name) * len(use.draws) for use in outputs.pairs)
        share = replaced / (outputs.num_draws * sum(model.stacks.num_layers))
        return replace(terms, means={**terms.means, "replaced_share": (share, 1)})

    cross_entropy = Wanted(HeadObjective(task=1.0), eager=not settings.losses.fused)
    granularities = sorted({span.num_layers for _, _, spans in model.stacks for span in spans})
    return Task(
        module=model,
        leaf_classes=[TeacherLeaf, ModularLeaf],
        lr_factor=lambda name: family.lr_factor(name, hf_config),
        clip_group=lambda name: ".".join(name.split(".")[1:3]),
        draws=draws,
        dearest_draws=lambda step: None if step < settings.local_steps else sampler.dearest(),
        forward_args=forward_args,
        loss_terms=loss_terms,
        validations={name: ((each,), cross_entropy) for name, each in followed(model.stacks, settings).items()},
        layers=[leaf for leaf in model.modules() if isinstance(leaf, (TeacherLeaf, ModularLeaf))],
        restarts=(settings.local_steps,) if 0 < settings.local_steps < settings.optim.num_steps else (),
        means=[*map(granularity_label, granularities), "replaced_share"],
    )


def followed(stacks: Stacks, settings: DistillConfig) -> dict[str, Assembly]:
    """Assemblies that are validated while training, by name: the teacher, each granularity throughout from the finest
    to the coarsest, and half of the layers, where these granularities reach that."""
    pure = list(pure_assemblies(settings, stacks).values())
    has_half = stacks.coarsest().num_layers <= round(sum(stacks.num_layers) / 2)
    half = [stacks.preset("size-first", 2.0)] if has_half else []
    return {"teacher": stacks.teacher()} | {str(assembly): assembly for assembly in [pure[0], *half, *pure[1:]]}


def translation(
    model: ModularModel,
    settings: DistillConfig,
    tokenizer_folder: Path,
    bleu_tokenizer: str,
    num_positions: int | None = None,
) -> Translation:
    """A small BLEU of the teacher, the finest, a 2x and the coarsest of the assemblies that are followed."""
    tokenizer: Any = load_tokenizer(tokenizer_folder)
    wording = Wording(tokenizer)

    def score(outputs: Sequence[list[int]], references: Sequence[list[int]]) -> float:
        return bleu(wording(outputs), wording(references), bleu_tokenizer)

    assemblies = followed(model.stacks, settings)
    ratios = {name: assembly.ratio_of_layers for name, assembly in assemblies.items()}
    teacher, *students = assemblies
    chosen = [teacher, students[0], min(students, key=lambda name: abs(ratios[name] - 2)), students[-1]]
    return Translation(
        {name: ((assemblies[name],),) for name in chosen}, tokenizer.eos_token_id, score, bool(language_ids(tokenizer)),
        num_positions,
    )  # fmt: skip
