"""Saving beside training: what a save costs the training loop, and bytes a trainable parameter.

Baselines: the same save waited for, and DeepSpeed's own save_checkpoint without the frozen parameters.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline.bench import Measure, report
from pipeline.checkpoints.checkpointer import Checkpointer, Keep, TrainState
from pipeline.config.recipe import DistillConfig, OptimConfig
from pipeline.data import Cursor, MicroBatch
from pipeline.distill import modular_task
from pipeline.families import family_of
from pipeline.families.t5 import new_t5
from pipeline.model.losses import GlobalCounts
from pipeline.model.modular import ModularModel
from pipeline.training.engine import Engine, join_world
from pipeline.world import World

VOCABULARY = 4096
GRANULARITIES = (2, 3, 6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=512, help="d_model of the teacher (default 512)")
    parser.add_argument("--layers", type=int, default=6, help="teacher layers of each stack (default 6)")
    parser.add_argument("--examples", type=int, default=8, help="examples of a step, 128/32 tokens each (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of everything, in turns (default 5)")
    parser.add_argument("--folder", type=Path, help="where to save (default: the system's temporary folder)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the table to DIR as Markdown, too")


def main(arguments: argparse.Namespace) -> None:
    world = join_world()
    training = _Training(world, arguments.width, arguments.layers, arguments.examples)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        measures = measure(training, world, folder, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    notes = (
        f"{training.num_parameters / 1e6:.1f} M trainable parameters, {world.size} rank, median of {arguments.rounds} "
        "rounds in turns.\nCost of a save: a step with a save before it, minus a step without. DeepSpeed's is neither "
        "synced to the disk\nnor checksummed. Floor of time: a copy of as many bytes in memory; of bytes: weight and "
        "two moments in fp32."
    )
    report("checkpoint", measures, notes, arguments.write)


class _Training:
    """Distillation steps on one batch of random tokens."""

    def __init__(self, world: World, width: int, layers: int, num_examples: int) -> None:
        sizes = {"d_model": width, "d_kv": 64, "d_ff": 2 * width, "num_heads": width // 64}
        depth = {"num_layers": layers, "num_decoder_layers": layers, "dropout": 0.0}
        teacher = new_t5(VOCABULARY, {**sizes, **depth}, 0)
        family = family_of("t5")
        settings = DistillConfig(granularities=GRANULARITIES, local_steps=0, optim=OptimConfig(num_steps=1000))
        model = ModularModel(teacher, family, (GRANULARITIES, GRANULARITIES), settings.init)
        self._task = modular_task(model, family, teacher.config, settings, 0)
        self.num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.engine = Engine(
            model,
            world=world,
            ds_config="zero3" if world.device.type == "cuda" else "zero3_cpu",
            optim=settings.optim,
            leaf_classes=self._task.leaf_classes,
            lr_factor=lambda name: 1.0,
            clip_group=self._task.clip_group,
            num_accumulated=1,
        )
        source_BS, labels_BT = (
            torch.randint(2, VOCABULARY, (num_examples, length), device=world.device) for length in (128, 32)
        )
        mask_BS = torch.ones_like(source_BS, dtype=torch.bool)
        self._batch = MicroBatch(0, np.arange(num_examples), source_BS, mask_BS, labels_BT)
        self._counts = GlobalCounts(labels_BT.numel() * world.size, world.size, self.engine.upstream)
        self._device = world.device
        self.num_steps = 0

    def step(self) -> None:
        step = self.num_steps % 2
        args = self._task.forward_args(step, self._task.draws(step, self._batch.index), self._counts)
        outputs = self.engine(self._batch, *args)
        self.engine.backward(self._task.loss_terms(1, outputs, self._counts).total)
        self.engine.step(1e-5)
        self.num_steps += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def measure(training: _Training, world: World, folder: Path, rounds: int) -> list[Measure]:
    checkpointer = Checkpointer(folder / "ours", world, keep=Keep(last=1), inputs={})
    engine = training.engine
    own_bytes = sum(tensor.numel() * 4 for part in engine.slices() for tensor in part.tensors.values())
    buffers = torch.empty(2, own_bytes, dtype=torch.uint8)

    def save() -> None:
        checkpointer.save(engine, TrainState(training.num_steps, Cursor()))

    def save_and_step() -> None:
        save()
        training.step()

    def save_waited_for() -> None:
        save()
        checkpointer.finish()
        training.step()

    def save_by_deepspeed() -> None:
        # its own engine, behind ours
        engine._engine.save_checkpoint(str(folder / "deepspeed"), tag="last", exclude_frozen_parameters=True)
        training.step()

    runs = {
        "step": training.step,
        "snapshot": save,
        "beside": save_and_step,
        "waited": save_waited_for,
        "deepspeed": save_by_deepspeed,
        "copy": lambda: buffers[0].copy_(buffers[1]),
    }
    seconds = _median_s(runs, checkpointer.finish, rounds)
    costs = {name: seconds[name] - seconds["step"] for name in ("beside", "waited", "deepspeed")}
    ours, deepspeeds = (_bytes_of(folder / name) / training.num_parameters for name in ("ours", "deepspeed"))
    floor = seconds["copy"]
    return [
        Measure("checkpoint", "cost of a save", costs["beside"], costs["waited"], "waited for", "s", floor),
        Measure("checkpoint", "cost of a save", costs["beside"], costs["deepspeed"], "deepspeed", "s", floor),
        Measure("checkpoint", "stall over step", seconds["snapshot"], seconds["step"], "one step", "s", floor),
        Measure("checkpoint", "bytes a parameter", ours, deepspeeds, "deepspeed", "B", 12.0),
    ]


def _median_s(runs: Mapping[str, Callable[[], object]], finish: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median seconds of each; what goes on in the background has ended before each begins."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-1, rounds):
        for name, run in runs.items():
            finish()
            begin = time.perf_counter()
            run()
            if number >= 0:
                times[name].append(time.perf_counter() - begin)
    finish()
    return {name: statistics.median(values) for name, values in times.items()}


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
