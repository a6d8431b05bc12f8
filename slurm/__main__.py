"""python -m slurm COMMAND: runs of the pipeline as jobs of a SLURM cluster, from a recipe to a report.

First, once a site: `clusters init`, then `doctor`. For every run: `submit`, then `status`; `submit` again goes on where
a chain stopped. slurm/README.md tells more.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from pipeline.config import parse_recipe, recipe_parser, run_program
from slurm.cluster import CLUSTERS, find_cluster, load_cluster
from slurm.controller import jobs_of_run
from slurm.discover import discover
from slurm.doctor import examine
from slurm.render import Nodes, render
from slurm.stages import stage_of
from slurm.status import check_run, newest_log, screen
from slurm.submit import CHAIN, Plan, alive_stages, cancel, describe, left_alone, plan_of, submit
from slurm.sweep import points_of, submit_sweep

CODE = Path(__file__).resolve().parent.parent
WATCH_S = 10.0
FILE_WIDTH = 200  # of a screen that goes into a file


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    args, fields = parser.parse_known_args(arguments)
    if "program" not in args:
        parser.print_help()
        return
    if fields and "config" not in args:
        parser.error(f"unrecognized arguments: {' '.join(fields)}")
    args.fields = fields
    run_program(lambda: args.program(args), verbose=args.verbose)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name: str, program: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("--verbose", action="store_true", help="show the traceback of an error")
        added.set_defaults(program=program)
        return added

    stages = ", ".join(CHAIN)
    added = command(
        "clusters", _clusters, "`clusters init NAME` writes the facts of this site into a first cluster file"
    )
    added.add_argument("action", choices=("init",))
    added.add_argument("file", metavar="NAME", help="a name in slurm/clusters/, or the path of a TOML file")

    added = command("doctor", _doctor, "try a cluster in a small job: what training needs of its nodes")
    _add_cluster_option(added)
    added.add_argument("--nodes", default="2", help="number of nodes (default 2)")
    added.add_argument("--run-dir", type=Path, default=Path("runs/doctor"), help="folder on the shared disk")
    _add_code_option(added)

    added = command(
        "submit", _submit, "submit the stages of a run, each after the one before, as far as they are not done"
    )
    _add_plan_options(added)
    added.add_argument("--dry-run", action="store_true", help="print scripts and commands; write and submit nothing")
    which = added.add_mutually_exclusive_group()
    which.add_argument(
        "--from", dest="first", type=stage_of, choices=CHAIN, metavar="STAGE",
        help=f"leave out the stages before this of {stages}",
    )  # fmt: skip
    which.add_argument("--only", type=stage_of, choices=CHAIN, metavar="STAGE", help="submit this stage alone")

    added = command("sweep", _sweep, "the same for many points: some fields varied, data and teacher shared")
    _add_plan_options(added)
    added.add_argument(
        "--vary", action="append", required=True, metavar="FIELD=A,B", help="a field and its values; may be repeated"
    )

    added = command("status", _status, "one screen: stages, jobs, progress, time left, restarts and why")
    _add_run_argument(added)
    added.add_argument(
        "--watch", action="store_true", help=f"again every {WATCH_S:.0f} s, until no job of the run is left"
    )

    added = command("logs", _logs, "print what a rank wrote in the newest start")
    _add_run_argument(added)
    added.add_argument(
        "--stage", type=stage_of, choices=CHAIN, metavar="STAGE", help=f"{stages} (default: the stage that wrote last)"
    )
    added.add_argument("--rank", type=int, default=0, help="rank (default 0)")
    added.add_argument("--launcher", action="store_true", help="what srun and torchrun say instead of a rank")
    added.add_argument("--follow", action="store_true", help="go on as the file grows")

    _add_run_argument(command("cancel", _cancel, "cancel all jobs of a run"))

    added = command("render", _render, "print the batch script of one stage")
    added.add_argument("stage", type=stage_of, choices=CHAIN, metavar="STAGE", help=stages)
    _add_plan_options(added)
    return parser


def _add_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory, such as runs/minute")


def _add_cluster_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", required=True, metavar="NAME", help="a name in slurm/clusters/, or the path of a TOML file"
    )


def _add_code_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--code-dir", type=Path, default=CODE, metavar="DIR", help="folder of data_prep and pipeline (default: here)"
    )


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    _add_cluster_option(parser)
    parser.add_argument(
        "--config", required=True, action="append", metavar="RECIPE",
        help="a name in pipeline/recipes/, or the path of a YAML file; may be repeated, the later one wins",
    )  # fmt: skip
    parser.add_argument("--nodes", help="nodes of the training stages, 4 or 2-4 (default: the cluster file's)")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="run directory on the shared disk (default: the recipe's)"
    )
    _add_code_option(parser)
    parser.epilog = "Any field of the recipe can be given too, such as --distill.optim.num_steps 5000."


def _recipe_words(args: argparse.Namespace) -> list[str]:
    """What the command line says of the recipe."""
    return [word for name in args.config for word in ("--config", name)] + args.fields


def _plan(args: argparse.Namespace, stages: tuple[str, ...]) -> Plan:
    recipe, _ = parse_recipe(recipe_parser("python -m slurm", ""), _recipe_words(args))
    return plan_of(
        recipe,
        cluster=args.cluster,
        run_dir=args.run_dir,
        code_dir=args.code_dir,
        nodes=args.nodes,
        stages=stages,
    )


def _render(args: argparse.Namespace) -> None:
    sys.stdout.write(render(_plan(args, CHAIN).script(args.stage)))


def _submit(args: argparse.Namespace) -> None:
    first = CHAIN.index(args.first) if args.first else 0
    plan = _plan(args, (args.only,) if args.only else CHAIN[first:])
    if args.dry_run:
        print(describe(plan))
        return
    submitted = submit(plan)
    others = left_alone(plan, alive_stages(plan.run_dir))
    for stage in plan.stages:
        print(f"{stage:<9} {submitted.get(stage) or others.get(stage)}")
    done = "submitted" if submitted else "nothing to submit"
    print(f"{done}; `python -m slurm status {shlex.quote(str(plan.run_dir))}` shows the run")


def _sweep(args: argparse.Namespace) -> None:
    plan = _plan(args, CHAIN)
    points = points_of(_recipe_words(args), plan.recipe, args.vary)
    for stage, number in submit_sweep(plan, points).items():
        print(f"{stage:<9} {number}")
    folder = shlex.quote(str(plan.run_dir / "sweep"))
    print(f"{len(points)} points submitted; `python -m slurm status {folder}` shows them")


def _clusters(args: argparse.Namespace) -> None:
    path = Path(args.file) if args.file.endswith(".toml") else CLUSTERS / f"{args.file}.toml"
    if path.exists():
        raise ValueError(f"{path} exists: remove it first, or choose another name")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for {path.name}")
    path.write_text(discover(), encoding="utf-8")
    load_cluster(path)
    print(f"wrote {path}")
    print(f"Look through its lines with `check`, then try it: python -m slurm doctor --cluster {args.file}")


def _doctor(args: argparse.Namespace) -> None:
    cluster = load_cluster(find_cluster(args.cluster))
    well = examine(cluster, args.run_dir.absolute(), args.code_dir.absolute(), Nodes.parse(args.nodes))
    raise SystemExit(0 if well else 1)


def _status(args: argparse.Namespace) -> None:
    run_dir = args.run_dir.absolute()
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    if not args.watch:
        console.print(screen(run_dir), highlight=False)
        return
    with Live(screen(run_dir), console=console, auto_refresh=False) as live:
        while any(job.is_alive for job in jobs_of_run(run_dir)):
            time.sleep(WATCH_S)
            live.update(screen(run_dir), refresh=True)
        live.update(screen(run_dir), refresh=True)  # a job may have ended since the last look


def _logs(args: argparse.Namespace) -> None:
    path = newest_log(args.run_dir.absolute(), args.stage, None if args.launcher else args.rank)
    print(f"==> {path}", file=sys.stderr, flush=True)
    subprocess.run(["tail", "-n", "+1", *(["-F"] if args.follow else []), str(path)])


def _cancel(args: argparse.Namespace) -> None:
    run_dir = args.run_dir.absolute()
    check_run(run_dir)
    cancelled = cancel(run_dir)
    for job in cancelled:
        print(f"{job.stage:<9} {job.label} was {job.state.lower()}")
    print(f"{len(cancelled)} job(s) cancelled" if cancelled else f"no job of {run_dir} is in the queue")


if __name__ == "__main__":
    main()
