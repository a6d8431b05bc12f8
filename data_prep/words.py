"""Texts put together from words that were encoded before, where that gives what encoding them whole gives.

Most of a text is words that have occurred already; to find their ids takes a tenth of the time that `tokenizers` needs.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow
import tokenizers
from pyarrow import compute

MARK = "\u2581"  # what stands for a space
_MOST_WORDS, _LONGEST_WORD = 1 << 18, 64  # that are kept: about 40 MB


class Words(dict[str, bytes | None]):
    """Word -> its int32 ids, or None where the word must be encoded together with its neighbours.

    Ids of a text are those of its words one after another where every step of tokenizer.json works on one word at a
    time: the normalizer (which goes by grapheme clusters, so no word may join the space beside it, become empty or
    hold spaces), the added tokens (so no word may hold one), and the words cut at spaces, each with its mark.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._tokenizer, self._normalizer, self._model = tokenizer, tokenizer.normalizer, tokenizer.model
        added = [token for token in tokenizer.get_added_tokens_decoder().values() if token.content]
        contents = {token.content for token in added} | {
            self._normal(token.content) for token in added if token.normalized
        }
        self.can = (
            _cuts_at_spaces(json.loads(tokenizer.to_str()))
            and self._normal("a a") == "a a"
            and not any(not content or " " in content or MARK in content for content in contents)
        )
        """Whether this tokenizer works on each word by itself at all."""
        self._keeps_ascii = all(self._normal(chr(code)) == chr(code) for code in range(0x21, 0x7F))
        self._added = re.compile("|".join(map(re.escape, sorted(contents))) or "(?!)")

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
        """(tokens of each text int64 [num_texts], ids of all back to back int32, texts not wholly made of words)."""
        assert self.can
        cut = compute.split_pattern(pyarrow.array(texts, pyarrow.large_string()), " ")
        coded = cut.values.dictionary_encode()
        known = [self[word] for word in coded.dictionary.to_pylist()]
        word_of_place, offsets = coded.indices.to_numpy(), cut.offsets.to_numpy().astype(np.int64)
        ids = [b"" if each is None else each for each in known]
        sizes = np.fromiter(map(len, ids), np.int64, len(ids)) // 4
        begins, lengths = (np.cumsum(sizes) - sizes)[word_of_place], sizes[word_of_place]
        num_ids, odd = int(sizes.sum()), self._odd_texts(known, word_of_place, offsets)
        for text in odd:  # all of its ids stand where the first of its words would
            ids.append(self._with_neighbours(texts[text]))
            lengths[offsets[text] : offsets[text + 1]] = 0
            begins[offsets[text]], lengths[offsets[text]] = num_ids, len(ids[-1]) // 4
            num_ids += len(ids[-1]) // 4
        stops = np.cumsum(lengths)
        places = np.arange(int(lengths.sum())) + np.repeat(begins - (stops - lengths), lengths)
        until = np.concatenate([[0], stops])[offsets]
        return np.diff(until), np.frombuffer(b"".join(ids), dtype=np.int32)[places], len(odd)

    @staticmethod
    def _odd_texts(known: list[bytes | None], word_of_place: np.ndarray, offsets: np.ndarray) -> list[int]:
        """Texts that are not empty and hold a word without ids of its own."""
        odd_words = np.array([each is None for each in known], dtype=bool)
        if not odd_words.any():
            return []
        places = np.flatnonzero(odd_words[word_of_place])
        return np.unique(np.searchsorted(offsets, places, side="right") - 1).tolist()

    def __missing__(self, word: str) -> bytes | None:
        ids = None
        plain = word.isascii() and word.isprintable() and self._keeps_ascii  # most are
        normal = word if plain else self._normal(word)
        alone = normal and (plain or _stands_alone(word, normal))
        if alone and not self._added.search(word if plain else f"{word} {normal}"):
            ids = array("i", [token.id for token in self._model.tokenize(MARK + normal)]).tobytes()
        if len(self) < _MOST_WORDS and len(word) <= _LONGEST_WORD:
            self[word] = ids
        return ids

    def _with_neighbours(self, text: str) -> bytes:
        """Ids of a text in which each run of odd words is encoded with the word before and the one after it."""
        words = text.split(" ")
        odd = [self[word] is None for word in words]
        near = [any(odd[max(place - 1, 0) : place + 2]) for place in range(len(words))]
        parts: list[bytes] = []
        for is_near, run in groupby(zip(near, words, strict=True), key=lambda each: each[0]):
            if is_near:
                run_text = " ".join(word for _, word in run)
                parts.append(array("i", self._tokenizer.encode(run_text, add_special_tokens=False).ids).tobytes())
            else:
                parts += [self[word] or b"" for _, word in run]
        return b"".join(parts)

    def _normal(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer is not None else text


def _cuts_at_spaces(pipeline: dict[str, Any]) -> bool:
    """Whether normalizer and pre-tokenizer of a tokenizer.json are known to work on each word by itself."""
    normalizers, cutters = _steps(pipeline["normalizer"]), _steps(pipeline["pre_tokenizer"])
    if any(step["type"] not in ("Precompiled", "Strip", "Replace") for step in normalizers):
        return False
    if any(step["type"] == "Replace" and step["pattern"] != {"Regex": " {2,}"} for step in normalizers):
        return False  # a single space is none of two or more
    schemes = {("Metaspace",): ("always", "first"), ("WhitespaceSplit", "Metaspace"): ("always",)}
    known = schemes.get(tuple(step["type"] for step in cutters), ())
    marks = [step for step in cutters if step["type"] == "Metaspace"]
    return (
        bool(known)
        and marks[0]["prepend_scheme"] in known
        and marks[0]["replacement"] == MARK
        and marks[0]["split"]
        and not pipeline["model"].get("dropout")
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part["normalizers" if "normalizers" in part else "pretokenizers"] if part["type"] == "Sequence" else [part]


def _stands_alone(word: str, normal: str) -> bool:
    """Whether nothing that a normalizer does to the word reaches beyond the spaces beside it."""
    if MARK in normal or any(character.isspace() for character in normal):
        return False
    return _is_apart(word[0], "LNPS") and _is_apart(word[-1], "LNPSM")


def _is_apart(character: str, categories: str) -> bool:
    """Whether no grapheme cluster holds the character and a space before it (after it, where marks are among the
    categories): blocks that have neither prepended nor extending letters (jamo, Thai and emoji are left out)."""
    code = ord(character)
    if code < 0x300:
        return character.isprintable() and character != " "
    in_blocks = code < 0xD00 or 0x1E00 <= code < 0xA960 or 0xAC00 <= code < 0xD7A4
    return in_blocks and unicodedata.category(character)[0] in categories
