"""python -m pipeline COMMAND --config RECIPE [--any.field value ...]

A recipe is a YAML file, or the name of one in pipeline/recipes/. `COMMAND --help` shows every field of a recipe.

run        do all stages in order, each in its own processes; skip those that are done (--dry-run: only say so)
estimate   say what memory, traffic, hours and disk a run will take (--nodes N --gpus M --gib G)
fetch      download what the recipe names as hub:owner/name, on a machine with internet
teacher    train, fine-tune or take the teacher, the large model (under torchrun or srun)
label      have the teacher write targets for the training sources: one more source of data
distill    train the modular layers, each of which stands for several teacher layers (under torchrun or srun)
baseline   train small models one by one, for comparison (under torchrun or srun)
search     find the assemblies that lose least under any budget
recover    train one assembly further, and keep the result if it is not worse (under torchrun or srun)
assemble   put teacher layers and modular layers together into checkpoints of all sizes asked for
evaluate   score and time all checkpoints in one batch
report     make the table, scores.csv, report.html and the pictures
compare    show what differs between two systems or two runs, and how surely
choose     name, and export, the assembly that fits a budget of latency, bytes or quality
export     write assemblies as ordinary folders, in half the bytes, for the engine CTranslate2, or as ONNX
draft      find and write the assembly that makes the teacher itself faster, by writing ahead for it
trim       remove the tokens that given texts never use from a T5, mT5 or mBART-50 folder
study      hold one run for all sizes against a run for each, at equal cost
doctor     check this machine or allocation, or (doctor FOLDER ...) whether model folders are what they say
checkpoint list, verify or export the checkpoints of a run
bench      measure against named baselines (also: python -m pipeline.bench)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentParser

from data_prep.processes import collect_garbage, die_with_parent, run_as_process
from pipeline.config import Recipe, parse_recipe, recipe_parser, run_program
from pipeline.exits import EXIT_MISTAKE
from pipeline.rundir import RunDir, Stage

# command -> module:function, imported when it is asked for: a report should not wait for torch
TRAINING = {
    "teacher": "pipeline.teacher:train_teacher",
    "distill": "pipeline.distill:train_modular",
    "baseline": "pipeline.baselines:train_baseline",
    "recover": "pipeline.recover:recover",
}
PROGRAMS = {
    "search": "pipeline.search:search",
    "assemble": "pipeline.assemble:assemble",
    "evaluate": "pipeline.evaluation:evaluate",
    "report": "pipeline.report:report",
}
TOOLS = {  # with options of their own
    "compare": "pipeline.report:compare_command",
    "choose": "pipeline.report:choose_command",
    "checkpoint": "pipeline.library:checkpoint_command",
    "export": "pipeline.export:export_command",
    "draft": "pipeline.draft:draft_command",
    "trim": "pipeline.trim:trim_command",
    "study": "pipeline.study:study_command",
}
STAGES = ("run", "estimate", "fetch", "label", "doctor", *TRAINING, *PROGRAMS)


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    name, *rest = arguments
    if name == "bench":
        _imported("pipeline.bench.__main__:main")(rest)
        return
    if name in TOOLS:
        tool = _imported(TOOLS[name])
        run_program(lambda: tool(rest), verbose="--verbose" in rest)
        return
    if name == "doctor" and rest and not rest[0].startswith("-"):
        from pipeline.doctor import examine

        run_program(lambda: examine(rest), verbose=False)
        return
    if name not in STAGES:
        print(f"error: unknown stage {name!r}: choose from {', '.join((*STAGES, *TOOLS))}", file=sys.stderr)
        raise SystemExit(EXIT_MISTAKE)
    run_program(lambda: _run_stage(name, rest), verbose="--verbose" in rest)


def about(command: str) -> str:
    """What a command does, from the list above."""
    (line,) = [line for line in (__doc__ or "").splitlines() if line.startswith(f"{command} ")]
    return line.removeprefix(command).strip()


def _run_stage(name: str, arguments: Sequence[str]) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun starts workers in sessions of their own, out of a kill's reach
        die_with_parent()
    parser = recipe_parser(f"python -m pipeline {name}", about(name), arguments)
    if name == "run" or name in TRAINING:
        parser.add_argument("--extend", action="store_true", help="Continue with another num_steps or learning rate.")
    if name == "run":
        parser.add_argument("--dry-run", action="store_true", help="Check everything and say what would be done.")
    if name == "estimate":
        _add_machine(parser)
    if name == "label":
        parser.add_argument("--num_beams", type=int, default=4, help="Beams of the teacher; 1 is greedy.")
        parser.add_argument("--min_chrf", type=float, default=40.0, help="Least chrF (0-100) with the reference.")
    recipe, options = parse_recipe(parser, arguments)
    run = RunDir(Path(recipe.resolved_run_dir))
    if name == "doctor":
        from pipeline.doctor import doctor

        doctor(run.root)
    elif name == "run":
        from pipeline.run import run_all

        run_all(recipe, run, extend=options["extend"], dry_run=options["dry_run"], verbose=options["verbose"])
    elif name == "estimate":
        from pipeline.planning import estimate

        machine = {"num_nodes": options["nodes"], "gpus_per_node": options["gpus"] or recipe.launch.num_ranks}
        print(estimate(recipe, **machine, gib=options["gib"], peak_tflops=options["tflops"], share=options["share"]))
    elif name == "fetch":
        _fetch(recipe)
    elif name == "label":
        from pipeline.label import Rule, label
        from pipeline.world import World

        collect_garbage()
        label(recipe, run, Rule(options["num_beams"], options["min_chrf"]), World.from_environment())
    elif name in TRAINING:
        _train(name, recipe, run, extend=options["extend"])
    else:
        _imported(PROGRAMS[name])(recipe, run)


def _add_machine(parser: ArgumentParser) -> None:
    from pipeline.planning import PEAK_TFLOPS, SHARE

    parser.add_argument("--nodes", type=int, default=1, help="Nodes to train on.")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of a node; 0: launch.num_ranks.")
    parser.add_argument("--gib", type=float, default=80.0, help="Memory of a GPU in GiB.")
    parser.add_argument("--tflops", type=float, default=PEAK_TFLOPS, help="Peak of a GPU in TFLOP/s.")
    parser.add_argument("--share", type=float, default=SHARE, help="Share of that peak that training reaches.")


def _fetch(recipe: Recipe) -> None:
    from data_prep.hub import PREFIX, data_files, fetch, names_data

    names = sorted({each for each in (recipe.teacher.folder, recipe.data.tokenizer) if each.startswith(PREFIX)})
    for each in names:
        print(f"{each} -> {fetch(each)}")
    inputs = [name for each in recipe.data.all_sets for name in (*each.train, *each.validation, *each.test)]
    for each in filter(names_data, inputs):
        for name, path in data_files(each, download=True):
            print(f"{name} -> {path}")
    if not names and not any(map(names_data, inputs)):
        print(f"nothing to fetch: teacher.folder, data.tokenizer and the data's files name no {PREFIX}owner/name")


def _train(name: str, recipe: Recipe, run: RunDir, *, extend: bool) -> None:
    stage = Stage.of(recipe, run, name)
    from pipeline.training import Watchdog, join_world
    from pipeline.world import World

    train = _imported(TRAINING[name])
    hang_timeout_s = (recipe.teacher if name == "teacher" else recipe.distill).loop.hang_timeout_s
    heartbeat = run.root / "heartbeat" / name
    with Watchdog(heartbeat, World.from_environment(), hang_timeout_s=hang_timeout_s) as watchdog:
        world = join_world()
        watchdog.met()
        train(recipe, stage, world, watchdog, extend=extend)
        world.close()


def _imported(place: str) -> Callable[..., None]:
    """The function at module:function, behind which no large import comes any more."""
    module, _, name = place.partition(":")
    found: Callable[..., None] = getattr(import_module(module), name)
    collect_garbage()
    return found


if __name__ == "__main__":
    run_as_process(lambda: main(sys.argv[1:]))
