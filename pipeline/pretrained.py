"""Models as their folders say them: numbers of another JSON kind are taken, and every stored embedding is the model's.

Strangers' folders come this way; what the pipeline writes is right already (ordinary.py).
"""

from __future__ import annotations

import typing
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pipeline.beside import CONFIG, read
from pipeline.families import FAMILIES, family_of
from pipeline.ordinary import HEAD, TIED, read_model, without_types_of_parts
from pipeline.weights import names_of_index, refuse_packed, shapes_of, weight_files

EMBEDDING, BIN = "shared.weight", "pytorch_model.bin"


def settings_of(folder: Path) -> dict[str, Any]:
    """config.json, with numbers of the kind that transformers wants where they are equal: 8.0 as 8, 0 as 0.0.

    Raises:
        ValueError: no model of transformers has these settings; names file and field.
    """
    path = folder / CONFIG
    told = without_types_of_parts(read(path))
    kind = told.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        said = f"its model_type is {kind!r}" if "model_type" in told else "it names no model_type"
        raise ValueError(f"{path} is not the settings of a Hugging Face model: {said}")
    wanted = {each.name: each for each in fields(CONFIG_MAPPING[kind])}
    return {
        name: _of_kind(value, wanted[name].type) if name in wanted else value
        for name, value in told.items()
        if value is not None
        or name not in wanted
        or wanted[name].default is not None  # null is as if it were not there
    }


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
    model, found = read_model(folder, config=config_of(folder), dtype=dtype or "auto")
    family = FAMILIES.get(model.config.model_type)
    if missing := sorted({*found["missing_keys"]} - {*(family.computed_weights if family else ())}):
        raise ValueError(f"{folder} lacks {len(missing)} weights that its config.json asks for, such as {missing[0]}")
    if family and EMBEDDING in family.vocabulary_weights:
        _take_stored_embedding(model, folder)
    return model


@torch.no_grad()
def _take_stored_embedding(model: Any, folder: Path) -> None:
    """Give the model the embedding and the head that its files have: without the name that it goes by, transformers
    5.17 takes a T5's head for both."""
    stored = _stored(folder)
    names = [each for each in family_of(model.config.model_type).vocabulary_weights if each in stored and each != HEAD]
    check_embedding(folder, settings_of(folder), stored)
    if not names:
        return
    found = stored[names[0]]()
    for other in names[1:]:
        if not torch.equal(found, stored[other]()):
            raise ValueError(f"{folder}: {names[0]} and {other} are two embeddings; use a model with one")
    embedding = nn.Parameter(found.to(model.dtype))
    for module in (model.get_input_embeddings(), model.get_encoder().embed_tokens, model.get_decoder().embed_tokens):
        if not torch.equal(module.weight, embedding):
            module.weight = embedding
    head = stored.get(HEAD)
    weight = nn.Parameter(head().to(model.dtype)) if head else model.get_input_embeddings().weight
    if not torch.equal(model.lm_head.weight, weight):
        model.lm_head.weight = weight


def check_embedding(folder: Path, settings: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Refuse weights whose only matrix of the vocabulary is a head of its own: transformers takes it for both.

    Raises:
        ValueError: names the weight that lacks.
    """
    family = FAMILIES.get(settings["model_type"])
    if not family or EMBEDDING not in family.vocabulary_weights or settings.get(TIED, family.ties_by_default):
        return
    if HEAD in names and not any(name in names for name in family.vocabulary_weights if name != HEAD):
        raise ValueError(
            f"{folder} lacks {EMBEDDING}: its config.json has {TIED} false, so {HEAD} is not the embedding"
        )


def shapes_in(folder: Path) -> dict[str, list[int]]:
    """Shapes of the weights of a model by name, from what its files announce; none where it has no weights.

    Raises:
        ValueError: a file is damaged, or its weights are quantised.
    """
    if files := weight_files(folder):
        for file in files:
            refuse_packed(file)
        return {name: shape for file in files for name, shape in shapes_of(file).items()}
    return {name: list(weight.shape) for name, weight in _pickled(folder).items()}


def _stored(folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """What reads each weight of a model, by name."""
    if files := weight_files(folder):
        return {name: partial(_tensor, file, name) for file in files for name in shapes_of(file)}
    return {name: partial(torch.Tensor.clone, weight) for name, weight in _pickled(folder).items()}


def _pickled(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of pytorch_model.bin or of the files that its index names, mapped into memory and not read."""
    index = folder / f"{BIN}.index.json"
    names = [BIN] if (folder / BIN).is_file() else names_of_index(index) if index.is_file() else []
    weights: dict[str, torch.Tensor] = {}
    for file in (folder / name for name in names):
        try:
            weights |= torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        except Exception as error:  # a pickle that is damaged raises any kind
            raise ValueError(f"{file} is damaged or no weights of PyTorch: fetch it again") from error
    if strange := [name for name, weight in weights.items() if not isinstance(weight, torch.Tensor)]:
        raise ValueError(f"{folder}: {BIN} has {strange[0]}, which is no weight: save the model's state_dict alone")
    return weights


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as weights:
        return weights.get_tensor(name)
