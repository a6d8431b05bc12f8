"""The training loop: one for the teacher, the modular layers and the baselines. It decides order; nothing else.

What is trained is a Task: a module, its losses, and which assembly (if any) each micro-batch takes. The loop owns
steps, accumulation, the schedule, checkpoints, validation, records, and stopping in good order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data_prep.partition import mix
from pipeline.checkpoints import Checkpointer, Keep, TrainState
from pipeline.config import BatchConfig, LoopConfig, OptimConfig
from pipeline.data import Batches, Cursor, StepBatch, evaluation_batches, on_device
from pipeline.exits import EXIT_MISTAKE, EXIT_REQUEUE
from pipeline.footprint import Machine, plan, sizes_of
from pipeline.model import Draws, GlobalCounts, LossTerms, ModularLeaf, TeacherLeaf, text_of
from pipeline.rundir import Stage, StageConflict, write_atomic
from pipeline.schedule import learning_rate
from pipeline.training.cadence import Cadence
from pipeline.training.clock import PhaseClock
from pipeline.training.engine import Engine
from pipeline.training.preempt import StepFlags, StopSignal
from pipeline.training.records import Records, Sums
from pipeline.training.validation import Translation, Validator
from pipeline.training.watchdog import Watchdog
from pipeline.world import World, logger_of


@dataclass(frozen=True)
class Task:
    """What a training run trains. Modules return outputs with `task_sum` and `labels_N`."""

    module: nn.Module
    leaf_classes: Sequence[type[nn.Module]]
    lr_factor: Callable[[str], float]
    clip_group: Callable[[str], str]
    forward_args: Callable[[int, Draws, GlobalCounts], tuple[Any, ...]]
    """(step, draws, counts) -> further arguments of the module's forward."""
    loss_terms: Callable[[int, Any, GlobalCounts], LossTerms]
    """(step, outputs, counts) -> losses."""
    validations: Mapping[str, tuple[Any, ...]]
    """Further arguments of forward for each validation loss, by its name."""
    layers: Sequence[nn.Module]
    """What activation checkpointing runs again in backward, one at a time."""
    draws: Callable[[int, int], Draws] = lambda step, micro_batch: ()
    """(step, micro-batch) -> the assemblies that share it."""
    dearest_draws: Callable[[int], Draws] = lambda step: ()
    """Step -> those of its phase that take most memory."""
    restarts: tuple[int, ...] = ()
    """Steps at which the objective changes: the optimizer's moments and the warm-up start anew."""
    means: Sequence[str] = ()
    """Names of the means among the loss terms."""
    translation: Translation | None = None
    """What a small BLEU needs; None: there is none."""
    product: Mapping[str, Any] = field(default_factory=dict)
    """JSON that goes into every checkpoint: what its export needs to know beside the weights."""


def begin_stage(stage: Stage, world: World, *, extend: bool) -> bool:
    """Make a training stage's folder ready; True when its published output is up to date already. Collective.

    Raises:
        StageConflict: on rank 0, which says it; the others leave with the exit code of a mistake.
    """
    done = world.any(world.is_main and stage.stamp() is not None)
    if done:
        logger_of(world).info("%s is up to date", stage.name)
        return True
    conflict: StageConflict | None = None
    if world.is_main:
        try:
            stage.begin(extend=extend)
        except StageConflict as found:
            conflict = found
    refused = world.any(conflict is not None)
    if conflict is not None:
        raise conflict
    if refused:
        raise SystemExit(EXIT_MISTAKE)
    return False


class Trainer:
    """One training run of one stage, from its newest checkpoint to its last step."""

    def __init__(
        self,
        task: Task,
        stage: Stage,
        world: World,
        watchdog: Watchdog,
        *,
        optim: OptimConfig,
        batch: BatchConfig,
        loop: LoopConfig,
    ) -> None:
        self.task, self.stage, self.world, self.watchdog = task, stage, world, watchdog
        self.optim, self.cadence = optim, loop
        data = stage.run.data
        seed = stage.identity["seed"]
        if batch.micro_batches_per_step % world.size:
            raise ValueError(
                f"micro_batches_per_step is {batch.micro_batches_per_step}, which {world.size} ranks do not divide: "
                f"make it a multiple of {world.size}"
            )
        self.batches = Batches(data, "train", seed, batch.tokens_per_micro_batch, batch.micro_batches_per_step)
        self.clock = PhaseClock(world.device)
        if loop.recompute_activations:
            recompute_in_backward(task.layers)
        dearest = task.dearest_draws(optim.num_steps - 1) or ()
        sizes = replace(sizes_of(task.module, task.leaf_classes), draws=dearest, longest=self.batches.longest)
        ds_config, summary = plan(sizes, Machine.of(world), batch, loop)
        for line in summary:
            logger_of(world).info("%s: %s", stage.name, line)
        self.engine = Engine(
            task.module,
            world=world,
            ds_config=ds_config,
            optim=optim,
            leaf_classes=task.leaf_classes,
            lr_factor=task.lr_factor if optim.family_lr_factors else lambda name: 1.0,
            clip_group=task.clip_group,
            num_accumulated=batch.micro_batches_per_step // world.size,
        )
        self.checkpointer = Checkpointer(
            stage.folder / "checkpoints",
            world,
            keep=Keep(loop.keep_checkpoints, loop.keep_every_steps, loop.keep_best),
            inputs=stage.inputs,
            product=task.product,
            beside=loop.save_beside,
        )
        self.side_group = group = world.side_group()
        self.flags = StepFlags(group)
        budget, num_decoded = batch.tokens_per_micro_batch, loop.validation_bleu_examples
        self.validator = Validator(
            self.engine, world, group, self.clock,
            args=task.validations,
            batches=evaluation_batches(data, "validation", budget, loop.validation_examples),
            decoded=evaluation_batches(data, "validation", budget, num_decoded) if num_decoded else [],
            translation=task.translation,
        )  # fmt: skip
        task.module.train()

    def train(self) -> None:
        """Run to the last step; leaves with exit code 85 when asked to stop before it."""
        with self.watchdog.training(self.clock):
            self._rehearse()
            self._train()
        self.engine.close()

    def _train(self) -> None:
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
        stop = StopSignal(self.stage.run.root / "STOP", self.world, self.cadence.stop_before_end_s)
        records = Records(self.stage, self.world, state.step, num_steps)
        with records, stop, self.checkpointer:
            self._run(state, records, stop)
        self.flags.close()

    def _run(self, state: TrainState, records: Records, stop: StopSignal) -> None:
        """Steps from `state` to the last."""
        cadence, clock = self.cadence, self.clock
        sums = Sums(self.engine.clip_groups, self.task.means, self.world, clock)
        validations = Cadence(cadence.validate_every_steps, cadence.validate_every_s)
        saves = Cadence(cadence.save_every_steps, cadence.save_every_s)
        while state.step < self.optim.num_steps:
            clock.begin(state.step)
            if state.step in self.task.restarts:
                self.engine.restart_optimizer()
            step_batch, cursor = self.batches.step(state.cursor, self.world.rank, self.world.size)
            draws = [self.task.draws(state.step, each.index) for each in step_batch.micro_batches]
            self._step(state.step, step_batch, draws, sums, self._learning_rate(state.step))
            state = TrainState(state.step + 1, cursor)
            records.advance()
            last = state.step == self.optim.num_steps
            clock.enter("agree")
            stopping, unsaved, *late = self.flags.exchange(
                stop.asked(), self.checkpointer.failed, validations.is_late(), saves.is_late()
            )
            if unsaved:
                self.checkpointer.finish()  # raises what went wrong
            values: dict[str, float] = {}
            if last or state.step % cadence.log_every_steps == 0:
                values |= sums.take() | {"learning_rate": self._learning_rate(state.step - 1)}
            validation: dict[str, float] = {}
            if validations.is_due(state.step, late[0]) or last:
                validation, bleu = self._validate()
                values |= {f"validation/{name}": loss for name, loss in validation.items()}
                values |= {f"bleu/{name}": score for name, score in bleu.items()}
            records.write(state.step, values)
            if saves.is_due(state.step, late[1]) or last or stopping:
                clock.enter("save")
                self.checkpointer.save(self.engine, state, validation)
            if stopping and not last:
                self._leave(state)

    def _validate(self) -> tuple[dict[str, float], dict[str, float]]:
        """(losses, BLEU) by name. Collective."""
        self.task.module.eval()
        found = self.validator.losses(), self.validator.bleu()
        self.task.module.train()
        return found

    def _learning_rate(self, step: int) -> float:
        optim = self.optim
        return learning_rate(
            step,
            peak=optim.learning_rate,
            warmup_steps=optim.warmup_steps,
            num_steps=optim.num_steps,
            restarts=self.task.restarts,
        )

    def _rehearse(self) -> None:
        """Take the largest micro-batches and the dearest draws through a step of each phase that leaves everything as
        it was, before anything is restored: what does not fit into memory fails now and not after hours."""
        batch = self.batches.longest_step(self.world.rank, self.world.size)
        for step in (0, *self.task.restarts):
            sums = Sums(self.engine.clip_groups, self.task.means, self.world, self.clock)
            dearest = self.task.dearest_draws(step)
            self._step(step, batch, [dearest] * len(batch.micro_batches), sums, learning_rate=0.0)
            self.engine.restart_optimizer()
        self.clock.take()

    def _step(self, step: int, batch: StepBatch, draws: Sequence[Draws], sums: Sums, learning_rate: float) -> None:
        """One optimizer step. Collective.

        Args:
            draws: of each micro-batch of this rank.
        """
        counts = GlobalCounts(batch.num_target_tokens, batch.num_micro_batches_with_data, self.engine.upstream)
        losses: list[torch.Tensor] = []
        for micro_batch, drawn in zip(batch.micro_batches, draws, strict=True):
            args = self.task.forward_args(step, drawn, counts)
            self.clock.enter("forward", text_of(drawn))
            micro_batch = on_device(micro_batch, self.world)
            # randomness (dropout) is a function of position too, so that a resumed run draws the same
            torch.manual_seed(mix(self.stage.identity["seed"], step, micro_batch.index) >> 1)
            outputs = self.engine(micro_batch, *args)
            terms = self.task.loss_terms(step, outputs, counts)
            self.clock.enter("backward", self.clock.detail)
            self.engine.backward(terms.total)
            losses.append(terms.total.detach())
            sums.add(terms, counted=len(micro_batch.example_ids) > 0)
            del outputs, terms  # the states in them would stay through the next forward
        self.clock.enter("optimizer")
        try:
            norms_G = self.engine.step(learning_rate)
        except FloatingPointError as error:
            raise ValueError(self._diagnosis(step, batch, draws, losses, str(error))) from None
        sums.add_step(norms_G, batch)

    def _diagnosis(
        self, step: int, batch: StepBatch, draws: Sequence[Draws], losses: Sequence[torch.Tensor], what: str
    ) -> str:
        """One line about a step that is not finite: the micro-batches of all ranks whose loss is not, or all of them
        where only gradients are not. Collective.

        Args:
            draws, losses: of each of this rank's micro-batches.
        """
        broken = [not math.isfinite(loss) for loss in losses]
        in_loss = self.world.any(any(broken))
        parts = []
        for micro_batch, drawn, loss, is_broken in zip(batch.micro_batches, draws, losses, broken, strict=True):
            if is_broken or not in_loss:
                of = f" of {text_of(drawn)}" if drawn != () else ""
                examples = " ".join(map(str, micro_batch.example_ids))
                parts.append(f"micro-batch {micro_batch.index}: loss {loss:.4g}{of}, examples {examples}")
        told = "; ".join(text for text in self.world.gather("; ".join(parts), self.side_group) if text)
        return f"step {step} stopped before the optimizer moved: {what}; {told}"

    def _leave(self, state: TrainState) -> None:
        """Say that this run, whose state is saved, wants to be queued again, and go."""
        self.checkpointer.finish()
        self.flags.close()
        if self.world.is_main:
            write_atomic(self.stage.folder / "REQUEUE", f"step {state.step}\n")
        logger_of(self.world).info("%s: asked to stop: saved at step %d", self.stage.name, state.step)
        self.world.close()
        raise SystemExit(EXIT_REQUEUE)


def recompute_in_backward(layers: Sequence[nn.Module]) -> None:
    """Activation checkpointing of a whole model's layers, or of a modular model's leaves."""
    for layer in layers:
        if isinstance(layer, (TeacherLeaf, ModularLeaf)):
            layer.recompute = True
        else:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
