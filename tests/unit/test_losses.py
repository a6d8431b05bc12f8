"""Objectives against float64 formulas, NaN wherever there is padding, and their sums over micro-batches."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.config.kinds import fields_of_kind
from pipeline.config.recipe import LossConfig
from pipeline.families import family_of
from pipeline.kernels import HeadLoss, HiddenPair
from pipeline.model.losses import GlobalCounts, Objectives, task_loss
from pipeline.model.modular import ModularModel, ModularOutputs, Use
from pipeline.spans.spans import Assembly
from tests.tiny import random_batch, tiny_model

COUNTS = GlobalCounts(num_target_tokens=13, num_micro_batches=2, upstream=2.0)


def outputs_of(seed: int, task: float = 3.0, logit: float = 0.5, share: float = 7.0) -> ModularOutputs:
    """States with about a third of padding, full of NaN; sums of the head as given."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.rand(2, 5, generator=generator) > 0.35
    mask_BT[:, 0] = True
    states = []
    for _ in range(3):
        state_BTD = torch.randn(2, 5, 8, generator=generator)
        states.append(torch.where(mask_BT[..., None], state_BTD, torch.nan))
    pairs = {
        Use("encoder.0-1", (0,)): HiddenPair(states[0].requires_grad_(), states[1], mask_BT, states[2]),
        Use("decoder.0-1", (0,)): HiddenPair(
            states[2].clone().requires_grad_(), states[1], mask_BT, states[0].detach()
        ),
    }
    head = HeadLoss(*(torch.tensor(value) for value in (share, task, logit)))
    return ModularOutputs(pairs, labels_N=torch.zeros(4, dtype=torch.long), head=head)


def hidden_error(pair: HiddenPair, mode: str) -> float:
    student, teacher, start = (state[pair.mask_BT].detach().double() for state in (pair[0], pair[1], pair[3]))
    if mode == "cosine":
        return (1 - torch.cosine_similarity(student, teacher, dim=-1)).mean().item()
    error = (student - teacher).square()
    return (error.mean() if mode == "mse" else error.sum() / (teacher - start).square().sum()).item()


def test_task_loss_is_summed_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits_NV, labels_N = torch.randn(11, 17, generator=generator), torch.arange(11)
    expected = -logits_NV.double().softmax(-1)[torch.arange(11), labels_N].log().sum()
    assert task_loss(logits_NV, labels_N).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["span", "mse", "cosine"])
def test_local_terms_log_each_modular_layer(mode, fused):
    outputs = outputs_of(4)
    terms = Objectives(LossConfig(hidden_mode=mode, fused=fused)).local_terms(0, outputs, COUNTS)
    for (name, _), pair in outputs.pairs.items():
        assert terms.parts[f"hidden/{name}"].item() == pytest.approx(hidden_error(pair, mode) / 2, rel=1e-5)
    assert terms.total.item() == pytest.approx(sum(part.item() for part in terms.parts.values()), rel=1e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["span", "mse", "cosine"])
def test_replacing_terms_weigh_and_report_each_objective(mode, fused):
    outputs = outputs_of(5)
    terms = Objectives(LossConfig(hidden=0.25, hidden_mode=mode, fused=fused)).replacing_terms(0, outputs, COUNTS)
    hidden = sum(hidden_error(pair, mode) for pair in outputs.pairs.values()) / 2 / 2
    assert terms.parts["hidden"].item() == pytest.approx(hidden, rel=1e-5)
    assert terms.parts["task"].item() == pytest.approx(3 / 13)
    assert terms.parts["logit"].item() == pytest.approx(0.5 / 13)
    assert terms.total.item() == pytest.approx(0.25 * hidden + 7, rel=1e-5)
    terms.total.backward()
    for pair in outputs.pairs.values():
        assert pair.student_BTD.grad.isfinite().all()


def test_a_draw_of_the_teacher_has_no_hidden_term():
    outputs = ModularOutputs({}, labels_N=torch.zeros(1), head=outputs_of(0).head)
    terms = Objectives(LossConfig()).replacing_terms(0, outputs, COUNTS)
    assert terms.parts["hidden"].item() == 0
    assert terms.total.item() == 7


def test_an_attention_loss_without_pairs_is_reported_as_zero():
    """Ranks add up their records by name, so a name must not depend on the draw."""
    config = LossConfig(attention_self=0.0, attention_cross=0.5)
    objectives, counts = Objectives(config), GlobalCounts(13, 1)
    modular = ModularModel(tiny_model("v1.1"), family_of("t5"), ((2, 3, 6), (2, 3, 6)), "first")
    outputs = modular(random_batch(1), [Assembly.parse("e2x3-d1x6")], objectives.wanted(0, counts))
    parts = objectives.replacing_terms(0, outputs, counts).parts
    assert parts.keys() == {"hidden", "logit", "task", "attention_cross"}
    assert parts["attention_cross"].item() == 0
    local = objectives.local_terms(0, modular(random_batch(1), None, objectives.wanted(0, counts)), counts)
    assert local.parts["attention_cross"].item() > 0


def test_weights_follow_the_step():
    config = LossConfig(task=((0, 1.0), (10, 0.5)), logit=2.0, temperature=3.0, logit_direction="reverse", fused=False)
    wanted = Objectives(config).wanted(5, COUNTS)
    assert (wanted.head.task, wanted.head.logit) == pytest.approx((0.75 / 13, 2 / 13))
    assert (wanted.head.temperature, wanted.head.reverse, wanted.upstream, wanted.eager) == (3.0, True, 2.0, True)
    assert Objectives(config).wanted(99, COUNTS).head.task == pytest.approx(0.5 / 13)


def test_points_of_a_weight_are_the_same_identity_after_json():
    identity = fields_of_kind(LossConfig(task=((0, 1.0), (10, 0.5))), "identity")
    assert json.loads(json.dumps(identity)) == identity


@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "bart"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_all_losses_of_a_step_equal_their_definitions(kind, direction):
    """The whole of it, from the batch to the gradients of the modular layers, fused and eager."""
    weights = {"hidden": 0.5, "logit": 2.0, "task": 0.7, "attention_self": 0.3, "attention_cross": 0.2}
    config = LossConfig(**weights, temperature=2.0, logit_direction=direction)
    results = []
    for fused in (True, False):
        model = tiny_model(kind)
        modular = ModularModel(model, family_of(model.config.model_type), ((2, 3, 6), (2, 3, 6)), "first")
        objectives = Objectives(LossConfig(**{**vars(config), "fused": fused}))
        outputs = modular(random_batch(1), [Assembly.parse("e2x3-d3x2")], objectives.wanted(0, COUNTS))
        terms = objectives.replacing_terms(0, outputs, COUNTS)
        (terms.total * 2).backward()
        gradients = {name: p.grad for name, p in modular.named_parameters() if p.grad is not None}
        results.append((terms, gradients))
    (terms, gradients), (eager_terms, eager_gradients) = results
    assert terms.parts.keys() == weights.keys()
    weighted = sum(weights[name] * part.item() for name, part in terms.parts.items())
    assert terms.total.item() == pytest.approx(weighted, rel=1e-5)
    assert terms.total.item() == pytest.approx(eager_terms.total.item(), rel=1e-5)
    for name, part in terms.parts.items():
        assert part.item() == pytest.approx(eager_terms.parts[name].item(), rel=1e-5), name
    assert gradients.keys() == eager_gradients.keys() != set()
    scale = max(gradient.abs().max().item() for gradient in eager_gradients.values())  # BART's key biases have none
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, eager_gradients[name], rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden": -1.0}, "hidden has a weight below 0"),
        ({"task": ((5, 1.0), (5, 2.0))}, "the steps of task must rise"),
        ({"logit": ()}, "logit has no points"),
        ({"temperature": 0.0}, "temperature is 0.0: choose more than 0"),
        ({"hidden_mode": "l1"}, "hidden_mode is 'l1': choose one of span, mse, cosine"),
        ({"logit_direction": "both"}, "choose one of forward, reverse"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LossConfig(**settings)
