"""The `search:` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.config import identity
from pipeline.spans import Budget


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search for the assemblies that lose least; it runs when assemble.presets names "searched"."""

    num_examples: int = identity(256)
    """Validation examples that losses are measured on."""
    candidates_per_size: int = identity(4)
    """Assemblies measured end to end for every number of layers and every budget, in each round."""
    rounds: int = identity(2)
    """Rounds of solving and measuring; from the second on, scores are fitted to all losses measured so far."""
    budgets: tuple[str, ...] = identity(())
    """Further budgets beside assemble.ratios, each with the best assembly found within it: layers=8, parameters=60M,
    bytes=300M, or ms=40 (latency at batch 1 on this device)."""
    latency_examples: int = identity(8)
    """Examples that time the shapes of assemblies; 0 leaves time out."""

    def __post_init__(self) -> None:
        for name in ("num_examples", "candidates_per_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name} must be 1 or more, not {getattr(self, name)}")
        for budget in self.budgets:
            if Budget.parse(budget).cost == "ms" and self.latency_examples < 1:
                raise ValueError(f"search.budgets holds {budget}, but search.latency_examples is 0: time some examples")
