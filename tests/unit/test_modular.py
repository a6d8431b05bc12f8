"""Teacher and modular layers as one module, against the unmodified Hugging Face model."""

from __future__ import annotations

import copy

import pytest
import torch

from pipeline.families import family_of
from pipeline.modular import ModularModel
from pipeline.spans import Assembly, Span, teacher_assembly
from tests.tiny import random_batch, tiny_t5

KINDS = ["v1.0", "v1.1", "mt5"]


def modular_of(model, **settings):
    settings = {"granularities": (2, 3, 6), "init": "last", **settings}
    return ModularModel(copy.deepcopy(model), family_of(model.config.model_type), **settings)


def perturb(model: ModularModel) -> None:
    torch.manual_seed(1)
    for parameter in model.modular.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


def hf_logits(model, batch):
    mask = batch.labels_BT != -100
    with torch.no_grad():
        return model(
            input_ids=batch.source_BS,
            attention_mask=batch.source_mask_BS,
            decoder_input_ids=model._shift_right(batch.labels_BT),
        ).logits[mask]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_teacher_path_equals_the_unmodified_model(kind, attention):
    model = tiny_t5(kind)
    for module in model.modules():  # the stacks have configurations of their own
        if hasattr(module, "config"):
            module.config._attn_implementation = attention
    batch = random_batch(0)
    outputs = modular_of(model)(batch, Assembly.parse("e1x4.2-d1x4.2"))
    torch.testing.assert_close(outputs.teacher_logits_NV, hf_logits(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["e2x3-d1x6", "e1x6-d3x2", "e1.1.2.2-d6", "e6-d1x4.2", "e3.1x3-d1x3.3", "e1x6-d1x6"])
def test_the_student_path_equals_an_assembled_model(kind, text):
    """The hybrid forward against a plain model into which the drawn layers are copied."""
    model = tiny_t5(kind)
    modular = modular_of(model)
    perturb(modular)
    assembly = Assembly.parse(text)
    plain = tiny_t5(kind, assembly.encoder.num_layers, assembly.decoder.num_layers)
    state = {name: weight for name, weight in model.state_dict().items() if ".block." not in name}
    plain.load_state_dict(state, strict=False)
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    for stack in ("encoder", "decoder"):
        blocks, original = getattr(plain, stack).block, getattr(model, stack).block
        for index, span in enumerate(assembly.tiling(stack).spans):
            single = span.num_layers == 1
            layer = original[span.first] if single else modular.modular[stack][str(span)].layer
            blocks[index].load_state_dict(layer.state_dict(), strict=False)
        bias = original[0].layer[0].SelfAttention.relative_attention_bias
        blocks[0].layer[0].SelfAttention.relative_attention_bias.load_state_dict(bias.state_dict())
    batch = random_batch(3)
    outputs = modular(batch, assembly)
    torch.testing.assert_close(outputs.student_logits_NV, hf_logits(plain, batch), atol=2e-5, rtol=1e-5)


def test_local_phase_pairs_are_the_teachers_own_states():
    """Each modular layer sees the teacher's state at its span's start and is compared with the one at its end."""
    model = tiny_t5()
    batch = random_batch(1)
    with torch.no_grad():
        hf = model(
            input_ids=batch.source_BS,
            attention_mask=batch.source_mask_BS,
            decoder_input_ids=model._shift_right(batch.labels_BT),
            output_hidden_states=True,
        )
    modular = modular_of(model)
    pairs = modular(batch, None).pairs
    assert len(pairs) == 12
    for name, pair in pairs.items():
        stack, _, text = name.partition(".")
        first, last = map(int, text.split("-"))
        states = hf.encoder_hidden_states if stack == "encoder" else hf.decoder_hidden_states
        mask = pair.mask_BT
        torch.testing.assert_close(pair.start_BTD[mask], states[first][mask], atol=1e-5, rtol=1e-5)
        if last < 5:  # after the last layer transformers reports the normed state
            torch.testing.assert_close(pair.teacher_BTD[mask], states[last + 1][mask], atol=1e-5, rtol=1e-5)


def test_only_modular_layers_train_and_the_teacher_gets_no_gradient():
    modular = modular_of(tiny_t5())
    trainable = {name for name, p in modular.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.startswith("modular.") for name in trainable)
    outputs = modular(random_batch(0), Assembly.parse("e2x3-d2x3"))
    outputs.student_logits_NV.sum().backward()
    drawn = {("encoder", "0-1"), ("encoder", "2-3"), ("encoder", "4-5")}
    drawn |= {("decoder", span) for _, span in list(drawn)}
    for name, parameter in modular.named_parameters():
        used = tuple(name.split(".")[1:3]) in drawn and name.startswith("modular.")
        assert (parameter.grad is not None) == used, name


def test_a_full_path_through_undrawn_layers_keeps_the_gradient():
    """A modular layer early in the encoder learns through every teacher layer behind it, in both stacks."""
    modular = modular_of(tiny_t5())
    outputs = modular(random_batch(0), Assembly.parse("e2.1x4-d1x6"))
    outputs.student_logits_NV.square().sum().backward()
    grads = [p.grad for p in modular.modular["encoder"]["0-1"].parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize(("init", "source"), [("first", 2), ("last", 3)])
def test_modular_layers_start_from_a_layer_of_their_span(init, source):
    model = tiny_t5()
    modular = modular_of(model, init=init)
    layer = modular.modular["decoder"][str(Span(2, 3))].layer
    for (name, ours), (_, theirs) in zip(
        layer.state_dict().items(), model.decoder.block[source].state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_teacher_assembly_costs_nothing_and_equals_the_teacher():
    modular = modular_of(tiny_t5())
    with torch.no_grad():
        outputs = modular(random_batch(2), teacher_assembly(6, 6))
    assert not outputs.pairs
    assert torch.equal(outputs.student_logits_NV, outputs.teacher_logits_NV)


def test_a_micro_batch_without_targets_weighs_nothing():
    from pipeline.config import LossConfig
    from pipeline.losses import GlobalCounts, local_terms, replacing_terms

    batch = random_batch(0, num_examples=1)
    batch.labels_BT[:] = -100  # as pipeline.data fills a step up: a source, but no target
    modular = modular_of(tiny_t5())
    for terms in (
        local_terms(modular(batch, None), GlobalCounts(7, 1)),
        replacing_terms(modular(batch, Assembly.parse("e6-d6")), GlobalCounts(7, 1), LossConfig()),
    ):
        assert terms.total.item() == 0
        terms.total.backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in modular.parameters())


def test_training_mode_turns_no_dropout_on():
    modular = modular_of(tiny_t5()).train()
    assert not any(module.training for module in modular.modules())
