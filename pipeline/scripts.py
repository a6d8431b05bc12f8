"""Scripts and languages: what is a word in them, and which of sacreBLEU's tokenizers cuts them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)
_SCRIPTS = {  # tokenizer: the characters that ask for it
    "ja-mecab": re.compile("[\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f]"),
    "zh": re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"),
    "ko-mecab": re.compile("[\uac00-\ud7a3\u1100-\u11ff]"),
    "char": re.compile("[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff]"),  # Thai, Lao, Tibetan, Burmese, Khmer
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
