"""What lies beside config.json and the weights of a model folder: generation settings and tokenizer files.

The lines of transformers read some keys of these files in other ways, or not at all. What contradicts config.json, or
is read in two ways, is refused from the files alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from pipeline.families import family_of

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
FROM_CONFIG, START = "_from_model_config", "decoder_start_token_id"
NAMED = ("pad_token", "eos_token")
LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens")
OF_MODELS = ("use_cache", "output_attentions", "output_hidden_states", "transformers_version")


def write_generation(folder: Path) -> None:
    """Make generation_config.json, where there is one, count in every reader: transformers 4 goes by config.json
    instead where this file says that it was made from that, which version 5 no longer believes but still writes."""
    told = read(folder / GENERATION)
    if told.pop(FROM_CONFIG, None) is not None:
        (folder / GENERATION).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_beside(folder: Path, settings: Mapping[str, Any]) -> None:
    """Hold generation settings and tokenizer files of a model folder against its config.json.

    Args:
        settings: those of config.json.

    Raises:
        ValueError: the first contradiction, in one line.
    """
    generation = read(folder / GENERATION)
    check_ids(folder, settings, generation)
    if (folder / GENERATION).is_file():
        _check_generation(folder, settings, generation)
    if (folder / TOKENIZER_CONFIG).is_file():
        _check_tokenizer(folder, settings)


def check_ids(folder: Path, settings: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """Hold the tokens that are named by number against the vocabulary; those that generation needs must be among them.

    Raises:
        ValueError: names file and key.
    """
    for name, told in ((CONFIG, settings), (GENERATION, generation)):
        for key in (key for key in told if key.endswith("_token_id") or key in LISTS_OF_IDS):
            if any(not 0 <= each < settings["vocab_size"] for each in _ids(told[key])):
                raise ValueError(f"{folder}: {name} has {key} {told[key]} beyond its {settings['vocab_size']} tokens")
    start_key = family_of(settings["model_type"]).start_key
    for key in (start_key, "eos_token_id", "pad_token_id"):
        if settings.get(key) is None:
            raise ValueError(f"{folder}: {CONFIG} names no {key}")
    if (start_id := generation.get(START)) not in (None, settings[start_key]):
        raise ValueError(
            f"{folder}: {CONFIG} has {start_key} {settings[start_key]}, but {GENERATION} {START} {start_id}: outputs "
            f"would begin otherwise than in training"
        )


def _check_generation(folder: Path, settings: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """Engines and training go by config.json, and so does transformers 4 now and then; generate by the other file."""
    if generation.get(FROM_CONFIG):
        raise ValueError(
            f"{folder}: {GENERATION} has {FROM_CONFIG}, for which transformers 4 may pass it over: remove it"
        )
    for key in GenerationConfig().to_dict():
        here, there = settings.get(key), generation.get(key)
        if here is None or key in OF_MODELS:
            continue
        if key.endswith("_token_id") and (there is None or {*_ids(here)} <= {*_ids(there)}):
            continue  # generate ends at several tokens, of which config.json names one
        if here != there:
            raise ValueError(
                f"{folder}: {CONFIG} has {key} {here}, but {GENERATION} {there}: readers go by one or the other"
            )


def _check_tokenizer(folder: Path, settings: Mapping[str, Any]) -> None:
    told, tokenizer = read(folder / TOKENIZER_CONFIG), read(folder / TOKENIZER)
    place = f"{folder}: {TOKENIZER_CONFIG}"
    if fault := fault_of_tokenizer(folder):
        raise ValueError(f"{place} has {fault}, which transformers 4 cannot read")
    ids = _ids_by_token(tokenizer)
    for key in told.get("added_tokens_decoder", {}):
        token = told["added_tokens_decoder"][key]["content"]
        if ids.get(token, int(key)) != int(key):
            raise ValueError(f"{place} has {token} as token {key}, but {TOKENIZER} as {ids[token]}")
    if ids and max(ids.values()) >= settings["vocab_size"]:
        raise ValueError(
            f"{folder}: {TOKENIZER} has token {max(ids.values())}, but {CONFIG} vocab_size {settings['vocab_size']}"
        )
    for name in NAMED:
        token = told.get(name)
        token = token["content"] if isinstance(token, dict) else token
        if token in ids and ids[token] not in _ids(settings[f"{name}_id"]):
            raise ValueError(
                f"{place} has {name} {token}, which is token {ids[token]}, but {CONFIG} {name}_id "
                f"{settings[f'{name}_id']}"
            )


def fault_of_tokenizer(folder: Path) -> str | None:
    """What version 5 of transformers writes into tokenizer_config.json and version 4 cannot read; None: nothing."""
    told = read(folder / TOKENIZER_CONFIG)
    if isinstance(told.get("extra_special_tokens"), list):
        return "a list of extra_special_tokens"
    return "tokenizer_class TokenizersBackend" if told.get("tokenizer_class") == "TokenizersBackend" else None


def _ids_by_token(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of a tokenizer.json with their ids."""
    pieces = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(pieces, list):  # a unigram's, as (piece, score)
        pieces = {piece: index for index, (piece, _) in enumerate(pieces)}
    return {**pieces, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if not isinstance(told, dict):
        raise ValueError(f"{path} is no JSON object, but a {type(told).__name__}")
    return told
