"""Ranges of the settings of training, search and evaluation, checked when a recipe is read."""

from __future__ import annotations

import math

from pipeline.config.kinds import fields_of_kind
from pipeline.config.recipe import Recipe

_AT_LEAST_ONE = (
    "launch.num_ranks", "launch.num_mpi_ranks", "launch.threads_per_rank",
    "evaluate.max_examples", "evaluate.max_new_tokens", "evaluate.num_beams", "evaluate.tokens_per_batch",
    "evaluate.latency_examples", "recover.validation_examples", "loop.validation_examples",
    "architecture.d_model", "architecture.d_kv", "architecture.d_ff", "architecture.num_heads",
    "architecture.num_layers", "architecture.num_decoder_layers",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "seed", "optim.warmup_steps", "optim.weight_decay", "loop.validation_bleu_examples", "loop.keep_every_steps",
    "loop.stop_before_end_s",
)  # fmt: skip
_SHARE_BELOW_ONE = ("optim.beta1", "optim.beta2", "architecture.dropout")

RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(_AT_LEAST_ONE, (1, math.inf, "1 or more")),
    **dict.fromkeys(_AT_LEAST_ZERO, (0, math.inf, "0 or more")),
    **dict.fromkeys(_SHARE_BELOW_ONE, (0, math.nextafter(1, 0), "a value from 0 to below 1")),
    "loop.hang_timeout_s": (1, math.inf, "1 or more"),
}
"""(lowest, highest, the same in words) by the end of a field's name."""


def check_ranges(recipe: Recipe) -> None:
    """Hold every number against its range.

    Raises:
        ValueError: names the field, its value and what to choose.
    """
    values = {name: each for kind in ("identity", "schedule", "operational")
              for name, each in fields_of_kind(recipe, kind).items()}  # fmt: skip
    for name, value in values.items():
        low, high, words = RANGES.get(".".join(name.split(".")[-2:]), (-math.inf, math.inf, ""))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ValueError(f"{name} is {value:g}: choose {words}")
    if not recipe.name or "/" in recipe.name:
        raise ValueError(f"name is {recipe.name!r}: give a name without a slash, and the folder as run_dir")
