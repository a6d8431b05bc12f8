"""Objectives against their formulas in float64, and their normalisation over micro-batches."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import LossConfig
from pipeline.kernels import HiddenPair
from pipeline.losses import GlobalCounts, local_terms, logit_loss, replacing_terms, task_loss
from pipeline.modular import ModularOutputs


def outputs_of(seed: int, num_tokens: int = 11, vocabulary: int = 17) -> ModularOutputs:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.ones(2, 5, dtype=torch.bool)
    pair = HiddenPair(random(2, 5, 8), random(2, 5, 8), mask, random(2, 5, 8))
    labels = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return ModularOutputs({"encoder.0-1": pair}, random(num_tokens, vocabulary), random(num_tokens, vocabulary), labels)


def test_task_loss_is_summed_cross_entropy():
    outputs = outputs_of(0)
    probabilities = outputs.student_logits_NV.double().softmax(-1)
    expected = -probabilities[torch.arange(11), outputs.labels_N].log().sum()
    assert task_loss(outputs.student_logits_NV, outputs.labels_N).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_logit_loss_is_forward_kl_times_temperature_squared(temperature):
    outputs = outputs_of(1)
    student = (outputs.student_logits_NV.double() / temperature).softmax(-1)
    teacher = (outputs.teacher_logits_NV.double() / temperature).softmax(-1)
    expected = (teacher * (teacher / student).log()).sum() * temperature**2
    ours = logit_loss(outputs.student_logits_NV, outputs.teacher_logits_NV, temperature)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logit_loss(outputs.teacher_logits_NV, outputs.teacher_logits_NV, temperature).item() == pytest.approx(0)


def test_terms_add_up_to_means_over_the_global_batch():
    parts = [outputs_of(2, num_tokens=4), outputs_of(3, num_tokens=9)]
    terms = [replacing_terms(part, GlobalCounts(13, 2), LossConfig(logit=0.5)) for part in parts]
    tokens = sum(task_loss(part.student_logits_NV, part.labels_N) for part in parts) / 13
    assert sum(term.parts["task"] for term in terms).item() == pytest.approx(tokens.item())
    divergences = sum(logit_loss(part.student_logits_NV, part.teacher_logits_NV, 1.0) for part in parts) / 13
    assert sum(term.parts["logit"] for term in terms).item() == pytest.approx(divergences.item())
    for term in terms:
        weighted = term.parts["hidden"] + 0.5 * term.parts["logit"] + term.parts["task"]
        assert term.total.item() == pytest.approx(weighted.item())


def test_local_terms_log_each_modular_layer():
    pair = outputs_of(4).pairs["encoder.0-1"]
    error = (pair.student_BTD - pair.teacher_BTD).double().square().sum()
    change = (pair.teacher_BTD - pair.start_BTD).double().square().sum()
    terms = local_terms(outputs_of(4), GlobalCounts(11, 2))
    assert terms.parts["hidden/encoder.0-1"].item() == pytest.approx((error / change / 2).item(), rel=1e-5)
