"""Scripts and languages: what is a word in them, and which of sacreBLEU's tokenizers cuts them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import regex

# Unicode's names (UAX 24). Extensions, since the mark of a long vowel is of no one script; letters and digits, since
# Chinese and Japanese share signs.
_KANA = r"[[\p{scx=Hiragana}\p{scx=Katakana}]&&[\p{L}\p{N}]]"
_HAN = r"[\p{scx=Han}&&[\p{L}\p{N}]]"
# The other scripts in use that put no spaces between words: those whose lines break at syllables or by a dictionary
# (UAX 14, classes SA, AK and AS), Tibetan, Buginese and Bopomofo.
_BY_SYLLABLE = "".join(
    rf"\p{{Script={name}}}"
    for name in (
        "Thai", "Lao", "Tibetan", "Myanmar", "Khmer", "Javanese", "Balinese", "Batak", "Buginese", "Cham", "Tai_Le",
        "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Ahom", "Bopomofo",
    )
)  # fmt: skip
WITHOUT_SPACES = regex.compile(f"[{_KANA}{_HAN}{_BY_SYLLABLE}]", regex.VERSION1)
_LETTER = regex.compile(rf"{WITHOUT_SPACES.pattern}\p{{M}}*", regex.VERSION1)
_SCRIPTS = {  # tokenizer: the characters that ask for it
    "ja-mecab": regex.compile(_KANA, regex.VERSION1),
    "zh": regex.compile(f"[{_HAN}--{_KANA}]", regex.VERSION1),
    "ko-mecab": regex.compile(r"\p{Script=Hangul}"),
    "char": regex.compile(f"[{_BY_SYLLABLE}]"),
}
_LANGUAGES = {"ja": "ja-mecab", "zh": "zh", "ko": "ko-mecab"}  # ISO 639-1, below 639-3, as NLLB has them
_LANGUAGES |= {"jpn": "ja-mecab", "zho": "zh", "yue": "zh", "kor": "ko-mecab"}
_LANGUAGES |= dict.fromkeys(("th", "lo", "bo", "my", "km", "tha", "lao", "bod", "mya", "khm"), "char")


def tokenizer_of(texts: Sequence[str], language: str) -> str:
    """sacreBLEU's tokenizer for a language, else for the script that the texts are mostly in."""
    code = re.split("[-_]", language.lower())[0]
    name = _LANGUAGES.get(code, "13a")
    if code not in _LANGUAGES:
        text = "".join(texts)
        counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
        if 2 * sum(counts.values()) >= sum(map(str.isalpha, text)) > 0:
            # Japanese is mostly written with some kana, Chinese never
            name = "ja-mecab" if 10 * counts["ja-mecab"] > counts["zh"] else max(counts, key=lambda each: counts[each])
    return name


def apart(text: str) -> str:
    """A text with spaces around each letter of a script that has none, and its marks."""
    return _LETTER.sub(r" \g<0> ", text)


def words_of(text: str) -> list[str]:
    """Runs of letters, marks and digits; letters of scripts without spaces by themselves, with their marks."""
    words: list[str] = []
    is_open = False
    for each in text.lower():
        kind = unicodedata.category(each)[0]
        if kind not in "LMN":
            is_open = False
        elif words and (kind == "M" or (is_open and not WITHOUT_SPACES.match(each))):
            words[-1] += each
        else:
            words.append(each)
            is_open = not WITHOUT_SPACES.match(each)
    return words
