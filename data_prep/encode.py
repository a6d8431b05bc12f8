"""Record text -> token ids. SentencePiece in C++ for spiece.model (T5, mT5), `tokenizers` for tokenizer.json (BART)."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

SPIECE, TOKENIZER_JSON = "spiece.model", "tokenizer.json"
TOKENIZER_FILES = (SPIECE, TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2  # of a trained model: T5's
_NUM_TRAINING_TEXTS = 400_000  # enough for a vocabulary; bounds time and memory of training
_LONGEST_TRAINING_TEXT = 65_536  # bytes; SentencePiece leaves out longer ones


@dataclass(frozen=True)
class TokenizerInfo:
    """What a reader of the shards must know of the tokenizer."""

    kind: str
    vocab_size: int
    pad_id: int
    eos_id: int
    unk_id: int


@dataclass
class Encoded:
    """The kept examples of some records, and what happened to the others (positions are those of the records)."""

    source_ids: list[np.ndarray] = field(default_factory=list)
    target_ids: list[np.ndarray] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    num_truncated_sources: int = 0
    num_truncated_targets: int = 0


class _Backend(Protocol):
    info: TokenizerInfo

    def ids(self, texts: list[str]) -> list[list[int]]: ...

    def text(self, ids: list[int]) -> str: ...


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        model = self._model
        self.info = TokenizerInfo(
            "sentencepiece", model.get_piece_size(), model.pad_id(), model.eos_id(), model.unk_id()
        )

    def ids(self, texts: list[str]) -> list[list[int]]:
        # One thread: the ranks are the parallelism.
        return self._model.encode(texts, out_type=int, num_threads=1)

    def text(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class _Tokenizers:
    def __init__(self, folder: Path) -> None:
        self._model = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        self._model.no_truncation()
        self._model.no_padding()
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        pad, eos, unk = (self._special(config, name) for name in ("pad", "eos", "unk"))
        self.info = TokenizerInfo("tokenizers", self._model.get_vocab_size(), pad, eos, unk)
        self._num_special = self._model.num_special_tokens_to_add(False)

    def _special(self, config: dict, name: str) -> int:
        token = config.get(f"{name}_token") or {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}[name]
        token = token["content"] if isinstance(token, dict) else token
        token_id = self._model.token_to_id(token)
        if token_id is None:
            raise ValueError(f"tokenizer.json has no {name} token {token!r}: name it in tokenizer_config.json")
        return token_id

    def ids(self, texts: list[str]) -> list[list[int]]:
        rows = [encoding.ids for encoding in self._model.encode_batch_fast(texts)]
        rows = [row if len(row) > self._num_special else [] for row in rows]
        return [row[:-1] if row and row[-1] == self.info.eos_id else row for row in rows]

    def text(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)


class Encoder:
    """Encodes text pairs with the tokenizer of a folder. Ids end with end-of-sequence, also when truncated."""

    def __init__(self, folder: Path, max_source_tokens: int, max_target_tokens: int) -> None:
        self._backend: _Backend
        if (folder / SPIECE).is_file():
            self._backend = _SentencePiece(folder / SPIECE)
        elif (folder / TOKENIZER_JSON).is_file():
            self._backend = _Tokenizers(folder)
        else:
            raise FileNotFoundError(f"{folder}: neither {SPIECE} nor {TOKENIZER_JSON}; check data.tokenizer")
        self.info = self._backend.info
        for name in ("pad_id", "eos_id"):
            if getattr(self.info, name) < 0:
                raise ValueError(f"{folder}: the tokenizer has no {name}; use the tokenizer of a seq2seq model")
        self._max_source_tokens = max_source_tokens
        self._max_target_tokens = max_target_tokens
        self._dtype = np.uint16 if self.info.vocab_size <= 1 << 16 else np.uint32

    def encode(self, sources: Sequence[str], targets: Sequence[str]) -> Encoded:
        """Encode pairs. Ids are uint16 [length] (uint32 if the vocabulary needs it); empty texts are dropped."""
        encoded = Encoded()
        source_rows, target_rows = self._backend.ids(list(sources)), self._backend.ids(list(targets))
        for position, (source, target) in enumerate(zip(source_rows, target_rows, strict=True)):
            if not source or not target:
                reason = "empty source" if not source else "empty target"
                encoded.dropped.setdefault(reason, []).append(position)
                continue
            encoded.num_truncated_sources += len(source) >= self._max_source_tokens
            encoded.num_truncated_targets += len(target) >= self._max_target_tokens
            encoded.source_ids.append(self._finish(source, self._max_source_tokens))
            encoded.target_ids.append(self._finish(target, self._max_target_tokens))
        return encoded

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids [length], end-of-sequence and padding left out."""
        return self._backend.text(ids.tolist())

    def _finish(self, ids: list[int], max_tokens: int) -> np.ndarray:
        return np.array([*ids[: max_tokens - 1], self.info.eos_id], dtype=self._dtype)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, split_digits: bool, out: Path) -> None:
    """Train a unigram SentencePiece model and write it to `out`. The same texts give the same bytes.

    Special ids are T5's (pad 0, eos 1, unk 2, no bos), so HF's T5Tokenizer takes the model as it is.
    """
    model = io.BytesIO()
    failures: list[Exception] = []

    def guarded() -> Iterator[str]:
        # SentencePiece reports an exception of its iterator as a bare source line: keep it and stop instead.
        try:
            yield from itertools.islice(texts, _NUM_TRAINING_TEXTS)
        except Exception as err:
            failures.append(err)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            split_digits=split_digits,
            character_coverage=1.0,
            hard_vocab_limit=False,
            byte_fallback=False,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            max_sentence_length=_LONGEST_TRAINING_TEXT,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as err:
        if failures:
            raise failures[0] from None
        reason = str(err).splitlines()[-1]
        raise ValueError(
            f"SentencePiece found no vocabulary of {vocab_size}: {reason}; change data.vocab_size"
        ) from err
    if failures:
        raise failures[0]
    out.write_bytes(model.getvalue())
