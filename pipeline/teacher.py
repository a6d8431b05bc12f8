"""The teacher stage: train a T5 from scratch or fine-tune one, through the engine that distils it.

Shapes: B examples, T target tokens, N valid target tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time

from transformers import PreTrainedModel

from data_prep.hub import local_folder
from pipeline.config import Recipe
from pipeline.families import new_t5
from pipeline.model import check_lengths, load_model
from pipeline.rundir import RunDir, Stage
from pipeline.tokenizer import vocabulary_size
from pipeline.training import Trainer, Watchdog, begin_stage, full_model_task, save_model, save_trained
from pipeline.world import World


def train_teacher(recipe: Recipe, stage: Stage, world: World, watchdog: Watchdog, *, extend: bool = False) -> None:
    """Make RUN/teacher/model, a Hugging Face folder. Collective over all ranks."""
    started_at, run = time.time(), stage.run
    if begin_stage(stage, world, extend=extend):
        return
    settings = recipe.teacher
    if settings.optim.num_steps == 0:
        if world.is_main:
            save_model(_starting_model(recipe, run), run.teacher_model, run.tokenizer)
    else:
        trainer = Trainer(
            full_model_task(_starting_model(recipe, run)),
            stage, world, watchdog, optim=settings.optim, batch=settings.batch, loop=settings.loop,
        )  # fmt: skip
        trainer.train()
        if world.is_main:
            save_trained(_starting_model(recipe, run), stage, run.teacher_model, run.tokenizer)
    if world.is_main:
        stage.publish([run.teacher_model], started_at=started_at)


def _starting_model(recipe: Recipe, run: RunDir) -> PreTrainedModel:
    settings = recipe.teacher
    if settings.folder:
        model = load_model(local_folder(settings.folder))
        check_lengths(model.config, recipe)
        return model
    return new_t5(vocabulary_size(run.tokenizer), dataclasses.asdict(settings.architecture), recipe.seed)
