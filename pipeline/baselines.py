"""Baselines on the same teacher, data and code: one small model a run, each an ordinary checkpoint.

Layer dropping keeps evenly spaced teacher layers and trains nothing (stage assemble makes it). The others train:

finetune  shrink and fine-tune (Shleifer & Rush 2020): kept teacher layers, all parameters trained on the task loss
logit     the same with logit distillation from the whole teacher (Hinton et al. 2015) beside the task loss
theseus   BERT-of-Theseus (Xu et al. 2020): one granularity, task loss only, every span replaced by an independent coin
          at a constant rate and all of them at the end; here a layer starts from the first of its span

Shapes: B examples, T target tokens, N valid target tokens, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import replace

from pipeline.assemble import (
    Baseline,
    Parts,
    baselines_of,
    one_granularity,
    stacks_of,
    theseus_settings,
    write_checkpoint,
)
from pipeline.checkpoints import checkpoints
from pipeline.config import Recipe
from pipeline.distill import modular_task
from pipeline.families import family_of
from pipeline.library import export_library, product_of
from pipeline.model import ModularModel, load_model
from pipeline.rundir import RunDir, Stage
from pipeline.training import Task, Trainer, Watchdog, begin_stage, distilled_task, full_model_task, save_trained
from pipeline.world import World, release_memory


def train_baseline(recipe: Recipe, stage: Stage, world: World, watchdog: Watchdog, *, extend: bool = False) -> None:
    """Make RUN/baseline/<method>-<assembly>/model for every baseline of the recipe, one after the other. Collective."""
    started_at, run = time.time(), stage.run
    wanted = baselines_of(recipe, stacks_of(recipe, run))
    if begin_stage(stage, world, extend=extend):
        return
    for each in wanted:
        try:
            _train_one(each, recipe, replace(stage, name=f"baseline/{each.name}"), world, watchdog, extend=extend)
        except SystemExit:
            requeue = stage.folder / each.name / "REQUEUE"
            if world.is_main and requeue.exists():  # whoever started the stage looks for it there
                requeue.rename(stage.folder / requeue.name)
            raise
        release_memory(world.device)
    if world.is_main:
        stage.publish([each.model(run) for each in wanted], started_at=started_at)


def _train_one(each: Baseline, recipe: Recipe, part: Stage, world: World, watchdog: Watchdog, *, extend: bool) -> None:
    """Train and publish one baseline. `part` is the stage as far as it concerns this one, in a folder of its own."""
    started_at, run = time.time(), part.run
    if begin_stage(part, world, extend=extend):
        return
    optim, batch, loop = recipe.baseline.optim, recipe.distill.batch, recipe.distill.loop
    if each.method == "theseus":
        task = theseus_task(recipe, run, one_granularity(each.assembly))
    else:
        start = part.folder / "start"
        if world.is_main:
            write_checkpoint(Parts.of(run, library=False), each.assembly, start, dropped=True)
        world.barrier()
        task = full_model_task(load_model(start))
        if each.method == "logit":
            task = distilled_task(task, load_model(run.teacher_model), recipe.distill.losses)
    Trainer(task, part, world, watchdog, optim=optim, batch=batch, loop=loop).train()
    if world.is_main:
        if each.method == "theseus":
            library = part.folder / "library"
            export_library(checkpoints(part.folder / "checkpoints")[-1], library)
            write_checkpoint(Parts.load(run.teacher_model, library), each.assembly, each.model(run))
        else:
            save_trained(load_model(part.folder / "start"), part, each.model(run), run.teacher_model)
        part.publish([each.model(run)], started_at=started_at)
    world.barrier()


def theseus_task(recipe: Recipe, run: RunDir, granularity: int) -> Task:
    settings = theseus_settings(recipe, granularity)
    teacher = load_model(run.teacher_model)
    family = family_of(teacher.config.model_type)
    model = ModularModel(teacher, family, settings.by_stack, settings.init)
    task = modular_task(model, family, teacher.config, settings, recipe.seed)
    return replace(task, product=product_of(model, run, settings))
