"""How much disk a run will take, at most, by stage."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from data_prep.hub import data_files, names_data
from data_prep.publish import files_in
from pipeline.assemble import requested_assemblies
from pipeline.config import LoopConfig, Recipe
from pipeline.footprint import BYTES_IN_CHECKPOINT, GIB
from pipeline.planning.planned import Planned
from pipeline.rundir import RunDir

BYTES_OF_A_WEIGHT = 4
"""In the folders of models and in the module library: fp32."""
BYTES_OF_A_DEMO_PAIR = 400
"""Text and ids of a pair of the built-in corpus."""
UNPACKED = 4
"""Bytes of text in a byte of a compressed file."""
PACKED = (".gz", ".zst", ".parquet")


def bytes_of_stages(planned: Planned) -> dict[str, float]:
    """Bytes of each stage's folder at its fullest, with one checkpoint being written beside those that are kept.

    Shards take about as many bytes as the texts: two or four for an id, which stands for about that many.
    """
    recipe = planned.recipe
    sizes = planned.checkpoint_sizes()
    teacher, distill = recipe.teacher, recipe.distill
    requests = requested_assemblies(recipe, planned.stacks)
    num_modular = planned.distill_sizes.num_trained
    # an assembly stands there twice, the second time with layers dropped
    folders: list[float] = [sizes.bytes(each) * (1 if each.ratio_of_layers == 1 else 2) for each in requests]
    quantized = [_bytes_of_quantized(name) / BYTES_OF_A_WEIGHT for name in recipe.assemble.ctranslate2]
    folders += [sizes.bytes(each) * share for each in requests for share in quantized]
    found = {
        "data": _bytes_of_data(recipe),
        "teacher": BYTES_OF_A_WEIGHT * planned.teacher_sizes.num_trained,
        "distill": BYTES_OF_A_WEIGHT * num_modular + checkpoints(num_modular, distill.optim.num_steps, distill.loop),
        "baseline": 0.0,
        "assemble": float(sum(folders)),
    }
    if teacher.optim.num_steps:
        found["teacher"] += checkpoints(planned.teacher_sizes.num_trained, teacher.optim.num_steps, teacher.loop)
    for each in planned.baselines:
        trained = planned.baseline_sizes(each).num_trained
        found["baseline"] += checkpoints(trained, recipe.baseline.optim.num_steps, distill.loop)
        found["baseline"] += 2 * sizes.bytes(each.assembly)  # what it starts from, and the model
    return found


def _bytes_of_quantized(name: str) -> int:
    """Of most weights in a model of CTranslate2."""
    kind = name.partition("_")[0]
    return {"int8": 1, "float32": 4}.get(kind, 2)


def checkpoints(num_trained: int, num_steps: int, loop: LoopConfig) -> float:
    """Bytes of a training stage's checkpoints."""
    kept = loop.keep_checkpoints + loop.keep_best
    if loop.keep_every_steps:
        kept += num_steps // loop.keep_every_steps
    made = math.ceil(num_steps / (loop.save_every_steps or num_steps))
    # how many the clock adds nobody knows beforehand
    count = min(num_steps if loop.save_every_s else made, kept + 1)
    return float(BYTES_IN_CHECKPOINT * num_trained * count)


def _bytes_of_data(recipe: Recipe) -> float:
    """Of the shards of those inputs that are here."""
    data = recipe.data
    if data.corpus == "demo":
        return float(BYTES_OF_A_DEMO_PAIR * data.num_demo_pairs)
    names = [name for each in data.all_sets for name in (*each.train, *each.validation, *each.test)]
    return float(sum(_size(path) * (UNPACKED if path.suffix in PACKED else 1) for path in _inputs(names)))


def _inputs(names: Iterable[str]) -> Iterable[Path]:
    for name in names:
        try:
            yield from [path for _, path in data_files(name)] if names_data(name) else [Path(name)]
        except FileNotFoundError:
            continue  # the data stage says so


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in (files_in(path) if path.is_dir() else [path]) if each.is_file())


def check_disk(planned: Planned, run: RunDir) -> None:
    """Refuse a run directory on a disk that will not hold what is still to be written.

    Raises:
        ValueError: names what is needed, what is free, and what to do.
    """
    needed = {name: max(0.0, count - _size(run.root / name)) for name, count in bytes_of_stages(planned).items()}
    place = run.root.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if sum(needed.values()) <= free:
        return
    parts = ", ".join(f"{name} {count / GIB:.2g}" for name, count in needed.items())
    raise ValueError(
        f"run_dir {run.root} will take up to {sum(needed.values()) / GIB:.3g} GiB more ({parts}), but the disk of "
        f"{place} has {free / GIB:.3g} GiB free: choose another run_dir, fewer loop.keep_checkpoints or fewer "
        "assemble.ratios"
    )
