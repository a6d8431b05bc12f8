"""What makes a model folder ordinary: config.json says what the weights are, and every reader takes it alike.

Readers differ in what they go by. transformers 5 ties a T5's head to its embedding unless the file has another, scales
its outputs unless `tie_word_embeddings` is false, and saves true whatever it read. transformers 4 believes that key: it
throws a stored head away where it is true, and scales. So one function writes the key, from the weights that are there,
and one check holds the whole of config.json against names, shapes and bytes in the files, and what lies beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, PreTrainedModel

from pipeline.beside import CONFIG, check_beside, read, write_generation
from pipeline.families import FAMILIES, Family, family_of, stored_weights
from pipeline.spans import STACKS
from pipeline.weights import dtypes_of, same_bytes, shapes_of, weight_files

WEIGHTS = "model.safetensors"
HEAD, TIED, SCALED = "lm_head.weight", "tie_word_embeddings", "scale_decoder_outputs"
DERIVED = ("is_gated_act", "dense_act_fn")  # of feed_forward_proj; saved beside it, and then believed
TYPES = ("dtype", "torch_dtype")
QUANTIZED, ADAPTER = "quantization_config", "adapter_config.json"
ADAPTED = (".lora_", ".base_layer.", ".adapter")
WRITE_NO_TEXTS = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification", "EncoderModel")
READ_IN_TWO_WAYS = {"tie_encoder_decoder": False, "is_encoder_decoder": True, "is_decoder": False}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # a config's word -> that of safetensors files


def save_ordinary(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's settings and its weights, in one file; raises what `write_settings` does."""
    model.save_pretrained(folder, max_shard_size="100TB")
    write_settings(folder, read(folder / CONFIG))


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write config.json of a folder whose weights are there, so that all readers see the same model; check the folder.

    A head that is the embedding, but whose inputs are not scaled as transformers 4 scales them, is written out as a
    matrix of its own: no setting that all readers know says it.

    Raises:
        ValueError: the settings contradict the weights, or no setting can say what they are.
    """
    written = without_types_of_parts(settings)
    shapes, family = _shapes(folder), family_of(written["model_type"])
    if family.scales_tied_head is not None:
        scaled = written.get(SCALED, written.get(TIED) is not False) and family.scales_tied_head
        if not scaled and HEAD not in shapes:
            weights = load_file(folder / WEIGHTS)
            head = weights[family.vocabulary_weights[0]].clone()
            save_file(weights | {HEAD: head}, folder / WEIGHTS, metadata={"format": "pt"})
        written[TIED] = bool(scaled)
        if SCALED in written:
            written[SCALED] = bool(scaled)
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    write_generation(folder)
    check_ordinary(folder)


def without_types_of_parts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which no part has a dtype of its own: transformers 5 loads it in that, whatever is asked for."""
    return {
        key: {name: part for name, part in without_types_of_parts(value).items() if name not in TYPES}
        if isinstance(value, Mapping)
        else value
        for key, value in settings.items()
    }


def read_model(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model of a local folder as every version of transformers should make it, in evaluation mode.

    Args:
        options: of from_pretrained, such as `dtype`; without it that of config.json, or else of the weights.

    Returns:
        The model, and the names of weights that are missing_keys, unexpected_keys and mismatched_keys.

    Raises:
        OSError: there are no settings or no weights.
    """
    model, found = AutoModelForSeq2SeqLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **options
    )
    if family := FAMILIES.get(model.config.model_type):
        family.correct(model, read(folder / CONFIG))
    return model, found


def check_ordinary(folder: Path) -> str:
    """Hold config.json of a model folder against its weights, from names, shapes and bytes alone.

    Returns:
        What the folder is, in a few words.

    Raises:
        FileNotFoundError: there are no settings or no safetensors files.
        ValueError: the first contradiction, in one line.
    """
    settings, shapes = _settings_of(folder), _shapes(folder)
    model = check_weights(folder)
    family = family_of(settings["model_type"])
    _check_head(folder, settings, shapes, family)
    _check_readings(folder, settings, model)
    check_beside(folder, settings)
    depths = "+".join(str(len(family.layers(model, stack))) for stack in STACKS)
    head = "a head of its own" if HEAD in shapes else "its embedding as head"
    return f"{folder}: {settings['model_type']}, {depths} layers, {head}; {CONFIG} agrees with the weights"


def check_weights(folder: Path) -> PreTrainedModel:
    """Hold the sizes in config.json against names and shapes in the weights; the rest can be written anew.

    Returns:
        The model without memory.

    Raises:
        FileNotFoundError: there are no settings or no safetensors files.
        ValueError: the first contradiction, in one line.
    """
    settings, shapes = _settings_of(folder), _shapes(folder)
    told = {key: value for key, value in settings.items() if key not in DERIVED}
    family, model = family_of(settings["model_type"]), empty_model(told, folder)
    check_shapes(model, family, shapes, str(folder))
    if (embedding := family.vocabulary_weights[0]) not in shapes:
        raise ValueError(f"{folder}: its weights lack {embedding}, by which readers know the embedding")
    check_kind(folder, settings)
    return model


def check_kind(folder: Path, settings: Mapping[str, Any]) -> None:
    """Hold config.json against itself, and against what stands in a folder of a whole model that writes texts.

    Raises:
        ValueError: the first contradiction, in one line with file and key.
    """
    told = {key: value for key, value in settings.items() if key not in DERIVED}
    model = empty_model(told, folder)
    for key in DERIVED:
        if (meant := getattr(model.config, key, None)) != settings.get(key, meant):
            raise ValueError(f"{folder}: {CONFIG} has {key} {settings[key]}, but its feed_forward_proj means {meant}")
    if settings.get(QUANTIZED):
        raise ValueError(
            f"{folder}: {CONFIG} has {QUANTIZED}, so its weights are no plain numbers: take the model before that"
        )
    if (folder / ADAPTER).is_file():
        raise ValueError(f"{folder} has an adapter ({ADAPTER}) that would be passed over: merge it into the weights")
    for key, wanted in READ_IN_TWO_WAYS.items():
        if settings.get(key, wanted) != wanted:
            raise ValueError(
                f"{folder}: {CONFIG} has {key} {settings[key]}, which readers take or pass over: remove it"
            )
    for alias, key in type(model.config).attribute_map.items():
        if settings.get(alias, settings.get(key)) != settings.get(key):
            raise ValueError(f"{folder}: {CONFIG} has {alias} {settings[alias]} and {key} {settings.get(key)}")
    for key in TYPES:
        if str(settings.get(key) or "auto").removeprefix("torch.") not in (*DTYPES, "float64", "auto"):
            raise ValueError(f"{folder}: {CONFIG} has {key} {settings[key]}: choose one of {', '.join(DTYPES)}")
    kinds = settings.get("architectures") or []
    if not isinstance(kinds, list) or any(str(kind).endswith(WRITE_NO_TEXTS) for kind in kinds):
        raise ValueError(f"{folder}: {CONFIG} has architectures {kinds}: a model that writes texts is needed")


def check_shapes(model: torch.nn.Module, family: Family, found: Mapping[str, list[int]], named: str) -> None:
    """Hold the names and shapes that safetensors files announce against a model made from settings (no data needed).

    Args:
        named: what to call the folder.

    Raises:
        ValueError: a layer is missing or left over, or a weight has another shape.
    """
    wanted = {family.stored_name(name): list(weight.shape) for name, weight in model.state_dict().items()}
    found = {family.stored_name(name): shape for name, shape in found.items()}
    if any(name.startswith("model.") for name in wanted):  # transformers takes names without it, too
        wanted = {name.removeprefix("model."): shape for name, shape in wanted.items()}
        found = {name.removeprefix("model."): shape for name, shape in found.items()}
    prefixes = tuple(family.layer_prefix(stack).removeprefix("model.") for stack in STACKS)

    needed = stored_weights(model, family).keys() - {*family.vocabulary_weights, *family.computed_weights}
    needed = {name.removeprefix("model.") for name in needed}
    if adapted := sorted(name for name in found if any(part in name for part in ADAPTED)):
        raise ValueError(f"{named}: its weights have {adapted[0]}, of an adapter: merge that into the weights")

    def layers(names: Iterable[str]) -> set[str]:
        each = {prefix: {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
                for prefix in prefixes}  # fmt: skip
        return {prefix + index for prefix, indices in each.items() for index in indices}

    for name, shape in sorted(wanted.items()):
        if found.get(name, shape) != shape:
            raise ValueError(f"{named}: {name} has shape {found[name]}, but {CONFIG} says {shape}")
        if name not in found and (name.startswith(prefixes) or name in needed):
            raise ValueError(f"{named}: its weights lack {name}, which {CONFIG} asks for")
    if left_over := sorted(layers(found) - layers(wanted)):
        raise ValueError(f"{named}: {CONFIG} says nothing of layer {left_over[0]} among its weights")


def _check_head(folder: Path, settings: Mapping[str, Any], shapes: Mapping[str, list[int]], family: Family) -> None:
    kind, embedding = settings["model_type"], family.vocabulary_weights[0]
    tied = bool(settings.get(TIED, family.ties_by_default))
    if not tied and HEAD not in shapes:
        raise ValueError(f"{folder}: {CONFIG} has {TIED} false, but the weights have no {HEAD}: readers draw it anew")
    if tied and HEAD in shapes and not same_bytes(weight_files(folder), HEAD, embedding):
        raise ValueError(
            f"{folder}: {CONFIG} has {TIED} true, but {HEAD} is another matrix than {embedding}: set it to false"
        )
    if tied and family.scales_tied_head is False:
        raise ValueError(f"{folder}: {CONFIG} has {TIED} true, which transformers 4 scales in {kind} and 5 does not")
    if bool(settings.get(SCALED, tied)) != tied and family.scales_tied_head is not None:
        raise ValueError(
            f"{folder}: {CONFIG} has {SCALED} {not tied} and {TIED} {tied}: readers go by one or the other"
        )


def _check_readings(folder: Path, settings: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Keys that one reader takes for another model than the next one does."""
    kind = type(model).__name__
    if kind not in (settings.get("architectures") or [kind]):
        raise ValueError(f"{folder}: {CONFIG} has architectures {settings['architectures']}, but this is a {kind}")
    told = {str(settings[key]).removeprefix("torch.") for key in TYPES if settings.get(key)}
    stored = {dtype for file in weight_files(folder) for dtype in dtypes_of(file)}
    if told and {DTYPES.get(each) for each in told} != stored:
        raise ValueError(
            f"{folder}: {CONFIG} has dtype {', '.join(sorted(told))}, but the weights are {', '.join(sorted(stored))}: "
            f"transformers 5 loads what it says, and 4 what is stored"
        )


def _settings_of(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no model folder: it has no {CONFIG}")
    settings = read(folder / CONFIG)
    family_of(settings.get("model_type", ""))
    return settings


def empty_model(settings: Mapping[str, Any], folder: Path) -> PreTrainedModel:
    """The model that the settings of a folder describe, with names and shapes and no memory.

    Raises:
        ValueError: they describe none, in one line.
    """
    try:
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))
        with torch.device("meta"):
            return AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # settings that do not fit their class raise any kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder / CONFIG} does not describe a model ({reason})") from error


def _shapes(folder: Path) -> dict[str, list[int]]:
    files = weight_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}")
    return {name: shape for file in files for name, shape in shapes_of(file).items()}
