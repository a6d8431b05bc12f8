"""Baselines: what each asks for, and the losses of those that learn from a teacher."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from pipeline.assemble.requests import baselines_of, one_granularity, theseus_settings
from pipeline.config.recipe import BaselineConfig, DistillConfig, LossConfig, OptimConfig, Recipe
from pipeline.distill import modular_task
from pipeline.families import family_of
from pipeline.model.draws import text_of
from pipeline.model.losses import GlobalCounts
from pipeline.model.modular import ModularModel
from pipeline.spans.spans import Assembly
from pipeline.training.whole_model import distilled_task, full_model_task
from tests.tiny import random_batch, tiny_t5
from tests.unit.test_modular import hf_logits


def asked(*methods: str, ratios: tuple[float, ...] = (), **optim) -> list[str]:
    settings = BaselineConfig(methods=methods, ratios=ratios, optim=OptimConfig(**optim))
    recipe = Recipe(baseline=settings)
    return [each.name for each in baselines_of(recipe, recipe.distill.stacks((6, 6)))]


def test_every_method_at_every_ratio():
    assert asked("finetune") == ["finetune-e6-d6"]
    assert asked("finetune", num_steps=0) == []
    assert asked("finetune", "logit", ratios=(2.0, 6.0)) == [
        "finetune-e2x3-d2x3", "finetune-e6-d6", "logit-e2x3-d2x3", "logit-e6-d6",
    ]  # fmt: skip
    assert asked("theseus", ratios=(2.0, 3.0)) == ["theseus-e2x3-d2x3", "theseus-e3x2-d3x2"]
    with pytest.raises(ValueError, match=r"theseus has one granularity, which does not make e1x4\.2-d1x4\.2"):
        asked("theseus", ratios=(1.2,))
    with pytest.raises(ValueError, match="methods is 'kd': choose one of finetune"):
        asked("kd")


def test_the_one_granularity_of_an_assembly():
    assert one_granularity(Assembly.parse("e3.3.1-d3x4")) == 3
    for mixed in ("e2x3-d3x2", "e1x6-d6", "e2.2.1.1-d2x3"):
        with pytest.raises(ValueError, match="one granularity"):
            one_granularity(Assembly.parse(mixed))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_logit_distillation_against_its_definition_in_float64(direction):
    student, teacher, batch = tiny_t5(num_layers=2, num_decoder_layers=1, seed=1), tiny_t5(), random_batch(3)
    losses = LossConfig(task=0.7, logit=1.3, temperature=2.0, logit_direction=direction)
    task = distilled_task(full_model_task(copy.deepcopy(student)), copy.deepcopy(teacher), losses)
    counts = GlobalCounts(17, 1)
    task.module.train()
    assert not task.module.teacher.training
    terms = task.loss_terms(0, task.module(batch, *task.forward_args(0, (), counts)), counts)

    logits = hf_logits(student, batch).double(), hf_logits(teacher, batch).double()
    labels = batch.labels_BT[batch.labels_BT != -100]
    cross_entropy = -logits[0].log_softmax(-1).gather(1, labels[:, None]).sum() / 17
    ours, theirs = (torch.log_softmax(each / 2.0, -1) for each in logits)
    left, right = (theirs, ours) if direction == "forward" else (ours, theirs)
    divergence = (left.exp() * (left - right)).sum() * 2.0**2 / 17
    torch.testing.assert_close(terms.parts["task"].double(), cross_entropy, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.parts["logit"].double(), divergence, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.total.double(), 0.7 * cross_entropy + 1.3 * divergence, rtol=1e-5, atol=0)

    terms.total.backward()
    trained = {name for name, parameter in task.module.named_parameters() if parameter.grad is not None}
    assert trained == {f"model.{name}" for name, _ in student.named_parameters()}, "all of the student, no teacher"
    (args,) = task.validations.values()
    plain = task.module(batch, *args).task_sum
    torch.testing.assert_close(plain.double() / 17, cross_entropy, rtol=1e-5, atol=0)


def test_theseus_is_the_task_loss_alone_with_every_span_replaced_at_the_end():
    losses = LossConfig(task=0.5, attention_self=1.0, attention_cross=2.0, fused=False)
    recipe = Recipe(
        distill=DistillConfig(granularities=(2, 3), replace_rate=0.4, ramp=0.5, local_steps=3, losses=losses),
        baseline=BaselineConfig(methods=("theseus",), ratios=(2.0,), optim=OptimConfig(num_steps=40)),
    )
    settings = theseus_settings(recipe, 2)
    model = ModularModel(tiny_t5(), family_of("t5"), settings.by_stack, settings.init)
    task = modular_task(model, family_of("t5"), tiny_t5().config, settings, seed=0)
    counts = GlobalCounts(9, 1)
    draws = [text_of(task.draws(step, 0)) for step in range(40)]
    assert set(draws[20:]) == {"e2x3-d2x3"}
    assert len(set(draws[:20])) > 8
    assert task.restarts == ()
    batch = random_batch(5)
    terms = task.loss_terms(30, model(batch, *task.forward_args(30, task.draws(30, 0), counts)), counts)
    torch.testing.assert_close(terms.total.detach(), terms.parts["task"])
    assert settings.losses == LossConfig(hidden=0.0, logit=0.0, fused=False)
    assert dataclasses.replace(settings, granularities=(2,)) == settings
