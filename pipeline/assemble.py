"""The assemble stage: put teacher layers and modular layers together into ordinary Hugging Face checkpoints.

A checkpoint is made of files alone: weights are renamed, the depth in config.json is changed, nothing else. So an
assembly differs from its teacher in nothing that transformers would need our code for. Before it is published, plain
transformers reads it back, and its logits must be those of the same layers put together in memory, bit for bit.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM

from pipeline.config import SEARCHED, Recipe
from pipeline.families import Family, family_of
from pipeline.rundir import RunDir, Stage, publish_folder, read_json, write_atomic
from pipeline.spans import (
    STACKS,
    Assembly,
    Span,
    Tiling,
    coarsest_assembly,
    kept_layers,
    modular_spans,
    preset_assembly,
    pure_tiling,
    refuse_misfit,
    teacher_assembly,
)
from pipeline.switching import ModuleLibrary
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
    check_granularities(recipe, run)
    requests = requested_assemblies(recipe, num_teacher_layers(run), read_json(run.choices))
    stage.begin()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # T5 v1.1 and mT5 warn that they are untied, at every loading
    parts = Parts.of(run)
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
    for baseline in baselines_of(recipe, num_teacher_layers(run)):
        systems.append(describe(run, baseline.model(run), "finetuned", baseline.name, baseline.assembly))
    write_atomic(run.systems, json.dumps({"systems": [asdict(system) for system in systems]}, indent=1))
    stage.publish([stage.folder / "models", run.systems], started_s=started_s)


def num_teacher_layers(run: RunDir) -> tuple[int, int]:
    """Layers of (encoder, decoder)."""
    config = json.loads((run.teacher_model / "config.json").read_text(encoding="utf-8"))
    keys = family_of(config["model_type"]).depth_keys
    return config[keys["encoder"]], config[keys["decoder"]]


def spans_of(recipe: Recipe, num_layers: tuple[int, int]) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Modular spans of (encoder, decoder)."""
    encoder, decoder = (
        modular_spans(n, recipe.distill.granularities_of(stack)) for stack, n in zip(STACKS, num_layers, strict=True)
    )
    return encoder, decoder


def check_granularities(recipe: Recipe, run: RunDir) -> None:
    """Hold a recipe against the module library that it is used with.

    Raises:
        FileNotFoundError: no library.
        ValueError: it was trained with other granularities.
    """
    library = read_json(run.library / "library.json")
    if library is None:
        raise FileNotFoundError(f"{run.library / 'library.json'} is missing: run stage distill first")
    for stack, spans in zip(STACKS, spans_of(recipe, num_teacher_layers(run)), strict=True):
        if sorted(library["spans"][stack]) != sorted(map(str, spans)):
            raise ValueError(
                f"{run.library} has modular layers for {stack} {', '.join(library['spans'][stack]) or 'layers: none'}, "
                f"not those of granularities {list(recipe.distill.granularities_of(stack))}: set the recipe's back, or "
                "run stage distill"
            )


def coarsest_of(recipe: Recipe, num_layers: tuple[int, int]) -> Assembly:
    return coarsest_assembly(num_layers, spans_of(recipe, num_layers))


def requested_assemblies(
    recipe: Recipe, num_layers: tuple[int, int], choices: dict[str, Any] | None = None
) -> dict[Assembly, list[tuple[str, float]]]:
    """Each assembly that the recipe asks for, the teacher first, with the (preset, ratio) pairs that ask for it.

    Args:
        choices: what stage search has chosen; None: it has not yet, and what it will choose is left out.

    Raises:
        ValueError: a ratio beyond the coarsest assembly, or an assembly that the granularities do not allow.
    """
    encoder, decoder = spans_of(recipe, num_layers)
    requests: dict[Assembly, list[tuple[str, float]]] = {teacher_assembly(*num_layers): []}
    for preset in recipe.assemble.presets:
        for ratio in recipe.assemble.ratios:
            assembly = preset_assembly(
                "size-first" if preset == SEARCHED else preset, ratio, num_layers, (encoder, decoder)
            )
            if preset == SEARCHED:
                if choices is None:
                    continue
                assembly = Assembly.parse(choices["ratios"][f"{ratio:g}"])
            requests.setdefault(assembly, []).append((preset, ratio))
    within_budgets = choices["budgets"].values() if choices and SEARCHED in recipe.assemble.presets else ()
    for text in (*recipe.assemble.assemblies, *within_budgets):
        assembly = Assembly.parse(text)
        refuse_misfit(assembly, num_layers, (encoder, decoder))
        requests.setdefault(assembly, [])
    return requests


@dataclass(frozen=True)
class Baseline:
    """One model that is trained to stand beside an assembly."""

    method: str
    assembly: Assembly
    """The assembly whose depth it has."""

    @property
    def name(self) -> str:
        return f"{self.method}-{self.assembly}"

    def model(self, run: RunDir) -> Path:
        """Its checkpoint folder."""
        return run.stage("baseline") / self.name / "model"


def baselines_of(recipe: Recipe, num_layers: tuple[int, int]) -> list[Baseline]:
    """What the recipe asks for.

    Raises:
        ValueError: a ratio beyond the coarsest assembly, or for theseus one that no single granularity makes.
    """
    settings = recipe.baseline
    if settings.optim.num_steps == 0:
        return []
    spans = spans_of(recipe, num_layers)
    assemblies = [preset_assembly("size-first", ratio, num_layers, spans) for ratio in settings.ratios]
    assemblies = list(dict.fromkeys(assemblies)) or [coarsest_of(recipe, num_layers)]
    found = [Baseline(method, assembly) for method in settings.methods for assembly in assemblies]
    for each in found:
        if each.method == "theseus":
            granularity_of(each.assembly)
    return found


def granularity_of(assembly: Assembly) -> int:
    """The one granularity of an assembly that BERT-of-Theseus can make.

    Raises:
        ValueError: it mixes several.
    """
    granularity = max(assembly.encoder.lengths + assembly.decoder.lengths)
    for tiling in (assembly.encoder, assembly.decoder):
        if tiling != pure_tiling(tiling.num_teacher_layers, granularity):
            raise ValueError(
                f"baseline theseus has one granularity, which does not make {assembly}: give it baseline.ratios that "
                "one granularity makes, such as 2, 3 or 6"
            )
    return granularity


@dataclass(frozen=True)
class Parts:
    """What checkpoints are put together from: the teacher's folder and the module library."""

    folder: Path
    config: dict[str, Any]
    family: Family
    teacher: Weights
    library: Weights
    models: ModuleLibrary
    """The same in memory: what a checkpoint must compute."""

    @staticmethod
    def of(run: RunDir, *, library: bool = True) -> Parts:
        """Read a run's teacher and, where asked for, its module library.

        Raises:
            FileNotFoundError: no library.
            ValueError: a library that is damaged or of another teacher.
        """
        return Parts.load(run.teacher_model, run.library if library else None)

    @staticmethod
    def load(teacher: Path, library: Path | None) -> Parts:
        """Read a teacher's folder and a module library that was trained over it; raises what `of` does."""
        config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
        return Parts(
            folder=teacher,
            config=config,
            family=family_of(config["model_type"]),
            teacher=load_file(teacher / "model.safetensors"),
            library=load_file(library / "modular.safetensors") if library else {},
            models=ModuleLibrary.load(teacher, library),
        )


def write_checkpoint(parts: Parts, assembly: Assembly, folder: Path, *, dropped: bool = False) -> None:
    """Publish one assembly as a Hugging Face folder; with `dropped`, teacher layers alone at the same depth.

    Raises:
        ValueError: what was written does not compute what it was written from; nothing is published.
    """
    config, family, teacher = dict(parts.config), parts.family, parts.teacher
    weights = dict(_outside_layers(teacher, family))
    spans = {stack: _spans(assembly.tiling(stack), dropped) for stack in STACKS}
    for stack in STACKS:
        for index, span in enumerate(spans[stack]):
            prefix = f"{family.layer_prefix(stack)}{index}."
            weights |= {prefix + name: tensor for name, tensor in _layer(parts, stack, span).items()}
        weights |= {name: teacher[name] for name in teacher if _is_shared(name, stack, family)}
    config |= family.depth_entries((assembly.encoder.num_layers, assembly.decoder.num_layers))
    config.pop("num_hidden_layers", None)  # an alias of the encoder's depth, which would win over it
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    generation = parts.folder / "generation_config.json"
    if generation.is_file():
        shutil.copy2(generation, temporary / generation.name)
    copy_tokenizer(parts.folder, temporary)
    try:
        check_round_trip(temporary, parts.models.model_of(spans))
    except ValueError:
        shutil.rmtree(temporary)
        raise
    publish_folder(temporary, folder)


def _spans(tiling: Tiling, dropped: bool) -> tuple[Span, ...]:
    """What the layers of an assembled stack stand for."""
    return tuple(Span(i, i) for i in kept_layers(tiling)) if dropped else tiling.spans


@torch.no_grad()
def check_round_trip(folder: Path, model: Any) -> None:
    """Hold that plain transformers makes of a folder a model with exactly the logits of `model`.

    Raises:
        ValueError: weights missing or left over, or other logits.
    """
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(f"{folder} does not read back ({what}: {', '.join(map(str, info[what]))}): not published")
    generator = torch.Generator().manual_seed(0)
    source_BS, target_BT = (
        torch.randint(model.config.vocab_size, (2, length), generator=generator) for length in (16, 8)
    )
    mask_BS = torch.arange(16)[None, :] < torch.tensor([[16], [11]])
    ours, theirs = (
        each.eval()(input_ids=source_BS, attention_mask=mask_BS, decoder_input_ids=target_BT).logits
        for each in (model, loaded)
    )
    if not torch.equal(ours, theirs):
        apart = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("nan")
        raise ValueError(
            f"{folder} reads back as another model (its logits are up to {apart:.2g} apart): not published; run "
            f"python -m pipeline doctor, and the same command again"
        )


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
