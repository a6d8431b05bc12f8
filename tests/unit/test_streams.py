"""Several draws over one pass of the teacher, against a forward pass for each of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.config.recipe import LossConfig
from pipeline.families import family_of
from pipeline.model.leaves import ModularLeaf, TeacherLeaf
from pipeline.model.losses import GlobalCounts, LossTerms, Objectives
from pipeline.model.modular import ModularModel
from pipeline.spans.prefixes import count_prefixes
from pipeline.spans.spans import STACKS, Assembly, modular_spans, teacher_assembly, tilings
from tests.tiny import random_batch, tiny_model

GRANULARITIES = (2, 3, 6)
TILINGS = [*tilings(6, modular_spans(6, GRANULARITIES))]
COUNTS = GlobalCounts(num_target_tokens=13, num_micro_batches=3, upstream=2.0)
WEIGHTS = {"hidden": 0.5, "logit": 2.0, "task": 0.7, "attention_self": 0.3, "attention_cross": 0.2}
NO_ATTENTION = {"attention_self": 0.0, "attention_cross": 0.0}
assemblies = st.builds(Assembly, st.sampled_from(TILINGS), st.sampled_from(TILINGS))
DRAWS = {
    "one twice": ("e2x3-d3x2", "e2x3-d3x2"),
    "one encoder": ("e2x3-d3x2", "e2x3-d6"),
    "one decoder": ("e2.1x4-d2x3", "e3x2-d2x3"),
    "part and meet": ("e2x3-d1x6", "e1x2.2x2-d1x6", "e2x3-d1x4.2"),
    "the teacher at first": ("e1x3.3-d1x6", "e1x6-d6", "e1x6-d1x4.2", "e1x3.3-d6"),
    "the teacher itself": ("e1x6-d1x6", "e6-d6"),
    "pure": ("e2x3-d2x3", "e3x2-d3x2", "e6-d6", "e2.1.1.2-d3.1x3"),
}


@cache
def model_of(kind: str) -> ModularModel:
    model = tiny_model(kind)
    modular = ModularModel(model, family_of(model.config.model_type), (GRANULARITIES, GRANULARITIES), "last").double()
    torch.manual_seed(1)
    for parameter in modular.modular.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return modular


def trained(modular: ModularModel, objectives: Objectives, draws: list[list[Assembly]]):
    """(the mean of the losses of these forward passes, of what they log, and of the gradients)."""
    modular.zero_grad(set_to_none=True)
    found: list[LossTerms] = []
    for each in draws:
        outputs = modular(random_batch(1), each, objectives.wanted(0, COUNTS))
        terms = objectives.replacing_terms(0, outputs, COUNTS)
        (terms.total * COUNTS.upstream / len(draws)).backward()
        found.append(terms)
    parts = {name: sum(each.parts[name] for each in found) / len(draws) for name in found[0].parts}
    means: Counter[str] = Counter()
    for each in found:
        for name, (total, count) in each.means.items():
            means[f"{name} sum"] += float(total)
            means[f"{name} count"] += count
    total = sum(each.total.detach() for each in found) / len(draws)
    return total, parts, means, {n: p.grad for n, p in modular.named_parameters() if p.grad is not None}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["v1.1", "bart", "t5gemma2"]),
    st.lists(assemblies, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["span", "mse", "cosine"]),
)
@example("v1.1", [Assembly.parse(text) for text in DRAWS["the teacher at first"]], True, "span")
@example("bart", [Assembly.parse(text) for text in DRAWS["part and meet"]], True, "span")
@example("v1.1", [Assembly.parse(text) for text in DRAWS["one twice"]], False, "span")
@example("bart", [Assembly.parse(text) for text in DRAWS["the teacher itself"]], False, "mse")
@example("t5gemma2", [Assembly.parse(text) for text in DRAWS["part and meet"]], True, "span")
def test_draws_that_share_a_pass_train_as_each_alone(kind, draws, fused, mode):
    """Losses, what is logged and gradients, in float64: the mean over a forward pass for each draw. The norms and the
    softmax of T5Gemma 2 are in float32 themselves."""
    if all(draw == teacher_assembly(6, 6) for draw in draws):
        draws = [*draws, Assembly.parse("e6-d6")]
    modular = model_of(kind)
    weights = WEIGHTS if modular.family.has_attention_losses else WEIGHTS | NO_ATTENTION
    objectives = Objectives(LossConfig(**weights, hidden_mode=mode, temperature=2.0, fused=fused))
    close, gradients_close = (1e-6, 1e-5) if kind == "t5gemma2" else (1e-9, 1e-7)
    total, parts, means, gradients = trained(modular, objectives, [draws])
    expected_total, expected_parts, expected_means, expected_gradients = trained(
        modular, objectives, [[draw] for draw in draws]
    )
    torch.testing.assert_close(total, expected_total, rtol=close, atol=0)
    torch.testing.assert_close(parts, expected_parts, rtol=close, atol=1e-15)
    assert means == pytest.approx(expected_means, rel=close)
    assert gradients.keys() == expected_gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():  # T5's norms go through float32
        limits = {"rtol": 10 * gradients_close, "atol": gradients_close * scale}
        torch.testing.assert_close(gradient, expected_gradients[name], **limits, msg=name)


def called_with(modular: ModularModel, draws: list[Assembly] | None) -> tuple[list[str], Counter[str]]:
    """(leaves in the order of their calls, examples that went through the layers of each stack)."""
    order: list[str] = []
    rows: Counter[str] = Counter()
    handles = []
    for name, module in modular.named_modules():
        if isinstance(module, (TeacherLeaf, ModularLeaf)):
            stack = name.split(".")[1]
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: order.append(name)))
            feed_forward = module.layer.get_submodule("layer")[-1]  # which each pass through a layer calls
            handles.append(
                feed_forward.register_forward_pre_hook(lambda _, args, stack=stack: rows.update({stack: len(args[0])}))
            )
    objectives = Objectives(LossConfig())
    modular(random_batch(1), draws, objectives.wanted(0, COUNTS))
    for handle in handles:
        handle.remove()
    return order, rows


@pytest.mark.parametrize("draws", DRAWS.values(), ids=DRAWS)
def test_every_leaf_is_called_once_and_every_prefix_computed_once(draws):
    """In one order, whatever the draws; what the teacher has computed is not computed again."""
    modular, assemblies = model_of("v1.1"), [Assembly.parse(text) for text in draws]
    order, rows = called_with(modular, assemblies)
    assert len(order) == len(set(order)) == 2 * (6 + 6)
    assert order == called_with(modular, None)[0] == called_with(modular, assemblies[:1])[0]
    num_examples = len(random_batch(1).example_ids)
    seen: dict[str, int] = {}
    for stack in STACKS:
        paths = [path_of(assembly) for assembly in assemblies]
        if stack == "encoder":
            paths = [path[: assembly.encoder.num_layers] for path, assembly in zip(paths, assemblies, strict=True)]
        of_teacher = path_of(teacher_assembly(6, 6))[: 6 if stack == "encoder" else 12]
        both = count_prefixes([*paths, of_teacher]) - len(of_teacher)
        seen[stack] = both - sum(seen.values())
        assert rows[stack] == num_examples * (6 + seen[stack])


def path_of(assembly: Assembly) -> list[str]:
    return [f"{stack}.{span}" for stack in STACKS for span in assembly.tiling(stack).spans]


def test_an_example_counts_alike_wherever_it_stands():
    """Batches of several lengths: masks and biases belong to the stream that they are repeated for."""
    modular, draws = model_of("v1.1"), [Assembly.parse(text) for text in DRAWS["pure"]]
    objectives = Objectives(LossConfig(**WEIGHTS))
    batch = random_batch(2, num_examples=3, longest=7)
    sides = {name: getattr(batch, name).flip(0) for name in ("source_BS", "source_mask_BS", "labels_BT")}
    flipped = dataclasses.replace(batch, **sides, places_N=None)
    totals = [
        objectives.replacing_terms(0, modular(each, draws, objectives.wanted(0, COUNTS)), COUNTS).total
        for each in (batch, flipped)
    ]
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-9, atol=0)
