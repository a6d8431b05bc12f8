"""Losses of many assemblies in one tree: what each gets alone, for as many layer calls as there are prefixes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from pipeline.families import family_of
from pipeline.model.losses import task_loss
from pipeline.model.modular import ModularModel
from pipeline.search.losses import LayerCalls, assembly_losses
from pipeline.spans.paths import path_of
from pipeline.spans.prefixes import count_layers, count_prefixes
from pipeline.spans.spans import Assembly, modular_spans, tilings
from tests.tiny import random_batch, tiny_model

SPANS = modular_spans(6, (2, 3, 6))
EVERYTHING = [Assembly(*pair) for pair in product(tilings(6, SPANS), repeat=2)]


@pytest.fixture(scope="module", params=["v1.0", "v1.1", "t5gemma2"])
def model(request):
    teacher = tiny_model(request.param)
    modular = ModularModel(teacher, family_of(teacher.config.model_type), ((2, 3, 6), (2, 3, 6)), "last")
    torch.manual_seed(1)
    for parameter in modular.modular.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return modular


def test_all_assemblies_in_a_tree_equal_one_by_one(model):
    batch, family = random_batch(0), model.family
    calls = LayerCalls()
    together = assembly_losses(model, family, batch, EVERYTHING, calls)
    alone = torch.cat([assembly_losses(model, family, batch, [each]) for each in EVERYTHING])
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) == len(EVERYTHING), "every assembly is another function"
    paths = [path_of(each) for each in EVERYTHING]
    assert calls.encoder + calls.decoder == count_prefixes(paths)
    # by hand: the tree of the 14 tilings of 6 layers has 30 nodes, and each of its 14 leaves carries one more such tree
    assert (calls.encoder, calls.decoder) == (30, 14 * 30)
    assert count_layers(paths) == sum(each.num_layers for each in EVERYTHING)


def test_losses_are_those_of_the_model_that_trains(model):
    """Against the forward pass of the replacing phase, which test_modular holds to plain Hugging Face models."""
    batch = random_batch(4)
    chosen = EVERYTHING[::13]
    found = assembly_losses(model, model.family, batch, chosen)
    for assembly, loss in zip(chosen, found, strict=True):
        with torch.no_grad():
            outputs = model(batch, [assembly])
        expected = task_loss(outputs.student_logits_NV, outputs.labels_N)
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)


def test_the_order_of_the_assemblies_is_kept_and_repeats_are_welcome(model):
    batch, family = random_batch(2), model.family
    some = [EVERYTHING[i] for i in (50, 3, 50, 120)]
    found = assembly_losses(model, family, batch, some)
    assert torch.equal(found[0], found[2])
    backwards = assembly_losses(model, family, batch, some[::-1])
    assert torch.equal(found, backwards.flip(0))
