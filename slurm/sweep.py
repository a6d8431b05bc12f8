"""One recipe with some fields varied, as arrays with one task a point; all points share one data build, one teacher and
one baseline.

    RUN/                     data, teacher, baseline: as of any run
    RUN/sweep/<point>/       a run directory: recipe.yaml, links to RUN/data, RUN/teacher, RUN/baseline, and the rest
    RUN/sweep/slurm/         the scripts of the arrays, and points.txt: the run directory of each task
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Recipe, parse_recipe, recipe_parser, recipe_yaml
from pipeline.rundir import write_atomic
from slurm.controller import jobs_of_run, sbatch, test_only
from slurm.render import Script, render
from slurm.status import SHARED_STAGES
from slurm.submit import Plan, chain_of, check_ranks, locked, submit, write_jobs

POINT_STAGES = ("distill", "search", "assemble", "evaluate", "report")
VARIED = ("distill.", "assemble.", "evaluate.", "seed")


@dataclass(frozen=True)
class Point:
    """One combination of the varied fields."""

    name: str
    """Name of its folder."""
    recipe: Recipe


def points_of(words: Sequence[str], base: Recipe, variations: Sequence[str]) -> list[Point]:
    """Every combination of the varied fields.

    Args:
        words: the recipe, as the command line gives it: --config and fields.
        variations: such as "seed=0,1,2"; a value with commas in brackets, such as [2,3], is one value.

    Raises:
        ValueError: a field that the points must share, an unknown one, or a value that it cannot take.
    """
    axes = [_axis(variation) for variation in variations]
    if len({field for field, _ in axes}) < len(axes):
        raise ValueError("a field is varied twice: give all its values in one --vary")
    points = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = list(zip((field for field, _ in axes), values, strict=True))
        name = ",".join(
            f"{field.rpartition('.')[2]}={re.sub(r'[^0-9A-Za-z.+-]+', '-', value.strip('[]'))}"
            for field, value in chosen
        )
        options = [word for field, value in chosen for word in (f"--{field}", value)]
        recipe, _ = parse_recipe(recipe_parser("python -m slurm", ""), [*words, *options])
        points.append(Point(name, dataclasses.replace(recipe, name=f"{base.name},{name}")))
    if len({point.name for point in points}) < len(points):
        raise ValueError("two points of the sweep have one name: vary fields whose last words differ")
    return points


def _axis(variation: str) -> tuple[str, list[str]]:
    field, _, text = variation.partition("=")
    if not field.startswith(VARIED):
        raise ValueError(f"--vary {variation}: points share data and teacher, so that only {', '.join(VARIED)} vary")
    values = [value for value in re.split(r",(?![^\[]*\])", text) if value]
    if not values:
        raise ValueError(f"--vary {variation}: give values, such as {field}=1,2")
    return field, values


def submit_sweep(plan: Plan, points: Sequence[Point]) -> dict[str, int]:
    """Submit the shared stages of a run, then the arrays; job numbers by stage. Submitted again when it has ended, it
    does what is missing: stages of points that are done skip themselves.

    Raises:
        ValueError: jobs of this sweep are in the queue, or the controller refuses a script.
    """
    folder = plan.run_dir / "sweep"
    for name in ("slurm", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with locked(folder / "slurm" / ".lock"):
        alive = sorted({job.number for job in jobs_of_run(folder) if job.is_alive})
        if alive:
            raise ValueError(
                f"jobs {', '.join(map(str, alive))} of this sweep are in the queue: wait, or cancel {folder}"
            )
        for point in points:
            check_ranks("distill", point.recipe, plan.cluster, plan.nodes)
        stages = [stage for stage in POINT_STAGES if any(stage in chain_of(point.recipe) for point in points)]
        scripts = {stage: _script(plan, stage, len(points)) for stage in stages}
        texts = {stage: render(script) for stage, script in scripts.items()}
        for text in texts.values():
            test_only(text)
        shared = submit(dataclasses.replace(plan, stages=SHARED_STAGES))
        _write(plan.run_dir, points)
        submitted: dict[str, int] = {}
        after = [f"afterok:{number}" for number in _alive_shared(plan, shared)]
        for stage in stages:
            path = folder / "slurm" / f"{stage}.sbatch"
            write_atomic(path, texts[stage])
            submitted[stage] = sbatch(path, after)
            write_jobs(folder, submitted)
            after = [f"aftercorr:{submitted[stage]}"]  # task k waits for task k
    return shared | submitted


def _alive_shared(plan: Plan, shared: dict[str, int]) -> list[int]:
    """The last job of the shared stages that is to wait for, if any."""
    alive = [job.number for job in jobs_of_run(plan.run_dir) if job.is_alive and job.stage in SHARED_STAGES]
    return [max([*alive, *shared.values()])] if alive or shared else []


def _script(plan: Plan, stage: str, num_points: int) -> Script:
    return dataclasses.replace(
        plan.script(stage), run_dir=plan.run_dir / "sweep", points=num_points, name=f"{plan.recipe.name}-sweep"
    )


def _write(run_dir: Path, points: Sequence[Point]) -> None:
    """The run directory of each point, and the list of them."""
    folder = run_dir / "sweep"
    for point in points:
        root = folder / point.name
        root.mkdir(exist_ok=True)
        write_atomic(root / "recipe.yaml", recipe_yaml(dataclasses.replace(point.recipe, run_dir=str(root))))
        for name in set(SHARED_STAGES) & set(chain_of(point.recipe)):
            if not (root / name).is_symlink():
                (root / name).symlink_to(Path("..", "..", name))
        (root / "STOP").unlink(missing_ok=True)
    write_atomic(folder / "slurm" / "points.txt", "".join(f"{folder / point.name}\n" for point in points))
