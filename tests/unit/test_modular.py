"""Teacher and modular layers as one module, against the unmodified Hugging Face model."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from pipeline.families import decoder_inputs, family_of
from pipeline.kernels import HeadObjective, distances, position_bias
from pipeline.model.modular import ModularModel, Wanted
from pipeline.spans.spans import Assembly, Span, teacher_assembly
from tests.tiny import KINDS, hf_logits, random_batch, tiny_assembled, tiny_model, tiny_t5


def modular_of(model, **settings):
    settings = {"granularities": ((2, 3, 6), (2, 3, 6)), "init": "last", **settings}
    return ModularModel(copy.deepcopy(model), family_of(model.config.model_type), **settings)


def perturb(model: ModularModel) -> None:
    torch.manual_seed(1)
    for parameter in model.modular.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_teacher_path_equals_the_unmodified_model(kind, attention):
    model = tiny_model(kind)
    for module in model.modules():  # the stacks have configurations of their own
        if hasattr(module, "config"):
            module.config._attn_implementation = attention
    batch = random_batch(0)
    outputs = modular_of(model)(batch, [Assembly.parse("e1x4.2-d1x4.2")])
    torch.testing.assert_close(outputs.teacher_logits_NV, hf_logits(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["e2x3-d1x6", "e1x6-d3x2", "e1.1.2.2-d6", "e6-d1x4.2", "e3.1x3-d1x3.3", "e1x6-d1x6"])
def test_the_student_path_equals_an_assembled_model(kind, text):
    """The hybrid forward against a plain model into which the drawn layers are copied."""
    model = tiny_model(kind)
    family = family_of(model.config.model_type)
    modular = modular_of(model)
    perturb(modular)
    assembly = Assembly.parse(text)
    plain = tiny_assembled(kind, assembly)
    prefixes = tuple(family.layer_prefix(stack) for stack in ("encoder", "decoder"))
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if not n.startswith(prefixes)}, strict=False)
    for stack in ("encoder", "decoder"):
        layers, original = family.layers(plain, stack), family.layers(model, stack)
        for layer, span in zip(layers, assembly.tiling(stack).spans, strict=True):
            single = span.num_layers == 1
            source = original[span.first] if single else modular.modular[stack][str(span)].layer
            layer.load_state_dict(source.state_dict(), strict=False)
        shared = {n: w for n, w in original[0].state_dict().items() if family.is_shared_weight(n)}
        layers[0].load_state_dict(shared, strict=False)
    batch = random_batch(3)
    outputs = modular(batch, [assembly])
    torch.testing.assert_close(outputs.student_logits_NV, hf_logits(plain, batch), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["v1.1", "bart", "t5gemma2"])
def test_local_phase_pairs_are_the_teachers_own_states(kind):
    """Each modular layer sees the teacher's state at its span's start and is compared with the one at its end."""
    model = tiny_model(kind)
    batch = random_batch(1)
    with torch.no_grad():
        hf = model(
            input_ids=batch.source_BS,
            attention_mask=batch.source_mask_BS,
            decoder_input_ids=decoder_inputs(model.config, batch.labels_BT),
            output_hidden_states=True,
        )
    modular = modular_of(model)
    pairs = modular(batch, None).pairs
    assert len(pairs) == 12
    for (name, _), pair in pairs.items():
        stack, _, text = name.partition(".")
        first, last = map(int, text.split("-"))
        states = hf.encoder_hidden_states if stack == "encoder" else hf.decoder_hidden_states
        mask = pair.mask_BT
        torch.testing.assert_close(pair.start_BTD[mask], states[first][mask], atol=1e-5, rtol=1e-5)
        if last < 5:  # after the last layer transformers reports the normed state
            torch.testing.assert_close(pair.teacher_BTD[mask], states[last + 1][mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_exactly_the_modular_layers_of_the_draw(kind):
    modular = modular_of(tiny_model(kind))
    trainable = {name for name, p in modular.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.startswith("modular.") for name in trainable)
    for text, drawn in (
        ("e2x3-d2x3", {"encoder.0-1", "encoder.2-3", "encoder.4-5", "decoder.0-1", "decoder.2-3", "decoder.4-5"}),
        ("e1x3.3-d6", {"encoder.3-5", "decoder.0-5"}),
        ("e1x6-d1x4.2", {"decoder.4-5"}),
    ):
        modular.zero_grad(set_to_none=True)
        modular(random_batch(0), [Assembly.parse(text)]).student_logits_NV.square().sum().backward()
        for name, parameter in modular.named_parameters():
            used = name.startswith("modular.") and ".".join(name.split(".")[1:3]) in drawn
            assert (parameter.grad is not None) == used, name
            # a key bias shifts all scores of a query alike: softmax does not see it
            assert not used or parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name


def test_a_full_path_through_undrawn_layers_keeps_the_gradient():
    """A modular layer early in the encoder learns through every teacher layer behind it, in both stacks."""
    modular = modular_of(tiny_t5())
    outputs = modular(random_batch(0), [Assembly.parse("e2.1x4-d1x6")])
    outputs.student_logits_NV.square().sum().backward()
    grads = [p.grad for p in modular.modular["encoder"]["0-1"].parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("kind", ["v1.1", "bart", "t5gemma2"])
@pytest.mark.parametrize(
    ("init", "span", "source"),
    [
        ("first", Span(2, 3), 2),
        ("last", Span(2, 3), 3),
        ("middle", Span(2, 3), 2),
        ("middle", Span(3, 5), 4),
        ("middle", Span(0, 5), 2),
    ],
)
def test_modular_layers_start_from_a_layer_of_their_span(kind, init, span, source):
    model = tiny_model(kind)
    modular = modular_of(model, init=init)
    ours = modular.modular["decoder"][str(span)].layer.state_dict()
    theirs = family_of(model.config.model_type).layers(model, "decoder")[source].state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="unknown init 'latest': choose from first, middle, last, average"):
        modular_of(tiny_t5(), init="latest")


@pytest.mark.parametrize("kind", ["v1.1", "bart"])
def test_modular_layers_start_from_the_average_of_their_span(kind):
    model = tiny_model(kind)
    modular = modular_of(model, init="average")
    original = family_of(model.config.model_type).layers(model, "encoder")
    for span in (Span(0, 1), Span(3, 5), Span(0, 5)):
        ours = modular.modular["encoder"][str(span)].layer.state_dict()
        layers = [original[i].state_dict() for i in range(span.first, span.last + 1)]
        for name, weight in ours.items():
            mean = sum(layer[name].double() for layer in layers) / len(layers)
            torch.testing.assert_close(weight.double(), mean, atol=1e-6, rtol=1e-6)
    # the teacher's own layers are not touched
    kept = modular.teacher["encoder"][1].layer.state_dict()
    assert all(torch.equal(weight, original[1].state_dict()[name]) for name, weight in kept.items())


def test_the_teacher_assembly_costs_nothing_and_equals_the_teacher():
    modular = modular_of(tiny_t5())
    with torch.no_grad():
        outputs = modular(random_batch(2), [teacher_assembly(6, 6)])
    assert not outputs.pairs
    assert torch.equal(outputs.student_logits_NV, outputs.teacher_logits_NV)


def test_a_micro_batch_without_targets_weighs_nothing():
    from pipeline.config.recipe import LossConfig
    from pipeline.model.losses import GlobalCounts, Objectives

    batch = random_batch(0, num_examples=1)
    # as pipeline.data fills a step up: a source, but no target
    batch = dataclasses.replace(batch, labels_BT=torch.full_like(batch.labels_BT, -100), places_N=None)
    modular = modular_of(tiny_t5())
    objectives, counts = Objectives(LossConfig()), GlobalCounts(7, 1)
    outputs = modular(batch, [Assembly.parse("e6-d6")], objectives.wanted(0, counts))
    for terms in (
        objectives.local_terms(0, modular(batch, None), counts),
        objectives.replacing_terms(0, outputs, counts),
    ):
        assert terms.total.item() == 0
        terms.total.backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in modular.parameters())


@pytest.mark.parametrize("kind", ["v1.1", "bart"])
@pytest.mark.parametrize("whole", ["encoder", "decoder"])
def test_one_stack_may_be_left_whole(kind, whole):
    model = tiny_model(kind)
    granularities = {"encoder": (2, 4), "decoder": (2, 4), whole: ()}
    modular = modular_of(model, granularities=tuple(granularities.values()))
    perturb(modular)
    assert modular.stacks.spans_of(whole) == ()
    names = {use.name for use in modular(random_batch(0), None).pairs}
    assert names == {name for name in modular_names(modular) if not name.startswith(whole)}
    text = {"encoder": "e1x6-d4.2", "decoder": "e4.2-d1x6"}[whole]
    outputs = modular(random_batch(0), [Assembly.parse(text)])
    torch.testing.assert_close(outputs.teacher_logits_NV, hf_logits(model, random_batch(0)), atol=1e-5, rtol=1e-5)
    outputs.student_logits_NV.square().sum().backward()
    reached = {name for name, parameter in modular.named_parameters() if parameter.grad is not None}
    drawn = {f"modular.{other}.{span}" for other in granularities if other != whole for span in ("0-3", "4-5")}
    assert {".".join(name.split(".")[:3]) for name in reached} == drawn


def modular_names(modular: ModularModel) -> set[str]:
    return {f"{stack}.{span}" for stack, _, spans in modular.stacks for span in spans}


def test_training_mode_turns_no_dropout_on():
    modular = modular_of(tiny_t5()).train()
    assert not any(module.training for module in modular.modules())


@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "umt5", "bart"])
def test_attention_pairs_are_the_attentions_of_the_unmodified_model(kind):
    """Queries, keys, scale and bias of the teacher's side give the attention maps that transformers reports."""
    model = tiny_model(kind)
    batch = random_batch(1)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    with torch.no_grad():
        hf = model(
            input_ids=batch.source_BS,
            attention_mask=batch.source_mask_BS,
            decoder_input_ids=decoder_inputs(model.config, batch.labels_BT),
            output_attentions=True,
        )
    modular = modular_of(model)
    pairs = modular(batch, None, Wanted(HeadObjective(1.0), attention=True)).attention
    assert {kind: len(named) for kind, named in pairs.items()} == {"self": 12, "cross": 6}
    for kind_of_map, named in pairs.items():
        for (name, _), pair in named.items():
            stack, _, text = name.partition(".")
            maps = hf.cross_attentions if kind_of_map == "cross" else getattr(hf, f"{stack}_attentions")
            scores = torch.einsum("bqhk,bshk->bhqs", pair.teacher_query_BQHK, pair.teacher_key_BSHK) * pair.scale
            if pair.bias_HR is not None:
                scores += position_bias(pair.bias_HR, pair, scores.dtype)
            hidden = ~pair.key_mask_BS[:, None, None, :] | (pair.causal & (distances(pair) > 0))
            found = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
            rows = pair.query_mask_BQ[:, None, :].expand(found.shape[:3])
            torch.testing.assert_close(found[rows], maps[int(text.split("-")[1])][rows], atol=1e-5, rtol=1e-4)
            assert not pair.teacher_query_BQHK.requires_grad
            assert pair.student_query_BQHK.requires_grad
