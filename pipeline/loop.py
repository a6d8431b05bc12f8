"""The training loop: one for the teacher, the modular layers and the baselines. It decides order; nothing else.

What is trained is a Task: a module, its losses, and which assembly (if any) each micro-batch takes. The loop owns
steps, accumulation, the schedule, checkpoints, validation, records, and stopping in good order.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from data_prep.partition import mix
from pipeline.checkpoint import Checkpointer, TrainState
from pipeline.config import BatchConfig, LoopConfig, OptimConfig
from pipeline.data import Batches, Cursor, MicroBatch, StepBatch, evaluation_batches
from pipeline.engine import Engine
from pipeline.losses import GlobalCounts, LossTerms, task_loss
from pipeline.metrics import MetricLog
from pipeline.preempt import EXIT_REQUEUE, StopSignal
from pipeline.rundir import Stage, write_atomic
from pipeline.schedule import learning_rate
from pipeline.world import World, logger_of


@dataclass(frozen=True)
class Task:
    """What a training run trains. Modules return outputs with `student_logits_NV` and `labels_N`."""

    module: nn.Module
    leaf_classes: Sequence[type[nn.Module]]
    lr_factor: Callable[[str], float]
    clip_group: Callable[[str], str]
    forward_args: Callable[[int, MicroBatch], tuple[Any, ...]]
    """(step, micro-batch) -> further arguments of the module's forward."""
    loss_terms: Callable[[int, Any, GlobalCounts], LossTerms]
    """(step, outputs, counts) -> losses."""
    validations: Mapping[str, tuple[Any, ...]]
    """Further arguments of forward for each validation loss, by its name."""
    restarts: tuple[int, ...] = ()
    """Steps at which the objective changes: the optimizer's moments and the warm-up start anew."""


def begin_stage(stage: Stage, world: World, *, extend: bool) -> bool:
    """Make a training stage's folder ready; True when its published output is up to date already. Collective."""
    done = world.any(world.is_main and stage.stamp() is not None)
    if done:
        logger_of(world).info("%s is up to date", stage.name)
    elif world.is_main:
        stage.begin(extend=extend)
    world.barrier()
    return done


class Trainer:
    """One training run of one stage, from its newest checkpoint to its last step."""

    def __init__(
        self, task: Task, stage: Stage, world: World, *, optim: OptimConfig, batch: BatchConfig, loop: LoopConfig
    ) -> None:
        self.task, self.stage, self.world = task, stage, world
        self.optim, self.cadence = optim, loop
        data = stage.run.data
        seed = stage.identity["seed"]
        if batch.micro_batches_per_step % world.size:
            raise ValueError(
                f"micro_batches_per_step is {batch.micro_batches_per_step}, which {world.size} ranks do not divide"
            )
        self.batches = Batches(data, "train", seed, batch.tokens_per_micro_batch, batch.micro_batches_per_step)
        self.validation = evaluation_batches(data, "validation", batch.tokens_per_micro_batch, loop.validation_examples)
        self.engine = Engine(
            task.module,
            world=world,
            ds_config=loop.ds_config,
            optim=optim,
            leaf_classes=task.leaf_classes,
            lr_factor=task.lr_factor if optim.family_lr_factors else lambda name: 1.0,
            clip_group=task.clip_group,
            num_accumulated=batch.micro_batches_per_step // world.size,
        )
        self.checkpointer = Checkpointer(
            stage.folder / "checkpoints", world, keep=loop.keep_checkpoints, inputs=stage.inputs
        )
        self.stop = StopSignal(stage.run.root / "STOP", world)
        task.module.train()

    def train(self) -> None:
        """Run to the last step; leaves with exit code 85 when asked to stop before it."""
        state = self.checkpointer.restore(self.engine, self.task.restarts) or TrainState(0, Cursor())
        num_steps = self.optim.num_steps
        if state.step > num_steps or (
            state.step == num_steps and self.checkpointer.restored_inputs != self.stage.inputs
        ):
            raise ValueError(
                f"the newest checkpoint is at step {state.step}: give a num_steps above it to continue, not {num_steps}"
            )
        if state.step:
            logger_of(self.world).info("%s: continuing from step %d of %d", self.stage.name, state.step, num_steps)
        sums = _Sums(self.engine.clip_groups)
        cadence = self.cadence
        with _Records(self.stage, self.world, state.step, num_steps) as records:
            while state.step < num_steps:
                if state.step in self.task.restarts:
                    self.engine.restart_optimizer()
                step_batch, cursor = self.batches.step(state.cursor, self.world.rank, self.world.size)
                self._step(state.step, step_batch, sums)
                state = TrainState(state.step + 1, cursor)
                records.advance()
                last = state.step == num_steps
                stopping = False
                if last or state.step % cadence.log_every_steps == 0:
                    records.losses(state.step, sums.take(self.world))
                    stopping = self.stop.agreed() and not last
                if last or state.step % cadence.validate_every_steps == 0:
                    records.validation(state.step, self._validate())
                if last or stopping or state.step % cadence.save_every_steps == 0:
                    self.checkpointer.save(self.engine, state)
                if stopping:
                    self._leave(state)

    def _learning_rate(self, step: int) -> float:
        optim = self.optim
        return learning_rate(
            step,
            peak=optim.learning_rate,
            warmup_steps=optim.warmup_steps,
            num_steps=optim.num_steps,
            restarts=self.task.restarts,
        )

    def _step(self, step: int, batch: StepBatch, sums: _Sums) -> None:
        counts = GlobalCounts(batch.num_target_tokens, batch.num_micro_batches_with_data)
        for micro_batch in batch.micro_batches:
            micro_batch = _on_device(micro_batch, self.world)
            # randomness (dropout) is a function of position too, so that a resumed run draws the same
            torch.manual_seed(mix(self.stage.identity["seed"], step, micro_batch.index) >> 1)
            outputs = self.engine(micro_batch, *self.task.forward_args(step, micro_batch))
            terms = self.task.loss_terms(step, outputs, counts)
            self.engine.backward(terms.total)
            sums.add(terms.parts)
        sums.add_step(self.engine.step(self._learning_rate(step)), batch)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Cross entropy per token on the validation part, in nats, for each of the task's validations. Collective:
        every rank runs the same number of forwards."""
        losses: dict[str, float] = {}
        num_rounds = math.ceil(len(self.validation) / self.world.size)
        self.task.module.eval()
        for name, args in self.task.validations.items():
            total = torch.zeros(2, device=self.world.device)
            for round_ in range(num_rounds):
                index = round_ * self.world.size + self.world.rank
                micro_batch = _on_device(self.validation[index % len(self.validation)], self.world)
                outputs = self.engine(micro_batch, *args)
                if index < len(self.validation):
                    total[0] += task_loss(outputs.student_logits_NV, outputs.labels_N)
                    total[1] += outputs.labels_N.numel()
            loss, count = self.world.sum(total).tolist()
            losses[name] = loss / max(1.0, count)
        self.task.module.train()
        return losses

    def _leave(self, state: TrainState) -> None:
        """Say that this run, whose state is saved, wants to be queued again, and go."""
        if self.world.is_main:
            write_atomic(self.stage.folder / "REQUEUE", f"step {state.step}\n")
        logger_of(self.world).info("%s: asked to stop: saved at step %d", self.stage.name, state.step)
        self.world.close()
        raise SystemExit(EXIT_REQUEUE)


class _Sums:
    """Losses, norms and tokens between two records; stays on the device until taken."""

    def __init__(self, clip_groups: Sequence[str]) -> None:
        self._clip_groups = clip_groups
        self._restart()

    def _restart(self) -> None:
        self._parts: dict[str, torch.Tensor] = {}
        self._names_in_step: set[str] = set()
        self._num_steps: Counter[str] = Counter()
        self._norms: list[torch.Tensor] = []
        self._num_tokens = 0
        self._start_s = time.perf_counter()

    def add(self, parts: Mapping[str, torch.Tensor]) -> None:
        for name, part in parts.items():
            self._parts[name] = self._parts[name] + part if name in self._parts else part
        self._names_in_step |= parts.keys()

    def add_step(self, norms_G: torch.Tensor, batch: StepBatch) -> None:
        self._num_steps.update(self._names_in_step)
        self._names_in_step.clear()
        self._norms.append(norms_G)
        self._num_tokens += batch.num_target_tokens + batch.num_source_tokens

    def take(self, world: World) -> dict[str, float]:
        """Mean per step over all ranks, and start anew. Collective: every rank has the same names."""
        names = sorted(self._parts)
        totals = world.sum(torch.stack([self._parts[name].float() for name in names])).tolist()
        values = {name: total / self._num_steps[name] for name, total in zip(names, totals, strict=True)}
        norms_G = torch.stack(self._norms).mean(0).tolist()
        values |= {f"grad_norm/{name}": norm for name, norm in zip(self._clip_groups, norms_G, strict=True)}
        values["tokens_per_s"] = self._num_tokens / (time.perf_counter() - self._start_s)
        self._restart()
        return values


def _on_device(batch: MicroBatch, world: World) -> MicroBatch:
    tensors = {key: value for key, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    moved: dict[str, Any] = {key: tensor.to(world.device, non_blocking=True) for key, tensor in tensors.items()}
    return replace(batch, **moved)


class _Records:
    """What rank 0 shows and writes down: a progress bar, metrics.jsonl and TensorBoard. Silent on other ranks."""

    def __init__(self, stage: Stage, world: World, step: int, num_steps: int) -> None:
        self._name = stage.name
        self._log = None
        if world.is_main:
            self._log = MetricLog(stage.folder / "metrics.jsonl", stage.run.tensorboard / stage.name, step=step)
        self._bar = tqdm(
            total=num_steps,
            initial=step,
            desc=stage.name,
            unit="step",
            disable=None if world.is_main else True,
        )

    def advance(self) -> None:
        self._bar.update()

    def losses(self, step: int, values: dict[str, float]) -> None:
        if self._log:
            self._log.log(step, values)
        if "task" in values:
            self._bar.set_postfix_str(f"task {values['task']:.3f}", refresh=False)

    def validation(self, step: int, values: dict[str, float]) -> None:
        if self._log:
            self._log.log(step, {f"validation/{name}": value for name, value in values.items()})
            text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            tqdm.write(f"{self._name} step {step}: validation loss  {text}")
            sys.stdout.flush()

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._log:
            self._log.close()
