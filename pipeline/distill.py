"""The distill stage: one run that trains every modular layer over the frozen teacher."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.checkpoint import checkpoints, full_weights
from pipeline.config import DistillConfig, Recipe
from pipeline.data import MicroBatch
from pipeline.families import family_of
from pipeline.loop import Task, Trainer, begin_stage
from pipeline.losses import GlobalCounts, LossTerms, local_terms, replacing_terms
from pipeline.modular import ModularLeaf, ModularModel, ModularOutputs, TeacherLeaf
from pipeline.rundir import RunDir, Stage, publish_folder, sha256_file, write_atomic
from pipeline.sampler import Sampler
from pipeline.spans import Assembly, pure_tiling, teacher_assembly
from pipeline.teacher import load_model
from pipeline.world import World


def train_modular(recipe: Recipe, run: RunDir, world: World, *, extend: bool = False) -> None:
    """Make RUN/distill/library, the modular layers of all granularities. Collective over all ranks."""
    started_s = time.time()
    stage = Stage.of(recipe, run, "distill")
    if begin_stage(stage, world, extend=extend):
        return
    settings = recipe.distill
    teacher = load_model(run.teacher_model)
    family = family_of(teacher.config.model_type)
    model = ModularModel(teacher, family, settings.granularities, settings.init)
    trainer = Trainer(
        modular_task(model, family, teacher.config, settings, recipe.seed),
        stage, world, optim=settings.optim, batch=settings.batch, loop=settings.loop,
    )  # fmt: skip
    trainer.train()
    if world.is_main:
        export_library(model, stage, run, settings)
        stage.publish([run.library], started_s=started_s)


def modular_task(model: ModularModel, family: Any, hf_config: Any, settings: DistillConfig, seed: int) -> Task:
    """The two phases: local, where every modular layer learns its span, then replacing, where draws are trained."""
    spans = (model.spans["encoder"], model.spans["decoder"])
    sampler = Sampler(
        seed=seed,
        num_layers=model.num_layers,
        spans=spans,
        granularities=settings.granularities,
        coarse_weight=settings.coarse_weight,
    )

    def forward_args(step: int, batch: MicroBatch) -> tuple[Assembly | None]:
        return (None if step < settings.local_steps else sampler.draw(step, batch.index),)

    def loss_terms(step: int, outputs: ModularOutputs, counts: GlobalCounts) -> LossTerms:
        if step < settings.local_steps:
            return local_terms(outputs, counts)
        return replacing_terms(outputs, counts, settings.losses)

    validations: dict[str, tuple[Assembly]] = {"teacher": (teacher_assembly(*model.num_layers),)}
    for granularity in settings.granularities:
        encoder, decoder = (pure_tiling(n, granularity) for n in model.num_layers)
        validations[str(Assembly(encoder, decoder))] = (Assembly(encoder, decoder),)
    return Task(
        module=model,
        leaf_classes=[TeacherLeaf, ModularLeaf],
        lr_factor=lambda name: family.lr_factor(name, hf_config),
        clip_group=lambda name: ".".join(name.split(".")[1:3]),
        forward_args=forward_args,
        loss_terms=loss_terms,
        validations=validations,
        restarts=(settings.local_steps,) if settings.local_steps else (),
    )


def export_library(model: ModularModel, stage: Stage, run: RunDir, settings: DistillConfig) -> None:
    """Publish the newest checkpoint's weights as the module library: one safetensors file and a manifest."""
    checkpoint = checkpoints(stage.folder / "checkpoints")[-1]
    weights = full_weights(checkpoint)
    # modular.encoder.0-1.layer.<name> -> encoder.0-1.<name>
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        _, stack, span, _, rest = name.split(".", 4)
        tensors[f"{stack}.{span}.{rest}"] = weight
    temporary = run.library.with_name(".library.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(tensors, temporary / "modular.safetensors", metadata={"format": "pt"})
    manifest = {
        "teacher_sha256": sha256_file(run.teacher_model / "model.safetensors"),
        "granularities": list(settings.granularities),
        "num_layers": dict(zip(("encoder", "decoder"), model.num_layers, strict=True)),
        "spans": {stack: [str(span) for span in spans] for stack, spans in model.spans.items()},
        "checkpoint": checkpoint.name,
        "inputs": stage.inputs,
        "modular_sha256": sha256_file(temporary / "modular.safetensors"),
    }
    write_atomic(temporary / "library.json", json.dumps(manifest, indent=1))
    publish_folder(temporary, run.library)
