"""What the ranks of test_engine.py run: the modular task under the engine, and the same in plain PyTorch."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from pipeline.checkpoints.checkpointer import Checkpointer, Keep, TrainState
from pipeline.checkpoints.format import full_weights
from pipeline.config.recipe import DistillConfig, LossConfig, OptimConfig
from pipeline.data import Cursor
from pipeline.distill import modular_task
from pipeline.families import family_of
from pipeline.footprint.sharding import read_ds_config
from pipeline.model.losses import GlobalCounts
from pipeline.model.modular import ModularModel
from pipeline.training.clock import PhaseClock
from pipeline.training.engine import Engine, join_world
from pipeline.training.loop import recompute_in_backward
from pipeline.training.validation import Translation, Validator
from pipeline.world import World
from tests.tiny import on_device, random_batch, tiny_model

NUM_STEPS, NUM_LOCAL = 7, 3
ONE, SEVERAL = ("sampled",), ("sampled", "coarsest", "sampled")
"""Draws that share a micro-batch."""


def settings_of(num_steps: int, num_local: int, draws: Sequence[str] = ONE) -> DistillConfig:
    optim = OptimConfig(num_steps=num_steps, learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.05)
    losses = LossConfig(attention_self=0.3, attention_cross=0.2)
    return DistillConfig(local_steps=num_local, optim=optim, losses=losses, draws=tuple(draws))


SETTINGS = settings_of(NUM_STEPS, NUM_LOCAL)
SHORT = settings_of(3, 1)


def new_task(settings: DistillConfig = SETTINGS, kind: str = "v1.0") -> Any:
    teacher = tiny_model(kind)
    family = family_of(teacher.config.model_type)
    if not family.has_attention_losses:
        settings = dataclasses.replace(settings, losses=LossConfig())
    model = ModularModel(teacher, family, settings.by_stack, settings.init)
    return modular_task(model, family, teacher.config, settings, seed=5)


def global_batch(step: int, size: int) -> list[Any]:
    return [random_batch(step, index, num_examples=2 + index) for index in range(size)]


def counts_of(batches: list[Any]) -> GlobalCounts:
    return GlobalCounts(int(sum((batch.labels_BT != -100).sum() for batch in batches)), len(batches))


def sgd(groups: Any, lr: float, weight_decay: float, **of_adam: Any) -> torch.optim.Optimizer:
    """Stands in for AdamW, which divides gradients by their own size: with SGD weights show gradients as they are."""
    return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay)


def reference(
    num_micro_batches: int,
    settings: DistillConfig = SETTINGS,
    new_optimizer: Any = torch.optim.AdamW,
    kind: str = "v1.0",
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses by step and final weights in plain PyTorch on one process: a forward pass for each draw, and the mean of
    their losses; gradients of unused layers are zeros."""
    task, optim = new_task(settings, kind), settings.optim
    parameters = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
    groups = [{"params": [p], "lr": optim.learning_rate * task.lr_factor(name)} for name, p in parameters.items()]

    def started() -> torch.optim.Optimizer:
        return new_optimizer(groups, lr=0.0, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)

    optimizer = started()
    losses = []
    for step in range(optim.num_steps):
        if step in task.restarts:
            optimizer = started()
        batches = global_batch(step, num_micro_batches)
        total = 0.0
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for batch in batches:
            counts = counts_of(batches)
            draws = task.draws(step, batch.index)
            each_alone = [None] if draws is None else [(draw,) for draw in draws]
            for alone in each_alone:
                outputs = task.module(batch, *task.forward_args(step, alone, counts))
                loss = task.loss_terms(step, outputs, counts).total / len(each_alone)
                loss.backward()
                total += loss.item()
        for name in {task.clip_group(name) for name in parameters}:
            members = [p for key, p in parameters.items() if task.clip_group(key) == name]
            torch.nn.utils.clip_grad_norm_(members, optim.max_grad_norm)
        optimizer.step()
        losses.append(total)
    return losses, {name: p.detach() for name, p in parameters.items()}


def unreadable(shape: torch.Size) -> torch.Tensor:
    """A tensor over a file that has been cut off since: reading of it ends the process."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4 * shape.numel())
        tensor = torch.from_file(file.name, shared=True, size=shape.numel())
        file.truncate(0)
    return tensor.view(shape)


class Run:
    """The task under the engine on this rank."""

    def __init__(
        self,
        num_micro_batches: int,
        ds_config: str,
        *,
        settings: DistillConfig = SETTINGS,
        recompute: bool = False,
        world: World | None = None,
        kind: str = "v1.0",
    ) -> None:
        self.world: World = world or join_world()
        self.settings = settings
        self.task = new_task(settings, kind)
        if recompute:
            recompute_in_backward(self.task.layers)
        self.num_micro_batches = num_micro_batches
        if self.world.rank and read_ds_config(ds_config)["zero_optimization"]["stage"] == 3:
            for parameter in self.task.module.parameters():  # only rank 0 reads weights
                parameter.data = unreadable(parameter.shape)
        self.engine = Engine(
            self.task.module,
            world=self.world,
            ds_config=ds_config,
            optim=settings.optim,
            leaf_classes=self.task.leaf_classes,
            lr_factor=self.task.lr_factor,
            clip_group=self.task.clip_group,
            num_accumulated=num_micro_batches // self.world.size,
        )

    def step(self, step: int) -> float:
        if step in self.task.restarts:
            self.engine.restart_optimizer()
        batches = global_batch(step, self.num_micro_batches)
        counts = dataclasses.replace(counts_of(batches), upstream=self.engine.upstream)
        total = torch.zeros((), device=self.world.device)
        for batch in batches[self.world.rank :: self.world.size]:
            batch = on_device(batch, self.world.device)
            draws = self.task.draws(step, batch.index)
            outputs = self.engine(batch, *self.task.forward_args(step, draws, counts))
            loss = self.task.loss_terms(step, outputs, counts).total
            self.engine.backward(loss)
            total += loss.detach()
        self.engine.step(self.settings.optim.learning_rate)
        return self.world.sum(total).item()

    def weights(self) -> dict[str, torch.Tensor]:
        """All trained weights in fp32, put together from every rank's slices. Collective."""
        whole = {
            n: torch.zeros(p.shape if not hasattr(p, "ds_shape") else p.ds_shape)
            for n, p in self.task.module.named_parameters()
            if p.requires_grad
        }
        for part in self.engine.slices():
            weight = part.tensors["weight"]
            whole[part.name].view(-1)[part.offset : part.offset + weight.numel()] = weight
        return {name: self.world.sum(weight) for name, weight in whole.items()}

    def checkpointer(self, folder: str) -> Checkpointer:
        return Checkpointer(Path(folder), self.world, keep=Keep(last=3), inputs={})


def train(
    num_micro_batches: int,
    folder: str,
    first: int = 0,
    last: int = NUM_STEPS,
    ds_config: str = "zero3_cpu",
    draws: Sequence[str] = ONE,
) -> list[float]:
    """Steps first..last-1, from a checkpoint in `folder` when first > 0, then a checkpoint there."""
    run = Run(num_micro_batches, ds_config, settings=settings_of(NUM_STEPS, NUM_LOCAL, draws))
    checkpointer = run.checkpointer(folder)
    state = checkpointer.restore(run.engine, run.task.restarts)
    assert (state.step if state else 0) == first
    losses = [run.step(step) for step in range(first, last)]
    checkpointer.save(run.engine, TrainState(last, Cursor(epoch=1, window=2, step_in_window=3)))
    checkpointer.finish()
    run.world.close()
    return losses


def errors(folder: str, expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(mean, largest) difference between the weights of the newest checkpoint and these."""
    weights = full_weights(sorted(Path(folder).glob("step_*"))[-1])
    assert weights.keys() == expected.keys()
    differences = torch.cat([(weights[name] - expected[name]).abs().flatten() for name in expected])
    return differences.mean().item(), differences.max().item()


def first_pass(ds_config: str) -> tuple[list[float], list[float], float]:
    """Of the local phase: gradient norm of each modular layer before and after clipping, and the share of the weights
    of their linear layers, gathered for forward, whose memory is still held when backward starts."""
    run_size = World.from_environment().size
    run = Run(run_size, ds_config)
    gathered: list[StorageWeakRef] = []
    for module in run.task.module.modular.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, *_: gathered.append(StorageWeakRef(m.weight.untyped_storage())))
    batches = global_batch(0, run_size)
    outputs = run.engine(batches[run.world.rank], None)
    held = sum(not each.expired() for each in gathered) / len(gathered)
    run.engine.backward(run.task.loss_terms(0, outputs, counts_of(batches)).total)
    before = run.engine._clip().tolist()
    after = run.engine._clip().tolist()
    run.world.close()
    return before, after, held


def in_fp32(ds_config: str, folder: str) -> str:
    """Path of a configuration of ds_configs/ with bf16 turned off, so that it can be compared to the last digits."""
    config = read_ds_config(ds_config)
    config["bf16"] = {"enabled": False}
    path = Path(folder) / f"{ds_config}_{os.environ['RANK']}.json"
    path.write_text(json.dumps(config))
    return str(path)


def modes_in_turn(folder: str, turns: list[tuple[str, int, bool]], draws: Sequence[str] = ONE) -> list[float]:
    """One training: each configuration makes some steps, perhaps recomputing activations, and saves; the next continues
    from its checkpoint."""
    world = join_world()
    losses: list[float] = []
    for ds_config, num_steps, recompute in turns:
        settings = settings_of(NUM_STEPS, NUM_LOCAL, draws)
        run = Run(4, in_fp32(ds_config, folder), settings=settings, recompute=recompute, world=world)
        checkpointer = run.checkpointer(folder + "/checkpoints")
        state = checkpointer.restore(run.engine, run.task.restarts)
        assert (state.step if state else 0) == len(losses)
        for _ in range(num_steps):
            losses.append(run.step(len(losses)))
        checkpointer.save(run.engine, TrainState(len(losses), Cursor()))
        checkpointer.finish()
    world.close()
    return losses


def in_bf16(kind: str, ds_configs: Sequence[str]) -> list[list[float]]:
    """Losses by step under each configuration, each from the start; at the end logits, which validation asks for."""
    world, found = join_world(), []
    for ds_config in ds_configs:
        run = Run(2, ds_config, settings=SHORT, world=world, kind=kind)
        found.append([run.step(step) for step in range(SHORT.optim.num_steps)])
        draws = run.task.draws(SHORT.local_steps, 0)[:1]
        with torch.no_grad():
            logits_NV = run.engine(random_batch(0), draws).student_logits_NV
        assert torch.isfinite(logits_NV).all()
        assert not run.engine._engine.tput_timer.config.enabled, "it waits for the device"
        check_order(run)
    world.close()
    return found


def by_family(kinds: Sequence[str], ds_configs: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """For each kind of model under each configuration, how far it is from plain PyTorch: the losses by a share of
    theirs, the weights on the mean and at most. Biases of keys are left out: softmax does not see them, so their
    gradients are noise, which AdamW makes as large as any."""
    world, found = join_world(), {}
    for kind in kinds:
        losses, weights = reference(2, SHORT, kind=kind)
        for ds_config in ds_configs:
            run = Run(2, ds_config, settings=SHORT, world=world, kind=kind)
            ours = [run.step(step) for step in range(SHORT.optim.num_steps)]
            apart = max(abs(a / b - 1) for a, b in zip(ours, losses, strict=True))
            seen = {name: weight for name, weight in run.weights().items() if not name.endswith("k_proj.bias")}
            differences = torch.cat([(weight - weights[name]).abs().flatten() for name, weight in seen.items()])
            found[f"{kind} {ds_config}"] = apart, differences.mean().item(), differences.max().item()
    world.close()
    return found


class GatherStream:
    """In place of the stream that a GPU gathers on: the weights at the moments when it is made to wait."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seen: list[torch.Tensor] = []

    def wait_stream(self, stream: object) -> None:
        self.seen.append(self.run.engine._partition.flats[0].clone())


def check_order(run: Run) -> None:
    """Gathers wait for the optimizer's step and for what is restored, and for nothing before."""
    stream = run.engine._partition.gather_stream = GatherStream(run)
    with patch.object(torch.cuda, "current_stream", lambda: None):
        run.step(0)
        run.engine.restored(1)
    after = run.engine._partition.flats[0]
    assert [torch.equal(each, after) for each in stream.seen] == [True, True]
    run.engine._partition.gather_stream = None


def norms(ds_config: str) -> int:
    """How often DeepSpeed computes a norm of gradients in a step, or looks for one that is not finite, which clipping
    has done already."""
    run = Run(2, ds_config)
    asked: list[Any] = []
    optimizer = run.engine._engine.optimizer
    names = "get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload", "has_overflow"
    for name in names if "zero2" in ds_config else names[:2]:
        own = getattr(optimizer, name)
        setattr(optimizer, name, lambda *args, own=own: asked.append(args) or own(*args))
    run.step(0)
    run.world.close()
    return len(asked)


def non_finite(ds_config: str) -> str:
    """What happens to the weights and moments when one rank has a NaN loss."""
    run_size = World.from_environment().size
    run = Run(run_size, ds_config)
    before = [{key: each.clone() for key, each in part.tensors.items()} for part in run.engine.slices()]
    batch = global_batch(0, run_size)[run.world.rank]
    counts = counts_of([batch])
    outputs = run.engine(batch, *run.task.forward_args(0, run.task.draws(0, batch.index), counts))
    loss = run.task.loss_terms(0, outputs, counts).total
    run.engine.backward(loss * (float("nan") if run.world.rank == 0 else 1.0))
    said = "no error"
    try:
        run.engine.step(1.0)
    except FloatingPointError as error:
        said = str(error)
    after = [part.tensors for part in run.engine.slices()]
    same = all(torch.equal(a[key], b[key]) for a, b in zip(before, after, strict=True) for key in a)
    run.world.close()
    return f"{said}; unchanged: {same}"


def greedy(under_engine: bool) -> dict[str, list[list[int]]]:
    """Greedy outputs of the teacher and the coarsest assembly on three micro-batches, gathered from all ranks."""
    found: list[list[list[int]]] = []

    def score(outputs: Any, references: Any) -> float:
        found.append(sorted(outputs))
        return 0.0

    run = Run(World.from_environment().size, "zero3_cpu") if under_engine else None
    task, world = (run.task, run.world) if run else (new_task(), World(0, 1, 0, torch.device("cpu")))
    names = ("teacher", list(task.validations)[-1])
    validator = Validator(
        run.engine if run else task.module,  # type: ignore[arg-type]
        world,
        world.side_group(),
        PhaseClock(world.device),
        args=task.validations,
        batches=[],
        decoded=[random_batch(3, index, longest=7 + 2 * index) for index in range(3)],
        translation=Translation({name: task.validations[name][:1] for name in names}, end_id=9, score=score),
    )
    task.module.eval()
    validator.bleu()
    if run:
        run.world.close()
    return dict(zip(names, found, strict=True))
