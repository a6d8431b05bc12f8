"""Scores of output texts: sacreBLEU's BLEU, chrF and TER, ROUGE, exact match; intervals, languages, significance."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from pipeline.scripts import WITHOUT_SPACES, apart, tokenizer_of, words_of

METRICS = {  # name: what it is called
    "bleu": "BLEU",
    "chrf": "chrF",
    "ter": "TER",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "exact_match": "exact %",
    "metricx": "MetricX",
    "loss": "loss",
}
_Value = TypeVar("_Value")
NUM_BOOTSTRAP = 200
NUM_PAIRED = 1000
SEED = 12345
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ROUGE_WORDS = ("a-z, 0-9", "letters and digits of every script, alone where a script has no spaces")
ACCENTED = 0.005  # share of letters beyond a-z from which on rouge-score's own tokenizer would cut words to pieces
LONG_PAIR = 50 * 50  # words of output x reference; TER's search for shifts may take a second for more
LETTERS_APART = "letters of scripts without spaces by themselves"
_FALLBACKS = {"ja-mecab": "char", "ko-mecab": "13a"}  # where the packages are not installed
_AT_SPACES = ("13a", "intl", "none")


def check_bleu_tokenizer(name: str) -> None:
    """Refuse a tokenizer of sacreBLEU that cannot be made here.

    Raises:
        ValueError: a package or a file that it needs is missing.
    """
    if name == "auto":
        return
    try:
        BLEU(tokenize=name)
    except Exception as error:  # of packages, files and networks
        reason = " ".join(str(error).split())
        raise ValueError(f"evaluate.bleu_tokenizer is {name}, which cannot be made here ({reason})") from error


@cache
def _can_make(name: str) -> bool:
    try:
        check_bleu_tokenizer(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class References:
    """What outputs are compared with; tokenised once for all systems."""

    texts: Sequence[Sequence[str]]
    """For each example one reference or several."""
    languages: Sequence[str]
    """For each example its language; empty where the data has none."""
    tokenizer: str = "auto"
    """BLEU's, by sacreBLEU's name; "auto" goes by languages and scripts."""
    _of_language: dict[str, References] = field(default_factory=dict)

    @cached_property
    def bleu_tokenizer(self) -> str:
        if self.tokenizer != "auto":
            return self.tokenizer
        languages = self.languages or [""] * len(self.texts)
        name = Counter(map(tokenizer_of, self.texts, languages)).most_common(1)[0][0]
        return name if _can_make(name) else _FALLBACKS[name]

    @property
    def warning(self) -> str:
        """Why BLEU says little of these references; empty where nothing is known against it."""
        lone = sum(len(text.split()) == 1 and len(WITHOUT_SPACES.findall(text)) > 3 for text, *_ in self.texts)
        if self.bleu_tokenizer not in _AT_SPACES or 4 * lone < len(self.texts):
            return ""
        return (
            f"BLEU's tokenizer {self.bleu_tokenizer} sees one word in {lone} of {len(self.texts)} references: set "
            f"evaluate.bleu_tokenizer to zh, ja-mecab, char or flores200"
        )

    @cached_property
    def rouge_words(self) -> str:
        """What ROUGE counts, of ROUGE_WORDS: as published where the references are written with a-z."""
        letters = [each for texts in self.texts for text in texts for each in text if each.isalpha()]
        return ROUGE_WORDS[sum(not each.isascii() for each in letters) > ACCENTED * len(letters)]

    @property
    def how(self) -> dict[str, str]:
        """What scores depend on beside outputs and references."""
        letters = f", {LETTERS_APART}" if self.has_letters_apart else ""
        return {"bleu": self.bleu_tokenizer, "rouge": self.rouge_words, "ter": f"no shifts beyond {LONG_PAIR}{letters}"}

    @property
    def has_letters_apart(self) -> bool:
        """Whether TER takes single letters for words, as BLEU then does."""
        return self.bleu_tokenizer == "char"

    @cached_property
    def streams(self) -> list[list[Any]]:
        """References as sacreBLEU wants them: the first of each example, the second of each, ..."""
        most = max(len(each) for each in self.texts)
        return [[each[i] if i < len(each) else None for each in self.texts] for i in range(most)]

    @cached_property
    def corpus_metrics(self) -> dict[str, Any]:
        """sacreBLEU's metrics, holding what they need of the references."""
        spaced = self.bleu_tokenizer in (*_AT_SPACES, "ko-mecab")
        return {
            "bleu": _Bleu(references=self.streams, tokenize=self.bleu_tokenizer),
            "chrf": _Chrf(references=self.streams),
            "ter": _Ter(
                apart=self.has_letters_apart, references=self.streams, normalized=not spaced, asian_support=not spaced
            ),
        }

    @cached_property
    def rouge(self) -> RougeScorer:
        return RougeScorer(list(ROUGE_TYPES), tokenizer=_RememberingTokenizer(self.rouge_words))

    def part(self, language: str) -> tuple[References, list[int]]:
        """The references of one language, and their places."""
        places = [i for i, each in enumerate(self.languages) if each == language]
        if language not in self._of_language:
            texts, languages = [self.texts[i] for i in places], [language] * len(places)
            self._of_language[language] = References(texts, languages, self.tokenizer)
        return self._of_language[language], places


class _Float:
    """A sacreBLEU metric whose scores are all Python's floats: its bootstrap cannot average a float 0.0 and numpy's
    float32, which is what resamples of a poor system give (sacrebleu 2.6)."""

    def _compute_score_from_stats(self, stats: Any) -> Any:
        score = super()._compute_score_from_stats(stats)  # type: ignore[misc]
        score.score = float(score.score)
        return score


_CHRF = CHRF()


class _Bleu(_Float, BLEU):
    pass


class _Chrf(_Float, CHRF):
    pass


class _Ter(_Float, TER):
    """TER in bounded time: in a long pair, words that moved count as deleted and inserted, which is never better.

    Args:
        apart: letters of scripts without spaces are words by themselves, of which sacreBLEU knows Chinese and Japanese.
    """

    def __init__(self, *, apart: bool, **options: Any) -> None:
        self._apart = apart  # before the references among the options are cut
        super().__init__(**options)

    def _preprocess_segment(self, sent: str) -> str:
        return super()._preprocess_segment(apart(sent) if self._apart else sent)

    num_long = 0
    beat: Callable[[], None] = staticmethod(lambda: None)

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict[str, Any]) -> list[float]:
        self.beat()
        words, references = hypothesis.split(), ref_kwargs["ref_words"]
        if all(len(words) * len(each) <= LONG_PAIR for each in references):
            return super()._compute_segment_statistics(hypothesis, ref_kwargs)
        self.num_long += 1
        edits = min(_edits(words, each) for each in references)
        return [edits, sum(map(len, references)) / len(references)]


def _edits(words: Sequence[str], reference: Sequence[str]) -> int:
    """Words deleted, inserted or changed, at the least."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys(reference))}
    reference_W, steps_W = np.array([numbers[word] for word in reference]), np.arange(len(reference) + 1)
    row_W = steps_W
    for word in words:
        changed_W = row_W[:-1] + (reference_W != numbers.get(word, -1))
        row_W = np.concatenate([row_W[:1] + 1, np.minimum(changed_W, row_W[1:] + 1)])
        row_W = np.minimum.accumulate(row_W - steps_W) + steps_W  # insertions
    return int(row_W[-1])


class _RememberingTokenizer(DefaultTokenizer):
    """ROUGE's words, of ROUGE_WORDS; it meets the references again with every system."""

    def __init__(self, words: str) -> None:
        super().__init__(use_stemmer=False)
        split = super().tokenize if words == ROUGE_WORDS[0] else words_of
        # a text of signs alone is what stands between its spaces, so that equal texts are alike
        self.tokenize = lru_cache(maxsize=100_000)(lambda text: split(text) or text.split())


def quality_of(
    references: References,
    outputs: Sequence[str],
    losses: Sequence[tuple[float, int]],
    beat: Callable[[], None] = lambda: None,
    errors: Sequence[float] = (),
) -> dict[str, Any]:
    """All scores of one system, each metric as its name, with _low and _high of a 95 % bootstrap interval.

    Percent, except for MetricX (0 to 25, less is better) and for the loss: cross entropy with the references per token,
    in nats. With several languages their own scores stand under "languages".

    Args:
        losses: for each example, the sum over the tokens of its (first) reference, and their number; empty where it
            could not be computed.
        beat: called with every example, of which long ones take a while.
        errors: MetricX of each example; empty where there is no such model.
    """
    quality = _scores(references, outputs, beat)
    for name, values in _of_examples(references, outputs, beat).items():
        quality |= _mean_with_interval(name, values)
    if losses:
        sums, counts = (np.array(each, dtype=float) for each in zip(*losses, strict=True))
        quality |= _mean_with_interval("loss", sums, counts)
    if errors:
        quality |= _mean_with_interval("metricx", np.array(errors))
    signatures = {name: str(metric.get_signature()) for name, metric in references.corpus_metrics.items()}
    if references.has_letters_apart:
        signatures["ter"] += f"|{LETTERS_APART}"
    if num_long := references.corpus_metrics["ter"].num_long:
        signatures["ter"] += f"|no shifts in {num_long} long pairs"
    signatures["rouge"] = (
        f"F1, mean over examples, no stemming, words: {references.rouge_words}, rouge-score {version('rouge-score')}"
    )
    if errors:
        signatures["metricx"] = "MetricX-24 with references, mean over examples, 0 to 25, less is better"
    quality |= {"signatures": signatures, "num_examples": len(outputs), "bleu_tokenizer": references.bleu_tokenizer}
    if len(languages := sorted(set(references.languages))) > 1:
        of_parts = ((language, *references.part(language)) for language in languages)
        quality["languages"] = {
            language: quality_of(part, _at(places, outputs), _at(places, losses), beat, _at(places, errors))
            for language, part, places in of_parts
        }
    return quality


def _scores(references: References, outputs: Sequence[str], beat: Callable[[], None]) -> dict[str, Any]:
    """sacreBLEU's scores with their intervals."""
    found: dict[str, Any] = {}
    ter = references.corpus_metrics["ter"]
    ter.beat, ter.num_long = beat, 0
    for name, metric in references.corpus_metrics.items():
        score: Any = metric.corpus_score(outputs, None, n_bootstrap=NUM_BOOTSTRAP)
        low, high = float(score._mean - score._ci), float(score._mean + score._ci)
        found |= {name: float(score.score), f"{name}_low": max(0.0, low)}
        found[f"{name}_high"] = high if name == "ter" else min(100.0, high)
    return found


def _of_examples(references: References, outputs: Sequence[str], beat: Callable[[], None]) -> dict[str, np.ndarray]:
    """Percent for each example, by metric."""
    pairs = list(zip(references.texts, outputs, strict=True))
    rouge = []
    for texts, output in pairs:
        rouge.append(references.rouge.score_multi(texts, output))
        beat()
    found = {name: np.array([100 * each[name].fmeasure for each in rouge]) for name in ROUGE_TYPES}
    is_exact = [100.0 * (output.strip() in {text.strip() for text in texts}) for texts, output in pairs]
    return {**found, "exact_match": np.array(is_exact)}


def _mean_with_interval(name: str, sums: np.ndarray, counts: np.ndarray | None = None) -> dict[str, float]:
    """sum / count over all examples, and the 95 % percentile interval over resampled examples."""
    counts = np.ones(len(sums)) if counts is None else counts
    generator = np.random.default_rng(SEED)
    picks = generator.integers(0, len(sums), (NUM_BOOTSTRAP, len(sums)))
    means = sums[picks].sum(1) / np.maximum(counts[picks].sum(1), 1)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(sums.sum() / max(counts.sum(), 1))
    return {name: mean, f"{name}_low": float(low), f"{name}_high": float(high)}


def _at(places: Sequence[int], values: Sequence[_Value]) -> list[_Value]:
    """The values of some examples; none where there are none of any."""
    return [values[i] for i in places] if values else []


def p_values(references: References, baseline: Sequence[str], systems: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """For each system, how likely a BLEU difference as large would be if it were as good as the baseline.

    sacreBLEU's paired bootstrap test with NUM_PAIRED resamples (Koehn 2004).
    """
    if not systems:
        return {}
    if len(set(zip(map(tuple, references.texts), baseline, *systems.values(), strict=True))) == 1:
        return dict.fromkeys(systems, 1.0)  # every resample is the same
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    test = PairedTest(
        [("baseline", baseline), *systems.items()],
        {"BLEU": references.corpus_metrics["bleu"]}, None, test_type="bs", n_samples=NUM_PAIRED,
    )  # fmt: skip
    scores: dict[str, list[Any]] = test()[1]
    first, *results = scores["BLEU"]
    # sacreBLEU counts resamples that differ by more than was seen: no difference at all would pass for a certain one
    return {
        name: 1.0 if result.score == first.score else float(result.p_value)
        for name, result in zip(systems, results, strict=True)
    }


def bleu(outputs: Sequence[str], references: Sequence[str], tokenizer: str = "auto") -> float:
    """Corpus BLEU (0..100)."""
    chosen = References([[text] for text in references], [], tokenizer).bleu_tokenizer
    return BLEU(tokenize=chosen).corpus_score(outputs, [references]).score


def chrf(output: str, reference: str) -> float:
    """chrF (0..100) of one output with sacrebleu's defaults."""
    return _CHRF.sentence_score(output, [reference]).score
