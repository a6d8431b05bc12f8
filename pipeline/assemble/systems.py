"""The models to evaluate, with their sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from pipeline.families import family_of
from pipeline.rundir import RunDir
from pipeline.spans import Assembly

ENGINE_PREFIX = "ct2-"
"""Begins the name of a model of CTranslate2; its quantization and its assembly follow."""


@dataclass(frozen=True, kw_only=True)
class System:
    """One model to evaluate."""

    name: str
    kind: str
    """teacher, assembly, dropped (layer dropping, no training), finetuned (shrink and fine-tune), engine (teacher or
    assembly as a model of CTranslate2) or peer (another folder)."""
    folder: str
    """Relative to the run directory."""
    assembly: str
    """The assembly it is, or stands beside."""
    requests: tuple[tuple[str, float], ...]
    """(preset, ratio) pairs that asked for it."""
    num_encoder_layers: int
    num_decoder_layers: int
    ratio_layers: float
    num_parameters: int
    num_non_embedding_parameters: int
    bytes: int


def describe(run: RunDir, folder: Path, kind: str, name: str, assembly: Assembly) -> System:
    """Sizes of a published checkpoint."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = family_of(config["model_type"])
    outside = {*family.vocabulary_weights, *family.position_weights}
    embeddings = [tensor.numel() for name, tensor in weights.items() if name in outside]
    total = sum(tensor.numel() for tensor in weights.values())
    return System(
        name=name,
        kind=kind,
        folder=str(folder.relative_to(run.root)),
        assembly=str(assembly),
        requests=(),
        num_encoder_layers=assembly.encoder.num_layers,
        num_decoder_layers=assembly.decoder.num_layers,
        ratio_layers=assembly.ratio_of_layers,
        num_parameters=total,
        num_non_embedding_parameters=total - sum(embeddings),
        bytes=(folder / "model.safetensors").stat().st_size,
    )
