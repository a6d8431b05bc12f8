"""What the ranks of `python -m pipeline.bench step` run, one process each under torchrun: a function for each part.

Shapes: B examples, S source tokens, T target tokens.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import T5ForConditionalGeneration

from pipeline.bench import step_draws
from pipeline.bench.step_host import host
from pipeline.bench.step_model import (
    SETTINGS,
    Counted,
    Plain,
    PrivatePeak,
    device_name,
    drawn_elements,
    flops_of,
    flops_of_fine_tuning,
    in_fp32,
    loss_of,
    matmul_flops,
    new_engine,
    new_task,
    p_numel,
    peak_of,
    profile_of,
    random_batch,
    read_prefetch,
    reset_peak,
    reset_peak_of,
    resident,
    t5,
    timed_step,
)
from pipeline.bench.step_trainer import trainer
from pipeline.config.recipe import BatchConfig, LoopConfig, LossConfig
from pipeline.footprint.estimate import Machine, plan
from pipeline.footprint.rank_memory import memory
from pipeline.footprint.sharding import Sharding
from pipeline.footprint.sizes import sizes_of
from pipeline.model.huggingface import load_model
from pipeline.model.losses import LossTerms
from pipeline.training.engine import join_world

BUCKET = 20_000_000
"""Elements of the reduction buffer and of layers gathered ahead in the memory part, so that it fits 16 GiB."""


def traffic(folder: str) -> dict[str, Any]:
    """Bytes of one step in zero3, whose draws differ between ranks and micro-batches, and what the formula says."""
    counted = Counted()
    world = join_world()
    num_micro_batches, vocab_size = 3, 512
    found = {}
    for name, prefetch in (("exact", 0), ("prefetching", read_prefetch())):
        task = new_task(T5ForConditionalGeneration(t5(6, 256, 512, vocab_size)))
        sizes = sizes_of(task.module, task.leaf_classes)
        path = in_fp32("zero3", folder, stage3_prefetch_bucket_size=prefetch)
        engine = new_engine(task, world, path, num_micro_batches)
        for step in range(4):
            counted.take()
            for m in range(num_micro_batches):
                index = m * world.size + world.rank
                batch = random_batch(index, (2, 12, 6), vocab_size, world.device)
                engine.backward(loss_of(engine, task, step, batch, num_micro_batches * world.size))
            engine.step(1e-3)
            found[name] = counted.take()
    draws = [draw for m in range(num_micro_batches) for draw in task.draws(3, m * world.size + world.rank) or ()]
    world.close()
    leaves = sum(leaf.num_parameters for leaf in sizes.leaves)
    # called forward and backward: last norms 2 and 1, position biases 1 and 1; the tied embedding is kept from its
    # first use in a forward to its last, and backward does without: the head's gradients are made forward
    module: Any = task.module
    counts = ((module.shared.embedding, 1), (module.shared.bias, 2), (module.shared.norm, 3))
    rest = sum(times * p_numel(parameter) for part, times in counts for parameter in part.parameters())
    gathered, reduced = found["exact"]
    return {
        "exact": {
            "gathered in a step, layers": (gathered - 4 * rest * num_micro_batches, 4 * 2 * leaves * num_micro_batches),
            "gathered in a step, all": (gathered, 4 * (2 * leaves + rest) * num_micro_batches),
            "reduced in a step": (reduced, 4 * sizes.num_trained * num_micro_batches),
        },
        "prefetching": found["prefetching"][0] - 4 * rest * num_micro_batches,
        "drawn": 4 * sum(drawn_elements(sizes, draw) for draw in draws),
        "setting": f"T5 6+6, granularities 2, 3, 6, fp32, {num_micro_batches} micro-batches a rank",
    }


def memory_part(
    folder: str,
    num_layers: int = 12,
    d_model: int = 1024,
    draws: Sequence[str] = SETTINGS.draws,
    shape_BST: tuple[int, int, int] = (2, 24, 8),
) -> dict[str, Any]:
    """Growth of resident memory over an idle rank: joined, with every module loaded, and a model-sized nothing."""
    world = join_world()
    model_folder = Path(folder) / "model"
    config = t5(num_layers, d_model, 2048)
    if world.is_main:
        T5ForConditionalGeneration(config).save_pretrained(model_folder, max_shard_size="100TB")
    world.barrier()
    idle = resident()
    reset_peak()
    teacher = load_model(model_folder)
    task = new_task(teacher, replace(SETTINGS, draws=tuple(draws)))
    del teacher
    small = {"reduce_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET}
    path = in_fp32("zero3", folder, stage3_prefetch_bucket_size=BUCKET, **small)
    loading = PrivatePeak()
    engine = new_engine(task, world, path)
    loading_peak = loading.stop() - idle["RssAnon"]
    sizes = sizes_of(task.module, task.leaf_classes)
    reset_peak()
    for step in range(3):
        batch = random_batch(step * world.size + world.rank, shape_BST, config.vocab_size, world.device)
        engine.backward(loss_of(engine, task, step, batch, world.size))
        engine.step(1e-4)
    peak = resident()["VmHWM"] - idle["VmRSS"]
    world.close()
    mode = Sharding.of(path, world.size, world.size, is_gpu=False)
    needs = memory(sizes, mode, shape_BST[0] * (shape_BST[1] + shape_BST[2]), recompute=False)
    shards = needs.device["weights"] + needs.device["fp32 weights and moments"] + needs.device["gradients"] / 2
    return {
        "peak": peak,
        "estimate": needs.device_total,
        "floor": 4 * sizes.num_frozen / world.size + 16 * sizes.num_trained / world.size,
        "loading": loading_peak,
        "shards": shards,
        "setting": f"zero3 in fp32 on 2 ranks, {sizes.num_trained:,} trainable and {sizes.num_frozen:,} frozen; GiB: "
        + ", ".join(f"{name} {count / 2**30:.2f}" for name, count in needs.device.items()),
    }


def overhead(folder: str, steps: int) -> dict[str, Any]:
    """One rank of zero3 against plain PyTorch, in turns: 12+12 layers, d 768, 8 x 128/32 tokens."""
    world = join_world()
    config = t5(12, 768, 2048)
    torch.manual_seed(0)
    teacher = T5ForConditionalGeneration(config)
    plain_task = new_task(copy.deepcopy(teacher))
    task = new_task(teacher)
    sizes = sizes_of(task.module, task.leaf_classes)
    ours, plain = new_engine(task, world, "zero3_cpu"), Plain(plain_task)
    times: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    shape_BST = (8, 128, 32)
    flops = []
    for step in range(-2, steps):
        batch = random_batch(step + 2, shape_BST, config.vocab_size, world.device)
        for name, side, side_task in (("ours", ours, task), ("plain", plain, plain_task)):
            found = timed_step(side, side_task, step + 2, batch)
            if step >= 0:
                times[name].append(found)
        flops.append(flops_of(sizes, task.draws(step + 2, batch.index), shape_BST))
    profile = (
        profile_of(lambda: timed_step(ours, task, steps + 2, batch)),
        profile_of(lambda: timed_step(plain, plain_task, steps + 2, batch)),
    )
    world.close()
    medians = {side: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for side, rows in times.items()}
    peak = matmul_flops(world.device)
    floor = statistics.mean(flops) / peak
    return {
        **medians,
        "floor": {"whole": floor, "forward": floor, "backward": floor, "optimizer": floor},
        "profile": f"ours {profile[0]}; plain {profile[1]}",
        "setting": f"1 rank, T5 12+12, d 768, {sizes.num_trained:,} trainable, fp32, batch 8, 128/32 tokens, "
        f"{torch.get_num_threads()} threads; matmul peak {peak / 1e9:.0f} GFLOP/s",
    }


def gpu(
    folder: str, steps: int, num_layers: int, d_model: int, d_ff: int, shape_BST: tuple[int, int, int]
) -> dict[str, Any]:
    """Distillation with granularities 2, 3, 6 on every GPU, under the configuration that `auto` takes; the same without
    distillation losses, with eager ones and with attention losses."""
    world = join_world()
    config = t5(num_layers, d_model, d_ff)
    num_tokens = shape_BST[0] * (shape_BST[1] + shape_BST[2])
    batch_config = BatchConfig(tokens_per_micro_batch=num_tokens, micro_batches_per_step=world.size)
    objectives = {
        "distillation": SETTINGS.losses,
        "with attention losses": LossConfig(attention_self=1.0, attention_cross=1.0),
        "with eager losses": LossConfig(fused=False),
        "task loss alone": LossConfig(hidden=0.0, logit=0.0),
    }
    rows: dict[str, Any] = {}
    for name, losses in objectives.items():
        torch.manual_seed(0)
        task = new_task(T5ForConditionalGeneration(config), replace(SETTINGS, losses=losses))
        if name == "task loss alone":  # a hidden loss of weight 0 is made all the same, to be logged
            task = replace(task, loss_terms=lambda _step, outputs, _counts: LossTerms(outputs.head.share, {}))
        sizes = sizes_of(task.module, task.leaf_classes)
        loop = LoopConfig(ds_config="auto")
        ds_config, plan_lines = plan(sizes, Machine.of(world), batch_config, loop)
        engine = new_engine(task, world, ds_config)
        reset_peak_of(world.device)
        seconds, flops = [], []
        for step in range(steps + 3):
            batch = random_batch(step * world.size + world.rank, shape_BST, config.vocab_size, world.device)
            found = timed_step(engine, task, step, batch)
            if step >= 3:
                seconds.append(found["whole"])
                flops.append(flops_of(sizes, task.draws(step, batch.index), shape_BST))
        rows[name] = {"seconds": statistics.median(seconds), "flops": statistics.mean(flops)}
        if name == "distillation":
            mode = Sharding.of(ds_config, world.size, world.ranks_per_node, is_gpu=world.device.type == "cuda")
            needs = memory(sizes, mode, num_tokens, recompute=False)
            peak_memory = {
                "peak": peak_of(world.device),
                "estimate": needs.device_total,
                "floor": needs.device["weights"] + needs.device["fp32 weights and moments"],
            }
        del engine, task
        torch.cuda.empty_cache()
    peak = matmul_flops(world.device)
    world.close()
    ours, alone = rows["distillation"], rows.pop("task loss alone")
    shares = (f"{name} {1 - alone['seconds'] / row['seconds']:.1%}" for name, row in rows.items())
    tokens, floor = num_tokens * world.size, ours["flops"] / peak
    return {
        "rows": [
            ("distillation", ours["seconds"], rows["with eager losses"]["seconds"], "with eager losses", floor),
            *((name, row["seconds"], alone["seconds"], "task loss alone", floor) for name, row in rows.items()),
        ],
        "fine-tuning": flops_of_fine_tuning(sizes, shape_BST) / peak,
        "memory": peak_memory,
        "setting": f"{world.size} x {device_name(world.device)}: {'. '.join(plan_lines)}.",
        "summary": f"{tokens / ours['seconds']:,.0f} tokens/s; useful FLOPs "
        f"{ours['flops'] / ours['seconds'] / peak:.1%} of the matmul peak of {peak / 1e12:.0f} TFLOP/s.\n"
        f"Share of the step that the losses of distillation take (all that the task loss alone does not): "
        f"{', '.join(shares)}",
    }


PARTS: dict[str, Callable[..., Any]] = {
    "traffic": traffic,
    "memory": memory_part,
    "draws-traffic": step_draws.traffic,
    "draws-seconds": step_draws.seconds,
    "overhead": overhead,
    "host": host,
    "gpu": gpu,
    "trainer": trainer,
}


def main(part: str, path: str, options: str) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = PARTS[part](folder=str(Path(path).parent), **json.loads(options))
    if int(os.environ["RANK"]) == 0:
        Path(path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
