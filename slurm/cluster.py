"""The facts of one site, read strictly from a TOML file: every key is required, unknown keys are refused."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.stages import FORMER_NAMES, stage_of

# stage -> kind of its job: the name of a [jobs.NAME] table in a cluster file
STAGE_JOBS = {
    "data": "data",
    "teacher": "train",
    "distill": "train",
    "baseline": "train",
    "search": "search",
    "assemble": "single",
    "evaluate": "evaluate",
    "report": "single",
}

ONE_PROCESS = ("search", "single")
"""Kinds of jobs that are one process."""

CHOICES = {
    "gpu_flag": ("gres", "gpus-per-node", "none"),
    "mpi": ("pmi2", "pmix", "mpiexec", "none"),
    "launcher": ("torchrun", "srun"),
}

CLUSTERS = Path(__file__).parent / "clusters"

_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")


@dataclass(frozen=True, kw_only=True)
class JobShape:
    """[jobs.NAME]: what one kind of job asks for."""

    partition: str
    """Partition (queue) of the job."""
    nodes: int
    """Nodes, unless --nodes says otherwise; of evaluate: tasks of the array, one node each."""
    processes_per_node: int
    """Processes on a node: MPI ranks (data), torchrun workers (train), decoding workers (evaluate)."""
    cpus_per_process: int
    """CPUs of a process; also its OMP_NUM_THREADS."""
    gpus_per_node: int
    """GPUs of a node; 0 asks for none."""
    memory_per_node: str
    """--mem: such as "64G"; "0" is all memory of the node; "" leaves the line out."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster file."""

    account: str
    """--account; "" leaves the line out."""
    qos: str
    """--qos; "" leaves the line out."""
    gpu_flag: str
    """How the site wants GPUs asked for: "gres" (--gres=gpu:8), "gpus-per-node" (--gpus-per-node=8) or "none"."""
    gpu_type: str
    """Type in that request, such as "a100"; "" for any."""
    sbatch_options: tuple[str, ...]
    """Further options of every job, such as "--exclusive"."""
    srun_options: tuple[str, ...]
    """Further options of every srun, such as pyxis' "--container-image=/images/modular.sqsh". A
    "--distribution" and GPUs by task ("--gpus-per-task") belong here too: steps take neither over from the job."""
    mpi: str
    """How data preparation starts its ranks: srun --mpi for the MPI that mpi4py uses, "pmi2" (MPICH, Intel MPI) or
    "pmix" (Open MPI); "mpiexec" beside the interpreter, which starts them within the job; "none" (one process)."""
    launcher: str
    """What starts training workers: "torchrun", one a node, or "srun" itself, one task a worker."""
    modules: tuple[str, ...]
    """Environment modules to load."""
    setup: tuple[str, ...]
    """Lines of shell that run before the work, such as "source /path/venv/bin/activate"."""
    container: tuple[str, ...]
    """Words in front of the interpreter, such as ["apptainer", "exec", "--nv", "/images/modular.sif"]; empty: none."""
    python: str
    """The interpreter: a command, or a path; a relative path starts at the project's folder."""
    local_scratch: str
    """Folder on a disk of each node, for compiler caches; shell variables of the job may be used in it."""
    signal_lead_s: int
    """Seconds before the time limit at which a job is told to save and requeue: at least
    `log_every_steps` steps, a validation and a save."""
    hang_timeout_s: int
    """Seconds without any change to a file of the stage or its logs after which a job counts as hung and is ended: more
    than loading the model, `log_every_steps` steps, a validation and a save take."""
    max_requeues: int
    """Starts of one job after which it is no longer requeued."""
    environment: dict[str, str]
    """[environment]: variables to export."""
    jobs: dict[str, JobShape]
    """[jobs.data], [jobs.train], [jobs.search] (needs a GPU of the kind that is evaluated on), [jobs.evaluate],
    [jobs.single]."""
    time_limits: dict[str, str]
    """[time_limits]: one for each stage, as [D-]HH:MM:SS."""


def find_cluster(name: str) -> Path:
    """File of a cluster: a path, or the name of one in slurm/clusters/.

    Raises:
        FileNotFoundError: there is no such file; the message lists the names that exist.
    """
    path = Path(name) if name.endswith(".toml") or "/" in name else CLUSTERS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in CLUSTERS.glob("*.toml")))
        raise FileNotFoundError(f"no cluster file {path}: give a path, or one of the names {known}")
    return path


def load_cluster(path: Path) -> Cluster:
    """Read and check a cluster file.

    Raises:
        ValueError: a key is missing, unknown or of the wrong type, or a value is impossible; names key and file.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    table |= {key: _renamed(table[key], f"{path} [{key}]") for key in ("jobs", "time_limits") if key in table}
    jobs = _take(table, "jobs", dict, str(path))
    known_jobs = tuple(dict.fromkeys(STAGE_JOBS.values()))
    _refuse_unknown(jobs, known_jobs, f"{path} [jobs]")
    if "single" in jobs:
        jobs = {"search": jobs["single"], **jobs}  # files that were written until November 2026 have no [jobs.search]
    shapes = {}
    for job in known_jobs:
        where = f"{path} [jobs.{job}]"
        shapes[job] = JobShape(**_read_fields(JobShape, _take(jobs, job, dict, f"{path} [jobs]"), where))
    cluster = Cluster(**_read_fields(Cluster, table | {"jobs": shapes}, str(path)))
    _refuse_unknown(cluster.time_limits, tuple(STAGE_JOBS), f"{path} [time_limits]")
    for stage in STAGE_JOBS:
        _take(cluster.time_limits, stage, str, f"{path} [time_limits]")
    _check_values(cluster, str(path))
    return cluster


def seconds_of(time_limit: str) -> int:
    """Seconds of a time limit written as [D-]HH:MM:SS."""
    match = _TIME_LIMIT.fullmatch(time_limit)
    if match is None:
        raise ValueError(f"time limit {time_limit!r} is not of the form [D-]HH:MM:SS, such as 1-00:00:00 or 08:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _renamed(table: Any, where: str) -> Any:
    """A table by stages with today's words for the former ones."""
    if not isinstance(table, dict):
        return table
    renamed = {stage_of(word): value for word, value in table.items()}
    if len(renamed) < len(table):
        former = ", ".join(table.keys() & FORMER_NAMES.keys())
        raise ValueError(f"{where}: remove {former}, the former name of {stage_of(former)}, which is there too")
    return renamed


def _read_fields(settings: type, table: dict[str, Any], where: str) -> dict[str, Any]:
    """Values of all fields of a settings dataclass out of a TOML table, with their types checked."""
    names = tuple(field.name for field in dataclasses.fields(settings))
    _refuse_unknown(table, names, where)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        outer = str(field.type).partition("[")[0]
        if outer == "tuple":
            words = _take(table, field.name, list, where)
            values[field.name] = tuple(_checked(word, str, field.name, where) for word in words)
        else:
            values[field.name] = _take(table, field.name, {"str": str, "int": int, "dict": dict}[outer], where)
    for name, value in values.get("environment", {}).items():
        _checked(value, str, f"environment.{name}", where)
    return values


def _take(table: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in table:
        raise ValueError(f"{where}: the key {key!r} is missing; slurm/clusters/example.toml shows every key")
    return _checked(table[key], kind, key, where)


def _checked(value: Any, kind: type, key: str, where: str) -> Any:
    if type(value) is not kind:  # exact, since True is an int
        words = {str: "a text in quotes", int: "a whole number", list: "a list of texts", dict: "a table"}
        raise ValueError(f"{where}: {key} must be {words[kind]}, not {value!r}")
    return value


def _refuse_unknown(table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def _check_values(cluster: Cluster, where: str) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{where}: {message}")

    for key, choices in CHOICES.items():
        value = getattr(cluster, key)
        require(value in choices, f"{key} must be one of {', '.join(choices)}, not {value!r}")
    for name, shape in cluster.jobs.items():
        for key in ("nodes", "processes_per_node", "cpus_per_process"):
            require(getattr(shape, key) >= 1, f"[jobs.{name}] {key} must be 1 or more, not {getattr(shape, key)}")
        require(shape.gpus_per_node >= 0, f"[jobs.{name}] gpus_per_node must be 0 or more, not {shape.gpus_per_node}")
    for name in ONE_PROCESS:
        require(
            cluster.jobs[name].nodes == cluster.jobs[name].processes_per_node == 1,
            f"[jobs.{name}] runs one process: nodes = 1 and processes_per_node = 1",
        )
    for name in cluster.environment:
        require(
            re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is not None,
            f"[environment] {name!r} cannot be a variable's name",
        )
    require(cluster.signal_lead_s >= 1, f"signal_lead_s must be 1 or more, not {cluster.signal_lead_s}")
    require(cluster.hang_timeout_s >= 1, f"hang_timeout_s must be 1 or more, not {cluster.hang_timeout_s}")
    require(cluster.max_requeues >= 0, f"max_requeues must be 0 or more, not {cluster.max_requeues}")
    for stage, limit in cluster.time_limits.items():
        try:
            limit_s = seconds_of(limit)
        except ValueError as error:
            raise ValueError(f"{where}: [time_limits] {stage}: {error}") from error
        # slurmctld looks every half minute and sends the signal up to a minute early
        require(
            limit_s >= cluster.signal_lead_s + 120,
            f"[time_limits] {stage} = {limit} leaves less than two minutes before the signal that comes "
            f"signal_lead_s = {cluster.signal_lead_s} s ahead of it",
        )
