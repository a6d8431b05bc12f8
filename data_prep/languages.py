"""Tokens of languages: those of NLLB, M2M100 and mBART-50, with one of which every text of theirs begins."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

LANGUAGES = "languages.json"  # beside a tokenizer that has such tokens


def read_languages(folder: Path) -> dict[str, int]:
    """Ids of the tokens of languages, by language, as `write_languages` left them; none beside other tokenizers."""
    path = folder / LANGUAGES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def language_id(ids: Mapping[str, int], language: str) -> int:
    """The id of a language's token.

    Raises:
        ValueError: it has none.
    """
    if language not in ids:
        alike = [each for each in ids if each.lower().startswith(language.lower()[:2])] or list(ids)
        raise ValueError(
            f"the tokenizer has no token for language {language!r}; of its {len(ids)} languages the likeliest are "
            f"{', '.join(alike[:5])}"
        )
    return ids[language]


def with_languages(rows: list[list[int]], ids: Mapping[str, int], languages: Sequence[str]) -> list[list[int]]:
    """Rows of ids as a tokenizer gives them, each begun with the token of its language instead of the tokenizer's own;
    as they are where there are no such tokens. Raises what `language_id` does."""
    if not ids:
        return rows
    return [[language_id(ids, language), *row[1:]] for row, language in zip(rows, languages, strict=True)]
