"""Memory of attention biases, which are tensors of every pair of tokens: what is told holds what attention is given."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.config import LossConfig
from pipeline.data import MicroBatch
from pipeline.families import family_of
from pipeline.footprint import Sharding, memory, sizes_of
from pipeline.model import GlobalCounts, ModularLeaf, ModularModel, Objectives, TeacherLeaf
from pipeline.spans import Assembly
from pipeline.training.whole_model import full_model_task
from tests.tiny import tiny_model

NUM_EXAMPLES, SOURCE, TARGET = 4, 64, 8
NUM_TOKENS = NUM_EXAMPLES * (SOURCE + TARGET)
DRAWS = tuple(map(Assembly.parse, ("e2.1x4-d6", "e2.2.1x2-d6", "e6-d2x3")))
"""The first two take the encoder's last layers together."""
COUNTS = GlobalCounts(num_target_tokens=13, num_micro_batches=1)
SHARDING = Sharding.of("zero2_cpu", 1, 1, is_gpu=False)


@pytest.fixture
def given(monkeypatch):
    """The tensors of pairs of tokens that attention was given where it is trained through, each storage once. A GPU's
    keeps them, and they are all that it keeps of pairs."""
    storages: dict[int, torch.UntypedStorage] = {}
    attention = F.scaled_dot_product_attention

    def keep(*arguments, **options):
        mask = options.get("attn_mask")
        if arguments[0].requires_grad and mask is not None and mask.shape[1] > 1:
            storages[mask.untyped_storage()._cdata] = mask.untyped_storage()
        return attention(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", keep)
    return storages


def batch(num_source_tokens: int = SOURCE) -> MicroBatch:
    source_BS = torch.full((NUM_EXAMPLES, num_source_tokens), 5)
    mask_BS = torch.ones_like(source_BS, dtype=torch.bool)
    mask_BS[1:, -3:] = False
    labels_BT = torch.full((NUM_EXAMPLES, TARGET), 7)
    return MicroBatch(0, np.arange(NUM_EXAMPLES), source_BS, mask_BS, labels_BT, torch.arange(labels_BT.numel()))


def told(module, leaf_classes, draws=()) -> float:
    sizes = dataclasses.replace(sizes_of(module, leaf_classes), draws=draws, longest=(SOURCE, TARGET))
    return memory(sizes, SHARDING, NUM_TOKENS, recompute=False).device.get("attention biases", 0.0)


def num_bytes(given: dict[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in given.values())


@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "mt5", "umt5"])
def test_a_whole_model_has_them_in_every_layer(given, kind):
    task = full_model_task(tiny_model(kind))
    outputs = task.module(batch())
    bound = told(task.module, task.leaf_classes)
    assert num_bytes(given) <= bound <= 1.25 * num_bytes(given)
    del outputs


@pytest.mark.parametrize(
    ("kind", "draws"),
    [("v1.1", DRAWS), ("v1.1", DRAWS[2:]), ("v1.1", None), ("umt5", DRAWS), ("umt5", None)],
    ids=["several draws", "one draw", "local", "own, several draws", "own, local"],
)
def test_modular_layers_share_those_of_a_stack(given, kind, draws):
    model = tiny_model(kind)
    modular = ModularModel(model, family_of(model.config.model_type), ((2, 3, 6), (2, 3, 6)), "last")
    outputs = modular(batch(), draws, Objectives(LossConfig()).wanted(0, COUNTS))
    bound = told(modular, [TeacherLeaf, ModularLeaf], draws or ())
    assert num_bytes(given) <= bound <= 1.25 * num_bytes(given)
    del outputs


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
def test_models_without_position_biases_have_none(given, kind):
    task = full_model_task(tiny_model(kind))
    task.module(batch(32))  # they have 40 positions
    assert not given
    assert told(task.module, task.leaf_classes) == 0
