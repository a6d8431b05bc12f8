"""Objectives, as sums over tokens on the device; the one place that normalises them.

Every term is divided by counts of the whole global batch, which every rank knows beforehand from the lengths of the
examples. So the sum of the terms over micro-batches and ranks is the mean over the global batch, whatever their number.

Shapes: N valid target tokens of a micro-batch, V vocabulary, P spans that it uses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F

from pipeline.config import LossConfig
from pipeline.kernels import HeadObjective, HiddenMode, PairLosses, attention_loss, hidden_loss
from pipeline.model.modular import ModularOutputs, Wanted, granularity_of
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
        hidden = self._hidden(outputs, 1 / counts.num_micro_batches, counts)
        shares_P = hidden.share_P.detach()
        parts = {f"hidden/{name}": share for name, share in zip(outputs.pairs, shares_P, strict=True)}
        total = hidden.share_P.sum() + self._attention(step, outputs, counts, parts, mean=False)
        return LossTerms(total, parts, by_granularity(outputs, hidden.loss_P))

    def replacing_terms(self, step: int, outputs: ModularOutputs, counts: GlobalCounts) -> LossTerms:
        """Replacing phase: hidden error at the ends of the drawn spans (their mean), logit distillation, task loss."""
        assert outputs.head is not None
        num_tokens = max(1, counts.num_target_tokens)
        total = outputs.head.share
        parts = {"logit": outputs.head.logit / num_tokens, "task": outputs.head.task / num_tokens}
        parts["hidden"] = torch.zeros_like(total)
        means = {}
        if outputs.pairs:  # a draw may be the teacher itself
            scale = 1 / (len(outputs.pairs) * counts.num_micro_batches)
            hidden = self._hidden(outputs, weight_at(self.config.hidden, step) * scale, counts)
            total = total + hidden.share_P.sum()
            parts["hidden"] = hidden.loss_P.sum() * scale
            means = by_granularity(outputs, hidden.loss_P)
        total = total + self._attention(step, outputs, counts, parts, mean=True)
        return LossTerms(total, {name: part.detach() for name, part in parts.items()}, means)

    def _attention_weights(self, step: int) -> dict[str, float]:
        return {
            "self": weight_at(self.config.attention_self, step),
            "cross": weight_at(self.config.attention_cross, step),
        }

    def _attention(
        self, step: int, outputs: ModularOutputs, counts: GlobalCounts, parts: dict[str, torch.Tensor], mean: bool
    ) -> torch.Tensor | float:
        """Weighted share of the attention losses, summed or averaged over modular layers; adds to the parts those that
        have a weight, also where no layer has such an attention: all ranks must report the same names."""
        total: torch.Tensor | float = 0.0
        for kind, weight in self._attention_weights(step).items():
            pairs = list(outputs.attention.get(kind, {}).values()) if weight else []
            if weight:
                parts[f"attention_{kind}"] = torch.zeros_like(next(iter(parts.values())))
            if pairs:
                scale = 1 / (counts.num_micro_batches * (len(pairs) if mean else 1))
                loss = attention_loss(pairs, weight * scale, counts.upstream, eager=not self.config.fused)
                total = total + loss.share_P.sum()
                parts[f"attention_{kind}"] = loss.loss_P.sum() * scale
        return total

    def _hidden(self, outputs: ModularOutputs, weight: float, counts: GlobalCounts) -> PairLosses:
        pairs, mode = list(outputs.pairs.values()), cast(HiddenMode, self.config.hidden_mode)
        return hidden_loss(pairs, mode, weight, counts.upstream, eager=not self.config.fused)


def granularity_label(granularity: int) -> str:
    """Name in the records of the mean hidden error of a granularity."""
    return f"hidden/granularity_{granularity}"


def by_granularity(outputs: ModularOutputs, errors_P: torch.Tensor) -> dict[str, tuple[torch.Tensor | float, int]]:
    """(sum, count) of the hidden errors of the spans that a micro-batch used, by granularity."""
    places: dict[int, list[int]] = {}
    for place, name in enumerate(outputs.pairs):
        places.setdefault(granularity_of(name), []).append(place)
    return {
        granularity_label(granularity): (errors_P.detach()[used].sum(), len(used))
        for granularity, used in places.items()
    }
