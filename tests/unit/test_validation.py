"""Validation while training: losses against transformers' own, greedy outputs against its generate()."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from pipeline.config.recipe import DistillConfig
from pipeline.distill import followed, modular_task
from pipeline.families import family_of
from pipeline.model.modular import ModularModel
from pipeline.training.clock import PhaseClock
from pipeline.training.validation import LONGEST_OUTPUT, Translation, Validator
from pipeline.world import World
from tests.tiny import random_batch, tiny_t5

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def teacher():
    return tiny_t5(num_layers=6, num_decoder_layers=6)


@pytest.fixture(scope="module")
def model(teacher):
    return ModularModel(copy.deepcopy(teacher), family_of("t5"), ((2, 3, 6), (2, 3, 6)), "last")


def generated(teacher, batch, end_id, **options):
    """Greedy ids of transformers, as long as ours may be."""
    return teacher.generate(
        input_ids=batch.source_BS,
        attention_mask=batch.source_mask_BS,
        max_new_tokens=math.ceil(LONGEST_OUTPUT * batch.labels_BT.shape[1]),
        num_beams=1,
        do_sample=False,
        eos_token_id=end_id,
        pad_token_id=0,
        **options,
    )[:, 1:].tolist()


def validator(model, score=None, end_id=1, forces_bos=False):
    batches = [random_batch(7, index) for index in range(3)]
    clock = PhaseClock(ALONE.device)
    settings = DistillConfig()
    task = modular_task(model, family_of("t5"), tiny_t5().config, settings, seed=0)
    assemblies = followed(model.stacks, settings)
    decoded = {name: ((assemblies[name],),) for name in ("teacher", "e6-d6")}
    translation = Translation(decoded, end_id, score, forces_bos) if score else None
    return Validator(
        model, ALONE, None, clock, args=task.validations, batches=batches, decoded=batches[:2], translation=translation
    ), batches


def test_the_teachers_loss_is_that_of_transformers(model, teacher):
    ours, batches = validator(model)
    total, count = 0.0, 0
    for batch in batches:
        loss = teacher(input_ids=batch.source_BS, attention_mask=batch.source_mask_BS, labels=batch.labels_BT).loss
        number = int((batch.labels_BT != -100).sum())
        total, count = total + loss.item() * number, count + number
    losses = ours.losses()
    assert losses["teacher"] == pytest.approx(total / count, rel=1e-5)
    assert set(losses) == {"teacher", "e2x3-d2x3", "e3x2-d3x2", "e6-d6"}
    assert ours.bleu() == {}


def test_greedy_outputs_are_those_of_transformers(model, teacher):
    """The end at different places, and outputs that are cut at the longest."""
    found = []

    def score(outputs, references):
        found.append((outputs, references))
        return 42.0

    end_id = generated(teacher, random_batch(7, 0), 1)[0][3]  # some outputs end there, others do not
    ours, batches = validator(model, score, end_id)
    assert ours.bleu() == {"teacher": 42.0, "e6-d6": 42.0}
    expected = [ids for batch in batches[:2] for ids in generated(teacher, batch, end_id)]
    assert 0 < sum(end_id in ids for ids in expected) < len(expected)
    expected = [ids[: ids.index(end_id)] if end_id in ids else ids for ids in expected]
    assert found[0][0] == expected
    assert found[1][0] != expected
    labels = [row for batch in batches[:2] for row in batch.labels_BT.tolist()]
    assert found[0][1] == [[each for each in row[: [*row, end_id].index(end_id)] if each != -100] for row in labels]


def test_outputs_begin_with_the_language_of_their_references(model, teacher):
    found = []
    ours, batches = validator(model, lambda outputs, references: found.append(outputs) or 0.0, forces_bos=True)
    ours.bleu()
    outputs = iter(found[0])
    for batch in batches[:2]:
        for place, first in enumerate(batch.labels_BT[:, 0].tolist()):
            ids = generated(teacher, batch, 1, forced_bos_token_id=first)[place]
            assert next(outputs) == (ids[: ids.index(1)] if 1 in ids else ids)


def test_what_is_followed_goes_from_the_finest_to_the_coarsest():
    model = ModularModel(tiny_t5(num_layers=6, num_decoder_layers=6), family_of("t5"), ((3, 6), (3, 6)), "last")
    names = list(followed(model.stacks, DistillConfig(granularities=(6, 3))))
    assert names[0] == "teacher"
    assert names[1] == "e3x2-d3x2"
    assert names[-1] == "e6-d6"
