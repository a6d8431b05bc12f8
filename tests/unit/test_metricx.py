"""MetricX against a plain forward of its model, one text at a time, and through an evaluation."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MT5Config, MT5ForConditionalGeneration

from pipeline.evaluation.metricx import MetricX, check_metricx
from pipeline.ordinary import save_ordinary
from tests.evaluated import evaluate_here, inputs, outputs, train_tokenizer

__all__ = ["inputs"]  # a fixture
CPU = torch.device("cpu")


def judge(folder: Path, seed: int) -> Path:
    """A small model with MetricX's vocabulary, whose errors range from below 0 to beyond 25."""
    tokenizer = train_tokenizer(folder, ["source candidate reference one two three half past: monday march euro"] * 9)
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
    model = MT5ForConditionalGeneration(MT5Config(**sizes, vocab_size=250112))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 * min(parameter.shape) ** -0.5)
    model.shared.weight.data[0] = 0.0  # of the decoder's only token: what it finds in the text is all that counts
    model.lm_head.weight = torch.nn.Parameter(8.0 * torch.randn(model.lm_head.weight.shape))
    save_ordinary(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_error(folder: Path, source: str, output: str, reference: str) -> float:
    """The published recipe: no end token, the start token alone for the decoder, one logit, clipped."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = f"source: {source} candidate: {output} reference: {reference}"
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=1536).input_ids[:, :-1]
    assert tokenizer.eos_token_id not in ids
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits
    return min(25.0, max(0.0, logits[0, 0, 250089].item()))


def test_errors_are_those_of_a_plain_forward_and_the_best_reference_counts(tmp_path):
    folder = judge(tmp_path / "judge", seed=3)
    check_metricx(folder)
    sources = ["one two", "half past three monday", "march", "euro euro one", "two", ""]
    texts = ["two", "one half", "monday march euro past past past three one", "", "three", "one " * 900]
    references = [["one"], ["two monday", "half", "past three"], ["march"], ["euro"], ["one two three"] * 2, ["two"]]
    beats = []
    found = MetricX.of(folder, CPU, "checkpoint").errors(sources, texts, references, 400, lambda: beats.append(1))
    expected = [
        min(plain_error(folder, source, text, each) for each in several)
        for source, text, several in zip(sources, texts, references, strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-4)
    assert {0.0, 25.0} < set(found), "below, within and beyond the range"
    assert len(beats) > 1


def test_an_evaluation_has_its_scores_and_another_judge_is_another_score(inputs, tmp_path):
    root = shutil.copytree(inputs, tmp_path / "run")
    before = judge(tmp_path / "judge", seed=3)
    evaluate_here(root, metricx=str(before), max_examples=6)
    with open(root / "evaluate/scores.csv", encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    for name, content in outputs(root).items():
        records = list(map(json.loads, content.decode().splitlines()))
        errors = [each["metricx"] for each in records]
        row = rows[name.removesuffix(".jsonl")]
        assert float(row["metricx"]) == pytest.approx(sum(errors) / 6, abs=1e-4)
        assert float(row["metricx_low"]) <= float(row["metricx"]) <= float(row["metricx_high"])
        first = records[0]
        assert errors[0] == pytest.approx(
            plain_error(before, *(first[k] for k in ("source", "output", "reference"))), abs=1e-4
        )
    scores = outputs(root)
    evaluate_here(root, metricx=str(judge(tmp_path / "other", seed=2)), max_examples=6)
    assert outputs(root) != scores
    evaluate_here(root, max_examples=6)
    assert b"metricx" not in outputs(root)["e2-d2.jsonl"]
