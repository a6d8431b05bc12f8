"""The two phases of a distillation, each of which may be left out."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.recipe import DistillConfig, OptimConfig
from pipeline.distill import modular_task
from pipeline.families import family_of
from pipeline.model.losses import GlobalCounts
from pipeline.model.modular import ModularModel
from pipeline.training.loop import recompute_in_backward
from tests.tiny import random_batch, tiny_model, tiny_t5

NUM_STEPS = 6


@pytest.fixture(scope="module")
def model():
    teacher = tiny_t5(num_layers=4, num_decoder_layers=3)
    return ModularModel(teacher, family_of("t5"), ((2, 3), (2, 3)), "last"), teacher.config


def phases(model, local_steps: int):
    """(names of the loss parts, modular layers with a gradient) of each step, and the task."""
    modular, hf_config = model
    settings = DistillConfig(
        granularities=(2, 3), local_steps=local_steps, draws=("sampled",), optim=OptimConfig(num_steps=NUM_STEPS)
    )
    task = modular_task(modular, family_of("t5"), hf_config, settings, seed=0)
    found = []
    for step in range(NUM_STEPS):
        batch = random_batch(step)
        counts = GlobalCounts(11, 1)
        args = task.forward_args(step, task.draws(step, batch.index), counts)
        terms = task.loss_terms(step, modular(batch, *args), counts)
        modular.zero_grad(set_to_none=True)
        terms.total.backward()
        trained = {
            f"{stack}.{span}"
            for stack in ("encoder", "decoder")
            for span, leaf in modular.modular[stack].items()
            if any(p.grad is not None and p.grad.abs().sum() > 0 for p in leaf.parameters())
        }
        found.append((set(terms.parts), trained))
    return found, task


def test_both_phases_in_one_run(model):
    found, task = phases(model, local_steps=2)
    everything = {f"{stack}.{span}" for stack, _, spans in model[0].stacks for span in spans}
    for parts, trained in found[:2]:
        assert parts == {f"hidden/{name}" for name in everything}
        assert trained == everything
    for step, (parts, trained) in enumerate(found[2:], start=2):
        assert {"hidden", "logit", "task"} <= parts
        (draw,) = task.draws(step, 0)
        drawn = {f"{s}.{span}" for s in ("encoder", "decoder") for span in draw.tiling(s).spans if span.num_layers > 1}
        assert trained == drawn
    assert task.restarts == (2,)


def test_the_local_phase_only(model):
    found, task = phases(model, local_steps=NUM_STEPS)
    assert all(all(part.startswith("hidden/") for part in parts) for parts, _ in found)
    assert task.restarts == ()


def test_the_replacing_phase_only(model):
    found, task = phases(model, local_steps=0)
    assert all("task" in parts for parts, _ in found)
    assert task.restarts == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [("init", "best"), ("sampler", "bernouli"), ("replace_rate", 0.0), ("replace_rate", 1.1), ("ramp", -0.1)],
)
def test_what_no_sampler_knows_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        DistillConfig(**{field: value})


@pytest.mark.parametrize("kind", ["v1.1", "umt5", "bart", "t5gemma2"])
def test_recomputed_activations_change_no_bit_and_keep_less(kind):
    kept, grads = [], []
    for recompute in (False, True):
        teacher = tiny_model(kind, num_layers=4, num_decoder_layers=3)
        family = family_of(teacher.config.model_type)
        model = ModularModel(teacher, family, ((2, 3), (2, 3)), "last")
        settings = DistillConfig(granularities=(2, 3), local_steps=0, optim=OptimConfig(num_steps=NUM_STEPS))
        task = modular_task(model, family, teacher.config, settings, seed=0)
        if recompute:
            recompute_in_backward(task.layers)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        batch, counts = random_batch(0), GlobalCounts(11, 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            args = task.forward_args(0, task.draws(0, batch.index), counts)
            terms = task.loss_terms(0, model(batch, *args), counts)
        terms.total.backward()
        kept.append(sum(sizes))
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert kept[1] < kept[0] / 2
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
