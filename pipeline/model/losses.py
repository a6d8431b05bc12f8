"""Objectives, as sums over tokens on the device; the one place that normalises them.

Every term is divided by counts of the whole global batch, which every rank knows beforehand from the lengths of the
examples. So the sum of the terms over micro-batches and ranks is the mean over the global batch, whatever their number.

Where several draws share a micro-batch, a term is the mean over its draws of what each of them alone would give. What
one stream makes counts for every draw that the stream serves.

Shapes: N valid target tokens of a micro-batch, V vocabulary, P spans that a stream goes through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F

from pipeline.config import LossConfig
from pipeline.kernels import HeadObjective, HiddenMode, HiddenPair, PairLosses, attention_loss, hidden_loss
from pipeline.model.modular import ModularOutputs, Use, Wanted, granularity_of
from pipeline.schedule import weight_at


@dataclass(frozen=True)
class GlobalCounts:
    """What the terms of one optimizer step are divided by."""

    num_target_tokens: int
    num_micro_batches: int
    """Micro-batches with data in them."""
    upstream: float = 1.0
    """Gradient that backward will bring for the total of the terms: the factor that the engine puts on it. The fused
    losses make their gradients for it; another one is right, too, but takes longer."""


@dataclass(frozen=True)
class LossTerms:
    """Share of one micro-batch in the losses of a step."""

    total: torch.Tensor
    """To run backward from."""
    parts: dict[str, torch.Tensor]
    """What to log, detached, by name; adds up over micro-batches and ranks."""
    means: dict[str, tuple[torch.Tensor | float, int]] = field(default_factory=dict)
    """What else to log: (sum, count) of this micro-batch; the mean is over all that was counted between two records."""


def task_loss(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Cross entropy summed over tokens, in nats, fp32."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")


class Objectives:
    """The objectives of a distillation run, with the weights that they have at each step."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def wanted(self, step: int, counts: GlobalCounts) -> Wanted:
        """What the forward pass makes for `replacing_terms`."""
        config, num_tokens = self.config, max(1, counts.num_target_tokens)
        objective = HeadObjective(
            task=weight_at(config.task, step) / num_tokens,
            logit=weight_at(config.logit, step) / num_tokens,
            temperature=config.temperature,
            reverse=config.logit_direction == "reverse",
        )
        attention = any(self._attention_weights(step).values())
        return Wanted(objective, counts.upstream, eager=not config.fused, attention=attention)

    def local_terms(self, step: int, outputs: ModularOutputs, counts: GlobalCounts) -> LossTerms:
        """Local phase: each modular layer's hidden error on its own span; they share no parameters, so the sum is
        free."""
        hidden = self._hidden(list(outputs.pairs.values()), 1 / counts.num_micro_batches, counts)
        shares_P = hidden.share_P.detach()
        parts = {f"hidden/{use.name}": share for use, share in zip(outputs.pairs, shares_P, strict=True)}
        total = hidden.share_P.sum()
        total = total + self._attention(
            step, outputs, counts, parts, lambda uses: {1 / counts.num_micro_batches: list(uses)}
        )
        return LossTerms(total, parts, by_granularity(list(outputs.pairs), hidden.loss_P))

    def replacing_terms(self, step: int, outputs: ModularOutputs, counts: GlobalCounts) -> LossTerms:
        """Replacing phase: hidden error at the ends of the drawn spans (their mean), logit distillation, task loss."""
        assert outputs.head is not None
        num_tokens = max(1, counts.num_target_tokens)
        total = outputs.head.share
        parts = {"logit": outputs.head.logit / num_tokens, "task": outputs.head.task / num_tokens}
        parts["hidden"] = torch.zeros_like(total)
        uses, errors = [], []

        def by_share(pairs: Iterable[Use]) -> dict[float, list[Use]]:
            return shares_of_draws(pairs, outputs.num_draws, counts.num_micro_batches)

        for share, alike in by_share(outputs.pairs).items():  # none where the draw is the teacher itself
            weight = weight_at(self.config.hidden, step) * share
            hidden = self._hidden([outputs.pairs[use] for use in alike], weight, counts)
            total = total + hidden.share_P.sum()
            parts["hidden"] = parts["hidden"] + hidden.loss_P.sum() * share
            uses += alike
            errors.append(hidden.loss_P)
        means = by_granularity(uses, torch.cat(errors)) if uses else {}
        total = total + self._attention(step, outputs, counts, parts, by_share)
        return LossTerms(total, {name: part.detach() for name, part in parts.items()}, means)

    def _attention_weights(self, step: int) -> dict[str, float]:
        return {
            "self": weight_at(self.config.attention_self, step),
            "cross": weight_at(self.config.attention_cross, step),
        }

    def _attention(
        self,
        step: int,
        outputs: ModularOutputs,
        counts: GlobalCounts,
        parts: dict[str, torch.Tensor],
        by_share: Callable[[Iterable[Use]], dict[float, list[Use]]],
    ) -> torch.Tensor | float:
        """Weighted share of the attention losses; adds to the parts those that have a weight, also where no layer has
        such an attention: all ranks must report the same names.

        Args:
            by_share: the uses of a kind by what each of them counts.
        """
        total: torch.Tensor | float = 0.0
        for kind, weight in self._attention_weights(step).items():
            if not weight:
                continue
            name, pairs = f"attention_{kind}", outputs.attention.get(kind, {})
            parts[name] = torch.zeros_like(next(iter(parts.values())))
            for share, alike in by_share(pairs).items() if pairs else ():
                loss = attention_loss(
                    [pairs[use] for use in alike], weight * share, counts.upstream, eager=not self.config.fused
                )
                total = total + loss.share_P.sum()
                parts[name] = parts[name] + loss.loss_P.sum() * share
        return total

    def _hidden(self, pairs: list[HiddenPair], weight: float, counts: GlobalCounts) -> PairLosses:
        mode = cast(HiddenMode, self.config.hidden_mode)
        return hidden_loss(pairs, mode, weight, counts.upstream, eager=not self.config.fused)


def shares_of_draws(uses: Iterable[Use], num_draws: int, num_micro_batches: int) -> dict[float, list[Use]]:
    """Uses by what each counts in the mean over micro-batches and draws of the mean over a draw's uses: those of other
    draws count otherwise, and what one loss function takes at once has one weight."""
    uses = list(uses)
    num_of_draw = Counter(draw for use in uses for draw in use.draws)
    found: dict[float, list[Use]] = {}
    for use in uses:
        share = sum(1 / (num_of_draw[draw] * num_draws * num_micro_batches) for draw in use.draws)
        found.setdefault(share, []).append(use)
    return found


def granularity_label(granularity: int) -> str:
    """Name in the records of the mean hidden error of a granularity."""
    return f"hidden/granularity_{granularity}"


def by_granularity(uses: Sequence[Use], errors_P: torch.Tensor) -> dict[str, tuple[torch.Tensor | float, int]]:
    """(sum, count) of the hidden errors of the spans that the draws of a micro-batch used, by granularity."""
    places: dict[int, list[int]] = {}
    for place, use in enumerate(uses):
        places.setdefault(granularity_of(use.name), []).extend([place] * len(use.draws))
    errors = errors_P.detach().unbind()  # a list as an index would be copied to the device, which the host waits for
    return {
        granularity_label(granularity): (torch.stack([errors[place] for place in used]).sum(), len(used))
        for granularity, used in places.items()
    }
