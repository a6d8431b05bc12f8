"""MetricX-24: how wrong a translation is, judged by an mT5 that was trained on people's judgements.

Juraska et al., "MetricX-24: The Google Submission to the WMT 2024 Metrics Shared Task". The model reads source, output
and reference as one text without an end token. Its first logit of one sentinel, clipped to 0..25, is the error on the
scale of MQM: 0 is perfect (https://github.com/google-research/metricx).

Shapes: B texts of a batch, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipeline.decoding import batches_of, load, padded_sources
from pipeline.families import family_of
from pipeline.ordinary import check_shapes, empty_model
from pipeline.pretrained import settings_of, shapes_in
from pipeline.tokenizer import check_tokenizer, tokenizer_files

SENTINEL = 250089
"""The token whose logit is the error: <extra_id_10> of mT5."""
WORST = 25.0
MOST_TOKENS = 1536
"""Longest input that the models were trained on."""


def check_metricx(folder: Path) -> None:
    """Refuse a folder that holds no MetricX model with its tokenizer.

    Raises:
        ValueError: what it lacks.
    """
    if not (folder / "config.json").is_file() or not (shapes := shapes_in(folder)):
        raise ValueError(f"evaluate.metricx: {folder} holds no model: it needs config.json and weights")
    settings = settings_of(folder)
    kind, num_tokens = settings.get("model_type"), settings.get("vocab_size", 0)
    if kind != "mt5" or num_tokens <= SENTINEL:
        raise ValueError(
            f"evaluate.metricx: {folder / 'config.json'} is of no MetricX model (model_type {kind}, vocab_size "
            f"{num_tokens}): give one such as google/metricx-24-hybrid-large-v2p6"
        )
    check_shapes(empty_model(settings, folder), family_of(kind), shapes, f"evaluate.metricx: {folder}")
    if not tokenizer_files(folder):
        raise ValueError(f"evaluate.metricx: {folder} has no tokenizer: copy that of google/mt5-xl beside the model")
    check_tokenizer(folder)


@dataclass(frozen=True)
class MetricX:
    """A MetricX-24 model on a device."""

    model: Any
    tokenizer: Any

    @staticmethod
    @cache
    def of(folder: Path, device: torch.device, dtype: str) -> MetricX:
        """The model of a folder, loaded once in a process.

        Args:
            dtype: as evaluate.dtype of a recipe.
        """
        return MetricX(*load(folder, device, dtype))

    def errors(
        self,
        sources: Sequence[str],
        outputs: Sequence[str],
        references: Sequence[Sequence[str]],
        tokens_per_batch: int,
        beat: Callable[[], None],
    ) -> list[float]:
        """The error of each output, 0 to 25: with several references, that with the one which makes it least.

        Args:
            tokens_per_batch: largest padded size of a batch.
            beat: called with every batch.
        """
        texts = [
            f"source: {source} candidate: {output} reference: {reference}"
            for source, output, several in zip(sources, outputs, references, strict=True)
            for reference in several
        ]
        rows = [ids[:-1] for ids in self.tokenizer(texts, max_length=MOST_TOKENS, truncation=True).input_ids]
        of_texts = [0.0] * len(rows)
        for places in batches_of([len(ids) for ids in rows], tokens_per_batch):
            for place, error in zip(places, self._errors([rows[i] for i in places]), strict=True):
                of_texts[place] = error
            beat()
        found = iter(of_texts)
        return [min(next(found) for _ in several) for several in references]

    @torch.inference_mode()
    def _errors(self, rows: Sequence[Sequence[int]]) -> list[float]:
        source_BS, mask_BS = padded_sources(self.model, rows)
        start_B1 = torch.zeros_like(source_BS[:, :1])
        logits_B1V = self.model(input_ids=source_BS, attention_mask=mask_BS, decoder_input_ids=start_B1).logits
        return logits_B1V[:, 0, SENTINEL].float().clamp(0.0, WORST).tolist()
