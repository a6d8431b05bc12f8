"""Tokens of a run's texts: the tokenizer of record beside every model, and output ids as texts."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.languages import with_languages
from data_prep.tokenizer import (
    check_tokenizer,
    copy_tokenizer,
    language_ids,
    load_tokenizer,
    tokenizer_files,
    write_tokenizer,
)

__all__ = [
    "Wording",
    "check_tokenizer",
    "copy_tokenizer",
    "forced_bos_ids",
    "language_ids",
    "load_tokenizer",
    "tokenizer_files",
    "vocabulary_size",
    "with_languages",
    "write_tokenizer",
]

_FRAMES = ("bos", "eos", "pad", "unk", "cls", "mask")  # never part of a text
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def vocabulary_size(folder: Path) -> int:
    """One more than the largest id; M2M100's tokens of languages are beyond what it says is its vocabulary."""
    tokenizer = load_tokenizer(folder)
    return max(len(tokenizer), 1 + max(language_ids(tokenizer).values(), default=0))


def forced_bos_ids(tokenizer: Any, references: Sequence[Sequence[int]]) -> list[int] | None:
    """The tokens of languages that outputs must begin with: those that their references begin with. None of a tokenizer
    without such tokens."""
    return [ids[0] for ids in references] if language_ids(tokenizer) else None


class Wording:
    """Output ids as texts: without special tokens, but for those that are part of texts, such as the <sep> of targets.

    Transformers leaves out all of them: outputs could never equal a reference that has one.
    """

    def __init__(self, tokenizer: Any, texts: Iterable[str] | None = None) -> None:
        """
        Args:
            texts: the references; the special tokens that they hold are kept, with spaces as there. None where
                references are ids, too: all are kept but those that frame a text, alike on both sides.
        """
        self._tokenizer = tokenizer
        self._languages = {*language_ids(tokenizer).values()}  # which not every folder says are special
        frames = {getattr(tokenizer, f"{name}_token_id") for name in _FRAMES} | self._languages
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        tokens = {text: number for text, number in special.items() if number not in frames and not _BYTE.match(text)}
        spaces = _spaces_around(tokens, texts) if tokens else {}
        self._written = {tokens[text]: _written(tokenizer, text, spaces.get(text)) for text in tokens}
        if texts is not None:
            self._written = {tokens[text]: self._written[tokens[text]] for text in spaces}

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts of ids [num_rows][num_tokens]."""
        if self._languages:
            rows = [[number for number in row if number not in self._languages] for row in rows]
        plain = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            text if self._written.keys().isdisjoint(row) else self._put_together(row)
            for row, text in zip(rows, plain, strict=True)
        ]

    def _put_together(self, row: Sequence[int]) -> str:
        text = last = ""
        for number, run in itertools.groupby(row, key=lambda number: number if number in self._written else None):
            if number is None:
                part = self._tokenizer.decode(list(run), skip_special_tokens=True)
                text, last = text + part, part or last
                continue
            for _ in run:
                last = self._written[number]
                text += last.removeprefix(" ") if not text or text.endswith(" ") else last
        return text.removesuffix(" ") if last in self._written.values() else text


def _spaces_around(tokens: Iterable[str], texts: Iterable[str] | None) -> dict[str, tuple[bool, bool]]:
    """Whether a space mostly stands (before, after) each of the tokens that the texts hold; an end of a text is one."""
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    counts: dict[str, Counter[str]] = {}
    for text in texts or ():
        for match in pattern.finditer(text):
            count = counts.setdefault(match[0], Counter())
            count["all"] += 1
            count["before"] += match.start() == 0 or text[match.start() - 1] == " "
            count["after"] += match.end() == len(text) or text[match.end()] == " "
    return {
        token: (2 * count["before"] >= count["all"], 2 * count["after"] >= count["all"])
        for token, count in counts.items()
    }


def _written(tokenizer: Any, token: str, spaces: tuple[bool, bool] | None) -> str:
    """A special token with the spaces that belong to it where ids do not tell whether there was one."""
    before, after = spaces or (True, True)
    ids = tokenizer([f"a{token}a", f"a {token}a", f"a{token} a"]).input_ids
    return " " * (before and ids[1] == ids[0]) + token + " " * (after and ids[2] == ids[0])
