"""Validation while training: loss on held-out data, and a small BLEU by greedy decoding through the leaves.

Every rank makes the same forwards in the same order, whatever its share of the data, as ZeRO-3 needs.

Shapes: B examples, T target tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from pipeline.data import IGNORED_LABEL, MicroBatch, on_device
from pipeline.training.clock import PhaseClock
from pipeline.training.engine import Engine
from pipeline.world import World

LONGEST_OUTPUT = 1.5  # times the longest reference of a micro-batch


@dataclass(frozen=True)
class Translation:
    """What a small BLEU needs beside the model.

    `score` takes the ids of outputs and references, each without padding and end, and returns BLEU (0..100).
    """

    args: Mapping[str, tuple[Any, ...]]
    """Further arguments of the module's forward that make it hand out logits, for each validation to decode with."""
    end_id: int
    score: Callable[[Sequence[list[int]], Sequence[list[int]]], float]
    forces_bos: bool = False
    """Whether an output begins with the token that its reference begins with: a language's."""
    num_positions: int | None = None
    """Tokens that the model takes at most; None where any length goes."""


class Validator:
    """Validation of one training run.

    Args:
        args: further arguments of the module's forward for each validation, by name.
        batches: micro-batches of the validation part, the same on every rank.
        decoded: micro-batches that are decoded for BLEU; none for no BLEU.
    """

    def __init__(
        self,
        engine: Engine,
        world: World,
        group: dist.ProcessGroup | None,
        clock: PhaseClock,
        *,
        args: Mapping[str, tuple[Any, ...]],
        batches: Sequence[MicroBatch],
        decoded: Sequence[MicroBatch],
        translation: Translation | None,
    ) -> None:
        self._engine, self._world, self._group, self._clock = engine, world, group, clock
        self._args, self._batches, self._decoded, self._translation = args, batches, decoded, translation

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Cross entropy per target token, in nats, of each validation. Collective."""
        return {name: self._loss(name, args) for name, args in self._args.items()}

    @torch.no_grad()
    def bleu(self) -> dict[str, float]:
        """BLEU of greedy outputs on the decoded examples, of the validations that are translated. Collective."""
        if self._translation is None or not self._decoded:
            return {}
        return {name: self._bleu(name, self._translation) for name in self._translation.args}

    def _mine(self, batches: Sequence[MicroBatch]) -> list[tuple[MicroBatch, bool]]:
        """This rank's micro-batches, as many as every other rank's, and whether each counts."""
        indices = [
            round_ * self._world.size + self._world.rank for round_ in range(math.ceil(len(batches) / self._world.size))
        ]
        return [(on_device(batches[i % len(batches)], self._world), i < len(batches)) for i in indices]

    def _loss(self, name: str, args: tuple[Any, ...]) -> float:
        total = torch.zeros(2, device=self._world.device)
        for batch, counts in self._mine(self._batches):
            self._clock.enter("validate", name)
            outputs = self._engine(batch, *args)
            if counts:
                total[0] += outputs.task_sum
                total[1] += outputs.labels_N.numel()
        loss, count = self._world.sum(total).tolist()
        return loss / max(1.0, count)

    def _bleu(self, name: str, translation: Translation) -> float:
        pairs: list[tuple[list[int], list[int]]] = []
        for batch, counts in self._mine(self._decoded):
            outputs_BT = self._greedy(batch, name, translation)
            if counts:
                for output, reference in zip(outputs_BT.tolist(), batch.labels_BT.tolist(), strict=True):
                    pairs.append((_until(output, translation.end_id), _until(reference, translation.end_id)))
        everyones = [pair for part in self._world.gather(pairs, self._group) for pair in part]
        return translation.score([output for output, _ in everyones], [reference for _, reference in everyones])

    def _greedy(self, batch: MicroBatch, name: str, translation: Translation) -> torch.Tensor:
        """Greedy outputs [B, T]; there is no cache: each token costs a forward of all tokens before it."""
        end_id, args = translation.end_id, translation.args[name]
        longest = math.ceil(LONGEST_OUTPUT * batch.labels_BT.shape[1])
        if translation.num_positions:
            longest = min(longest, translation.num_positions - 1)  # labels get one more
        labels_BT = batch.labels_BT.new_full((len(batch.labels_BT), 1), end_id)
        ended_B = labels_BT.new_zeros(len(labels_BT), dtype=torch.bool)
        while True:
            self._clock.enter("validate", f"decoding {name}")
            places_N = torch.arange(labels_BT.numel(), device=labels_BT.device)  # every label asks for logits
            so_far = replace(batch, labels_BT=labels_BT, places_N=places_N)
            logits_NV = self._engine(so_far, *args).student_logits_NV
            going = not bool(ended_B.all()) and labels_BT.shape[1] <= longest
            if going:
                # the last label only made room for the token that is found now
                said_B = logits_NV.view(*labels_BT.shape, -1)[:, -1].argmax(-1)
                if translation.forces_bos and labels_BT.shape[1] == 1:
                    said_B = batch.labels_BT[:, 0]
                labels_BT[:, -1] = said_B.where(~ended_B, end_id)
                ended_B |= labels_BT[:, -1] == end_id
                labels_BT = torch.cat([labels_BT, labels_BT.new_full((len(labels_BT), 1), end_id)], 1)
            if not self._world.any(going):
                return labels_BT


def _until(ids: list[int], end_id: int) -> list[int]:
    """Ids before the end and without what pads labels."""
    kept = ids[: ids.index(end_id)] if end_id in ids else ids
    return [each for each in kept if each != IGNORED_LABEL]
