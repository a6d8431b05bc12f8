"""python -m pipeline estimate: what a run will cost, on one screen; nothing is read but settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

from pipeline.config import BatchConfig, DistillConfig, LoopConfig, OptimConfig, Recipe
from pipeline.footprint import (
    GIB,
    SHARE_OF_MEMORY,
    Machine,
    Memory,
    Sharding,
    Sizes,
    Traffic,
    local_flops,
    memory,
    plan,
    readable,
    traffic,
    training_flops,
    useful_flops,
)
from pipeline.model import Sampler
from pipeline.planning.checks import check_named_files, check_teacher
from pipeline.planning.disk import bytes_of_stages
from pipeline.planning.planned import Planned

PEAK_TFLOPS = 312.0
"""Matmul peak of a rank in bf16: an A100's."""
SHARE = 0.3
"""Of the peak that useful FLOPs reach: what encoder-decoders of this size commonly do; not measured on a GPU here."""
HOST_S_OF_A_LAYER = {2: 1.6e-3, 3: 3.9e-3}
"""Seconds of Python that a layer takes in a micro-batch, forward and backward, by ZeRO stage: of 24 + 24 tiny T5 layers
and as many modular ones on two ranks of a CPU (November 2026). Where it is more than a GPU's work, the GPU waits."""
NUM_DRAWS = 200
"""Draws whose FLOPs are averaged, evenly over the replacing phase."""
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, less their whole parts, lie evenly between 0 and 1 however many there are."""


@dataclass(frozen=True)
class TrainingCost:
    """What one training costs."""

    name: str
    sizes: Sizes
    sharding: Sharding
    memory: Memory
    traffic: Traffic
    num_steps: int
    flops: float
    """Of the whole training, over all ranks: useful ones, without what activation checkpointing computes again."""
    host_s: float
    """Seconds of the whole training that a rank's host takes to say what is to be done."""

    def hours(self, peak_tflops: float, share: float) -> float:
        """Of the whole training, when the longer of the device's work and the host's counts."""
        device_s = self.flops / (self.sharding.num_ranks * peak_tflops * 1e12 * share)
        return max(device_s, self.host_s) / 3600


def estimate(
    recipe: Recipe, *, num_nodes: int, gpus_per_node: int, gib: float, peak_tflops: float, share: float
) -> str:
    """The screen.

    Raises:
        ValueError: a number out of range, nothing fits, or a teacher that is neither here nor a public model.
    """
    for name, value in (("nodes", num_nodes), ("gpus", gpus_per_node), ("gib", gib), ("tflops", peak_tflops)):
        if value <= 0:
            raise ValueError(f"--{name} must be above 0, not {value:g}")
    if not 0 < share <= 1:
        raise ValueError(f"--share must lie above 0 and up to 1, not {share:g}")
    check_named_files(recipe)
    planned = Planned.of(recipe)
    if planned.folder:
        check_teacher(recipe, planned.folder, whole=False)
    machine = Machine(num_nodes * gpus_per_node, gpus_per_node, gib * GIB, is_gpu=True)
    costs = costs_of(planned, machine)
    num_layers, stages = planned.stacks.num_layers, bytes_of_stages(planned)
    lines = [
        f"{recipe.name}: {num_nodes} node{'s' * (num_nodes > 1)} x {gpus_per_node} ranks with {gib:g} GiB each",
        f"teacher: {planned.source}: {planned.teacher_sizes.num_trained / 1e6:,.1f} M parameters, "
        f"{num_layers[0]}+{num_layers[1]} layers",
        "",
        *_table(costs, [cost.hours(peak_tflops, share) for cost in costs]),
        "",
        *_memory_lines(costs, gib),
        f"disk     {readable(sum(stages.values()))} at most: {_parts(stages)}",
        f"hours    at {share:.0%} of a matmul peak of {peak_tflops:g} TFLOP/s a rank, both assumed: give --share and "
        "--tflops;",
        "         full micro-batches of texts as long as they may be; data, search and evaluation not counted; but no "
        "less",
        f"         than the host takes: {1e3 * HOST_S_OF_A_LAYER[2]:g} ms a layer and micro-batch in stage 2, "
        f"{1e3 * HOST_S_OF_A_LAYER[3]:g} in stage 3",
    ]
    return "\n".join(lines)


def costs_of(planned: Planned, machine: Machine) -> list[TrainingCost]:
    """Every training of a run, in order.

    Raises:
        ValueError: the ranks do not divide a global batch, or `auto` finds nothing that fits.
    """
    recipe = planned.recipe
    teacher, distill = recipe.teacher, recipe.distill
    found: list[TrainingCost] = []
    if teacher.optim.num_steps:
        sizes = planned.teacher_sizes
        per_micro_batch = training_flops(sizes, *_tokens(recipe, teacher.batch))
        found.append(_cost("teacher", sizes, machine, teacher.optim, teacher.batch, teacher.loop, per_micro_batch))
    sizes = planned.distill_sizes
    per_micro_batch = _modular_flops(recipe, planned, sizes, distill)
    found.append(_cost("distill", sizes, machine, distill.optim, distill.batch, distill.loop, per_micro_batch))
    for each in planned.baselines:
        sizes = planned.baseline_sizes(each)
        per_micro_batch = training_flops(sizes, *_tokens(recipe, distill.batch))
        optim = recipe.baseline.optim
        found.append(_cost(each.name, sizes, machine, optim, distill.batch, distill.loop, per_micro_batch))
    return found


def _cost(
    name: str,
    sizes: Sizes,
    machine: Machine,
    optim: OptimConfig,
    batch: BatchConfig,
    loop: LoopConfig,
    flops_per_micro_batch: float,
) -> TrainingCost:
    if batch.micro_batches_per_step % machine.num_ranks:
        raise ValueError(
            f"{name}: {batch.micro_batches_per_step} micro_batches_per_step, which {machine.num_ranks} ranks do not "
            f"divide: make it a multiple of {machine.num_ranks}"
        )
    ds_config, _ = plan(sizes, machine, batch, loop)
    sharding = Sharding.of(ds_config, machine.num_ranks, machine.ranks_per_node, is_gpu=machine.is_gpu)
    num_micro_batches = batch.micro_batches_per_step // machine.num_ranks
    return TrainingCost(
        name=name,
        sizes=sizes,
        sharding=sharding,
        memory=memory(
            sizes,
            sharding,
            batch.tokens_per_micro_batch,
            recompute=loop.recompute_activations,
            save_beside=loop.save_beside,
        ),
        traffic=traffic(sizes, sharding, num_micro_batches),
        num_steps=optim.num_steps,
        flops=flops_per_micro_batch * batch.micro_batches_per_step * optim.num_steps,
        host_s=HOST_S_OF_A_LAYER[sharding.stage] * len(sizes.leaves) * num_micro_batches * optim.num_steps,
    )


def _tokens(recipe: Recipe, batch: BatchConfig) -> tuple[int, int]:
    """(source, target) tokens of a full micro-batch whose texts are as long as they may be."""
    source, target = recipe.data.max_source_tokens, recipe.data.max_target_tokens
    num_source = batch.tokens_per_micro_batch * source // (source + target)
    return num_source, batch.tokens_per_micro_batch - num_source


def _modular_flops(
    recipe: Recipe, planned: Planned, sizes: Sizes, settings: DistillConfig, num_draws: int = NUM_DRAWS
) -> float:
    """FLOPs of a micro-batch, averaged over both phases and over draws."""
    tokens = _tokens(recipe, settings.batch)
    local_steps, num_steps = settings.local_steps, settings.optim.num_steps
    total = local_steps * local_flops(sizes, *tokens)
    if num_steps > local_steps:
        sampler = Sampler(settings, seed=recipe.seed, stacks=planned.stacks)
        of_a_step = settings.batch.micro_batches_per_step
        # even steps through the phase could meet one kind alone of micro-batches that take turns; golden ones do not
        places = [int(i * GOLDEN % 1 * (num_steps - local_steps) * of_a_step) for i in range(num_draws)]
        draws = [sampler.draws(local_steps + place // of_a_step, place % of_a_step) for place in places]
        total += (num_steps - local_steps) * mean(useful_flops(sizes, *tokens, each) for each in draws)
    return total / num_steps


def distill_flops(recipe: Recipe, num_draws: int = NUM_DRAWS) -> float:
    """Useful FLOPs of training the modular layers, all ranks together, teacher and heads included.

    Args:
        num_draws: draws whose FLOPs are averaged.

    Raises:
        ValueError: a teacher that is neither here nor a public model.
    """
    planned, settings = Planned.of(recipe), recipe.distill
    per_micro_batch = _modular_flops(recipe, planned, planned.distill_sizes, settings, num_draws)
    return per_micro_batch * settings.batch.micro_batches_per_step * settings.optim.num_steps


def baseline_flops(recipe: Recipe) -> float:
    """The same of training every baseline of the recipe, one after the other."""
    planned = Planned.of(recipe)
    tokens = _tokens(recipe, recipe.distill.batch)
    per_micro_batch = sum(training_flops(planned.baseline_sizes(each), *tokens) for each in planned.baselines)
    return per_micro_batch * recipe.distill.batch.micro_batches_per_step * recipe.baseline.optim.num_steps


def _table(costs: list[TrainingCost], hours: list[float]) -> list[str]:
    rows = [
        [
            "",
            "trains",
            "DeepSpeed",
            "GiB a rank",
            "GiB received a step",
            "between nodes",
            "TFLOP a step",
            "steps",
            "hours",
        ]
    ]
    for cost, taken in zip(costs, hours, strict=True):
        moved = cost.traffic
        rows.append(
            [
                cost.name,
                f"{cost.sizes.num_trained / 1e6:,.1f} M",
                cost.sharding.name,
                f"{cost.memory.device_total / GIB:.1f}",
                f"{(moved.gathered + moved.reduced) / GIB:.1f}",
                f"{moved.between_nodes / GIB:.1f}",
                f"{cost.flops / max(1, cost.num_steps) / 1e12:,.2f}",
                f"{cost.num_steps:,}",
                f"{taken:.2f}",
            ]
        )
    rows.append(["all", *[""] * 7, f"{sum(hours):.2f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if column in (0, 2) else cell.rjust(w)
            for column, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _memory_lines(costs: list[TrainingCost], gib: float) -> list[str]:
    """What fills a rank, and what does not fit."""
    lines = []
    for cost in costs:
        needs = cost.memory
        lines.append(f"memory   {cost.name}: {_parts(needs.device)}")
        if needs.host:
            lines.append(f"         in host memory: {_parts(needs.host)}")
        if needs.device_total > SHARE_OF_MEMORY * gib * GIB:
            lines.append(
                f"         more than {SHARE_OF_MEMORY:.0%} of {gib:g} GiB: take more ranks, loop.ds_config auto, "
                "loop.recompute_activations or fewer tokens"
            )
    return lines


def _parts(counts: Mapping[str, float]) -> str:
    """The four largest."""
    largest = sorted(counts.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} {readable(count)}" for name, count in largest)
