"""The assemble stage: put teacher layers and modular layers together into ordinary Hugging Face checkpoints.

Works on files alone: weights are renamed, the depth in config.json is changed, nothing else. So an assembly differs
from its teacher in nothing that transformers would need our code for.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from pipeline.config import Recipe
from pipeline.families import Family, family_of
from pipeline.rundir import RunDir, Stage, publish_folder, write_atomic
from pipeline.spans import (
    STACKS,
    Assembly,
    Span,
    coarsest_assembly,
    kept_layers,
    modular_spans,
    preset_assembly,
    teacher_assembly,
)
from pipeline.tokenizer import copy_tokenizer

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class System:
    """One model to evaluate."""

    name: str
    kind: str
    """teacher, assembly, dropped (layer dropping, no training) or finetuned (shrink and fine-tune)."""
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


def assemble(recipe: Recipe, run: RunDir) -> None:
    """Make RUN/assemble: a checkpoint of every asked assembly, the teacher's, the baselines', and systems.json."""
    started_s = time.time()
    stage = Stage.of(recipe, run, "assemble")
    if stage.stamp() is not None:
        print("assemble is up to date")
        return
    stage.begin()
    parts = Parts.of(run)
    requests = requested_assemblies(recipe, num_teacher_layers(run))
    systems = []
    for assembly, asked in tqdm(requests.items(), desc="assemble", unit="model", disable=None):
        is_teacher = assembly.num_layers == assembly.num_teacher_layers
        kinds = ["teacher"] if is_teacher else ["assembly", "dropped"]
        for kind in kinds:
            name = f"drop-{assembly}" if kind == "dropped" else str(assembly)
            folder = stage.folder / "models" / name
            write_checkpoint(parts, assembly, folder, dropped=kind == "dropped")
            system = describe(run, folder, kind, name, assembly)
            systems.append(replace(system, requests=tuple(asked) if kind != "dropped" else ()))
    if run.baseline_model.is_dir():
        coarsest = coarsest_of(recipe, num_teacher_layers(run))
        systems.append(describe(run, run.baseline_model, "finetuned", f"finetuned-{coarsest}", coarsest))
    write_atomic(run.systems, json.dumps({"systems": [asdict(system) for system in systems]}, indent=1))
    stage.publish([stage.folder / "models", run.systems], started_s=started_s)


def num_teacher_layers(run: RunDir) -> tuple[int, int]:
    """Layers of (encoder, decoder)."""
    config = json.loads((run.teacher_model / "config.json").read_text(encoding="utf-8"))
    keys = family_of(config["model_type"]).depth_keys
    return config[keys["encoder"]], config[keys["decoder"]]


def coarsest_of(recipe: Recipe, num_layers: tuple[int, int]) -> Assembly:
    encoder, decoder = (modular_spans(n, recipe.distill.granularities) for n in num_layers)
    return coarsest_assembly(num_layers, (encoder, decoder))


def requested_assemblies(recipe: Recipe, num_layers: tuple[int, int]) -> dict[Assembly, list[tuple[str, float]]]:
    """Each assembly that the recipe asks for, the teacher first, with the (preset, ratio) pairs that ask for it.

    Raises:
        ValueError: a ratio beyond the coarsest assembly, or an assembly that the granularities do not allow.
    """
    encoder, decoder = (modular_spans(n, recipe.distill.granularities) for n in num_layers)
    requests: dict[Assembly, list[tuple[str, float]]] = {teacher_assembly(*num_layers): []}
    for preset in recipe.assemble.presets:
        for ratio in recipe.assemble.ratios:
            assembly = preset_assembly(preset, ratio, num_layers, (encoder, decoder))
            requests.setdefault(assembly, []).append((preset, ratio))
    for text in recipe.assemble.assemblies:
        assembly = Assembly.parse(text)
        for stack, spans, total in zip(STACKS, (encoder, decoder), num_layers, strict=True):
            tiling = assembly.tiling(stack)
            unknown = [span for span in tiling.spans if span.num_layers > 1 and span not in spans]
            if tiling.num_teacher_layers != total or unknown:
                raise ValueError(
                    f"assembly {text} does not fit: the {stack} has {total} layers and modular layers for "
                    f"{', '.join(map(str, spans))}"
                )
        requests.setdefault(assembly, [])
    return requests


@dataclass(frozen=True)
class Parts:
    """What checkpoints are put together from: the teacher's folder and the module library, each read once."""

    folder: Path
    config: dict[str, Any]
    family: Family
    teacher: Weights
    library: Weights

    @staticmethod
    def of(run: RunDir, *, library: bool = True) -> Parts:
        config = json.loads((run.teacher_model / "config.json").read_text(encoding="utf-8"))
        return Parts(
            folder=run.teacher_model,
            config=config,
            family=family_of(config["model_type"]),
            teacher=load_file(run.teacher_model / "model.safetensors"),
            library=load_file(run.library / "modular.safetensors") if library else {},
        )


def write_checkpoint(parts: Parts, assembly: Assembly, folder: Path, *, dropped: bool = False) -> None:
    """Publish one assembly as a Hugging Face folder; with `dropped`, teacher layers alone at the same depth."""
    config, family, teacher = dict(parts.config), parts.family, parts.teacher
    weights = dict(_outside_layers(teacher, family))
    for stack in STACKS:
        tiling = assembly.tiling(stack)
        sources = [Span(i, i) for i in kept_layers(tiling)] if dropped else tiling.spans
        for index, span in enumerate(sources):
            prefix = f"{family.layer_prefix(stack)}{index}."
            weights |= {prefix + name: tensor for name, tensor in _layer(parts, stack, span).items()}
        config[family.depth_keys[stack]] = tiling.num_layers
        weights |= {name: teacher[name] for name in teacher if _is_shared(name, stack, family)}
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = parts.folder / "generation_config.json"
    if generation.is_file():
        shutil.copy2(generation, temporary / generation.name)
    copy_tokenizer(parts.folder, temporary)
    publish_folder(temporary, folder)


def _outside_layers(weights: Weights, family: Family) -> Weights:
    prefixes = tuple(family.layer_prefix(stack) for stack in STACKS)
    return {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}


def _is_shared(name: str, stack: str, family: Family) -> bool:
    prefix = f"{family.layer_prefix(stack)}0."
    return name.startswith(prefix) and family.is_shared_weight(name.removeprefix(prefix))


def _layer(parts: Parts, stack: str, span: Span) -> Weights:
    """Weights of the layer that stands for a span, by their names inside a layer."""
    if span.num_layers == 1:
        source, prefix = parts.teacher, f"{parts.family.layer_prefix(stack)}{span.first}."
    else:
        source, prefix = parts.library, f"{stack}.{span}."
    layer = {name.removeprefix(prefix): tensor for name, tensor in source.items() if name.startswith(prefix)}
    assert layer, f"no weights for {stack} {span}"
    return layer


def describe(run: RunDir, folder: Path, kind: str, name: str, assembly: Assembly) -> System:
    """Sizes of a published checkpoint."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocabulary = family_of(config["model_type"]).vocabulary_weights
    embeddings = [tensor.numel() for name, tensor in weights.items() if name in vocabulary]
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
