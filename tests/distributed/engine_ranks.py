"""What the ranks of test_engine.py run: the modular task under the engine, and the same in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import Checkpointer, TrainState, full_weights
from pipeline.config import DistillConfig, OptimConfig
from pipeline.data import Cursor
from pipeline.distill import modular_task
from pipeline.engine import Engine, join_world
from pipeline.families import family_of
from pipeline.losses import GlobalCounts
from pipeline.modular import ModularModel
from pipeline.world import World
from tests.tiny import on_device, random_batch, tiny_t5

NUM_STEPS, NUM_LOCAL = 7, 3
SETTINGS = DistillConfig(
    local_steps=NUM_LOCAL,
    optim=OptimConfig(num_steps=NUM_STEPS, learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.05),
)


def new_task() -> Any:
    teacher = tiny_t5("v1.0")
    family = family_of("t5")
    model = ModularModel(teacher, family, SETTINGS.granularities, SETTINGS.init)
    return modular_task(model, family, teacher.config, SETTINGS, seed=5)


def global_batch(step: int, size: int) -> list[Any]:
    return [random_batch(step, index, num_examples=2 + index) for index in range(size)]


def counts_of(batches: list[Any]) -> GlobalCounts:
    return GlobalCounts(int(sum((batch.labels_BT != -100).sum() for batch in batches)), len(batches))


def reference(num_micro_batches: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses by step and final weights in plain PyTorch on one process; gradients of unused layers are zeros."""
    task, optim = new_task(), SETTINGS.optim
    parameters = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
    groups = [{"params": [p], "lr": optim.learning_rate * task.lr_factor(name)} for name, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    losses = []
    for step in range(NUM_STEPS):
        if step in task.restarts:
            optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
        batches = global_batch(step, num_micro_batches)
        total = 0.0
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for batch in batches:
            outputs = task.module(batch, *task.forward_args(step, batch))
            loss = task.loss_terms(step, outputs, counts_of(batches)).total
            loss.backward()
            total += loss.item()
        for name in {task.clip_group(name) for name in parameters}:
            members = [p for key, p in parameters.items() if task.clip_group(key) == name]
            torch.nn.utils.clip_grad_norm_(members, optim.max_grad_norm)
        optimizer.step()
        losses.append(total)
    return losses, {name: p.detach() for name, p in parameters.items()}


class Run:
    """The task under the engine on this rank."""

    def __init__(self, num_micro_batches: int, ds_config: str) -> None:
        self.world: World = join_world()
        self.task = new_task()
        self.num_micro_batches = num_micro_batches
        self.engine = Engine(
            self.task.module,
            world=self.world,
            ds_config=ds_config,
            optim=SETTINGS.optim,
            leaf_classes=self.task.leaf_classes,
            lr_factor=self.task.lr_factor,
            clip_group=self.task.clip_group,
            num_accumulated=num_micro_batches // self.world.size,
        )

    def step(self, step: int) -> float:
        if step in self.task.restarts:
            self.engine.restart_optimizer()
        batches = global_batch(step, self.num_micro_batches)
        counts = counts_of(batches)
        total = torch.zeros((), device=self.world.device)
        for batch in batches[self.world.rank :: self.world.size]:
            batch = on_device(batch, self.world.device)
            outputs = self.engine(batch, *self.task.forward_args(step, batch))
            loss = self.task.loss_terms(step, outputs, counts).total
            self.engine.backward(loss)
            total += loss.detach()
        self.engine.step(SETTINGS.optim.learning_rate)
        return self.world.sum(total).item()

    def checkpointer(self, folder: str) -> Checkpointer:
        return Checkpointer(Path(folder), self.world, keep=3, inputs={})


def train(
    num_micro_batches: int, folder: str, first: int = 0, last: int = NUM_STEPS, ds_config: str = "zero3_cpu"
) -> list[float]:
    """Steps first..last-1, from a checkpoint in `folder` when first > 0, then a checkpoint there."""
    run = Run(num_micro_batches, ds_config)
    checkpointer = run.checkpointer(folder)
    state = checkpointer.restore(run.engine, run.task.restarts)
    assert (state.step if state else 0) == first
    losses = [run.step(step) for step in range(first, last)]
    checkpointer.save(run.engine, TrainState(last, Cursor(epoch=1, window=2, step_in_window=3)))
    run.world.close()
    return losses


def errors(folder: str, expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(mean, largest) difference between the weights of the newest checkpoint and these."""
    weights = full_weights(sorted(Path(folder).glob("step_*"))[-1])
    assert weights.keys() == expected.keys()
    differences = torch.cat([(weights[name] - expected[name]).abs().flatten() for name in expected])
    return differences.mean().item(), differences.max().item()


def norms_around_clipping(ds_config: str) -> tuple[list[float], list[float]]:
    """Gradient norm of each modular layer before and after clipping."""
    run_size = World.from_environment().size
    run = Run(run_size, ds_config)
    batches = global_batch(0, run_size)
    outputs = run.engine(batches[run.world.rank], None)
    run.engine.backward(run.task.loss_terms(0, outputs, counts_of(batches)).total)
    before = run.engine._clip().tolist()
    after = run.engine._clip().tolist()
    run.world.close()
    return before, after


def non_finite() -> str:
    """What happens to the weights and moments when one rank has a NaN loss."""
    run_size = World.from_environment().size
    run = Run(run_size, "zero3_cpu")
    before = {part.name: part.tensors["weight"].clone() for part in run.engine.slices()}
    batch = global_batch(0, run_size)[run.world.rank]
    outputs = run.engine(batch, *run.task.forward_args(0, batch))
    loss = run.task.loss_terms(0, outputs, counts_of([batch])).total
    run.engine.backward(loss * (float("nan") if run.world.rank == 0 else 1.0))
    try:
        run.engine.step(1.0)
    except RuntimeError as error:
        same = all(torch.equal(part.tensors["weight"], before[part.name]) for part in run.engine.slices())
        return f"{error}".splitlines()[0] + f" weights unchanged: {same}"
    return "no error"
