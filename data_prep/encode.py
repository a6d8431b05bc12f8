"""Record text -> token ids. SentencePiece in C++ for spiece.model (T5, mT5), `tokenizers` for tokenizer.json (BART)."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers

from data_prep.shards import Block

SPIECE, TOKENIZER_JSON = "spiece.model", "tokenizer.json"
TOKENIZER_FILES = (SPIECE, TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SENTINEL = "<extra_id_{}>"
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
    """The kept examples of some records as one block, and what happened to the others (positions among the records)."""

    block: Block
    dropped: dict[str, list[int]] = field(default_factory=dict)
    num_truncated_sources: int = 0
    num_truncated_targets: int = 0


class _Backend(Protocol):
    info: TokenizerInfo

    def ids(self, texts: list[str]) -> Sequence[Sequence[int] | np.ndarray]: ...

    def text(self, ids: list[int]) -> str: ...

    def id_of(self, token: str) -> int | None: ...


class _SentencePiece:
    """The C++ model, and around it what Hugging Face's T5 tokenizer does with special tokens in a text: they are cut
    out first, and what is between them is encoded by itself."""

    def __init__(self, folder: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(folder / SPIECE))
        except (RuntimeError, OSError) as err:
            raise _not_a_tokenizer(folder / SPIECE, err) from err
        model = self._model
        num_pieces = model.get_piece_size()
        specials = {model.id_to_piece(i): i for i in (model.pad_id(), model.eos_id(), model.unk_id()) if i >= 0}
        # Sentinels follow the pieces, the last one first, unless the model has them as pieces of its own.
        num_sentinels = _num_sentinels(folder)
        specials |= {SENTINEL.format(k): num_pieces + num_sentinels - 1 - k for k in range(num_sentinels)}
        self._specials = specials
        self._pattern = re.compile("(" + "|".join(map(re.escape, specials)) + ")")
        self.info = TokenizerInfo(
            "sentencepiece", num_pieces + num_sentinels, model.pad_id(), model.eos_id(), model.unk_id()
        )

    def ids(self, texts: list[str]) -> Sequence[np.ndarray]:
        # One thread: the ranks are the parallelism.
        rows = list(self._model.encode(texts, out_type="numpy", num_threads=1))
        for position, text in enumerate(texts):
            if "<" in text and self._pattern.search(text):
                parts = [self._specials.get(part, part) for part in self._pattern.split(text)]
                ids = [[part] if isinstance(part, int) else self._model.encode(part, out_type=int) for part in parts]
                rows[position] = np.array(list(itertools.chain(*ids)), dtype=np.int32)
        return rows

    def text(self, ids: list[int]) -> str:
        names = {number: name for name, number in self._specials.items() if number >= self._model.get_piece_size()}
        runs = itertools.groupby(ids, key=lambda number: number in names)
        return " ".join(
            " ".join(names[i] for i in run) if special else self._model.decode(list(run)) for special, run in runs
        )

    def id_of(self, token: str) -> int | None:
        if token in self._specials:
            return self._specials[token]
        found = self._model.piece_to_id(token)
        return found if found != self._model.unk_id() else None


def _num_sentinels(folder: Path) -> int:
    """How many <extra_id_k> Hugging Face's tokenizer adds to the pieces, as the files beside the model say."""
    config = _tokenizer_config(folder)
    added = {token["content"] for token in config.get("added_tokens_decoder", {}).values()}
    return int(config.get("extra_ids") or sum(SENTINEL.format(k) in added for k in range(1000)))


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as err:
        raise _not_a_tokenizer(path, err) from err


def _not_a_tokenizer(path: Path, err: Exception) -> ValueError:
    return ValueError(f"{path}: damaged, or no tokenizer of this kind ({err}); check data.tokenizer")


class _Tokenizers:
    def __init__(self, folder: Path) -> None:
        try:
            self._model = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        except Exception as err:  # the library raises no narrower one
            raise _not_a_tokenizer(folder / TOKENIZER_JSON, err) from err
        self._model.no_truncation()
        self._model.no_padding()
        config = _tokenizer_config(folder)
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

    def id_of(self, token: str) -> int | None:
        return self._model.token_to_id(token)


class Encoder:
    """Encodes text pairs with the tokenizer of a folder. Ids end with end-of-sequence, also when truncated."""

    def __init__(self, folder: Path, max_source_tokens: int, max_target_tokens: int) -> None:
        self._backend: _Backend
        if (folder / SPIECE).is_file():
            self._backend = _SentencePiece(folder)
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
        """Encode pairs. Ids are uint16 (uint32 if the vocabulary needs it); pairs with an empty text are dropped."""
        sources_ids, targets_ids = self._backend.ids(list(sources)), self._backend.ids(list(targets))
        dropped: dict[str, list[int]] = {}
        kept: list[int] = []
        for position, (left, right) in enumerate(zip(sources_ids, targets_ids, strict=True)):
            if len(left) and len(right):
                kept.append(position)
            else:
                dropped.setdefault("empty target" if len(left) else "empty source", []).append(position)
        sources_kept, num_source = self._packed([sources_ids[position] for position in kept], self._max_source_tokens)
        targets_kept, num_target = self._packed([targets_ids[position] for position in kept], self._max_target_tokens)
        (source_lengths, source), (target_lengths, target) = sources_kept, targets_kept
        return Encoded(Block(source_lengths, target_lengths, source, target), dropped, num_source, num_target)

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """The texts back to back without end-of-sequence, int64 [num_tokens]."""
        rows = self._backend.ids(list(texts))
        return np.concatenate([*rows, np.empty(0, dtype=np.int64)]).astype(np.int64)

    def sentinels(self, count: int) -> np.ndarray:
        """Ids of <extra_id_0>, <extra_id_1> ..., int64 [count]. ValueError if the tokenizer has fewer."""
        ids = [self._backend.id_of(SENTINEL.format(k)) for k in range(count)]
        found = [number for number in ids if number is not None]
        if len(found) < count:
            raise ValueError(
                f"span corruption needs {count} tokens {SENTINEL.format(0)}, {SENTINEL.format(1)} ...; the tokenizer "
                f"has {len(found)}: give T5's, or lower data.max_source_tokens"
            )
        return np.array(found, dtype=np.int64)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids [length], end-of-sequence and padding left out."""
        return self._backend.text(ids.tolist())

    def block_of(self, source_NS: np.ndarray, target_NT: np.ndarray) -> Block:
        """Rows of equal length, end-of-sequence included, as a block."""
        source, target = (np.full(len(rows), rows.shape[1], dtype=np.uint16) for rows in (source_NS, target_NT))
        return Block(
            source, target, source_NS.reshape(-1).astype(self._dtype), target_NT.reshape(-1).astype(self._dtype)
        )

    def _packed(
        self, rows: Sequence[Sequence[int] | np.ndarray], max_tokens: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """(lengths, ids) of rows back to back, each cut and ended with end-of-sequence, and how many were cut."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        num_cut = int((lengths >= max_tokens).sum())
        if num_cut:
            rows = [row[: max_tokens - 1] for row in rows]
        lengths = np.minimum(lengths, max_tokens - 1) + 1
        ids = np.full(lengths.sum(), self.info.eos_id, dtype=self._dtype)
        is_end = np.zeros(len(ids), dtype=bool)
        is_end[np.cumsum(lengths) - 1] = True
        ids[~is_end] = np.concatenate([np.empty(0, dtype=np.int64), *rows])
        return (lengths.astype(np.uint16), ids), num_cut


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, split_digits: bool, out: Path, num_sentinels: int = 0
) -> None:
    """Train a unigram SentencePiece model and write it to `out`. The same texts give the same bytes.

    Special ids are T5's (pad 0, eos 1, unk 2, no bos), so HF's T5Tokenizer takes the model as it is. Sentinels become
    pieces of the model itself.
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
            user_defined_symbols=[SENTINEL.format(k) for k in range(num_sentinels)],
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
