"""Ablations of the method: one teacher, one budget, one change each, several seeds; killed or not, it goes on.

Every run is a run directory of its own, DIR/<configuration>-seed<n>, that shares data and teacher with --base; a run
that is done is not done again. The table says what the last validation of each run found, as mean and spread over the
seeds, and marks what differs from the recipe as it is by more than both spreads.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from pipeline.bench import hardware
from pipeline.config.cli import parse_recipe, recipe_parser
from pipeline.config.recipe import Recipe
from pipeline.planning.forecast import distill_flops
from pipeline.report.data import read_jsonl
from pipeline.run import run_stage, write_recipe
from pipeline.rundir.run_dir import RunDir
from pipeline.rundir.stage import Stage

AS_IT_IS = "as-it-is"
DEFAULT_OUT = "runs/ablation"

# configuration -> what it changes of the recipe; {steps} is distill.optim.num_steps, {sixth} a sixth of them
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    AS_IT_IS: (),
    "init-last": ("--distill.init", "last"),
    "init-average": ("--distill.init", "average"),
    "sampler-uniform": ("--distill.sampler", "uniform"),
    "sampler-sandwich": ("--distill.sampler", "sandwich"),
    "sampler-theseus-linear": ("--distill.sampler", "theseus-linear"),
    "local-only": ("--distill.local_steps", "{steps}"),
    "replacing-only": ("--distill.local_steps", "0"),
    "no-hidden-loss": ("--distill.losses.hidden", "0"),
    "no-logit-loss": ("--distill.losses.logit", "0"),
    "no-task-loss": ("--distill.losses.task", "0"),
    "attention-losses": ("--distill.losses.attention_self", "1", "--distill.losses.attention_cross", "1"),
}
FURTHER: dict[str, tuple[str, ...]] = {
    "init-middle": ("--distill.init", "middle"),
    "draws-coarsest": ("--distill.draws", "[sampled,coarsest]"),
    "draws-sampled": ("--distill.draws", "[sampled,sampled,sampled,sampled]"),
    "draws-one": ("--distill.draws", "[sampled]"),
    "draws-pure": ("--distill.draws", "[sampled,pure]"),
    "draws-pure-alone": ("--distill.draws", "[pure]"),
    "local-sixth": ("--distill.local_steps", "{sixth}"),
    "draws-coarsest-local-sixth": ("--distill.draws", "[sampled,coarsest]", "--distill.local_steps", "{sixth}"),
    "draws-sampled-local-sixth": (
        "--distill.draws", "[sampled,sampled,sampled,sampled]", "--distill.local_steps", "{sixth}",
    ),
    "draws-one-local-sixth": ("--distill.draws", "[sampled]", "--distill.local_steps", "{sixth}"),
    "draws-pure-alone-local-sixth": ("--distill.draws", "[pure]", "--distill.local_steps", "{sixth}"),
    "sampler-theseus-constant": ("--distill.sampler", "theseus-constant"),
    "sampler-coarse-to-fine": ("--distill.sampler", "coarse-to-fine"),
    "sampler-fine-to-coarse": ("--distill.sampler", "fine-to-coarse"),
    "task-loss-only": ("--distill.losses.hidden", "0", "--distill.losses.logit", "0"),
    "reverse-logit-loss": ("--distill.losses.logit_direction", "reverse"),
    "plain-hidden-loss": ("--distill.losses.hidden_mode", "mse"),
    "cosine-hidden-loss": ("--distill.losses.hidden_mode", "cosine"),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one run found."""

    measures: dict[str, float]
    """The last record's validation/<assembly> (nats per token) and bleu/<assembly>."""
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="recipe: a path or a name in pipeline/recipes/")
    parser.add_argument(
        "--base",
        type=Path,
        help="run directory whose data and teacher are taken as they are (default: DIR/base)",
    )
    parser.add_argument("--out", type=Path, default=Path(DEFAULT_OUT), metavar="DIR", help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of every configuration")
    parser.add_argument(
        "--only", nargs="+", default=list(CONFIGURATIONS), choices=[*CONFIGURATIONS, *FURTHER], metavar="NAME",
        help=f"configurations to run; further ones: {', '.join(FURTHER)}",
    )  # fmt: skip
    parser.add_argument(
        "--equal-flops",
        action="store_true",
        help="give each configuration as many steps as cost the FLOPs of the recipe as it is, not as many as that has",
    )
    parser.add_argument("--bleu-examples", type=int, default=0, help="validation examples to decode at the end")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to this Markdown file, too")


def main(arguments: argparse.Namespace) -> None:
    base = RunDir(arguments.base or arguments.out / "base")
    recipe = recipe_with(arguments.config, base, ())
    if arguments.base is None or not (base.stage("teacher") / "stage.json").is_file():
        make_base(recipe, base)
    found: dict[str, dict[int, Outcome]] = {}
    # seed by seed, so that a table of all configurations is there as early as can be
    for seed in arguments.seeds:
        for name in arguments.only:
            run = RunDir(arguments.out / f"{name}-seed{seed}")
            changes = changes_of(
                name, recipe, seed, arguments.bleu_examples,
                equal_flops_of=arguments.config if arguments.equal_flops else "",
            )  # fmt: skip
            changed = recipe_with(arguments.config, run, changes)
            found.setdefault(name, {})[seed] = run_one(changed, run, base)
    text = report_text(recipe, arguments.seeds, found)
    print(text)
    for line in json_lines(found):
        print(line, flush=True)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


def recipe_with(config: str, run: RunDir, changes: Sequence[str]) -> Recipe:
    """The recipe of one run, with overrides as on the command line."""
    return parse_recipe(recipe_parser("ablation", ""), ["--config", config, "--run_dir", str(run.root), *changes])[0]


def changes_of(name: str, recipe: Recipe, seed: int, bleu_examples: int, *, equal_flops_of: str = "") -> list[str]:
    """Command-line overrides of one run: what the configuration changes, the seed, one validation at the end.

    Args:
        equal_flops_of: the recipe's name or path, to take as many steps as cost the same; empty: as many as it has.
    """
    steps = recipe.distill.optim.num_steps
    changes = [part.format(steps=steps, sixth=steps // 6) for part in {**CONFIGURATIONS, **FURTHER}[name]]
    if equal_flops_of:
        steps, local_steps = at_equal_flops(distill_flops(recipe), equal_flops_of, changes)
        changes += ["--distill.optim.num_steps", str(steps), "--distill.local_steps", str(local_steps)]
    loop = "--distill.loop."
    changes += ["--seed", str(seed), f"{loop}validate_every_steps", str(steps), f"{loop}keep_best", "false"]
    return [*changes, f"{loop}validation_bleu_examples", str(bleu_examples)]


def at_equal_flops(flops: float, config: str, changes: Sequence[str]) -> tuple[int, int]:
    """(steps, those of them that are local) after which a recipe with these changes has cost so many FLOPs; of a
    recipe without a replacing phase all are."""
    nowhere = RunDir(Path(DEFAULT_OUT))
    changed = recipe_with(config, nowhere, changes)
    num_steps, local_steps = changed.distill.optim.num_steps, changed.distill.local_steps
    all_local = recipe_with(config, nowhere, [*changes, "--distill.local_steps", str(num_steps)])
    local_step = distill_flops(all_local) / num_steps
    if local_steps == num_steps:
        steps = round(flops / local_step)
        return steps, steps
    local = local_steps * local_step
    replacing_step = (distill_flops(changed) - local) / (num_steps - local_steps)
    return local_steps + round((flops - local) / replacing_step), local_steps


def make_base(recipe: Recipe, base: RunDir) -> None:
    """Make data and teacher, as far as they are not there yet."""
    base.root.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, base)
    for name in ("data", "teacher"):
        run_stage(name, recipe, base, [])


def run_one(recipe: Recipe, run: RunDir, base: RunDir) -> Outcome:
    """Distil once, or read what was found before."""
    run.root.mkdir(parents=True, exist_ok=True)
    for name in ("data", "teacher"):
        link = run.root / name
        if not link.is_symlink():
            link.symlink_to((base.root / name).resolve(), target_is_directory=True)
    stage = Stage.of(recipe, run, "distill")
    if stage.stamp() is None:
        print(f"ablation: {run.root.name}", flush=True)
        write_recipe(recipe, run)
        run_stage("distill", recipe, run, [])
    stamp = stage.stamp()
    assert stamp is not None, "stage distill has just ended well"
    last = read_jsonl(stage.folder / "metrics.jsonl")[-1]
    measures = {name: value for name, value in last.items() if name.startswith(("validation/", "bleu/"))}
    return Outcome(measures, stamp["seconds"])


def report_text(recipe: Recipe, seeds: Sequence[int], found: Mapping[str, Mapping[int, Outcome]]) -> str:
    """The table in Markdown, with what it was made with."""
    lines = [
        f"# Ablations on {recipe.name}\n",
        f"{hardware()}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}. One teacher, "
        f"{recipe.distill.optim.num_steps} steps of {recipe.distill.batch.micro_batches_per_step} x "
        f"{recipe.distill.batch.tokens_per_micro_batch} tokens each, seeds {', '.join(map(str, seeds))}. validation: "
        "nats per target token of the validation part, the last step's weights; +- is half the range over the seeds; "
        f"* differs from {AS_IT_IS} by more than both half ranges together; seconds are those of a "
        "run's last start.\n",
        table(found),
    ]
    return "\n".join(lines) + "\n"


def table(found: Mapping[str, Mapping[int, Outcome]]) -> str:
    """One row a configuration, one column a measure."""
    names = list(dict.fromkeys(m for runs in found.values() for each in runs.values() for m in each.measures))
    rows = [["configuration", *names, "seconds"], [":--", *("--:" for _ in names), "--:"]]
    reference = found.get(AS_IT_IS)
    for name, runs in found.items():
        cells = [cell(runs, measure, reference if name != AS_IT_IS else None) for measure in names]
        rows.append([name, *cells, f"{statistics.mean(each.seconds for each in runs.values()):.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(runs: Mapping[int, Outcome], measure: str, reference: Mapping[int, Outcome] | None) -> str:
    mean, half = spread(runs, measure)
    if math.isnan(mean):
        return ""
    digits = 2 if measure.startswith("bleu/") else 4
    text = f"{mean:.{digits}f} +- {half:.{digits}f}"
    if reference is not None and min(len(runs), len(reference)) > 1:  # one run has no spread to compare with
        other, other_half = spread(reference, measure)
        text += " *" if abs(mean - other) > half + other_half else ""
    return text


def spread(runs: Mapping[int, Outcome], measure: str) -> tuple[float, float]:
    """(mean, half the range) over the seeds that measured it; not a number where none did."""
    values = [each.measures[measure] for each in runs.values() if measure in each.measures]
    if not values:
        return math.nan, math.nan
    return statistics.mean(values), (max(values) - min(values)) / 2


def json_lines(found: Mapping[str, Mapping[int, Outcome]]) -> list[str]:
    """One line a configuration and measure."""
    lines = []
    for name, runs in found.items():
        for measure in next(iter(runs.values())).measures:
            mean, half = spread(runs, measure)
            record = {"bench": "ablation", "measure": measure, "configuration": name, "mean": mean, "half_range": half}
            record |= {"values": {str(seed): each.measures.get(measure) for seed, each in runs.items()}}
            lines.append(json.dumps(record))
    return lines
