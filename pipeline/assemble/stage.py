"""The assemble stage: a checkpoint of every assembly that is asked for, the teacher's, and the list of all."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace

import transformers
from tqdm import tqdm

from data_prep.publish import publishing_folder
from pipeline.assemble.requests import baselines_of, check_granularities, requested_assemblies, stacks_of
from pipeline.assemble.systems import ENGINE_PREFIX, System, describe
from pipeline.assemble.write import Parts, write_checkpoint, write_converted
from pipeline.config import Recipe
from pipeline.rundir import RunDir, Stage, read_json, write_atomic
from pipeline.spans import Assembly


def assemble(recipe: Recipe, run: RunDir) -> None:
    """Make RUN/assemble: a checkpoint of every asked assembly, the teacher's, the baselines', and systems.json."""
    started_at = time.time()
    stage = Stage.of(recipe, run, "assemble")
    if stage.stamp() is not None:
        print("assemble is up to date")
        return
    check_granularities(recipe, run)
    stacks = stacks_of(recipe, run)
    requests = requested_assemblies(recipe, stacks, read_json(run.choices))
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
            if kind != "dropped":
                systems += [convert(run, parts, system, each) for each in recipe.assemble.ctranslate2]
    for baseline in baselines_of(recipe, stacks):
        systems.append(describe(run, baseline.model(run), "finetuned", baseline.name, baseline.assembly))
    write_atomic(run.systems, json.dumps({"systems": [asdict(system) for system in systems]}, indent=1))
    stage.publish([stage.folder / "models", run.systems], started_at=started_at)


def convert(run: RunDir, parts: Parts, system: System, quantization: str) -> System:
    """Publish a system's checkpoint as a model of CTranslate2, beside it."""
    checkpoint, name = run.root / system.folder, f"{ENGINE_PREFIX}{quantization}-{system.assembly}"
    folder = checkpoint.parent / name
    with publishing_folder(folder) as temporary:
        write_converted(parts, Assembly.parse(system.assembly), checkpoint, temporary, "ctranslate2", quantization)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.bin"))
    return replace(
        system, name=name, kind="engine", folder=str(folder.relative_to(run.root)), requests=(), bytes=num_bytes
    )
