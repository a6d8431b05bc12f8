"""Small tokenizers of translation models, made and not downloaded: with tokens of languages, as NLLB, M2M100 and
mBART-50 have them, and with pieces of its own for each side, as OPUS-MT has it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece
import tokenizers
import transformers

FRAMES = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3 in all three


def nllb(folder: Path, texts: Iterable[str], num_pieces: int) -> None:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=num_pieces, special_tokens=FRAMES, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    languages = ["eng_Latn", "deu_Latn", "fra_Latn", "zho_Hans"]
    merges = [tuple(each) for each in model["merges"]]
    transformers.NllbTokenizer(vocab=model["vocab"], merges=merges, extra_special_tokens=languages).save_pretrained(
        folder
    )


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
