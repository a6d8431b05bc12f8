"""Draws that share a micro-batch: what two to five of them cost beside one, of the step benchmark.

Shapes: B examples, S source tokens, T target tokens.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5ForConditionalGeneration

from pipeline.bench.step_model import (
    SETTINGS,
    Counted,
    flops_of,
    in_fp32,
    loss_of,
    matmul_flops,
    new_engine,
    new_task,
    random_batch,
    t5,
    timed_step,
    with_draws,
)
from pipeline.config.cli import parse_recipe, recipe_parser
from pipeline.footprint.sizes import sizes_of
from pipeline.model.draws import Sampler
from pipeline.planning.planned import Planned
from pipeline.training.engine import join_world

DRAWS = {
    1: ("sampled",),
    2: ("sampled", "coarsest"),
    3: ("sampled", "coarsest", "pure-3"),
    4: ("sampled", "pure"),
    5: ("sampled", "crossed", "coarsest"),
}
RECIPES = ("t5_large", "mt5_large")
NUM_MICRO_BATCHES = 200
NARROWER = 16
"""Width and vocabulary of the counted models in parts of the recipes' own: products keep their proportions."""
NUM_COUNTED = 4


def flops() -> dict[str, dict[str, dict[int, float]]]:
    """FLOPs of a micro-batch of the replacing phase by recipe, way and number of draws: by the estimate, the mean over
    many draws; and counted by torch at a sixteenth of the width, held against the estimate of the same draws."""
    found = {}
    for name in RECIPES:
        planned = Planned.of(parse_recipe(recipe_parser("step", ""), ["--config", name])[0])
        recipe = planned.recipe
        source, target = recipe.data.max_source_tokens, recipe.data.max_target_tokens
        examples = recipe.distill.batch.tokens_per_micro_batch / (source + target)
        estimated = {}
        for num_draws, draws in DRAWS.items():
            settings = replace(recipe.distill, draws=draws)
            sampler = Sampler(settings, seed=recipe.seed, stacks=planned.stacks)
            first = settings.local_steps
            drawn = [sampler.draws(first + place, 0) for place in range(NUM_MICRO_BATCHES)]
            of_example = mean(flops_of(planned.distill_sizes, each, (1, source, target)) for each in drawn)
            estimated[num_draws] = examples * of_example
        found[name] = {"estimated": estimated, **_counted(planned)}
    return found


def _counted(planned: Planned) -> dict[str, dict[int, float]]:
    settings = planned.settings
    vocab_size = settings["vocab_size"] // NARROWER
    config = t5(settings["num_layers"], settings["d_model"] // NARROWER, settings["d_ff"] // NARROWER, vocab_size)
    config.d_kv, config.num_heads = 16, settings["d_model"] // NARROWER // 16
    shape_BST = (1, 16, 4)
    counted, expected = {}, {}
    for num_draws, draws in DRAWS.items():
        torch.manual_seed(0)
        task = new_task(T5ForConditionalGeneration(config), replace(SETTINGS, draws=draws))
        sizes = sizes_of(task.module, task.leaf_classes)
        counted[num_draws] = expected[num_draws] = 0.0
        for index in range(NUM_COUNTED):
            batch = random_batch(index, shape_BST, vocab_size, torch.device("cpu"))
            with FlopCounterMode(display=False) as counter:
                loss_of(_Plain(task.module), task, 0, batch, 1).backward()
            by_operation = counter.get_flop_counts()["Global"].items()
            counted[num_draws] += sum(n for op, n in by_operation if str(op) in ("aten.mm", "aten.addmm"))
            expected[num_draws] += flops_of(sizes, task.draws(0, index), shape_BST)
    return {"counted": counted, "of the same draws": expected}


class _Plain:
    """A module without an engine."""

    upstream = 1.0

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any) -> Any:
        return self._module(*args)


def traffic(folder: str) -> dict[str, dict[int, int]]:
    """Bytes (gathered, reduced) of a step in zero3 on one of the ranks, by number of draws."""
    counted, world, vocab_size = Counted(), join_world(), 512
    found: dict[str, dict[int, int]] = {"gathered": {}, "reduced": {}}
    for num_draws, draws in DRAWS.items():
        task = new_task(T5ForConditionalGeneration(t5(6, 256, 512, vocab_size)), replace(SETTINGS, draws=draws))
        engine = new_engine(task, world, in_fp32("zero3", folder, stage3_prefetch_bucket_size=0))
        for step in range(3):
            counted.take()
            batch = random_batch(world.rank, (2, 12, 6), vocab_size, world.device)
            engine.backward(loss_of(engine, task, step, batch, world.size))
            engine.step(1e-3)
        found["gathered"][num_draws], found["reduced"][num_draws] = counted.take()
    world.close()
    return found


def seconds(folder: str, steps: int) -> dict[str, Any]:
    """Seconds of a step on one rank of zero3, in turns, the mean over steps: 12+12 layers, d 512, 4 x 128/32 tokens."""
    world, config = join_world(), t5(12, 512, 1408)
    torch.manual_seed(0)
    task = new_task(T5ForConditionalGeneration(config))
    sizes = sizes_of(task.module, task.leaf_classes)
    tasks = {num_draws: with_draws(task, draws) for num_draws, draws in DRAWS.items()}
    engine = new_engine(task, world, "zero3_cpu")
    taken: dict[int, list[float]] = {num_draws: [] for num_draws in DRAWS}
    useful: dict[int, list[float]] = {num_draws: [] for num_draws in DRAWS}
    shape_BST = (4, 128, 32)
    for step in range(-1, steps):
        batch = random_batch(step + 1, shape_BST, config.vocab_size, world.device)
        for num_draws, each in tasks.items():
            found = timed_step(engine, each, step + 1, batch)["whole"]
            if step >= 0:
                taken[num_draws].append(found)
                useful[num_draws].append(flops_of(sizes, each.draws(step + 1, batch.index), shape_BST))
    world.close()
    peak = matmul_flops(world.device)
    return {
        "seconds": {num_draws: mean(each) for num_draws, each in taken.items()},
        "floor": {num_draws: mean(each) / peak for num_draws, each in useful.items()},
        "setting": f"T5 12+12, d 512, fp32, batch 4, 128/32 tokens, {torch.get_num_threads()} threads",
    }
