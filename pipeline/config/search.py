"""The `search:` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from data_prep.config import Settings, identity
from pipeline.spans import Budget


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Settings):
    """The search for the assemblies that lose least; it runs when assemble.presets names "searched"."""

    place: ClassVar[str] = "search."

    num_examples: int = identity(256, low=1)
    """Validation examples that losses are measured on."""
    candidates_per_size: int = identity(4, low=1)
    """How many assemblies are measured for every number of layers and every budget, in each round."""
    rounds: int = identity(2, low=1)
    """Rounds of proposing assemblies and measuring their losses. Later rounds learn from all losses measured before."""
    budgets: tuple[str, ...] = identity(())
    """Further budgets beside assemble.ratios, each with the best assembly found within it: layers=8, parameters=60M,
    bytes=300M, or ms=40 (latency at batch 1 on this device)."""
    latency_examples: int = identity(8)
    """Examples that are decoded to time assemblies of every shape. 0: no times, and no budgets in ms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for budget in self.budgets:
            if Budget.parse(budget).cost == "ms" and self.latency_examples < 1:
                raise ValueError(f"search.budgets holds {budget}, but search.latency_examples is 0: time some examples")
