"""Assemblies as views: the teacher and the module library loaded once, every assembly a pair of paths through them.

A path is the spans of a tiling in order: a span of one layer is the teacher's, a longer one the modular layer. Layer
dropping is a path of teacher layers. Any other checkpoint folder is a pool of its own layers with one path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.decoding.plain import weights_in
from pipeline.families import Family
from pipeline.library import ModuleLibrary
from pipeline.spans import Span
from pipeline.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Pool:
    """Layers of one width that assemblies are put together from, and what stands around them."""

    family: Family
    shared: Any
    """Embeddings, position biases, norms and head: a pipeline.families.base.Shared."""
    layers: dict[str, dict[Span, nn.Module]]
    """By stack and span."""
    model: Any
    """What is left of the Hugging Face model: its config and generation config."""
    folder: Path
    device: torch.device

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @property
    def vocabulary_size(self) -> int:
        return self.model.config.vocab_size

    def path(self, stack: str, spans: Sequence[Span]) -> list[nn.Module]:
        return [self.layers[stack][span] for span in spans]


def load_pool(folder: Path, device: torch.device, library: Path | None = None, dtype: str = "checkpoint") -> Pool:
    """The layers of a checkpoint folder, and those of a module library, which check_library has held against it.

    Args:
        dtype: as evaluate.dtype of a recipe.

    Raises:
        ValueError: a model type that no family knows.
        FileNotFoundError: a folder is missing.
    """
    found = ModuleLibrary.read(folder, library, device=device, dtype=weights_in(dtype))
    return Pool(found.family, found.family.take_shared(found.teacher), found.layers, found.teacher, folder, device)
