"""Scores of output texts: sacreBLEU's BLEU, chrF and TER, ROUGE, exact match; intervals, languages, significance."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

METRICS = {  # name: what it is called
    "bleu": "BLEU",
    "chrf": "chrF",
    "ter": "TER",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "exact_match": "exact %",
    "loss": "loss",
}
NUM_BOOTSTRAP = 200
NUM_PAIRED = 1000
SEED = 12345
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ROUGE_VARIANT = (
    f"F1, mean over examples, no stemming, default tokenizer (a-z, 0-9), rouge-score {version('rouge-score')}"
)


@dataclass(frozen=True)
class References:
    """What outputs are compared with; tokenised once for all systems."""

    texts: Sequence[Sequence[str]]
    """For each example one reference or several."""
    languages: Sequence[str]
    """For each example its language; empty where the data has none."""
    _of_language: dict[str, References] = field(default_factory=dict)

    @cached_property
    def streams(self) -> list[list[Any]]:
        """References as sacreBLEU wants them: the first of each example, the second of each, ..."""
        most = max(len(each) for each in self.texts)
        return [[each[i] if i < len(each) else None for each in self.texts] for i in range(most)]

    @cached_property
    def corpus_metrics(self) -> dict[str, Any]:
        """sacreBLEU's metrics, holding what they need of the references."""
        classes: dict[str, Any] = {"bleu": _Bleu, "chrf": _Chrf, "ter": _Ter}
        return {name: metric(references=self.streams) for name, metric in classes.items()}

    @cached_property
    def rouge(self) -> RougeScorer:
        return RougeScorer(list(ROUGE_TYPES), tokenizer=_RememberingTokenizer())

    def part(self, language: str) -> tuple[References, list[int]]:
        """The references of one language, and their places."""
        places = [i for i, each in enumerate(self.languages) if each == language]
        if language not in self._of_language:
            texts, languages = [self.texts[i] for i in places], [language] * len(places)
            self._of_language[language] = References(texts, languages)
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
    pass


class _RememberingTokenizer(DefaultTokenizer):
    """rouge-score's tokenizer, which meets the references again with every system."""

    def __init__(self) -> None:
        super().__init__(use_stemmer=False)
        self.tokenize = lru_cache(maxsize=100_000)(super().tokenize)


def quality_of(references: References, outputs: Sequence[str], losses: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """All scores of one system, each metric as its name, with _low and _high of a 95 % bootstrap interval.

    Percent, except for the loss: cross entropy with the references per token, in nats. With several languages their
    own scores stand under "languages".

    Args:
        losses: for each example, the sum over the tokens of its (first) reference, and their number; empty where it
            could not be computed.
    """
    quality = _scores(references, outputs)
    for name, values in _of_examples(references, outputs).items():
        quality |= _mean_with_interval(name, values)
    if losses:
        sums, counts = (np.array(each, dtype=float) for each in zip(*losses, strict=True))
        quality |= _mean_with_interval("loss", sums, counts)
    signatures = {name: str(metric.get_signature()) for name, metric in references.corpus_metrics.items()}
    quality |= {"signatures": {**signatures, "rouge": ROUGE_VARIANT}, "num_examples": len(outputs)}
    if len(languages := sorted(set(references.languages))) > 1:
        quality["languages"] = {each: _of_language(references, each, outputs, losses) for each in languages}
    return quality


def _scores(references: References, outputs: Sequence[str]) -> dict[str, Any]:
    """sacreBLEU's scores with their intervals."""
    found: dict[str, Any] = {}
    for name, metric in references.corpus_metrics.items():
        score: Any = metric.corpus_score(outputs, None, n_bootstrap=NUM_BOOTSTRAP)
        low, high = float(score._mean - score._ci), float(score._mean + score._ci)
        found |= {name: float(score.score), f"{name}_low": max(0.0, low)}
        found[f"{name}_high"] = high if name == "ter" else min(100.0, high)
    return found


def _of_examples(references: References, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Percent for each example, by metric."""
    pairs = list(zip(references.texts, outputs, strict=True))
    rouge = [references.rouge.score_multi(texts, output) for texts, output in pairs]
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


def _of_language(
    references: References, language: str, outputs: Sequence[str], losses: Sequence[tuple[float, int]]
) -> dict[str, Any]:
    part, places = references.part(language)
    return quality_of(part, [outputs[i] for i in places], [losses[i] for i in places] if losses else [])


def p_values(references: References, baseline: Sequence[str], systems: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """For each system, how likely a BLEU difference as large would be if it were as good as the baseline.

    sacreBLEU's paired bootstrap test with NUM_PAIRED resamples (Koehn 2004).
    """
    if not systems:
        return {}
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


def bleu(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU (0..100) with sacrebleu's defaults."""
    return BLEU().corpus_score(outputs, [references]).score


def chrf(output: str, reference: str) -> float:
    """chrF (0..100) of one output with sacrebleu's defaults."""
    return _CHRF.sentence_score(output, [reference]).score
