"""What a training run shows and writes down: one record a step that is recorded, a live line."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from pipeline.curves import MetricLog
from pipeline.data import StepBatch
from pipeline.model import LossTerms
from pipeline.rundir import Stage
from pipeline.training.clock import PhaseClock, memory_gib
from pipeline.world import World


class Sums:
    """Losses, norms and tokens between two records; stays on the device until taken.

    Args:
        means: names of the means among the loss terms, the same on every rank whatever it draws.
    """

    def __init__(self, clip_groups: Sequence[str], means: Sequence[str], world: World, clock: PhaseClock) -> None:
        self._clip_groups, self._mean_names = clip_groups, means
        self._world, self._clock = world, clock
        self._restart()

    def _restart(self) -> None:
        self._parts: dict[str, torch.Tensor] = {}
        self._means = {name: torch.zeros(2, device=self._world.device) for name in self._mean_names}
        self._names_in_step: set[str] = set()
        self._num_steps: Counter[str] = Counter()
        self._norms: list[torch.Tensor] = []
        self._num_tokens = 0
        self._start_s = time.perf_counter()

    def add(self, terms: LossTerms, *, counted: bool) -> None:
        """A micro-batch of this rank; one without data only fills a step up and is not counted in means."""
        for name, part in terms.parts.items():
            self._parts[name] = self._parts[name] + part if name in self._parts else part
        self._names_in_step |= terms.parts.keys()
        for name, (total, count) in terms.means.items() if counted else ():
            self._means[name][0] += total
            self._means[name][1] += count

    def add_step(self, norms_G: torch.Tensor, batch: StepBatch) -> None:
        self._num_steps.update(self._names_in_step)
        self._names_in_step.clear()
        self._norms.append(norms_G)
        self._num_tokens += batch.num_target_tokens + batch.num_source_tokens

    def take(self) -> dict[str, float]:
        """Over all ranks, and start anew: losses are means of a step, times those of the mean rank, memory that of the
        rank with most. Collective: every rank has the same names."""
        world, num_steps = self._world, len(self._norms)
        names = sorted(self._parts)
        seconds = self._clock.take()
        phases = sorted(seconds.keys() | {"data", "forward", "backward", "optimizer"})
        times = torch.tensor([seconds.get(phase, 0.0) for phase in phases], device=world.device)
        parts = [self._parts[name].float() for name in names]
        means = list(self._means.values())
        sums = torch.cat([torch.stack([*parts, *times]), *means]) if parts else torch.cat([times, *means])
        totals = world.sum(sums).tolist()
        values = {name: totals.pop(0) / self._num_steps[name] for name in names}
        values |= {f"seconds_per_step/{phase}": totals.pop(0) / world.size / num_steps for phase in phases}
        for name in self._means:
            total, count = totals.pop(0), totals.pop(0)
            if count:
                values[name] = total / count
        norms_G = torch.stack(self._norms).mean(0).tolist()
        values |= {f"grad_norm/{name}": norm for name, norm in zip(self._clip_groups, norms_G, strict=True)}
        memory = memory_gib(world.device)
        most = world.max(torch.tensor(list(memory.values()), device=world.device)).tolist()
        values |= {f"memory_gib/{name}": each for name, each in zip(memory, most, strict=True)}
        values["tokens_per_s"] = self._num_tokens / (time.perf_counter() - self._start_s)
        self._restart()
        return values


class Records:
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

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The record of a step; nothing when there are no values."""
        if not values or self._log is None:
            return
        self._log.log(step, dict(values))
        shown = [f"{name} {values[name]:.3f}" for name in ("task", "hidden", "logit") if name in values]
        shown += [f"{values['tokens_per_s']:.0f} tokens/s"] if "tokens_per_s" in values else []
        if shown:
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
        for kind in ("validation", "bleu"):
            found = {
                name.removeprefix(f"{kind}/"): value for name, value in values.items() if name.startswith(f"{kind}/")
            }
            if found:
                text = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
                what = "validation loss" if kind == "validation" else "validation BLEU"
                tqdm.write(f"{self._name} step {step}: {what}  {text}")
                sys.stdout.flush()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._log:
            self._log.close()
