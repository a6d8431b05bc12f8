"""The teacher as transformers loads it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.config import LossConfig, Recipe
from pipeline.families import family_of, refuse_uncarried
from pipeline.pretrained import model_of, settings_of


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


def check_losses(kind: str, losses: LossConfig) -> None:
    """Refuse losses that a model type has not.

    Raises:
        ValueError: names the field and its value.
    """
    for name in ("attention_self", "attention_cross"):
        weight = getattr(losses, name)
        if weight != 0.0 and not family_of(kind).has_attention_losses:
            raise ValueError(f"distill.losses.{name} is {weight}, but {kind} has no attention losses: set it to 0")


def load_model(folder: Path) -> PreTrainedModel:
    """A supported encoder-decoder from a local folder, in fp32, ready for training.

    Raises:
        ValueError: not a model that a family carries, or weights are missing, which transformers would draw at random.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    settings = settings_of(folder)
    refuse_uncarried(settings, folder / "config.json")
    family = family_of(settings["model_type"])
    model = model_of(folder, torch.float32)
    family.prepare_for_training(model)
    return model
