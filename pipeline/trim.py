"""python -m pipeline trim: a model folder without the vocabulary that the languages in use never need.

The vocabulary of an mT5 is most of its bytes (58 % of mT5-base) and nearly all of its softmax. What some text uses is
kept, with a new id each in the old order; nothing is retrained. Text that segments into kept pieces segments as before:
removing pieces takes rivals away from the best segmentation and nothing else. The model computes for the kept pieces
the logits that it did; it only cannot write the others any more. Both are checked before anything is published.

Trim the teacher before distilling: training then saves what serving saves. A finished assembly can be trimmed as well.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.convert_slow_tokenizer import import_protobuf

from data_prep.publish import publishing_folder
from pipeline.assemble import write_trimmed_card
from pipeline.families import family_of
from pipeline.ordinary import read_model, save_ordinary, write_settings
from pipeline.pretrained import model_of
from pipeline.rundir import check_empty
from pipeline.tokenizer import load_tokenizer, write_tokenizer

MULTIPLE = 64  # of the new vocabulary's size: what matrix units like
TEXTS_AT_ONCE = 4096
NAMES_OF_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids", "sequence_bias")


def trim(folder: Path, texts: Sequence[str], out: Path) -> dict[str, Any]:
    """Publish a folder with the pieces that `texts` use; returns what was saved.

    Raises:
        ValueError: `out` is not empty, the original lacks weights, its vocabulary is not a SentencePiece unigram one,
            its settings name tokens by their ids, or the result does not do what the original does.
    """
    check_empty(out, "--out")
    model = model_of(folder)
    with publishing_folder(out) as temporary:
        return _write_trimmed(model.eval(), folder, texts, temporary)


def _write_trimmed(model: Any, folder: Path, texts: Sequence[str], temporary: Path) -> dict[str, Any]:
    """Write and check a model of this folder without what `texts` do not use; raises what `trim` does."""
    original: Any = load_tokenizer(folder)
    kind = type(original.backend_tokenizer.model).__name__ if hasattr(original, "backend_tokenizer") else "Python"
    if kind != "Unigram":
        raise ValueError(f"{folder} has a {kind} tokenizer: only SentencePiece unigram is trimmed")
    save_ordinary(model, temporary)
    write_tokenizer(folder, temporary)
    tokenizer = json.loads((temporary / "tokenizer.json").read_text(encoding="utf-8"))
    used = _used_ids(folder, texts) | _named_ids(temporary)
    kept = kept_ids(tokenizer, used, set(itertools.chain.from_iterable(texts)))
    before = (temporary / "model.safetensors").stat().st_size
    _trim_tokenizer(temporary, tokenizer, kept)
    _trim_weights(temporary, kept)
    check_tokens(folder, temporary, texts, kept)
    check_logits(model, temporary, kept)
    summary = {
        "original_vocabulary_size": model.config.vocab_size,
        "vocabulary_size": len(kept),
        "original_bytes": before,
        "bytes": (temporary / "model.safetensors").stat().st_size,
    }
    write_trimmed_card(folder, temporary, len(kept), model.config.vocab_size)
    (temporary / "kept_ids.json").write_text(json.dumps({**summary, "original_id_of": kept}), encoding="utf-8")
    return summary


def kept_ids(tokenizer: dict[str, Any], used: set[int], characters: set[str]) -> list[int]:
    """Old ids in ascending order; the new id of one is its place.

    What is used, all special tokens, the bytes, and every character of the texts as a piece of its own, so that new
    words of the same languages can be spelt; then the first of the others up to a multiple of 64.
    """
    vocabulary = [piece for piece, _ in tokenizer["model"]["vocab"]]
    kept = used | {token["id"] for token in tokenizer["added_tokens"]} | {tokenizer["model"]["unk_id"]}
    for index, piece in enumerate(vocabulary):
        if piece == "▁" or piece.removeprefix("▁") in characters or (piece.startswith("<0x") and len(piece) == 6):
            kept.add(index)
    others = (index for index in range(len(vocabulary)) if index not in kept)
    return sorted(kept | set(itertools.islice(others, -len(kept) % MULTIPLE)))


def _used_ids(folder: Path, texts: Iterable[str]) -> set[int]:
    tokenizer = load_tokenizer(folder)
    used: set[int] = set()
    for batch in _batches(texts):
        used.update(itertools.chain.from_iterable(tokenizer(batch).input_ids))
    return used


def _named_ids(folder: Path) -> set[int]:
    """Tokens that the settings of a model name: of several that end an output, the texts may use some."""
    named: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        for ids in (ids for key, ids in settings.items() if key.endswith("_token_id") and ids is not None):
            named.update(ids if isinstance(ids, list) else [ids])
    return named


def _trim_tokenizer(folder: Path, tokenizer: dict[str, Any], kept: Sequence[int]) -> None:
    """Rewrite tokenizer.json and, where it is, spiece.model in a folder."""
    new = {old: index for index, old in enumerate(kept)}
    model = tokenizer["model"]
    pieces = [piece for piece, _ in model["vocab"]]
    model["vocab"] = [
        model["vocab"][old] for old in kept if old < len(pieces)
    ]  # added tokens may lie behind the pieces
    model["unk_id"] = new[model["unk_id"]]
    for token in tokenizer["added_tokens"]:
        token["id"] = new[token["id"]]
    for token in ((tokenizer.get("post_processor") or {}).get("special_tokens") or {}).values():
        token["ids"] = [new[old] for old in token["ids"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    spiece = folder / "spiece.model"
    if spiece.is_file():
        proto = import_protobuf().ModelProto()
        proto.ParseFromString(spiece.read_bytes())
        if [piece.piece for piece in proto.pieces] != pieces[: len(proto.pieces)]:
            raise ValueError(f"{folder}: spiece.model and tokenizer.json number their pieces in different ways")
        left = [proto.pieces[old] for old in kept if old < len(proto.pieces)]
        del proto.pieces[:]
        proto.pieces.extend(left)
        proto.trainer_spec.vocab_size = len(left)
        spiece.write_bytes(proto.SerializeToString())


def _trim_weights(folder: Path, kept: Sequence[int]) -> None:
    """Rewrite weights, config and generation config in a folder."""
    new = {old: index for index, old in enumerate(kept)}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = family_of(config["model_type"]).vocabulary_weights
    weights = load_file(folder / "model.safetensors")
    rows = torch.tensor(kept)
    for name in set(names) & weights.keys():
        of_token = weights[name].shape.index(config["vocab_size"])  # the second dimension of a bias of logits
        weights[name] = weights[name].index_select(of_token, rows)
    save_file(weights, folder / "model.trimmed", metadata={"format": "pt"})
    (folder / "model.trimmed").rename(folder / "model.safetensors")
    config["vocab_size"] = len(kept)
    for path, settings in (
        (folder / "config.json", config),
        (folder / "generation_config.json", json.loads((folder / "generation_config.json").read_text("utf-8"))),
    ):
        for name in settings:
            if name in NAMES_OF_IDS and settings[name]:
                raise ValueError(f"{path.name} has {name}, which names tokens by their ids: remove it and trim again")
            if name.endswith("_token_id") and settings[name] is not None:
                ids = settings[name]
                settings[name] = [new[old] for old in ids] if isinstance(ids, list) else new[ids]
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    write_settings(folder, config)


def check_tokens(original: Path, trimmed: Path, texts: Iterable[str], kept: Sequence[int]) -> None:
    """Hold that every text has the tokens that it had, under their new ids, and reads back the same.

    Raises:
        ValueError: the first text that has not.
    """
    old_tokenizer, new_tokenizer = load_tokenizer(original), load_tokenizer(trimmed)
    if len(new_tokenizer) != len(kept):
        raise ValueError(f"the trimmed tokenizer has {len(new_tokenizer)} tokens, not {len(kept)}: not published")
    for batch in _batches(texts):
        old_rows = old_tokenizer(batch).input_ids
        new_rows = new_tokenizer(batch).input_ids
        for text, old, new in zip(batch, old_rows, new_rows, strict=True):
            if [kept[index] for index in new] != old:
                raise ValueError(f"{text!r} has other tokens after trimming: not published")
        if old_tokenizer.batch_decode(old_rows) != new_tokenizer.batch_decode(new_rows):
            raise ValueError("texts do not read back the same after trimming: not published")


@torch.no_grad()
def check_logits(original: Any, trimmed: Path, kept: Sequence[int]) -> None:
    """Hold that a trimmed model computes the original's logits of the kept tokens, but for the order of summation.

    Raises:
        ValueError: it does not.
    """
    model, _ = read_model(trimmed)
    generator = torch.Generator().manual_seed(0)
    source_BS, target_BT = (torch.randint(len(kept), (2, length), generator=generator) for length in (16, 8))
    rows = torch.tensor(kept)
    theirs = original(input_ids=rows[source_BS], decoder_input_ids=rows[target_BT]).logits[..., rows].float()
    ours = model(input_ids=source_BS, decoder_input_ids=target_BT).logits.float()
    tolerance = 1e-5 if original.dtype == torch.float32 else 2e-2
    apart = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    if not apart <= tolerance:
        raise ValueError(f"the trimmed model's logits are off by {apart:.2g} of the largest: not published")


def read_texts(paths: Sequence[Path], fields: Sequence[str], prefix: str = "") -> Iterator[str]:
    """The texts of these fields (dotted paths) in JSONL files, the first of which comes with the prefix, or the lines
    of other files; .gz or plain.

    Raises:
        ValueError: a record without one of the fields, or with something else than text in it.
    """
    from data_prep.sources import Template  # late: what reads texts takes a while

    template = Template("prefix", prefix)
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            for line in lines:
                if ".jsonl" not in path.name:
                    yield line.rstrip("\n")
                    continue
                record = json.loads(line)
                for field in fields:
                    value: Any = record
                    for key in field.split("."):
                        if not isinstance(value, dict) or key not in value:
                            raise ValueError(f"{path}: a record has no field {field!r}: name others with --fields")
                        value = value[key]
                    if not isinstance(value, str):
                        text = json.dumps(value)[:40]
                        raise ValueError(f"{path}: field {field!r} of a record is no text but {text}: see --fields")
                    yield (template.fill(record, str(path)) if field == fields[0] else "") + value


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, TEXTS_AT_ONCE)):
        yield batch


def trim_command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline trim", description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of a T5, mT5, umT5 or mBART-50 with its tokenizer"
    )
    parser.add_argument("--texts", type=Path, required=True, nargs="+", help="JSONL or plain files, .gz or not")
    parser.add_argument("--fields", nargs="+", default=["source", "target"], help="fields of JSONL records")
    parser.add_argument("--prefix", default="", help="what is put before every source, such as 'summarize: '")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    # before all texts are read, which may take long
    check_empty(options.out, "--out")
    if not (options.model / "config.json").is_file():
        raise FileNotFoundError(f"--model {options.model} is not a model folder: it has no config.json")
    if missing := [path for path in options.texts if not path.exists() or path.is_dir()]:
        raise FileNotFoundError(f"--texts {missing[0]}: no such file")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    texts = list(read_texts(options.texts, options.fields, options.prefix))
    if not any(texts):
        raise ValueError("--texts hold no text: nothing says which tokens are in use")
    summary = trim(options.model, texts, options.out)
    saved = 1 - summary["bytes"] / summary["original_bytes"]
    print(
        f"{options.out}: {summary['vocabulary_size']:,} of {summary['original_vocabulary_size']:,} tokens kept, "
        f"{summary['bytes']:,} of {summary['original_bytes']:,} bytes ({saved:.0%} saved)"
    )
