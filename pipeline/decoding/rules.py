"""Decoding settings: what Hugging Face generate goes by, as far as cached decoding of views carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.pretrained import config_of

GENERATION = "generation_config.json"
# settings of a generation config that Rules carry; anything else leaves the checkpoint to transformers' own generate
UNDERSTOOD = {
    "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens",
    "num_beams", "length_penalty", "early_stopping", "do_sample", "use_cache", "transformers_version",
    "_from_model_config", "repetition_penalty", "no_repeat_ngram_size", "min_length", "forced_bos_token_id",
    "forced_eos_token_id", "bad_words_ids", "renormalize_logits",
}  # fmt: skip
# what neither greedy decoding nor beam search goes by
WITHOUT_EFFECT = {
    "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "cache_implementation",
    "cache_config", "disable_compile", "compile_config", "low_memory",
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """Decoding settings; see transformers' GenerationConfig for their meaning."""

    start_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    processors: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """Changes scores [R, V] given the tokens so far [R, T]; None where nothing does."""


def rules_of(model: Any, max_new_tokens: int, num_beams: int) -> Rules:
    """Decoding settings of a Hugging Face model as generate(max_new_tokens=..., num_beams=..., do_sample=False) has it.

    Raises:
        ValueError: the model's generation config holds a setting that is not carried over.
    """
    config = model.generation_config
    refuse_unknown(config, Path(model.name_or_path))
    start_id = config.decoder_start_token_id
    if start_id is None:
        start_id = getattr(model.config, "decoder_start_token_id", None) or config.bos_token_id
    eos_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return Rules(
        start_id=int(start_id),
        eos_ids=tuple(int(each) for each in eos_ids if each is not None),
        pad_id=int(config.pad_token_id or 0),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=1.0 if config.length_penalty is None else config.length_penalty,
        early_stopping=config.early_stopping or False,
        processors=_processors(config, eos_ids, max_new_tokens, str(model.device)),
    )


def generation_settings(folder: Path) -> transformers.GenerationConfig:
    """What `generate` goes by for the model in a folder; its weights are not read.

    Raises:
        ValueError: the settings cannot be read.
    """
    try:
        if (folder / GENERATION).is_file():
            return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        return transformers.GenerationConfig.from_model_config(config_of(folder))
    except Exception as error:  # settings that do not fit their class raise any kind
        raise ValueError(f"{folder / GENERATION} cannot be read ({' '.join(str(error).split())})") from error


def refuse_unknown(config: transformers.GenerationConfig, folder: Path) -> None:
    """Refuse settings that change outputs in a way that Rules do not carry.

    Raises:
        ValueError: names them and the file.
    """
    known = UNDERSTOOD | WITHOUT_EFFECT
    unknown = sorted(
        name
        for name, value in config.to_diff_dict().items()
        if name not in known and value not in (None, False, 0, 1.0)
    )
    if unknown:
        raise ValueError(
            f"{folder / GENERATION} has {', '.join(unknown)}, which decoding here does not carry: give a copy of "
            f"the model without {'it' if len(unknown) == 1 else 'them'} as teacher.folder"
        )


def _processors(config: Any, eos_ids: list[int], max_new_tokens: int, device: str) -> Any:
    """transformers' own logits processors, in the order in which generate applies them; None where there is none."""
    found: list[Any] = []
    if config.repetition_penalty not in (None, 1.0):
        found.append(transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(transformers.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        found.append(transformers.NoBadWordsLogitsProcessor(config.bad_words_ids, eos_ids))
    if config.min_length:
        found.append(transformers.MinLengthLogitsProcessor(config.min_length, eos_ids, device=device))
    if config.forced_bos_token_id is not None:
        found.append(transformers.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        ends = config.forced_eos_token_id
        found.append(transformers.ForcedEOSTokenLogitsProcessor(1 + max_new_tokens, ends, device=device))
    if config.renormalize_logits:
        found.append(transformers.LogitNormalization())
    return transformers.LogitsProcessorList(found) if found else None
