"""What the teacher stage writes is what it trained, for tied and untied heads."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from data_prep.encode import train_sentencepiece
from pipeline import teacher
from pipeline.rundir import RunDir, Stage
from tests.tiny import random_batch, tiny_t5
from tests.unit.test_modular import hf_logits


@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "mt5"])
def test_trained_weights_are_written_and_an_untied_head_stays_untied(tmp_path, monkeypatch, kind):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    train_sentencepiece([f"{number} words" for number in range(300)], 40, False, tokenizer / "spiece.model")
    trained = tiny_t5(kind, seed=1)
    weights = {f"model.{name}": parameter.detach() for name, parameter in trained.named_parameters()}
    monkeypatch.setattr(teacher, "checkpoints", lambda folder: [folder])
    monkeypatch.setattr(teacher, "full_weights", lambda checkpoint: weights)
    stage = Stage(RunDir(tmp_path), "teacher", {}, {})
    tiny_t5(kind, seed=2).save_pretrained(tmp_path / "start")
    teacher.save_trained(teacher.load_model(tmp_path / "start"), stage, tmp_path / "out", tokenizer)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    batch = random_batch(0)
    torch.testing.assert_close(hf_logits(loaded, batch), hf_logits(trained, batch), atol=1e-6, rtol=1e-6)
