"""Baselines on the same teacher and data.

Layer dropping keeps evenly spaced teacher layers and trains nothing. Shrink and fine-tune (Shleifer & Rush 2020) starts
from kept layers too, and trains all of that small model directly on the task loss; it makes one size a run.
"""

from __future__ import annotations

import time

from pipeline.assemble import Parts, coarsest_of, num_teacher_layers, write_checkpoint
from pipeline.config import Recipe
from pipeline.loop import Trainer, begin_stage
from pipeline.rundir import RunDir, Stage
from pipeline.teacher import full_model_task, load_model, save_trained
from pipeline.world import World


def train_baseline(recipe: Recipe, run: RunDir, world: World, *, extend: bool = False) -> None:
    """Make RUN/baseline/model: the teacher shrunk to the depth of the coarsest assembly and fine-tuned. Collective."""
    started_s = time.time()
    stage = Stage.of(recipe, run, "baseline")
    if begin_stage(stage, world, extend=extend):
        return
    if recipe.baseline.optim.num_steps == 0:
        if world.is_main:
            stage.publish([], started_s=started_s)
        return
    start = stage.folder / "start"
    if world.is_main:
        coarsest = coarsest_of(recipe, num_teacher_layers(run))
        write_checkpoint(Parts.of(run, library=False), coarsest, start, dropped=True)
    world.barrier()
    model = load_model(start)
    trainer = Trainer(
        full_model_task(model),
        stage, world, optim=recipe.baseline.optim, batch=recipe.distill.batch, loop=recipe.distill.loop,
    )  # fmt: skip
    trainer.train()
    if world.is_main:
        save_trained(load_model(start), stage, run.baseline_model, run.teacher_model)
        stage.publish([run.baseline_model], started_s=started_s)
