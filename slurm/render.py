"""From a stage, a cluster and a run directory to the text of one batch script: a pure function."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import jinja2

from slurm.cluster import ONE_PROCESS, STAGE_JOBS, Cluster, JobShape

DOCTOR_TIME_LIMIT = "00:15:00"

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # bash, not HTML
)


@dataclass(frozen=True)
class Nodes:
    """How many nodes a job takes: as many as it can get between two numbers."""

    least: int
    most: int

    @staticmethod
    def parse(text: str) -> Nodes:
        """From "4", or "2-4".

        Raises:
            ValueError: neither of the two forms, or no node at all.
        """
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise ValueError(f"nodes must be a number such as 4, or a range such as 2-4, not {text!r}")
        return Nodes(int(match[1]), int(match[2] or match[1]))

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}-{self.most}"


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a batch script is rendered for."""

    stage: str
    """A key of STAGE_JOBS, or "doctor": a check of what training needs of the nodes."""
    cluster: Cluster
    name: str
    """Of the run; job names are <name>-<stage>."""
    run_dir: Path
    """Absolute path on the shared disk: the script reads recipe.yaml there, and writes logs/."""
    code_dir: Path
    """Absolute path of the folder that holds the packages data_prep, pipeline and slurm; the script runs there."""
    nodes: Nodes | None = None
    """Instead of the cluster file's number."""
    points: int = 0
    """Points of a sweep: the job is an array with one task for each, whose run directory stands in slurm/points.txt."""

    @property
    def template(self) -> str:
        kind = "doctor" if self.stage == "doctor" else STAGE_JOBS[self.stage]
        return "single" if kind in ONE_PROCESS else kind

    @property
    def shape(self) -> JobShape:
        return self.cluster.jobs["train" if self.stage == "doctor" else STAGE_JOBS[self.stage]]

    @property
    def node_range(self) -> Nodes:
        """Nodes of the stage, over all tasks of an array of evaluation."""
        return self.nodes or Nodes(self.shape.nodes, self.shape.nodes)

    @property
    def slurm_dir(self) -> Path:
        return self.run_dir / "slurm"

    @property
    def is_array(self) -> bool:
        return self.stage == "evaluate" and not self.points

    @property
    def request(self) -> str:
        """What the job asks for, in a few words."""
        shape, nodes = self.shape, self.node_range

        def counted(number: object, word: str, plural: str) -> str:
            return f"{number} {word if str(number) == '1' else plural}"

        where = f"{nodes} tasks of 1 node" if self.is_array else counted(nodes, "node", "nodes")
        each = [counted(shape.processes_per_node, "process", "processes")]
        each += [counted(shape.gpus_per_node, "GPU", "GPUs")] if shape.gpus_per_node else []
        return f"{where} of {shape.partition}, {' and '.join(each)} a node, {self.cluster.time_limits[self.stage]}"


def render(script: Script) -> str:
    """The text of a batch script.

    Raises:
        ValueError: more than one node or process where only one can work, or a value that cannot
            be written into a script.
    """
    _check(script)
    cluster, shape = script.cluster, script.shape
    return TEMPLATES.get_template(f"{script.template}.sbatch.j2").render(
        stage=script.stage,
        cluster=cluster,
        shape=shape,
        options=_sbatch_options(script),
        is_array=script.is_array or script.points > 0,
        step_cpus=shape.cpus_per_process * (shape.processes_per_node if _is_torchrun(script) else 1),
        run_dir=shlex.quote(str(script.run_dir)),
        points=shlex.quote(str(script.slurm_dir / "points.txt")) if script.points else "",
        code_dir=shlex.quote(str(script.code_dir)),
        program=shlex.join([*cluster.container, cluster.python]),
        python=shlex.quote(cluster.python),
        mpiexec="mpiexec" if cluster.container else shlex.quote(str(Path(cluster.python).with_name("mpiexec"))),
        srun_options="".join(f" {shlex.quote(option)}" for option in cluster.srun_options),
        modules=shlex.join(cluster.modules),
        environment={key: shlex.quote(value) for key, value in cluster.environment.items()},
        local_scratch=_double_quoted(cluster.local_scratch, "local_scratch"),
    )


def _check(script: Script) -> None:
    stage, shape, nodes = script.stage, script.shape, script.node_range
    job = script.template
    if job == "single" and nodes.most != 1:
        raise ValueError(f"stage {stage} is one process: it cannot use {nodes} nodes")
    if nodes.least != nodes.most and job not in ("train", "doctor"):
        raise ValueError(f"stage {stage} takes a number of nodes, not a range: {nodes}")
    num_ranks = nodes.most * shape.processes_per_node
    if job == "data" and script.cluster.mpi == "none" and num_ranks > 1:
        raise ValueError(
            f"stage data would start {num_ranks} MPI ranks, but the cluster file says mpi = 'none': set mpi to "
            f"pmi2, pmix or mpiexec, or [jobs.data] to one process on one node"
        )
    for label, path in (("run_dir", script.run_dir), ("code_dir", script.code_dir)):
        if not path.is_absolute():
            raise ValueError(f"{label} must be an absolute path, not {path}")


def _sbatch_options(script: Script) -> list[str]:
    """The #SBATCH options of a job, in the order in which they are printed."""
    cluster, shape, stage = script.cluster, script.shape, script.stage
    # Training asks for whole nodes' worth of processes as one task a node: torchrun is one, and a job with a range of
    # nodes that counted its tasks would always get the fewest. Everywhere else SLURM counts the processes.
    workers = script.template in ("train", "doctor")
    num_tasks = 1 if workers else shape.processes_per_node
    num_cpus = shape.cpus_per_process * (shape.processes_per_node if workers else 1)
    a_range = script.node_range.least != script.node_range.most
    array = script.points or (script.node_range.most if script.is_array else 0)
    logs = str(script.run_dir).replace("%", "%%") + "/logs"
    options = {
        "job-name": f"{script.name}-{stage}",
        "partition": shape.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "array": f"0-{array - 1}" if array else "",
        "nodes": "1" if script.is_array else str(script.node_range),
        "ntasks-per-node": "" if a_range else str(num_tasks),
        "cpus-per-task": str(num_cpus),
        "mem": shape.memory_per_node,
        **_gpu_option(cluster, shape.gpus_per_node),
        "time": DOCTOR_TIME_LIMIT if stage == "doctor" else cluster.time_limits[stage],
        "signal": f"B:USR1@{cluster.signal_lead_s}",
        # by this folder the jobs of a run are found in the queue
        "chdir": str(script.slurm_dir),
        # %j: number of the job, %A and %a: of the array and its task. A requeued job goes on in the same file.
        "output": f"{logs}/{stage}-{'%A_%a' if array else '%j'}.out",
        "open-mode": "append",
    }
    lines = [f"--{key}={_sbatch_value(value, key)}" for key, value in options.items() if value]
    return [*lines, "--requeue", *cluster.sbatch_options]


def _is_torchrun(script: Script) -> bool:
    return script.template in ("train", "doctor") and script.cluster.launcher == "torchrun"


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
