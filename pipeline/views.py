"""Assemblies as views: the teacher and the module library loaded once, every assembly a pair of paths through them.

A path is the spans of a tiling in order: a span of one layer is the teacher's, a longer one the modular layer. Layer
dropping is a path of teacher layers. Any other checkpoint folder is a pool of its own layers with one path.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from pipeline.families import Family, family_of
from pipeline.rundir import RunDir, sha256_file
from pipeline.spans import STACKS, Span


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
        return transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @property
    def vocabulary_size(self) -> int:
        return self.model.config.vocab_size

    def path(self, stack: str, spans: Sequence[Span]) -> list[nn.Module]:
        return [self.layers[stack][span] for span in spans]


def load_pool(folder: Path, device: torch.device, library: Path | None = None) -> Pool:
    """The layers of a checkpoint folder, in the dtype of the checkpoint, and those of a module library.

    Raises:
        ValueError: a model type that no family knows; a library that is damaged or of another teacher.
        FileNotFoundError: a folder is missing.
    """
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True).eval()
    model.requires_grad_(False)
    family = family_of(model.config.model_type)
    layers: dict[str, dict[Span, nn.Module]] = {
        stack: {Span(i, i): layer for i, layer in enumerate(family.layers(model, stack))} for stack in STACKS
    }
    shared: Any = family.take_shared(model)
    if library is not None:
        _add_library(layers, library, model.dtype)
    for part in (shared, *(layer for each in layers.values() for layer in each.values())):
        part.to(device)
    return Pool(family, shared, layers, model, folder, device)


def _add_library(layers: dict[str, dict[Span, nn.Module]], library: Path, dtype: torch.dtype) -> None:
    """Put the modular layers beside the teacher's."""
    manifest = json.loads((library / "library.json").read_text(encoding="utf-8"))
    weights = load_file(library / "modular.safetensors")
    for stack in STACKS:
        for text in manifest["spans"][stack]:
            span = Span(*map(int, text.split("-")))
            prefix = f"{stack}.{span}."
            own = {n.removeprefix(prefix): w.to(dtype) for n, w in weights.items() if n.startswith(prefix)}
            layer = copy.deepcopy(layers[stack][Span(span.first, span.first)]).to("meta")
            layer.load_state_dict(own, assign=True)
            layers[stack][span] = layer.requires_grad_(False)


def check_library(run: RunDir) -> dict[str, str]:
    """sha256 of the teacher's weights and of the library's, after comparing both with the library's manifest.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one of them is not what the manifest says.
    """
    manifest_path, modular = run.library / "library.json", run.library / "modular.safetensors"
    teacher = run.teacher_model / "model.safetensors"
    for path, stage in ((teacher, "teacher"), (manifest_path, "distill"), (modular, "distill")):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run stage {stage} first")
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    found = {}
    for path, name, cure in (
        (teacher, "teacher_sha256", "it is not the teacher that the library was trained for, or it is damaged"),
        (modular, "modular_sha256", "it is damaged: copy it again, or remove the distill folder and run that stage"),
    ):
        found[name] = sha256_file(path)
        if found[name] != manifest[name]:
            raise ValueError(f"{path} does not match {manifest_path}: {cure}")
    return found
