"""From a stage, a cluster and a run directory to the text of one batch script: a pure function."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import jinja2

from slurm.cluster import STAGE_JOBS, Cluster, JobShape

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # bash, not HTML
)


def render(stage: str, cluster: Cluster, *, name: str, run_dir: Path, code_dir: Path, nodes: int | None = None) -> str:
    """The batch script of one stage of a run.

    Args:
        stage: a key of STAGE_JOBS.
        cluster: facts of the site.
        name: name of the run; job names are <name>-<stage>.
        run_dir: absolute path of the run directory on the shared disk; the script reads run_dir/recipe.yaml and
            writes run_dir/logs/.
        code_dir: absolute path of the folder that holds the packages data_prep and pipeline; the script runs there.
        nodes: number of nodes instead of the cluster file's.

    Raises:
        ValueError: an unknown stage, more than one node or process where only one can work, or a value that cannot
            be written into a script.
    """
    if stage not in STAGE_JOBS:
        raise ValueError(f"unknown stage {stage!r}: choose from {', '.join(STAGE_JOBS)}")
    job = STAGE_JOBS[stage]
    shape = cluster.jobs[job] if nodes is None else replace(cluster.jobs[job], nodes=nodes)
    if shape.nodes < 1:
        raise ValueError(f"--nodes must be 1 or more, not {shape.nodes}")
    if job == "single" and shape.nodes != 1:
        raise ValueError(f"stage {stage} is one process: it cannot use {shape.nodes} nodes")
    if job == "prepare" and cluster.mpi == "none" and shape.nodes * shape.processes_per_node > 1:
        raise ValueError(
            f"stage prepare would start {shape.nodes * shape.processes_per_node} MPI ranks, but the cluster file says "
            f"mpi = 'none': set mpi to pmi2 or pmix, or [jobs.prepare] to one process on one node"
        )
    for label, path in (("run_dir", run_dir), ("code_dir", code_dir)):
        if not path.is_absolute():
            raise ValueError(f"{label} must be an absolute path, not {path}")
    return _TEMPLATES.get_template(f"{job}.sbatch.j2").render(
        stage=stage,
        cluster=cluster,
        shape=shape,
        options=_sbatch_options(stage, cluster, shape, name=name, run_dir=run_dir),
        run_dir=shlex.quote(str(run_dir)),
        code_dir=shlex.quote(str(code_dir)),
        program=shlex.join([*cluster.container, cluster.python]),
        srun_options="".join(f" {shlex.quote(option)}" for option in cluster.srun_options),
        modules=shlex.join(cluster.modules),
        environment={key: shlex.quote(value) for key, value in cluster.environment.items()},
        local_scratch=_double_quoted(cluster.local_scratch, "local_scratch"),
    )


def _sbatch_options(stage: str, cluster: Cluster, shape: JobShape, *, name: str, run_dir: Path) -> list[str]:
    """The #SBATCH options of a job, in the order in which they are printed."""
    # srun starts one torchrun a node, which starts the workers; everywhere else srun starts the processes
    training = STAGE_JOBS[stage] == "train"
    tasks = 1 if training else shape.processes_per_node
    cpus = shape.cpus_per_process * (shape.processes_per_node if training else 1)
    options = {
        "job-name": f"{name}-{stage}",
        "partition": shape.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "nodes": str(shape.nodes),
        "ntasks-per-node": str(tasks),
        "cpus-per-task": str(cpus),
        "mem": shape.memory_per_node,
        **_gpu_option(cluster, shape.gpus_per_node),
        "time": cluster.time_limits[stage],
        "signal": f"B:USR1@{cluster.signal_lead_s}",
        # %x is the job's name and %j its number: a requeued job goes on in the same file
        "output": f"{str(run_dir).replace('%', '%%')}/logs/%x-%j.out",
        "open-mode": "append",
    }
    lines = [f"--{key}={_sbatch_value(value, key)}" for key, value in options.items() if value]
    return [*lines, "--requeue", *cluster.sbatch_options]


def _gpu_option(cluster: Cluster, gpus: int) -> dict[str, str]:
    if gpus == 0 or cluster.gpu_flag == "none":
        return {}
    request = f"{cluster.gpu_type}:{gpus}" if cluster.gpu_type else str(gpus)
    return {"gres": f"gpu:{request}"} if cluster.gpu_flag == "gres" else {"gpus-per-node": request}


def _sbatch_value(value: str, key: str) -> str:
    """sbatch reads its own lines, not the shell: double quotes hold spaces, and nothing can be escaped inside them."""
    if any(character in value for character in '"\\\n'):
        raise ValueError(f"--{key}: {value!r} holds a quote, a backslash or a line break, which sbatch cannot read")
    return f'"{value}"' if shlex.quote(value) != value else value


def _double_quoted(value: str, key: str) -> str:
    """A value for double quotes in the script, where variables are still expanded."""
    if any(character in value for character in '"\\`\n'):
        raise ValueError(f"{key}: {value!r} holds a quote, a backslash, a backquote or a line break")
    return f'"{value}"'
