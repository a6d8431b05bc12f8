"""The module library, the product of training: all modular layers as safetensors, with a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.publish import publishing_folder, sha256_of
from pipeline.checkpoints import read_manifest, write_weights
from pipeline.config import DistillConfig
from pipeline.model import ModularModel
from pipeline.rundir import RunDir, read_json, write_atomic
from pipeline.spans import STACKS


def check_library(
    teacher: Path, library: Path, hashes_of: Callable[[Sequence[Path]], Mapping[Path, str]] | None = None
) -> dict[str, str]:
    """sha256 of the weights of a teacher's folder and of a module library, after the library's manifest was held
    against both.

    Args:
        hashes_of: where the hashes come from; None reads both files whole.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one of them is not what the manifest says.
    """
    manifest_path, modular, weights = (
        library / "library.json",
        library / "modular.safetensors",
        teacher / "model.safetensors",
    )
    for path, stage in ((weights, "teacher"), (manifest_path, "distill"), (modular, "distill")):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run stage {stage} first")
    manifest, found = read_json(manifest_path) or {}, {}
    hashes = hashes_of([weights, modular]) if hashes_of else {path: sha256_of(path) for path in (weights, modular)}
    for path, name, cure in (
        (weights, "teacher_sha256", "it is not the teacher that the library was trained for, or it is damaged"),
        (modular, "modular_sha256", "it is damaged: copy it again, or remove the distill folder and run that stage"),
    ):
        found[name] = hashes[path]
        if found[name] != manifest[name]:
            raise ValueError(f"{path} does not match {manifest_path}: {cure}")
    return found


def product_of(model: ModularModel, run: RunDir, settings: DistillConfig) -> dict[str, Any]:
    """What a checkpoint must tell so that a library can be made from it alone."""
    stamp = read_json(run.stage("teacher") / "stage.json")
    assert stamp is not None, "the teacher is done before distillation starts"
    return {
        "teacher_sha256": stamp["outputs"]["model/model.safetensors"]["sha256"],
        "granularities": {stack: list(settings.granularities_of(stack)) for stack in STACKS},
        "num_layers": {stack: total for stack, total, _ in model.stacks},
        "spans": {stack: [str(span) for span in spans] for stack, _, spans in model.stacks},
    }


def export_library(checkpoint: Path, library: Path) -> None:
    """Publish a checkpoint's weights as a module library: one safetensors file in fp32 and a manifest.

    Needs neither the teacher nor DeepSpeed nor the ranks that trained, and host memory for one weight.

    Raises:
        ValueError: the checkpoint is not of modular layers.
    """
    manifest = read_manifest(checkpoint)
    if "spans" not in manifest["product"]:
        raise ValueError(
            f"{checkpoint} holds no modular layers: only checkpoints of stage distill make a module library"
        )
    with publishing_folder(library) as temporary:
        write_weights(checkpoint, temporary / "modular.safetensors", _name_in_library)
        description = {
            **manifest["product"],
            "checkpoint": checkpoint.name,
            "inputs": manifest["inputs"],
            "modular_sha256": sha256_of(temporary / "modular.safetensors"),
        }
        write_atomic(temporary / "library.json", json.dumps(description, indent=1))


def _name_in_library(name: str) -> str:
    """modular.encoder.0-1.layer.<name> -> encoder.0-1.<name>"""
    _, stack, span, _, rest = name.split(".", 4)
    return f"{stack}.{span}.{rest}"
