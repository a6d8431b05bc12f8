"""Compiled layers compute what layers do, and where they cannot be compiled nothing changes."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.recipe import DistillConfig, LossConfig, OptimConfig
from pipeline.distill import modular_task
from pipeline.families import family_of
from pipeline.model import GlobalCounts, ModularModel, compile_layers
from pipeline.training.loop import recompute_in_backward
from tests.tiny import random_batch, tiny_model


def model_of(kind: str) -> ModularModel:
    teacher = tiny_model(kind, 2, 2)
    family = family_of(teacher.config.model_type)
    family.prepare_for_training(teacher)
    return ModularModel(teacher, family, ((2,), (2,)), "first")


def losses_and_gradients(model: ModularModel, hf_config, **losses: float) -> list[torch.Tensor]:
    """Of a step of each phase, on batches of several sizes."""
    settings = DistillConfig(
        granularities=(2,), local_steps=2, draws=("sampled", "coarsest"), optim=OptimConfig(num_steps=5),
        losses=LossConfig(**losses),
    )  # fmt: skip
    task = modular_task(model, model.family, hf_config, settings, seed=0)
    found = []
    for step in range(5):
        batch = random_batch(step, num_examples=1 + step, longest=6 + 2 * step)
        counts = GlobalCounts(11, 1)
        outputs = model(batch, *task.forward_args(step, task.draws(step, 0), counts))
        total = task.loss_terms(step, outputs, counts).total
        model.zero_grad()
        total.backward()
        grads = [p.grad.flatten() for p in model.modular.parameters() if p.grad is not None]
        found += [total.detach(), torch.cat(grads)]
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "backend"), [("v1.1", "inductor"), ("bart", "aot_eager")])
def test_compiled_layers_give_the_same_losses_and_gradients(kind: str, backend: str) -> None:
    models = model_of(kind), model_of(kind)
    hf_config = tiny_model(kind, 2, 2).config
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    said = compile_layers(models[1], lambda good: good, backend)
    assert said.startswith(f"layers are compiled by {backend}"), said
    plain, compiled = (losses_and_gradients(model, hf_config) for model in models)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 8, "torch compiles no more of one function by itself"


def test_steps_with_attention_losses_run_the_layers_as_they_are() -> None:
    models = model_of("v1.1"), model_of("v1.1")
    hf_config = tiny_model("v1.1", 2, 2).config
    compile_layers(models[1], lambda good: good, "eager")
    plain, compiled = (losses_and_gradients(model, hf_config, attention_self=1.0) for model in models)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_where_it_does_not_work_layers_stay_as_they_are_and_the_reason_is_told() -> None:
    model = model_of("v1.1")

    def broken(*_: object) -> None:
        raise OSError("no compiler\nat all")

    def broken_where_weights_train(graph, inputs: list[torch.Tensor]) -> object:
        return (
            broken() if any(isinstance(each, torch.nn.Parameter) and each.requires_grad for each in inputs) else graph
        )

    assert "not compiled: OSError" in compile_layers(model, lambda good: good, broken_where_weights_train)
    assert compile_layers(model, lambda good: good, broken) == "layers are not compiled: OSError: no compiler"
    said = compile_layers(model, lambda good: False, "eager")
    assert said == "layers are not compiled: another rank cannot"
    recompute_in_backward([leaf for leaf in model.modules() if hasattr(leaf, "layer")])
    assert "not with recompute_activations" in compile_layers(model, lambda good: good, "eager")
    next(model.parameters()).ds_id = 0
    assert "not under ZeRO-3" in compile_layers(model, lambda good: good, "eager")
    assert all(leaf.compiled is None for leaf in model.modules() if hasattr(leaf, "compiled"))
