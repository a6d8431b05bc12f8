"""Record text -> token ids, by the tokenizer of record: the tokenizer.json that AutoTokenizer loads from the folder.

Most texts are put together from words that were encoded before, which is several times as fast as encoding them whole
and gives the same ids by construction; `data_prep/words.py` says when.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from data_prep.languages import read_languages
from data_prep.shards import Block
from data_prep.words import MARK, Words

SPIECE, TOKENIZER_JSON, TOKENIZER_CONFIG = "spiece.model", "tokenizer.json", "tokenizer_config.json"
SENTINEL = "<extra_id_{}>"
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2  # of a trained model: T5's
_SPECIALS = ("<pad>", "</s>", "<unk>")
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


Rows = tuple[np.ndarray, np.ndarray, int]
"""(tokens of each text int64 [num_texts], ids of all back to back int32, texts not encoded word by word)."""


_Before = Sequence[int | np.ndarray]
"""Ids that begin texts, one place after the other: the same for all texts, or one for each."""


class _Backend(Protocol):
    info: TokenizerInfo
    before: tuple[int, ...]
    """Ids that begin every text; end-of-sequence ends it."""

    def rows(self, texts: list[str], *, are_targets: bool = False) -> Rows:
        """Ids of texts without what begins and ends them; none of an empty text. Marian cuts targets into pieces of
        their own."""

    def text(self, ids: list[int]) -> str: ...

    def id_of(self, token: str) -> int | None: ...


def _backend(folder: Path) -> _Backend:
    """The tokenizer of a folder; transformers is asked only where `write_tokenizer` has not written it yet."""
    path, settings = folder / TOKENIZER_JSON, folder / TOKENIZER_CONFIG
    if path.is_file() and settings.is_file():
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
            config = json.loads(settings.read_text(encoding="utf-8"))
        except Exception as err:  # the library raises no narrower one
            raise ValueError(f"{path}: damaged, or no tokenizer of this kind ({err}); check data.tokenizer") from err
        tokens = {name: config.get(f"{name}_token") for name in ("pad", "eos", "unk")}
        names = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
        return _Tokenizers(model, names, bool(config.get("split_special_tokens")))
    if not folder.is_dir() or not any(folder.iterdir()):
        raise FileNotFoundError(f"{folder}: neither {SPIECE} nor {TOKENIZER_JSON}; check data.tokenizer")
    from data_prep.tokenizer import load_tokenizer  # late: the others do without transformers

    served = load_tokenizer(folder)
    if not hasattr(served, "backend_tokenizer"):
        return _Python(served)
    model = tokenizers.Tokenizer.from_str(served.backend_tokenizer.to_str())
    names = {name: getattr(served, f"{name}_token") for name in ("pad", "eos", "unk")}
    return _Tokenizers(model, names, served.split_special_tokens)


class _Tokenizers:
    """tokenizer.json, as AutoTokenizer uses it."""

    def __init__(self, model: tokenizers.Tokenizer, names: dict[str, str | None], splits_special: bool) -> None:
        self._model = model
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = splits_special
        ids = {name: model.token_to_id(token) if token else None for name, token in names.items()}
        pad, eos, unk = (-1 if (number := ids[name]) is None else number for name in ("pad", "eos", "unk"))
        self.info = TokenizerInfo("tokenizers", model.get_vocab_size(), pad, eos, unk)
        framed, bare = (model.encode("a", add_special_tokens=add).ids for add in (True, False))
        num_before = len(framed) - 1 - len(bare)
        if pad < 0 or eos < 0 or framed[num_before:] != [*bare, eos]:
            raise ValueError(
                f"the tokenizer does not end texts as a seq2seq model's does ({names}); check data.tokenizer"
            )
        self.before = tuple(framed[:num_before])
        self._words = Words(model)

    def rows(self, texts: list[str], *, are_targets: bool = False) -> Rows:
        if self._words.can:
            return self._words.encode(texts)
        encoded = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return _joined([encoding.ids for encoding in encoded])

    def text(self, ids: list[int]) -> str:
        hidden = {self.info.pad_id, self.info.eos_id, *self.before}
        return self._model.decode([each for each in ids if each not in hidden], skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        return self._model.token_to_id(token)


class _Python:
    """A tokenizer that is Python code of transformers alone, such as ByT5's."""

    def __init__(self, model: Any) -> None:
        self._model = model
        special = (getattr(self._model, f"{name}_token_id") for name in ("pad", "eos", "unk"))
        self.info = TokenizerInfo("python", len(self._model), *(-1 if each is None else each for each in special))
        self.before = tuple(self._model("").input_ids[:-1])

    def rows(self, texts: list[str], *, are_targets: bool = False) -> Rows:
        encoded = self._model(**{"text_target" if are_targets else "text": texts}).input_ids if texts else []
        return _joined([row[len(self.before) : -1] for row in encoded])

    def text(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._model.get_vocab().get(token)


def _joined(rows: list[list[int]]) -> Rows:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return lengths, np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum())), len(rows)


class Encoder:
    """Encodes text pairs with the tokenizer of a folder. Ids end with end-of-sequence,
    also when truncated."""

    def __init__(self, folder: Path, max_source_tokens: int, max_target_tokens: int) -> None:
        self._backend = _backend(folder)
        self.languages = read_languages(folder)
        """Ids of the tokens of languages that texts begin with, where the tokenizer has such."""
        info = self._backend.info
        # M2M100's tokens of languages are beyond what it says is its vocabulary
        self.info = replace(info, vocab_size=max(info.vocab_size, 1 + max(self.languages.values(), default=0)))
        self.num_whole = 0
        """Texts so far that were not encoded word by word."""
        self._max_source_tokens = max_source_tokens
        self._max_target_tokens = max_target_tokens
        self._dtype = np.uint16 if self.info.vocab_size <= 1 << 16 else np.uint32

    def encode(
        self, sources: Sequence[str], targets: Sequence[str], languages: Sequence[tuple[str, str]] = ()
    ) -> Encoded:
        """Encode pairs. Ids are uint16 (uint32 if the vocabulary needs it); pairs with an empty text are dropped.

        Args:
            languages: of source and target of each pair, for a tokenizer with tokens of languages (see `languages`).
        """
        source, target = self._rows(sources), self._rows(targets, are_targets=not self.languages)
        has_source, has_target = source[0] > 0, target[0] > 0
        empty = {"empty source": ~has_source, "empty target": has_source & ~has_target}
        dropped = {reason: np.flatnonzero(rows).tolist() for reason, rows in empty.items() if rows.any()}
        kept = has_source & has_target
        source_before, target_before = self._before(languages, kept)
        source_lengths, source_ids, num_source = self._packed(source, kept, self._max_source_tokens, source_before)
        target_lengths, target_ids, num_target = self._packed(target, kept, self._max_target_tokens, target_before)
        block = Block(source_lengths, target_lengths, source_ids, target_ids)
        return Encoded(block, dropped, num_source, num_target)

    def _rows(self, texts: Sequence[str], *, are_targets: bool = False) -> Rows:
        # A text of spaces is empty, whatever a tokenizer makes of it.
        rows = self._backend.rows(["" if text.isspace() else text for text in texts], are_targets=are_targets)
        self.num_whole += rows[2]
        return rows

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """The texts back to back without end-of-sequence, int64 [num_tokens]."""
        return self._rows(texts)[1].astype(np.int64)

    def sentinels(self, count: int) -> np.ndarray:
        """Ids of <extra_id_0>, <extra_id_1> ..., int64 [count]. ValueError if the tokenizer has fewer."""
        found: list[int] = []
        for name in map(SENTINEL.format, range(count)):
            ids = (self._backend.id_of(token) for token in (name, MARK + name))  # mT5's are pieces with a mark
            number = next((each for each in ids if each is not None), None)
            if number is None:
                raise ValueError(
                    f"span corruption needs {count} tokens {SENTINEL.format(0)}, {SENTINEL.format(1)} ...; the "
                    f"tokenizer has {len(found)}: give T5's, or lower data.max_source_tokens"
                )
            found.append(number)
        return np.array(found, dtype=np.int64)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids [length], end-of-sequence, padding and languages left out."""
        languages = {*self.languages.values()}
        return self._backend.text([each for each in ids.tolist() if each not in languages])

    def block_of(self, source_NS: np.ndarray, target_NT: np.ndarray) -> Block:
        """Rows of equal length, end-of-sequence included, as a block."""
        source, target = (np.full(len(rows), rows.shape[1], dtype=np.uint16) for rows in (source_NS, target_NT))
        return Block(
            source, target, source_NS.reshape(-1).astype(self._dtype), target_NT.reshape(-1).astype(self._dtype)
        )

    def _before(self, languages: Sequence[tuple[str, str]], kept: np.ndarray) -> tuple[_Before, _Before]:
        """What begins the kept sources, and the targets."""
        if not self.languages:
            return self._backend.before, self._backend.before
        ids_N2 = np.array([[self.languages[each] for each in pair] for pair in languages]).reshape(-1, 2)[kept]
        return (ids_N2[:, 0],), (ids_N2[:, 1],)

    def _packed(
        self, rows: Rows, kept: np.ndarray, max_tokens: int, before: _Before
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """(lengths, ids) of the kept rows back to back, each framed and cut, and how many were cut."""
        lengths, ids, _ = rows
        longest = max(max_tokens - 1 - len(before), 0)
        num_cut = int((lengths[kept] > longest).sum())
        if num_cut or not kept.all():
            place_in_row = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            ids = ids[np.repeat(kept, lengths) & (place_in_row < longest)]
            lengths = np.minimum(lengths[kept], longest)
        framed = lengths + len(before) + 1
        begins = np.cumsum(framed) - framed
        packed = np.full(int(framed.sum()), self.info.eos_id, dtype=self._dtype)
        is_text = np.ones(len(packed), dtype=bool)
        is_text[begins + framed - 1] = False
        for place, numbers in enumerate(before):
            packed[begins + place], is_text[begins + place] = numbers, False
        packed[is_text] = ids
        return framed.astype(np.uint16), packed, num_cut


def write_plain_t5(source: Path, target: Path) -> bool:
    """Write a folder that holds nothing of a tokenizer but a spiece.model with T5's special ids, as `write_tokenizer`
    would: what transformers' T5Tokenizer makes of the pieces, without sentinels. False where it holds anything else."""
    if [path.name for path in source.iterdir() if path.suffix in (".json", ".model", ".txt")] != [SPIECE]:
        return False
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString((source / SPIECE).read_bytes())
    except DecodeError:
        return False
    specials = [(each.piece, each.score) for each in model.pieces[:3]]
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM or specials != [(each, 0.0) for each in _SPECIALS]:
        return False
    pieces = [(each.piece, each.score) for each in model.pieces]
    written = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=UNK_ID, byte_fallback=False))
    if model.normalizer_spec.precompiled_charsmap:
        written.normalizer = tokenizers.normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    cutters = tokenizers.pre_tokenizers
    written.pre_tokenizer = cutters.Sequence([cutters.WhitespaceSplit(), cutters.Metaspace(MARK, "always", True)])
    written.decoder = tokenizers.decoders.Metaspace(MARK, "always", True)
    end = _SPECIALS[EOS_ID]
    written.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, EOS_ID)]
    )
    written.add_special_tokens(list(_SPECIALS))
    (target / TOKENIZER_JSON).write_text(written.to_str(pretty=True), encoding="utf-8")
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": []}
    settings |= dict(zip(("pad_token", "eos_token", "unk_token"), _SPECIALS, strict=True))
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (target / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(source / SPIECE, target / SPIECE)
    return True


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
