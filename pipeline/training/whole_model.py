"""Tasks that train every parameter of a Hugging Face model, alone or beside its teacher, and what they save.

Shapes: B examples, T target tokens, N valid target tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from data_prep.publish import publishing_folder
from pipeline.checkpoints import checkpoints, full_weights
from pipeline.config import LossConfig
from pipeline.data import MicroBatch
from pipeline.families import decoder_inputs, family_of
from pipeline.kernels import HeadLoss, HeadObjective, distribution_loss
from pipeline.model import Draws, GlobalCounts, LossTerms, Objectives, task_loss
from pipeline.ordinary import check_ordinary, save_ordinary
from pipeline.rundir import Stage
from pipeline.spans import STACKS
from pipeline.tokenizer import write_tokenizer
from pipeline.training.loop import Task


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
        logits_BTV = self.model(
            input_ids=batch.source_BS,
            attention_mask=source_mask(self.model, batch),
            decoder_input_ids=decoder_inputs(self.model.config, batch.labels_BT),
            use_cache=False,
        ).logits
        return TeacherOutputs(task_loss(at_labels(logits_BTV, batch), batch.labels_N), batch.labels_N)


def source_mask(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """The mask of the source as transformers would make it, [B, 1, 1, S], or [B, S] where it takes no other.

    It would look for padding, for which the host waits on a GPU, and leave the mask out where there is none: then a
    batch of the longest texts, with which a run rehearses, takes less memory than those that come.
    """
    mask_BS = batch.source_mask_BS
    takes_made = family_of(model.config.model_type).takes_made_mask
    return mask_BS[:, None, None, :] if takes_made else mask_BS


def at_labels(values_BTV: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Values [N, V] where there are labels that count."""
    return values_BTV.flatten(0, 1).index_select(0, batch.places_N)


def teacher_terms(step: int, outputs: TeacherOutputs, counts: GlobalCounts) -> LossTerms:
    loss = outputs.task_sum / counts.num_target_tokens
    return LossTerms(loss, {"task": loss.detach()})


def full_model_task(model: PreTrainedModel) -> Task:
    """Train every parameter of a Hugging Face model on the task loss."""
    family = family_of(model.config.model_type)
    layers = [layer for stack in STACKS for layer in family.layers(model, stack)]
    return Task(
        module=TeacherModel(model),
        leaf_classes=list(dict.fromkeys(map(type, layers))),  # one of a T5, two of others
        lr_factor=lambda name: family.lr_factor(name, model.config),
        clip_group=lambda name: "model",
        forward_args=lambda step, draws, counts: (),
        loss_terms=teacher_terms,
        validations={"task": ()},
        layers=layers,
    )


def save_trained(model: PreTrainedModel, stage: Stage, target: Path, tokenizer: Path) -> None:
    """Write the weights of the stage's newest checkpoint as an ordinary Hugging Face folder."""
    weights = full_weights(checkpoints(stage.folder / "checkpoints")[-1])
    # not strict: a tied weight has several names in the model and one in the checkpoint
    result = model.load_state_dict({n.removeprefix("model."): weight for n, weight in weights.items()}, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    save_model(model, target, tokenizer)


def save_model(model: PreTrainedModel, target: Path, tokenizer: Path) -> None:
    """Publish a model and its tokenizer as a Hugging Face folder with one file of weights.

    Raises:
        ValueError: they contradict each other.
    """
    with publishing_folder(target) as temporary:
        save_ordinary(model, temporary)
        write_tokenizer(tokenizer, temporary)
        check_ordinary(temporary)


@dataclass(frozen=True)
class DistilledOutputs:
    """What a student says beside its teacher."""

    head: HeadLoss
    """Sums over the tokens of `labels_N`."""
    labels_N: torch.Tensor

    @property
    def task_sum(self) -> torch.Tensor:
        """Cross entropy summed over tokens."""
        return self.head.task


class DistilledModel(nn.Module):
    """A student whose parameters all train, beside its whole frozen teacher."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model
        self.teacher: Any = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DistilledModel:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: MicroBatch, objective: HeadObjective) -> DistilledOutputs:
        inputs = {
            "input_ids": batch.source_BS,
            "attention_mask": source_mask(self.model, batch),
            "decoder_input_ids": decoder_inputs(self.model.config, batch.labels_BT),
            "use_cache": False,
        }
        with torch.no_grad():
            teacher_NV = at_labels(self.teacher(**inputs).logits, batch)
        student_NV, labels_N = at_labels(self.model(**inputs).logits, batch), batch.labels_N
        return DistilledOutputs(distribution_loss(student_NV, teacher_NV, labels_N, objective), labels_N)


def distilled_task(task: Task, teacher: PreTrainedModel, losses: LossConfig) -> Task:
    """The task of fine-tuning a whole model, with logit distillation added; weights as in the replacing phase."""
    model: Any = task.module
    objectives = Objectives(losses)

    def forward_args(step: int, draws: Draws, counts: GlobalCounts) -> tuple[HeadObjective]:
        return (objectives.wanted(step, counts).head,)

    def loss_terms(step: int, outputs: DistilledOutputs, counts: GlobalCounts) -> LossTerms:
        num_tokens = max(1, counts.num_target_tokens)
        parts = {"task": outputs.head.task / num_tokens, "logit": outputs.head.logit / num_tokens}
        return LossTerms(outputs.head.share, {name: part.detach() for name, part in parts.items()})

    return replace(
        task,
        module=DistilledModel(model.model, teacher),
        forward_args=forward_args,
        loss_terms=loss_terms,
        validations={"task": (HeadObjective(task=1.0),)},
    )
