"""What the ranks of the engine's cover run: each cell under the engine, and the same steps in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from pipeline.model.draws import text_of
from pipeline.training.engine import join_world
from tests.distributed.engine_ranks import Run, in_fp32, new_task, reference, settings_of, sgd

NUM_STEPS, NUM_LOCAL = 30, 5
OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": sgd}


def cells(folder: str, cells: list[tuple[str, int, bool]], draws: Sequence[str]) -> list[dict[str, Any]]:
    """For each (configuration, accumulated micro-batches, recompute) and optimizer: how far from plain PyTorch.

    `loss` is the largest relative difference of a step's loss, `weight` the largest difference of a weight, `distance`
    the largest over parameters of (distance from the reference / distance travelled).
    """
    world, settings = join_world(), settings_of(NUM_STEPS, NUM_LOCAL, draws)
    references: dict[tuple[int, str], Any] = {}
    found = []
    for ds_config, num_accumulated, recompute in cells:
        for name, optimizer in OPTIMIZERS.items():
            with mock.patch("torch.optim.AdamW", optimizer):
                run = Run(
                    num_accumulated * world.size,
                    in_fp32(ds_config, folder),
                    settings=settings,
                    recompute=recompute,
                    world=world,
                )
                losses = [run.step(step) for step in range(NUM_STEPS)]
            weights = run.weights()
            if world.is_main:
                key = (run.num_micro_batches, name)
                if key not in references:
                    references[key] = reference(run.num_micro_batches, settings, optimizer)
                cell = f"{ds_config} ranks {world.size} accumulated {num_accumulated} recompute {recompute} {name}"
                cell += f" draws {len(draws)}"
                found.append({"cell": cell, "optimizer": name, **_errors(losses, weights, *references[key])})
    world.close()
    return found


def _errors(losses: Any, weights: Any, expected_losses: Any, expected: Any) -> dict[str, float]:
    start = {name: p.detach() for name, p in new_task().module.named_parameters()}
    distances = [
        ((weights[name] - expected[name]).norm() / (expected[name] - start[name]).norm()).item() for name in expected
    ]
    return {
        "loss": max(abs(ours - plain) / abs(plain) for ours, plain in zip(losses, expected_losses, strict=True)),
        "weight": max((weights[name] - expected[name]).abs().max().item() for name in expected),
        "distance": max(distances),
    }


def random_draws(num_steps: int, draws: Sequence[str]) -> dict[str, Any]:
    """Steps of random draws, different ones on every rank: how often DeepSpeed found its trace of leaves wrong, whether
    it prefetches by it at the end, this rank's draws, and the losses of ours and of plain PyTorch."""
    settings = settings_of(num_steps, 0, draws)
    world = join_world()
    run = Run(world.size, "zero3_cpu", settings=settings, world=world)
    coordinator = run.engine._engine.optimizer.parameter_offload.param_coordinator
    invalidated = []
    invalidate = coordinator._invalidate_trace
    coordinator._invalidate_trace = lambda: (invalidated.append(None), invalidate())
    losses = [run.step(step) for step in range(num_steps)]
    drawn = [text_of(run.task.draws(step, world.rank)) for step in range(num_steps)]
    found = {"invalidated": len(invalidated), "prefetches": coordinator.is_complete_trace(), "draws": drawn}
    world.close()
    expected = reference(world.size, settings)[0] if world.is_main else []
    return {**found, "losses": losses, "expected": expected}
