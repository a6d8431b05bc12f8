"""One assembly as an ordinary Hugging Face folder.

A checkpoint is made of files alone: weights are renamed, the depth in config.json is changed, and what config.json says
of the head is made true for every reader. So an assembly differs from its teacher in nothing that transformers would
need our code for. Before it is published, config.json is held against the weights, plain transformers reads the folder
back, and its logits must be those of the same layers put together in memory, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data_prep.publish import publishing_folder
from pipeline.assemble.card import card_of, loading_of, write_card
from pipeline.beside import fault_of_tokenizer
from pipeline.engines import ENGINES, refuse_kind
from pipeline.families import Family, family_of
from pipeline.library import ModuleLibrary
from pipeline.ordinary import check_weights, read_model, write_settings
from pipeline.rundir import RunDir, read_json
from pipeline.spans import STACKS, Assembly, Span, Tiling, kept_layers
from pipeline.tokenizer import copy_tokenizer, write_tokenizer

Weights = dict[str, torch.Tensor]


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
    manifest: dict[str, Any] | None
    """Of the library; None where there is none."""

    @property
    def hashes(self) -> dict[str, str]:
        """What a checkpoint is made of."""
        assert self.manifest is not None
        return {name: self.manifest[name] for name in ("teacher_sha256", "modular_sha256")}

    @staticmethod
    def of(run: RunDir, *, library: bool = True, dtype: torch.dtype = torch.float32) -> Parts:
        """Read a run's teacher and, where asked for, its module library; raises what `load` does."""
        return Parts.load(run.teacher_model, run.library if library else None, dtype=dtype)

    @staticmethod
    def load(teacher: Path, library: Path | None, *, dtype: torch.dtype = torch.float32) -> Parts:
        """Read a teacher's folder and a module library that was trained over it, rounded to `dtype`.

        Raises:
            FileNotFoundError: no library.
            ValueError: a teacher that says of itself what it is not, or a library that is damaged or of another one.
        """
        check_weights(teacher)
        config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)  # an older name of `dtype`
        return Parts(
            folder=teacher,
            config={**config, "dtype": str(dtype).removeprefix("torch.")},
            family=family_of(config["model_type"]),
            teacher=_rounded(teacher / "model.safetensors", dtype),
            library=_rounded(library / "modular.safetensors", dtype) if library else {},
            models=ModuleLibrary.load(teacher, library, dtype=dtype),
            manifest=read_json(library / "library.json") if library else None,
        )


def write_checkpoint(
    parts: Parts, assembly: Assembly, folder: Path, *, dropped: bool = False, scores: Sequence[str] = ()
) -> None:
    """Publish one assembly as a Hugging Face folder; with `dropped`, teacher layers alone at the same depth.

    Args:
        scores: lines for its model card.

    Raises:
        ValueError: what was written contradicts itself, or does not compute what it was written from; nothing is
            published.
    """
    config, family, teacher = dict(parts.config), parts.family, parts.teacher
    weights = dict(_outside_layers(teacher, family))
    spans = {stack: _spans(assembly.tiling(stack), dropped) for stack in STACKS}
    for stack in STACKS:
        for index, span in enumerate(spans[stack]):
            prefix = f"{family.layer_prefix(stack)}{index}."
            weights |= {prefix + name: tensor for name, tensor in _layer(parts, stack, span).items()}
        weights |= {name: teacher[name] for name in teacher if _is_shared(name, stack, family)}
    config = family.with_layers(config, {stack: [span.last for span in spans[stack]] for stack in STACKS})
    with publishing_folder(folder) as temporary:
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        generation = parts.folder / "generation_config.json"
        if generation.is_file():
            shutil.copy2(generation, temporary / generation.name)
        if fault_of_tokenizer(parts.folder):  # as earlier versions of this project saved it
            write_tokenizer(parts.folder, temporary)
        else:
            copy_tokenizer(parts.folder, temporary)
        kind, library = config["model_type"], parts.manifest
        card = card_of(
            assembly, kind=kind, dropped=dropped, library=library, loading=loading_of(temporary), scores=scores
        )
        write_card(temporary, card)
        write_settings(temporary, config)
        check_round_trip(temporary, parts.models.model_of(spans))


def write_converted(
    parts: Parts, assembly: Assembly, checkpoint: Path, folder: Path, engine: str, quantization: str,
    scores: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the checkpoint of an assembly for an engine into a folder that is there, with its card.

    Args:
        engine: one of ENGINES.
        scores: lines for its model card.

    Raises:
        ValueError: what the engine makes of such a model, or of this one, computes something else.
    """
    kind = parts.config["model_type"]
    refuse_kind(engine, kind)
    loading = ENGINES[engine].convert(checkpoint, folder, quantization)
    write_card(
        folder, card_of(assembly, kind=kind, dropped=False, library=parts.manifest, loading=loading, scores=scores)
    )


def _rounded(file: Path, dtype: torch.dtype) -> Weights:
    return {name: weight.to(dtype) for name, weight in load_file(file).items()}


def _spans(tiling: Tiling, dropped: bool) -> tuple[Span, ...]:
    """What the layers of an assembled stack stand for."""
    return tuple(Span(i, i) for i in kept_layers(tiling)) if dropped else tiling.spans


@torch.no_grad()
def check_round_trip(folder: Path, model: Any) -> None:
    """Hold that plain transformers makes of a folder a model with exactly the logits of `model`.

    Raises:
        ValueError: weights missing or left over, or other logits.
    """
    loaded, info = read_model(folder)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(f"{folder} does not read back ({what}: {', '.join(map(str, info[what]))}): not published")
    generator = torch.Generator().manual_seed(0)
    source_BS, target_BT = (
        torch.randint(model.config.vocab_size, (2, length), generator=generator) for length in (16, 8)
    )
    mask_BS, mask_BT = (
        torch.arange(most)[None, :] < torch.tensor([[most], [fewer]]) for most, fewer in ((16, 11), (8, 5))
    )
    ours, theirs = (
        each.eval()(
            input_ids=source_BS, attention_mask=mask_BS, decoder_input_ids=target_BT, decoder_attention_mask=mask_BT
        ).logits
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
