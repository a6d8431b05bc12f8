"""Other Hugging Face folders in the table of scores: what they are, and what keeps one from being scored."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig

from data_prep.processes import may_pass
from pipeline.assemble import ENGINE_PREFIX, System
from pipeline.config import QUANTIZATIONS
from pipeline.decoding import generation_settings
from pipeline.families import FAMILIES, family_of
from pipeline.ordinary import check_shapes
from pipeline.pretrained import config_of
from pipeline.spans import Assembly
from pipeline.tokenizer import check_tokenizer, tokenizer_files
from pipeline.weights import shapes_of

LAYER_KEYS = (("num_layers", "encoder_layers"), ("num_decoder_layers", "decoder_layers"))
VOCABULARY = ("shared.weight", "embed_tokens.weight", "lm_head.weight")
OWN_PREFIXES = (  # of a run's systems, before an assembly
    "drop-", "finetune-", "logit-", "theseus-", *(f"{ENGINE_PREFIX}{each}-" for each in QUANTIZATIONS),
)  # fmt: skip


def read_peers(texts: Sequence[str]) -> tuple[list[System], list[str]]:
    """(those of evaluate.folders that can be scored, why each of the others cannot)."""
    systems: dict[str, System] = {}
    refused = []
    for text in texts:
        try:
            system = peer(text)
            if system.name in systems:
                raise ValueError(
                    f"two systems are called {system.name}: give a peer another name (evaluate.folders: NAME=FOLDER)"
                )
            systems[system.name] = system
        except (ValueError, OSError) as error:
            if may_pass(error):
                raise
            refused.append(str(error))
    return list(systems.values()), refused


def peer(text: str) -> System:
    """A Hugging Face folder, given as FOLDER or NAME=FOLDER, as a system of the table.

    Raises:
        FileNotFoundError: it is no checkpoint folder with safetensors and a tokenizer.
        ValueError: the name is a system's of the run or cannot be one of a file, or transformers cannot make an
            encoder-decoder and a tokenizer of it that fit each other.
    """
    name, _, path = text.rpartition("=")
    folder = Path(path).resolve()
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise FileNotFoundError(f"{folder} is not a Hugging Face folder: it needs config.json and *.safetensors")
    if not tokenizer_files(folder):
        raise FileNotFoundError(f"{folder} has no tokenizer: save one beside the model (tokenizer.save_pretrained)")
    if not re.fullmatch(r"\w[\w.+-]*", name := name or folder.name):
        raise ValueError(f"evaluate.folders calls a system {name!r}: use letters, digits, and . _ + - behind the first")
    if _is_own_name(name):
        raise ValueError(
            f"evaluate.folders calls a system {name}, as systems of this run are called: give it another name "
            f"(NAME=FOLDER)"
        )
    shapes = {tensor: shape for file in weights for tensor, shape in shapes_of(file).items()}
    config = _check_model(folder, shapes)
    if config.model_type in FAMILIES:
        encoder, decoder = family_of(config.model_type).depths(config.to_dict())
    else:
        encoder, decoder = (next((getattr(config, k) for k in keys if hasattr(config, k)), 0) for keys in LAYER_KEYS)
    counts = {tensor: math.prod(shape) for tensor, shape in shapes.items()}
    total, embeddings = sum(counts.values()), sum(n for tensor, n in counts.items() if tensor.endswith(VOCABULARY))
    return System(
        name=name,
        kind="peer",
        folder=str(folder),
        assembly="",
        requests=(),
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
        ratio_layers=0.0,
        num_parameters=total,
        num_non_embedding_parameters=total - embeddings,
        bytes=sum(file.stat().st_size for file in weights),
    )


def _is_own_name(name: str) -> bool:
    for prefix in OWN_PREFIXES:
        name = name.removeprefix(prefix)
    try:
        Assembly.parse(name)
    except ValueError:
        return False
    return True


def _check_model(folder: Path, shapes: dict[str, list[int]]) -> Any:
    """The settings of a folder whose model and tokenizer go together; its weights are not read."""
    config = config_of(folder)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForSeq2SeqLM.from_config(config)
    except Exception as error:  # settings that do not fit their class raise any kind
        reason = " ".join(str(error).split())
        if "Unrecognized configuration class" in reason:
            reason = "its model type is none that AutoModelForSeq2SeqLM knows"
        raise ValueError(f"evaluate.folders: {folder / 'config.json'} is of no encoder-decoder ({reason})") from error
    if config.model_type in FAMILIES:
        check_shapes(model, family_of(config.model_type), shapes, f"evaluate.folders: {folder}")
    vocab_size, num_tokens = model.get_input_embeddings().num_embeddings, len(check_tokenizer(folder))
    if num_tokens > vocab_size:
        raise ValueError(
            f"evaluate.folders: the tokenizer in {folder} has {num_tokens} tokens, its model's embedding only "
            f"{vocab_size}: save the tokenizer that belongs to it"
        )
    settings = generation_settings(folder)
    if settings.decoder_start_token_id is None and settings.bos_token_id is None:
        raise ValueError(f"evaluate.folders: {folder} names no decoder_start_token_id: add it to its settings")
    return config


def most_positions(config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """Tokens of the longest (source, target) that a model with these settings takes; None where any length goes."""
    if config.model_type in FAMILIES:
        longest = family_of(config.model_type).max_positions(config)
        return longest, longest
    if hasattr(config, "relative_attention_num_buckets"):  # of T5's kin, some of which name positions, too
        return None, None
    found = []
    for side in ("encoder", "decoder"):
        own: Any = getattr(config, side, config)
        keys = (f"max_{side}_position_embeddings", "max_position_embeddings")
        found.append(next((getattr(own, key) for key in keys if getattr(own, key, None)), None))
    return found[0], found[1]
