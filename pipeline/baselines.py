"""Baselines on the same teacher and data.

Layer dropping keeps evenly spaced teacher layers and trains nothing. Shrink and fine-tune (Shleifer & Rush 2020) starts
from kept layers too, and trains all of that small model directly; it makes one size a run.
"""

from __future__ import annotations

import time

from pipeline.assemble import write_checkpoint
from pipeline.config import Recipe
from pipeline.loop import Trainer
from pipeline.rundir import RunDir, Stage
from pipeline.spans import coarsest_assembly, modular_spans
from pipeline.teacher import begin, full_model_task, load_model, save_trained
from pipeline.world import World


def train_baseline(recipe: Recipe, run: RunDir, world: World, *, extend: bool = False) -> None:
    """Make RUN/baseline/model: the teacher shrunk to the depth of the coarsest assembly and fine-tuned. Collective."""
    started_s = time.time()
    stage = Stage.of(recipe, run, "baseline")
    begin(stage, world, extend=extend)
    if recipe.baseline.optim.num_steps == 0:
        if world.is_main:
            stage.publish([], started_s=started_s)
        return
    start = stage.folder / "start"
    if world.is_main:
        config = load_model(run.teacher_model).config
        num_layers = (config.num_layers, config.num_decoder_layers)
        encoder, decoder = (modular_spans(n, recipe.distill.granularities) for n in num_layers)
        write_checkpoint(run, coarsest_assembly(num_layers, (encoder, decoder)), start, dropped=True)
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
