"""How many training processes this machine runs of those that a recipe asks for."""

from __future__ import annotations

import dataclasses

import torch

from pipeline.config import LaunchConfig, Recipe


def ranks_here(recipe: Recipe) -> LaunchConfig:
    """The recipe's `launch`, with no more ranks than this machine has GPUs, where it has any: fewer of them take more
    micro-batches each, and make the same of them."""
    wanted, num_gpus = recipe.launch.num_ranks, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus == 0 or wanted <= num_gpus:
        return recipe.launch
    sizes = [each.batch.micro_batches_per_step for each in (recipe.teacher, recipe.distill)]
    count = max(n for n in range(1, num_gpus + 1) if not any(size % n for size in sizes))
    print(f"launch.num_ranks is {wanted}, and this machine has {num_gpus} GPUs: {count} ranks share the same batches")
    return dataclasses.replace(recipe.launch, num_ranks=count)
