"""Decoding settings: what Hugging Face generate goes by, as far as cached decoding of views carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.beside import CONFIG, GENERATION, read

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
NEUTRAL_AT_1 = {"encoder_repetition_penalty", "guidance_scale", "num_return_sequences", "num_beam_groups"}
IDS = (
    "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id",
    "forced_eos_token_id",
)  # fmt: skip
SEVERAL = ("eos_token_id", "forced_eos_token_id")  # may be lists
COUNTS = ("max_length", "max_new_tokens", "min_length", "num_beams", "no_repeat_ngram_size")
FACTORS = ("repetition_penalty", "length_penalty")


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
    take_numbers(config, Path(model.name_or_path))
    start_id = config.decoder_start_token_id
    if start_id is None:
        start_id = getattr(model.config, "decoder_start_token_id", None)
    if start_id is None:
        start_id = config.bos_token_id
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

    Where generation_config.json lacks, settings of generation in config.json count, as models before 2023 have them.

    Raises:
        ValueError: the settings cannot be read, or a number is none; names the file.
    """
    path = _file_of(folder)
    read(path)  # refuses what is no object
    try:
        config = transformers.GenerationConfig.from_pretrained(
            folder, config_file_name=path.name, local_files_only=True, _from_model_config=path.name == CONFIG
        )
    except Exception as error:  # settings that do not fit their class raise any kind
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    take_numbers(config, folder)
    return config


def take_numbers(config: transformers.GenerationConfig, folder: Path) -> None:
    """Make numbers of another JSON kind those that they are equal to: 3.0 is 3.

    Raises:
        ValueError: another value stands for a number; names file and key.
    """
    for name in (*IDS, *COUNTS, *FACTORS):
        value = getattr(config, name, None)
        each = value if isinstance(value, list) and name in SEVERAL else [value]
        numbers = [_number(one, whole=name not in FACTORS) for one in each]
        least = 1e-9 if name == "repetition_penalty" else 0
        if any(number is None and one is not None for number, one in zip(numbers, each, strict=True)) or (
            name != "length_penalty" and any(number is not None and number < least for number in numbers)
        ):
            kind = "a number" if name in FACTORS else "a whole number of 0 or more"
            raise ValueError(f"{_file_of(folder)} has {name} {value!r}: it must be {kind}")
        setattr(config, name, numbers if isinstance(value, list) else numbers[0])


def _number(value: Any, *, whole: bool) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not whole:
        return float(value)
    return int(value) if float(value).is_integer() else None


def _file_of(folder: Path) -> Path:
    """The file that says how the model in a folder writes."""
    return folder / (GENERATION if (folder / GENERATION).is_file() else CONFIG)


def refuse_unknown(config: transformers.GenerationConfig, folder: Path) -> None:
    """Refuse settings that change outputs in a way that Rules do not carry.

    Raises:
        ValueError: names them and the file.
    """
    known = UNDERSTOOD | WITHOUT_EFFECT
    unknown = sorted(
        name for name, value in config.to_diff_dict().items() if name not in known and not _does_nothing(name, value)
    )
    if unknown:
        raise ValueError(
            f"{_file_of(folder)} has {', '.join(unknown)}, which decoding here does not carry: give a copy of "
            f"the model without {'it' if len(unknown) == 1 else 'them'} as teacher.folder"
        )


def _does_nothing(name: str, value: Any) -> bool:
    """Whether a setting is as if it were not there: true, and a length of 1, are not."""
    return not value or (name in NEUTRAL_AT_1 and value == 1)


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
