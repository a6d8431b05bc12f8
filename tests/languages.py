"""Small tokenizers, made and not downloaded: with tokens of languages, as NLLB, M2M100 and mBART-50 have them, with
pieces of its own for each side, as OPUS-MT has it, and those of Pegasus and T5Gemma 2."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import transformers

FRAMES = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3 in all three


def nllb(folder: Path, texts: Iterable[str], num_pieces: int) -> None:
    languages = ["eng_Latn", "deu_Latn", "fra_Latn", "zho_Hans"]
    merged = _merged(texts, num_pieces, FRAMES, prepend="always")
    transformers.NllbTokenizer(**merged, extra_special_tokens=languages).save_pretrained(folder)


def m2m_100(folder: Path, texts: Iterable[str], num_pieces: int) -> None:
    model, pieces = _pieces(texts, num_pieces)
    names = [*FRAMES, *(piece for piece, _ in pieces)]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    files = str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model")
    languages = list(transformers.M2M100Tokenizer(*files).lang_token_to_id)  # which public folders name as special
    transformers.M2M100Tokenizer(*files, additional_special_tokens=languages).save_pretrained(folder)


def mbart_50(folder: Path, texts: Iterable[str], num_pieces: int) -> None:
    _, pieces = _pieces(texts, num_pieces)
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *pieces]  # as SentencePiece has them
    transformers.MBart50Tokenizer(vocab=vocab).save_pretrained(folder)


def marian(folder: Path, texts: Iterable[str], num_pieces: int) -> None:
    numbers, texts = {"</s>": 0, "<unk>": 1}, list(texts)
    for side in ("source", "target"):
        model, pieces = _pieces(texts[side == "target" :: 2], num_pieces)
        (folder / f"{side}.spm").write_bytes(model)
        for piece, _ in pieces:
            numbers.setdefault(piece, len(numbers))
    (folder / "vocab.json").write_text(json.dumps({**numbers, "<pad>": len(numbers)}))
    settings = {"source_lang": "en", "target_lang": "de", "tokenizer_class": "MarianTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def pegasus(folder: Path, texts: Iterable[str], num_pieces: int) -> None:
    _, pieces = _pieces(texts, num_pieces)
    frames = ["<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>"]
    vocab = [*((name, 0.0) for name in frames), *pieces]
    transformers.PegasusTokenizer(vocab=vocab, offset=len(frames)).save_pretrained(folder)


def t5gemma2(folder: Path, texts: Iterable[str], num_pieces: int) -> None:
    """As recipes/t5gemma2_270m.yaml has the public one saved: a token ends each text, and none begins it."""
    merged = _merged(texts, num_pieces, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], prepend="never")
    transformers.GemmaTokenizer(**merged, add_bos_token=False, add_eos_token=True).save_pretrained(folder)


def _merged(texts: Iterable[str], num_pieces: int, special: list[str], prepend: str) -> dict[str, Any]:
    """Byte pairs of words that each begin with a sign for the space before them, and how they are merged."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=num_pieces, special_tokens=special, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(each) for each in model["merges"]]}


def _pieces(texts: Iterable[str], num_pieces: int) -> tuple[bytes, list[tuple[str, float]]]:
    """A SentencePiece model, and its pieces with their scores, without special ones."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=num_pieces, hard_vocab_limit=False, minloglevel=2
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return model.getvalue(), [
        (trained.id_to_piece(number), trained.get_score(number)) for number in range(3, trained.get_piece_size())
    ]


MADE: dict[str, tuple[Callable[[Path, Iterable[str], int], None], tuple[str, str]]] = {
    "NLLB": (nllb, ("eng_Latn", "deu_Latn")),
    "M2M100": (m2m_100, ("en", "de")),
    "mBART-50": (mbart_50, ("en_XX", "de_DE")),
}
"""(what makes one, two of its languages)."""
OF_TRANSLATORS = {**MADE, "OPUS-MT": (marian, ("en", "de"))}
