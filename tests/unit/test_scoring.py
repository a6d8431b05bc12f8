"""Scores are those of the sacrebleu command line and of rouge-score, to the last digit."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from pipeline import scoring
from pipeline.scoring import ROUGE_TYPES, References, bleu, check_bleu_tokenizer, p_values, quality_of
from pipeline.scripts import apart, words_of

WORDS = (
    "ein", "zwei", "Häuser,", "\u201ealte\u201c", "Straßen\u2028", "&", "schöne", "Gärten;", "3.5", "km", "\u2013",
    "und", "dann?", "(nichts)",
)  # fmt: skip


def corpus(seed: int, count: int, changes: float) -> tuple[list[list[str]], list[str]]:
    """(references, one, two or three for each example; outputs that depart from the first here and there)."""
    generator = random.Random(seed)
    references, outputs = [], []
    for _ in range(count):
        text = generator.choices(WORDS, k=generator.randrange(2, 15))
        others = [generator.sample(text, len(text)) for _ in range(generator.randrange(3))]
        references.append([" ".join(each) for each in (text, *others)])
        outputs.append(" ".join(w if generator.random() > changes else generator.choice(WORDS) for w in text))
    return references, outputs


def test_scores_are_those_of_the_command_line(tmp_path):
    texts, outputs = corpus(0, 60, 0.3)
    texts = [[*each[:1], *each[1:2], *each[:1]][:2] for each in texts]  # two each, as the command line wants it
    clean = [[text.replace("\u2028", "") for text in each] for each in texts]
    outputs = [text.replace("\u2028", "") for text in outputs]
    streams = [[each[i] for each in clean] for i in range(2)]
    for name, lines in (("0", streams[0]), ("1", streams[1]), ("out", outputs)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "0", "1", "-i", "out", "-m", "bleu", "chrf", "ter", "-w", "12"]
    done = subprocess.run([*command, "--format", "json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = {each["name"].lower().removesuffix("2"): each["score"] for each in json.loads(done.stdout)}
    quality = quality_of(References(clean, [""] * 60), outputs, [])
    assert {name: round(quality[name], 12) for name in ("bleu", "chrf", "ter")} == expected
    assert "nrefs:2" in quality["signatures"]["bleu"]


def test_rouge_of_english_is_that_of_rouge_score():
    texts, outputs = corpus(1, 40, 0.4)
    plain = str.maketrans("\u00e4\u00f6\u00fc\u00df", "aous")
    texts = [[text.translate(plain) for text in each] for each in texts]
    outputs = [text.translate(plain) for text in outputs]
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=False)
    found = [scorer.score_multi(each, output) for each, output in zip(texts, outputs, strict=True)]
    quality = quality_of(References(texts, [""] * 40), outputs, [])
    for name in ROUGE_TYPES:
        assert quality[name] == float(np.mean([100 * each[name].fmeasure for each in found])), name


def test_intervals_hold_the_score_and_the_loss_is_per_token():
    texts, outputs = corpus(2, 50, 0.3)
    losses = [(float(i), 1 + i % 3) for i in range(50)]
    quality = quality_of(References(texts, [""] * 50), outputs, losses)
    assert quality["loss"] == sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    for name in ("bleu", "chrf", "ter", *ROUGE_TYPES, "exact_match", "loss"):
        low, high = quality[f"{name}_low"], quality[f"{name}_high"]
        assert low < high, name
        assert low - 2 <= quality[name] <= high + 2, name
    assert quality == quality_of(References(texts, [""] * 50), outputs, losses), "the same each time"
    json.dumps(quality)


def test_any_reference_makes_a_match_exact():
    references = References([["a b", "c d"], ["e"], ["f"]], [""] * 3)
    assert quality_of(references, ["c d ", "e", "x"], [])["exact_match"] == pytest.approx(200 / 3)


def test_languages_are_scored_by_themselves():
    texts, outputs = corpus(3, 40, 0.2)
    languages = ["de", "fr"] * 20
    outputs[1::2] = ["nothing alike here at all"] * 20
    quality = quality_of(References(texts, languages), outputs, [(1.0, 2)] * 40)
    french, german = quality["languages"]["fr"], quality["languages"]["de"]
    assert german["num_examples"] == french["num_examples"] == 20
    assert german["bleu"] > 50 > 5 > french["bleu"]
    alone = quality_of(References(texts[::2], ["de"] * 20), outputs[::2], [(1.0, 2)] * 20)
    assert german == alone


def test_significance_tells_better_from_alike():
    texts, outputs = corpus(4, 80, 0.1)
    _, worse = corpus(4, 80, 0.6)
    references = References(texts, [""] * 80)
    found = p_values(references, outputs, {"same": list(outputs), "worse": worse})
    assert found["worse"] < 0.01
    assert found["same"] == 1.0
    assert p_values(references, outputs, {}) == {}
    one = References(texts[:1], [""])
    assert p_values(one, outputs[:1], {"worse": worse[:1]}) == {"worse": 1.0}, "resamples of one example are all alike"


def test_outputs_that_are_all_empty_score_nothing():
    quality = quality_of(References([["a b c d e"], ["f g h i j"]], ["", ""]), ["", ""], [])
    assert quality["bleu"] == quality["chrf"] == quality["rougeL"] == quality["exact_match"] == 0.0
    assert quality["ter"] == 100.0


def test_bleu_of_a_corpus():
    assert bleu(["a b c d e"], ["a b c d e"]) == pytest.approx(100.0)


SCRIPTS = {  # two sentences, and one that is half of the first
    "zh": ["猫坐在垫子上睡觉。", "今天天气很好。"],
    "ja": ["猫がマットの上で寝ています。", "今日は天気がいいです。"],
    "th": ["แมวนั่งบนเสื่อ", "วันนี้อากาศดี"],
    "ko": ["고양이가 매트 위에서 자고 있다", "오늘은 날씨가 아주 좋다"],
    "ru": ["Кошка сидит на ковре.", "Сегодня хорошая погода."],
    "hi": ["बिल्ली चटाई पर बैठी है।", "आज मौसम अच्छा है।"],
    "de": ["Über Äpfel hört müde Füße laufen.", "Schöne Grüße aus Köln."],
    "signs": ["\U0001f44d\U0001f3fd \U0001f600", "!!! ???"],
}  # fmt: skip
WITHOUT_SPACES = {  # other scripts that have none: their first letter
    "Lao": 0x0E81, "Tibetan": 0x0F40, "Burmese": 0x1000, "Khmer": 0x1780, "Tai Le": 0x1950, "New Tai Lue": 0x1980,
    "Buginese": 0x1A00, "Lanna": 0x1A20, "Balinese": 0x1B05, "Batak": 0x1BC0, "Bopomofo": 0x3105, "Javanese": 0xA984,
    "Cham": 0xAA00, "Tai Viet": 0xAA80, "Ahom": 0x11700,
}  # fmt: skip
SCRIPTS |= {
    name: ["".join(map(chr, range(first, first + 10))), "".join(map(chr, range(first + 10, first + 15)))]
    for name, first in WITHOUT_SPACES.items()
}
TOKENIZERS = {"zh": "zh", "ja": "char", "th": "char"} | dict.fromkeys(WITHOUT_SPACES, "char")
# Japanese and Korean where their packages are not installed


@pytest.mark.parametrize("script", SCRIPTS)
def test_scores_mean_something_in_every_script(script, monkeypatch):
    """Equal texts are 100, others less, and half of a text is more than nothing of it."""
    monkeypatch.setattr(scoring, "_can_make", lambda name: "mecab" not in name)
    first, second = SCRIPTS[script]
    references = References([[first], [second]] * 5, [""] * 10)
    assert references.bleu_tokenizer == TOKENIZERS.get(script, "13a")
    assert not references.warning
    equal, half, nothing = (
        quality_of(references, outputs * 5, [])
        for outputs in ([first, second], [first[: len(first) // 2 + 1], second], ["q", "w"])
    )
    for name in ("bleu", "chrf", "rouge1", "rougeL", "rougeLsum"):
        if script != "signs" or name not in ("bleu", "chrf"):
            assert equal[name] == pytest.approx(100), name
        assert equal[name] > half[name] > nothing[name], name
    assert equal["ter"] == 0.0
    assert equal["ter"] < half["ter"] < 100.0
    assert f"tok:{references.bleu_tokenizer}" in equal["signatures"]["bleu"]


@pytest.mark.parametrize("script", ["th", *WITHOUT_SPACES])
def test_a_letter_less_is_not_a_whole_text_less_where_there_are_no_spaces(script):
    texts = SCRIPTS[script]
    references = References([[text] for text in texts], [""] * 2)
    quality = quality_of(references, [text[1:] for text in texts], [])
    num_words = sum(len(apart(text).split()) for text in texts)
    assert quality["ter"] == pytest.approx(100 * 2 / num_words)
    assert quality["signatures"]["ter"].endswith("|letters of scripts without spaces by themselves")


def test_words_of_rouge_are_whole_in_every_script():
    assert words_of(SCRIPTS["hi"][1]) == SCRIPTS["hi"][1].removesuffix("\u0964").split()
    assert words_of("Na\u00efve \u0130 caf\u00e9s, 3\u00bd\u4e2d\u6587x") == [
        "na\u00efve", "i\u0307", "caf\u00e9s", "3\u00bd", "\u4e2d", "\u6587", "x"
    ]  # fmt: skip


def test_a_language_goes_before_the_script_and_a_setting_before_both(monkeypatch):
    monkeypatch.setattr(scoring, "_can_make", lambda name: True)
    texts = [[SCRIPTS["zh"][0]]]
    assert References(texts, ["ja_XX"]).bleu_tokenizer == "ja-mecab"
    assert References(texts, ["jpn_Jpan"]).bleu_tokenizer == "ja-mecab"
    assert References(texts, ["zh-Hant"]).bleu_tokenizer == References(texts, ["en"]).bleu_tokenizer == "zh"
    assert References([[SCRIPTS["ko"][0]]], []).bleu_tokenizer == "ko-mecab"
    references = References(texts, [""], "13a")
    assert references.bleu_tokenizer == "13a"
    assert "13a sees one word in 1 of 1 references: set evaluate.bleu_tokenizer to zh" in references.warning
    assert bleu([texts[0][0][:6]], texts[0], "char") > bleu([texts[0][0][:6]], texts[0], "13a") == 0.0
    parts = References([*texts, ["a garden"]], ["zh", "en"])
    assert [parts.part(each)[0].bleu_tokenizer for each in ("zh", "en")] == ["zh", "13a"]


def test_a_tokenizer_whose_package_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    with pytest.raises(ValueError, match=r"bleu_tokenizer is ja-mecab, which .*pip install sacrebleu\[ja\]") as caught:
        check_bleu_tokenizer("ja-mecab")
    assert "\n" not in str(caught.value)
    check_bleu_tokenizer("zh")


def test_ter_of_long_pairs_is_bounded_told_and_the_claim_is_touched():
    """Words that moved are counted twice there; a pair that is not long counts as ever."""
    words = [f"w{i}" for i in range(130)]
    moved, short = [*words[100:], *words[:100]], ["a b c d e f", "f a b c d e"]
    references, beats = References([[" ".join(words)], short[:1]], ["", ""]), []
    quality = quality_of(references, [" ".join(moved), short[1]], [], lambda: beats.append(1))
    assert quality["ter"] == pytest.approx(100 * (60 + 1) / 136)
    assert quality["signatures"]["ter"].endswith("|no shifts in 1 long pairs")
    assert len(beats) >= 4
    again = quality_of(references, [" ".join(words), short[0]], [])
    assert again["ter"] == 0.0
    assert again["signatures"]["ter"].endswith("in 1 long pairs"), "counted anew"
