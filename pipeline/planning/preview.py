"""What a run would work on, in three lines: the teacher, the data, the ranks."""

from __future__ import annotations

import os
from collections import Counter

import torch

from pipeline.config import Recipe
from pipeline.planning.planned import Planned
from pipeline.rundir import RunDir


def preview_of(recipe: Recipe, run: RunDir) -> list[str]:
    """Lines for people. Inputs that nothing was made of yet are counted, and the first record of each is read.

    Raises:
        ValueError, FileNotFoundError: no such file, or a record without what the recipe asks for.
    """
    planned = Planned.of(recipe)
    depth = " + ".join(map(str, planned.stacks.num_layers))
    num_parameters = sum(each.numel() for each in planned.model().parameters())
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        f"teacher: {planned.source}, {planned.settings['model_type']}, {depth} layers, {num_parameters:,} parameters",
        f"data: {_data(recipe, run)}",
        f"ranks: {recipe.launch.num_ranks} a training; this machine has {num_gpus or 'no'} GPUs and {os.cpu_count()} "
        "CPU cores",
    ]


def _data(recipe: Recipe, run: RunDir) -> str:
    if run.output_hash("data") is not None:
        return f"as it is in {run.data}"
    if recipe.data.corpus == "demo":
        return f"the built-in corpus of {recipe.data.num_demo_pairs:,} pairs"
    from data_prep.plan import plan_of_inputs  # late: what reads texts takes a while

    records: Counter[str] = Counter()
    for each in plan_of_inputs(run.data, recipe.data, {}).inputs:
        records[each.split] += each.records
    return ", ".join(f"{count:,} {split} records" for split, count in records.items())
