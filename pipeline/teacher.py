"""The teacher stage: train a T5 from scratch or fine-tune one, through the engine that distils it.

Shapes: B examples, T target tokens, N valid target tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from data_prep.hub import local_folder
from pipeline.checkpoint_format import checkpoints, full_weights
from pipeline.config import Recipe
from pipeline.data import MicroBatch
from pipeline.families import family_of
from pipeline.families.t5 import new_t5
from pipeline.loop import Task, Trainer, begin_stage
from pipeline.losses import GlobalCounts, LossTerms, task_loss
from pipeline.rundir import RunDir, Stage, publish_folder
from pipeline.spans import STACKS
from pipeline.tokenizer import save_tokenizer, vocabulary_size
from pipeline.watchdog import Watchdog
from pipeline.world import World


@dataclass(frozen=True)
class TeacherOutputs:
    task_sum: torch.Tensor
    """Cross entropy summed over tokens."""
    labels_N: torch.Tensor


class TeacherModel(nn.Module):
    """A Hugging Face encoder-decoder whose parameters all train."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, batch: MicroBatch) -> TeacherOutputs:
        target_mask_BT = batch.labels_BT != -100
        logits_BTV = self.model(
            input_ids=batch.source_BS,
            attention_mask=batch.source_mask_BS,
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(batch.labels_BT),
            use_cache=False,
        ).logits
        labels_N = batch.labels_BT[target_mask_BT]
        return TeacherOutputs(task_loss(logits_BTV[target_mask_BT], labels_N), labels_N)


def teacher_terms(step: int, outputs: TeacherOutputs, counts: GlobalCounts) -> LossTerms:
    loss = outputs.task_sum / counts.num_target_tokens
    return LossTerms(loss, {"task": loss.detach()})


def full_model_task(model: PreTrainedModel) -> Task:
    """Train every parameter of a Hugging Face model on the task loss."""
    family = family_of(model.config.model_type)
    return Task(
        module=TeacherModel(model),
        leaf_classes=[type(family.layers(model, "encoder")[0])],
        lr_factor=lambda name: family.lr_factor(name, model.config),
        clip_group=lambda name: "model",
        forward_args=lambda step, batch, counts: (),
        loss_terms=teacher_terms,
        validations={"task": ()},
        layers=[layer for stack in STACKS for layer in family.layers(model, stack)],
    )


def train_teacher(recipe: Recipe, stage: Stage, world: World, watchdog: Watchdog, *, extend: bool = False) -> None:
    """Make RUN/teacher/model, a Hugging Face folder. Collective over all ranks."""
    started_s, run = time.time(), stage.run
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
        stage.publish([run.teacher_model], started_s=started_s)


def _starting_model(recipe: Recipe, run: RunDir) -> PreTrainedModel:
    settings = recipe.teacher
    if settings.folder:
        model = load_model(local_folder(settings.folder))
        check_lengths(model.config, recipe)
        return model
    return new_t5(vocabulary_size(run.tokenizer), dataclasses.asdict(settings.architecture), recipe.seed)


def check_lengths(config: PreTrainedConfig, recipe: Recipe) -> None:
    """Refuse lengths beyond the positions that a model has.

    Raises:
        ValueError: names the field, its value and the limit.
    """
    longest = family_of(config.model_type).max_positions(config)
    for name, length in (
        ("data.max_source_tokens", recipe.data.max_source_tokens),
        ("data.max_target_tokens", recipe.data.max_target_tokens),
        ("evaluate.max_new_tokens", recipe.evaluate.max_new_tokens),
    ):
        if longest is not None and length > longest:
            raise ValueError(f"{name} is {length}, but {recipe.teacher.folder} has {longest} positions: lower it")


def load_model(folder: Path) -> PreTrainedModel:
    """A supported encoder-decoder from a local folder, in fp32.

    Raises:
        ValueError: not a model that a family knows, or weights are missing, which transformers would draw at random.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    disable_progress_bar()
    family = family_of(AutoConfig.from_pretrained(folder, local_files_only=True).model_type)
    model, found = AutoModelForSeq2SeqLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} weights that its config.json asks for, such as {missing[0]}")
    family.disable_layer_drop(model)
    return model


def save_trained(model: PreTrainedModel, stage: Stage, target: Path, tokenizer: Path) -> None:
    """Write the weights of the stage's newest checkpoint as an ordinary Hugging Face folder."""
    weights = full_weights(checkpoints(stage.folder / "checkpoints")[-1])
    # not strict: a tied weight has several names in the model and one in the checkpoint
    result = model.load_state_dict({n.removeprefix("model."): weight for n, weight in weights.items()}, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    save_model(model, target, tokenizer)


def save_model(model: PreTrainedModel, target: Path, tokenizer: Path) -> None:
    """Publish a model and its tokenizer as a Hugging Face folder with one file of weights."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, max_shard_size="100TB")
    save_tokenizer(tokenizer, temporary)
    publish_folder(temporary, target)
