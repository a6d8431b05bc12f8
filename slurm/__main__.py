"""python -m slurm render STAGE --cluster NAME --config RECIPE [--nodes N]: print the batch script of one stage."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.cli import parse_recipe, recipe_parser, run_program
from pipeline.config import BatchConfig, Recipe
from slurm.cluster import STAGE_JOBS, Cluster, find_cluster, load_cluster
from slurm.render import render

CODE = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    run_program(lambda: _render(args), verbose=args.verbose)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m slurm", description="Batch scripts for SLURM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("render", help="print the batch script of one stage", description=__doc__)
    command.add_argument("stage", choices=list(STAGE_JOBS), metavar="STAGE", help=", ".join(STAGE_JOBS))
    command.add_argument("--cluster", required=True, help="a TOML file, or the name of one in slurm/clusters/")
    command.add_argument("--config", required=True, help="a recipe, or the name of one in pipeline/recipes/")
    command.add_argument("--nodes", type=int, help="number of nodes (default: the cluster file's)")
    command.add_argument("--run-dir", type=Path, help="run directory on the shared disk (default: the recipe's)")
    command.add_argument("--code-dir", type=Path, default=CODE, help="folder of data_prep and pipeline (default: here)")
    command.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    return parser


def _render(args: argparse.Namespace) -> None:
    recipe, _ = parse_recipe(recipe_parser("python -m slurm render", ""), ["--config", args.config])
    cluster = load_cluster(find_cluster(args.cluster))
    check_ranks(args.stage, recipe, cluster, args.nodes)
    script = render(
        args.stage,
        cluster,
        name=recipe.name,
        run_dir=(args.run_dir or Path(recipe.resolved_run_dir)).absolute(),
        code_dir=args.code_dir.absolute(),
        nodes=args.nodes,
    )
    sys.stdout.write(script)


def check_ranks(stage: str, recipe: Recipe, cluster: Cluster, nodes: int | None) -> None:
    """Refuse now what would be refused after hours in the queue.

    Raises:
        ValueError: the ranks of a training stage do not divide its micro-batches.
    """
    batches: dict[str, BatchConfig] = {
        "teacher": recipe.teacher.batch,
        "distill": recipe.distill.batch,
        "baseline": recipe.distill.batch,
    }
    if stage not in batches:
        return
    shape = cluster.jobs[STAGE_JOBS[stage]]
    num_nodes = shape.nodes if nodes is None else nodes
    num_ranks = num_nodes * shape.processes_per_node
    num_micro_batches = batches[stage].micro_batches_per_step
    if num_ranks > 0 and num_micro_batches % num_ranks:
        raise ValueError(
            f"stage {stage} has {num_micro_batches} micro-batches a step, which {num_ranks} ranks ({num_nodes} nodes x "
            f"{shape.processes_per_node} processes) cannot share evenly: change --nodes, processes_per_node in the "
            f"cluster file, or batch.micro_batches_per_step in the recipe"
        )


if __name__ == "__main__":
    main()
