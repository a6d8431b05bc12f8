"""The tokenizer of record: read from whatever a folder holds, written so that it loads by itself in every reader.

What transformers' AutoTokenizer makes of a folder (its config.json included) is what teacher and exports are served
with, so it is asked once, on one rank, and written as tokenizer.json with a tokenizer_config.json that names class and
special tokens. Shards, evaluation and exports all use these files. No other file of data_prep imports transformers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, T5Tokenizer
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from data_prep.hub import refuse_pointer
from data_prep.languages import LANGUAGES

SPIECE, TOKENIZER_JSON, TOKENIZER_CONFIG = "spiece.model", "tokenizer.json", "tokenizer_config.json"
_SETTINGS = "config.json"
_KINDS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.spm")
_GENERIC = "PreTrainedTokenizerFast"  # known to transformers 4 and 5; both then take tokenizer.json as it stands
_OF_THIS_MACHINE = ("backend", "is_local", "local_files_only", "name_or_path")
# Classes and model types whose spiece.model is read as T5's; AutoTokenizer of transformers 5 knows only some of them.
_READ_AS_T5 = ("T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast", "t5", "mt5", "umt5")
_USUAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the files of a folder that a tokenizer may be made of, sorted."""
    return sorted(
        path.name for path in folder.glob("*") if path.is_file() and any(fnmatch(path.name, kind) for kind in _KINDS)
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, as AutoTokenizer reads it.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    files = tokenizer_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no tokenizer: it needs tokenizer.json or spiece.model")
    for name in files:
        refuse_pointer(folder / name)
    _refuse_other_kinds(folder / TOKENIZER_CONFIG)
    with _quiet():
        try:
            tokenizer = _load(folder, set(files))
            tokenizer("a")  # some settings are first looked at here
        except Exception as error:  # the tokenizers' own libraries raise any kind
            text = " ".join(str(error).split())
            raise ValueError(
                f"the tokenizer in {folder} ({', '.join(files)}) cannot be read ({text}): fetch it again, or "
                f"give one that transformers {transformers.__version__} reads, such as a {TOKENIZER_JSON}"
            ) from error
    for kind, token in _USUAL.items():  # a tokenizer.json alone names none
        if getattr(tokenizer, kind) is None and token in tokenizer.get_vocab():
            setattr(tokenizer, kind, token)
    return tokenizer


def _refuse_other_kinds(path: Path) -> None:
    """Hold the settings of a tokenizer against the kinds that transformers goes by: its own errors name no key.

    Raises:
        ValueError: names file and key.
    """
    try:
        told = _json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if not isinstance(told, dict):
        raise ValueError(f"{path} is no JSON object, but a {type(told).__name__}")
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "tokenizer_class": ((str,), "the name of a class"),
        "model_max_length": ((int, float), "a number"),
        "extra_ids": ((int,), "a whole number"),
        "added_tokens_decoder": ((dict,), "an object with a token for each id"),
        **{f"{kind}_token": ((str, dict), "a token") for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")},
    }
    for key, (allowed, words) in kinds.items():
        value = told.get(key)
        wrong = value is not None and (isinstance(value, bool) or not isinstance(value, allowed))
        if key == "added_tokens_decoder" and not wrong:
            wrong = not all(number.isdecimal() and _is_token(each) for number, each in (value or {}).items())
        if wrong or (isinstance(value, dict) and key != "added_tokens_decoder" and not _is_token(value)):
            raise ValueError(f"{path} has {key} {value!r}: it must be {words}")


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what it tries before it fails
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _load(folder: Path, files: set[str]) -> PreTrainedTokenizerBase:
    told, model = (_json(folder / name) for name in (TOKENIZER_CONFIG, _SETTINGS))
    if TOKENIZER_JSON not in files and SPIECE in files:
        if _has_no_character_map(folder / SPIECE):
            return _load_without_character_map(folder, files)
        if not told.get("tokenizer_class") and not model.get("model_type"):
            # Nothing says what kind it is: T5's, with the sentinels that the files name.
            return T5Tokenizer.from_pretrained(folder, extra_ids=_num_sentinels(told), local_files_only=True)
    options: dict[str, Any] = {"local_files_only": True}
    kind = told.get("tokenizer_class") or model.get("tokenizer_class") or model.get("model_type")
    if TOKENIZER_JSON not in files and SPIECE in files and kind in _READ_AS_T5:
        options["tokenizer_type"] = "t5"
    if model.get("model_type") in CONFIG_MAPPING:
        # Only what says the class: whether the rest can be read is the model's affair.
        named = {"tokenizer_class": model["tokenizer_class"]} if model.get("tokenizer_class") else {}
        options["config"] = AutoConfig.for_model(model["model_type"], **named)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    num_embeddings = int(model.get("vocab_size") or len(tokenizer))
    if "extra_ids" not in told and isinstance(tokenizer, T5Tokenizer) and num_embeddings < len(tokenizer):
        # T5's class adds 100 sentinels where no file speaks of any; this model has no embeddings for them.
        return AutoTokenizer.from_pretrained(folder, extra_ids=0, **options)
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _num_sentinels(told: dict[str, Any]) -> int:
    added = {token["content"] for token in told.get("added_tokens_decoder", {}).values()}
    return int(told.get("extra_ids") or sum(f"<extra_id_{k}>" in added for k in range(1000)))


def _has_no_character_map(path: Path) -> bool:
    return not SentencePieceExtractor(str(path)).proto.normalizer_spec.precompiled_charsmap


def _load_without_character_map(folder: Path, files: set[str]) -> PreTrainedTokenizerBase:
    """SentencePiece trained with normalization_rule_name=identity, whose empty map transformers 5 cannot parse: the
    same pieces as a tokenizer.json without a normalizer."""
    proto = SentencePieceExtractor(str(folder / SPIECE)).proto
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    with tempfile.TemporaryDirectory() as scratch:
        for name in files | ({_SETTINGS} if (folder / _SETTINGS).is_file() else set()):
            shutil.copyfile(folder / name, Path(scratch) / name)
        T5Tokenizer(vocab=vocabulary, extra_ids=0).backend_tokenizer.save(str(Path(scratch) / TOKENIZER_JSON))
        return _load(Path(scratch), files | {TOKENIZER_JSON})


def write_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of one folder into another, in files that load by themselves to the same ids everywhere.

    Raises:
        ValueError: it cannot be read, has no padding or end-of-sequence token, or does not end a text with the latter.
    """
    tokenizer = check_tokenizer(source)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(target)
    for name in set(tokenizer.vocab_files_names.values()) - {TOKENIZER_JSON, TOKENIZER_CONFIG}:
        if (source / name).is_file():  # for readers without `tokenizers`
            shutil.copyfile(source / name, target / name)
    settings = _json(target / TOKENIZER_CONFIG)
    for name in _OF_THIS_MACHINE:
        settings.pop(name, None)
    # transformers 4 wants a dict under the name that version 5 writes a list to; both read this one.
    extra = settings.pop("extra_special_tokens", None) or []
    named = {getattr(tokenizer, kind) for kind in _USUAL}
    settings["additional_special_tokens"] = [each for each in extra if _content(each) not in named]
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    if backend is None:
        _write_json(target / TOKENIZER_CONFIG, settings)
        return
    names = dict.fromkeys([settings["tokenizer_class"].replace("TokenizersBackend", _GENERIC), _GENERIC])
    for name in names:
        _write_json(target / TOKENIZER_CONFIG, settings | {"tokenizer_class": name})
        if _pipeline(load_tokenizer(target).backend_tokenizer.to_str()) == _pipeline(backend.to_str()):
            return
    raise ValueError(f"{source}: its tokenizer does not survive being saved and loaded; give another data.tokenizer")


def check_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, fit for a seq2seq model; raises what `write_tokenizer` does."""
    tokenizer = load_tokenizer(source)
    for kind in ("pad", "eos"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise ValueError(
                f"{source}: the tokenizer has no {kind} token: name it in {TOKENIZER_CONFIG}, or give the tokenizer of "
                f"a seq2seq model"
            )
    if getattr(tokenizer, "separate_vocabs", False):
        raise ValueError(
            f"{source}: the tokenizer numbers targets by a list of their own (separate_vocabs), which is not carried: "
            f"use a model with one vocabulary"
        )
    ids = tokenizer("a").input_ids
    if (language := getattr(tokenizer, "src_lang", None)) and not language_ids(tokenizer):
        raise ValueError(
            f"{source}: the tokenizer does not begin a text with the token of its language {language!r} (it gives "
            f"{ids} for 'a'), as NLLB's, M2M100's and mBART-50's do; older ones, which end it so, are not carried"
        )
    if not ids or ids[-1] != tokenizer.eos_token_id:
        raise ValueError(
            f"{source}: the tokenizer does not end a text with its end-of-sequence token {tokenizer.eos_token!r} (it "
            f"gives {ids} for 'a'): use the tokenizer of a seq2seq model"
        )
    return tokenizer


def write_languages(folder: Path) -> None:
    """Put the ids of the tokens of languages beside a tokenizer that has such: shards are made without transformers."""
    if languages := language_ids(load_tokenizer(folder)):
        _write_json(folder / LANGUAGES, languages)


def language_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the tokens that texts of each language begin with; none of a tokenizer without such, or that puts them
    elsewhere."""
    if getattr(tokenizer, "src_lang", None) is None:
        return {}
    if known := getattr(tokenizer, "lang_code_to_id", None):
        found = {language: number for language, number in known.items() if number != tokenizer.unk_token_id}
    else:
        named = {getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
        added = tokenizer.added_tokens_decoder
        found = {each.content: number for number, each in added.items() if each.special and number not in named}
    return found if found.get(tokenizer.src_lang) == tokenizer("a").input_ids[0] else {}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _pipeline(text: str) -> dict[str, Any]:
    """What a tokenizer.json does. Scores are of float32: `tokenizers` is off by the last digit of a double that it
    reads, transformers' own classes are not."""
    parts = json.loads(text, parse_float=np.float32)
    return {name: part for name, part in parts.items() if name not in ("truncation", "padding")}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files that `write_tokenizer` made as they are."""
    for name in tokenizer_files(source):
        shutil.copyfile(source / name, target / name)


def refuse_other_ids(folder: Path, examples: Iterable[tuple[str, str, str, list[int], int]]) -> None:
    """Compare (text, its side, its language, its ids, the most it may have) with what the folder's AutoTokenizer gives.

    Raises:
        ValueError: the first text with other ids.
    """
    tokenizer: Any = load_tokenizer(folder)
    has_languages = bool(language_ids(tokenizer))
    for text, side, language, ours, longest in examples:
        if has_languages:
            tokenizer.src_lang = language
        kind = "text_target" if side == "target" and not has_languages else "text"
        theirs = tokenizer(**{kind: text}, truncation=True, max_length=longest).input_ids
        if theirs != ours:
            raise ValueError(
                f"{folder}: AutoTokenizer gives {theirs} for {text!r}, the shards have {ours}: build with the versions "
                f"of transformers and tokenizers that the data are used with"
            )
