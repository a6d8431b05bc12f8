"""Models as their folders say them: numbers of another JSON kind are taken, and every stored embedding is the model's.

Strangers' folders come this way; what the pipeline writes is right already (ordinary.py).
"""

from __future__ import annotations

import json
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pipeline.families import FAMILIES, family_of
from pipeline.ordinary import HEAD
from pipeline.weights import same_bytes, shapes_of, weight_files

EMBEDDING = "shared.weight"


def settings_of(folder: Path) -> dict[str, Any]:
    """config.json, with numbers of the kind that transformers wants where they are equal: 8.0 as 8, 0 as 0.0.

    Raises:
        ValueError: no model of transformers has these settings; names file and field.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        wanted = {each.name: each.type for each in fields(CONFIG_MAPPING[settings["model_type"]])}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not the settings of a Hugging Face model ({type(error).__name__})") from error
    for name, value in settings.items():
        if name in wanted:
            settings[name] = _of_kind(value, wanted[name])
    return settings


def _of_kind(value: Any, wanted: Any) -> Any:
    kinds = typing.get_args(wanted) or (wanted,)
    if type(value) is float and float not in kinds and int in kinds and value.is_integer():
        return int(value)
    if type(value) is int and int not in kinds:
        if float in kinds:
            return float(value)
        return bool(value) if bool in kinds and value in (0, 1) else value
    return value


def config_of(folder: Path) -> PreTrainedConfig:
    """The settings of a model folder.

    Raises:
        ValueError: they are none, in one line with file and field.
    """
    settings = settings_of(folder)
    try:
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    except Exception as error:  # transformers raises kinds of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'config.json'} does not fit its model type ({reason})") from error
    config.name_or_path = str(folder)
    return config


def model_of(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The encoder-decoder of a local folder, in the dtype of its checkpoint or in `dtype`.

    Raises:
        ValueError: settings that do not fit, weights that are missing (transformers would draw them at random), or
            several embeddings.
    """
    disable_progress_bar()
    model, found = AutoModelForSeq2SeqLM.from_pretrained(
        folder, config=config_of(folder), local_files_only=True, dtype=dtype or "auto", output_loading_info=True
    )
    family = FAMILIES.get(model.config.model_type)
    if missing := sorted({*found["missing_keys"]} - {*(family.computed_weights if family else ())}):
        raise ValueError(f"{folder} lacks {len(missing)} weights that its config.json asks for, such as {missing[0]}")
    if family and EMBEDDING in family.vocabulary_weights:
        _take_stored_embedding(model, folder)
    return model


@torch.no_grad()
def _take_stored_embedding(model: Any, folder: Path) -> None:
    """Give the model the embedding and the head that its files have: without the name that transformers goes by, it
    takes the one for the other."""
    places = {name: file for file in weight_files(folder) for name in shapes_of(file)}
    head = places.get(HEAD)
    names = family_of(model.config.model_type).vocabulary_weights
    stored = [name for name in names if name in places and name != HEAD]
    if not stored:
        return
    for other in stored[1:]:
        if not same_bytes(list(dict.fromkeys(places.values())), stored[0], other):
            raise ValueError(f"{folder}: {stored[0]} and {other} are two embeddings; use a model with one")
    embedding = nn.Parameter(_tensor(places[stored[0]], stored[0]).to(model.dtype))
    for module in (model.get_input_embeddings(), model.get_encoder().embed_tokens, model.get_decoder().embed_tokens):
        if not torch.equal(module.weight, embedding):
            module.weight = embedding
    weight = nn.Parameter(_tensor(head, HEAD).to(model.dtype)) if head else model.get_input_embeddings().weight
    if not torch.equal(model.lm_head.weight, weight):
        model.lm_head.weight = weight


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as weights:
        return weights.get_tensor(name)
