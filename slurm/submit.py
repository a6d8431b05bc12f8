"""The whole chain of a run as jobs: rendered, checked by the controller, submitted, written down."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.hub import PREFIX, local_folder
from pipeline.config import BatchConfig, Recipe, recipe_yaml
from pipeline.rundir import STAGES, RunDir, Stage, left_out, read_json, write_atomic
from slurm.cluster import STAGE_JOBS, Cluster, find_cluster, load_cluster
from slurm.controller import Job, jobs_of_run, sbatch, sbatch_words, scancel, test_only
from slurm.render import Nodes, Script, render
from slurm.stages import stage_of

CHAIN = tuple(STAGE_JOBS)


def chain_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages of a recipe, in order."""
    return tuple(stage for stage in CHAIN if stage not in left_out(recipe))


@dataclass(frozen=True)
class Plan:
    """What a submission will do."""

    recipe: Recipe
    cluster_file: Path
    run_dir: Path
    code_dir: Path
    nodes: Nodes | None
    """Of the training stages, instead of the cluster file's."""
    stages: tuple[str, ...] = CHAIN

    @property
    def cluster(self) -> Cluster:
        return load_cluster(self.cluster_file)

    def script(self, stage: str) -> Script:
        check_ranks(stage, self.recipe, self.cluster, self.nodes)
        return Script(
            stage=stage,
            cluster=self.cluster,
            name=self.recipe.name,
            run_dir=self.run_dir,
            code_dir=self.code_dir,
            nodes=self.nodes if STAGE_JOBS[stage] == "train" else None,
        )

    def script_path(self, stage: str) -> Path:
        return self.run_dir / "slurm" / f"{stage}.sbatch"


def submit(plan: Plan) -> dict[str, int]:
    """Submit what is neither done nor in the queue, each stage after the one before; job numbers by stage.

    Raises:
        ValueError: the controller refuses a script, jobs of this run are in the queue with another recipe or cluster
            file, or a stage to begin with has nothing to begin from.
        FileNotFoundError: files of the recipe are missing, or this machine has no SLURM.
        PermissionError: the run directory cannot be written.
    """
    check_inputs(plan.recipe, plan.code_dir)
    (plan.run_dir / "slurm").mkdir(parents=True, exist_ok=True)
    with locked(plan.run_dir / "slurm" / ".lock"):
        alive = alive_stages(plan.run_dir)
        if alive:
            _refuse_other_settings(plan, alive)
        todo = stages_to_submit(plan, alive)
        texts = {stage: render(plan.script(stage)) for stage in todo}
        for stage, text in texts.items():
            _try(stage, text)
        if todo:
            _preflight(plan)
        _write_run(plan, texts)
        return _submit_chain(plan, todo, alive)


def describe(plan: Plan) -> str:
    """What `submit` would do: every script, every command, and what each job asks for; nothing is written or
    submitted."""
    check_inputs(plan.recipe, plan.code_dir)
    has_slurm = shutil.which("sbatch") is not None
    alive = alive_stages(plan.run_dir) if has_slurm else {}
    todo = stages_to_submit(plan, alive)
    parts = []
    summary = [f"# {stage:<9} {state}" for stage, state in left_alone(plan, alive).items()]
    previous = ""
    for stage in CHAIN:
        if stage in todo:
            text = render(plan.script(stage))
            if has_slurm:
                _try(stage, text)
            path = plan.script_path(stage)
            words = sbatch_words(path, [f"afterok:{previous}"] if previous else [])
            parts.append(f"# {path}\n{text}\n# {shlex.join(words)}\n")
            summary.append(f"# {stage:<9} {plan.script(stage).request}")
            previous = f"JOB_OF_{stage.upper()}"
        elif stage in alive:
            previous = str(alive[stage])
    checked = "the controller accepts all scripts" if has_slurm else "no sbatch here: the scripts are not checked"
    return "\n".join([*parts, *summary, f"# dry run, nothing submitted; {checked}"])


def cancel(run_dir: Path) -> list[Job]:
    """Cancel all jobs of a run that are in the queue; what was cancelled. Training workers save if KillWait of the site
    leaves them time."""
    alive = [job for job in jobs_of_run(run_dir) if job.is_alive]
    if alive:
        scancel(sorted({job.number for job in alive}))
    return alive


def alive_stages(run_dir: Path) -> dict[str, int]:
    """Job numbers of the stages of a run that are in the queue."""
    return {job.stage: job.number for job in jobs_of_run(run_dir) if job.is_alive}


def stages_to_submit(plan: Plan, alive: dict[str, int]) -> list[str]:
    """Stages of the plan that are neither done nor in the queue.

    Raises:
        ValueError: one of them needs a stage that is neither, and that the plan leaves out.
    """
    chain, done = chain_of(plan.recipe), done_stages(plan, alive)
    todo = [stage for stage in chain if stage in plan.stages and stage not in done and stage not in alive]
    for stage in todo:
        lacking = [other for other in chain if other in needs(stage) - done - alive.keys() - set(todo)]
        if lacking:
            raise ValueError(f"stage {stage} needs {', '.join(lacking)} first: submit with --from {lacking[0]}")
    return todo


def done_stages(plan: Plan, alive: dict[str, int]) -> set[str]:
    """Stages whose output fits the recipe, and so do those of all stages before it."""
    chain, run = chain_of(plan.recipe), RunDir(plan.run_dir)
    done: set[str] = set()
    for stage in chain:
        if done >= needs(stage) & set(chain) and stage not in alive and is_done(stage, plan.recipe, run):
            done.add(stage)
    return done


def left_alone(plan: Plan, alive: dict[str, int]) -> dict[str, str]:
    """Of each stage of the plan that there is nothing to submit of: why."""
    done = done_stages(plan, alive)
    why = {stage: "done" for stage in done} | {stage: f"in the queue as {number}" for stage, number in alive.items()}
    why |= {stage: f"left out: {reason}" for stage, reason in left_out(plan.recipe).items()}
    return {stage: why[stage] for stage in plan.stages if stage in why}


def needs(stage: str) -> set[str]:
    """Stages whose output a stage reads."""
    return set(STAGES[stage][1]) if stage in STAGES else set()


def is_done(stage: str, recipe: Recipe, run: RunDir) -> bool:
    """Whether a stage has published an output that fits the recipe."""
    if stage == "data":
        return run.output_hash(stage) is not None
    if stage == "report":  # a view of the scores
        html = run.stage("report") / "report.html"
        return html.is_file() and run.scores.is_file() and html.stat().st_mtime >= run.scores.stat().st_mtime
    try:
        return Stage.of(recipe, run, stage).stamp() is not None
    except FileNotFoundError:
        return False


def check_inputs(recipe: Recipe, code_dir: Path) -> None:
    """Refuse what a compute node could not open; it has no internet to fetch it from.

    Raises:
        FileNotFoundError: a file or folder that the recipe names is not there, or has not been fetched from its hub.
    """
    for name in filter(None, (recipe.teacher.folder, recipe.data.tokenizer)):
        local_folder(name)
    data = recipe.data
    named = {"teacher.folder": (recipe.teacher.folder,), "data.tokenizer": (data.tokenizer,)}
    named |= {f"data.{part}": getattr(data, part) for part in ("train", "validation", "test")}
    for field, paths in named.items():
        for path in paths:
            if path and not path.startswith(PREFIX) and not (code_dir / path).exists():
                raise FileNotFoundError(f"{field}: there is no {path} in {code_dir}, where jobs start")


def check_ranks(stage: str, recipe: Recipe, cluster: Cluster, nodes: Nodes | None) -> None:
    """Refuse now what would be refused after hours in the queue.

    Raises:
        ValueError: the ranks of a training stage do not divide its micro-batches, for some number of nodes.
    """
    batches: dict[str, BatchConfig] = {
        "teacher": recipe.teacher.batch,
        "distill": recipe.distill.batch,
        "baseline": recipe.distill.batch,
    }
    if stage not in batches:
        return
    shape = cluster.jobs[STAGE_JOBS[stage]]
    nodes = nodes or Nodes(shape.nodes, shape.nodes)
    batch = batches[stage]
    num_micro_batches = batch.micro_batches_per_step
    for num_nodes in range(nodes.least, nodes.most + 1):
        num_ranks = num_nodes * shape.processes_per_node
        if num_micro_batches % num_ranks:
            raise ValueError(
                f"stage {stage} has {num_micro_batches} micro-batches a step, which {num_ranks} ranks ({num_nodes} "
                f"nodes x {shape.processes_per_node} processes) cannot share evenly: change --nodes, "
                f"processes_per_node in the cluster file, or batch.micro_batches_per_step in the recipe "
                f"({batch.shared_by(num_ranks)})"
            )


def _preflight(plan: Plan) -> None:
    """Find mistakes in the recipe here, not hours later in the queue."""
    from pipeline.planning import preflight  # late: it needs torch

    # how many ranks there are is the cluster's matter here (check_ranks)
    launch = dataclasses.replace(plan.recipe.launch, num_ranks=1)
    preflight(dataclasses.replace(plan.recipe, launch=launch), RunDir(plan.run_dir))


def _try(stage: str, text: str) -> None:
    try:
        test_only(text)
    except ValueError as error:
        raise ValueError(f"stage {stage}: {error}") from None


def _refuse_other_settings(plan: Plan, alive: dict[str, int]) -> None:
    """Jobs in the queue read RUN/recipe.yaml when they start: it must not change under them."""
    recipe_file, cluster_file = plan.run_dir / "recipe.yaml", plan.run_dir / "slurm" / "cluster.toml"
    same_recipe = recipe_file.is_file() and recipe_file.read_text(encoding="utf-8") == _recipe_text(plan)
    same_cluster = cluster_file.is_file() and load_cluster(cluster_file) == plan.cluster
    if not (same_recipe and same_cluster):
        jobs = ", ".join(f"{stage} {number}" for stage, number in alive.items())
        what = "recipe" if not same_recipe else "cluster file"
        raise ValueError(
            f"jobs of {plan.run_dir} are in the queue with another {what} ({jobs}): wait for them, or stop them with "
            f"`python -m slurm cancel {shlex.quote(str(plan.run_dir))}`"
        )


def _recipe_text(plan: Plan) -> str:
    return recipe_yaml(dataclasses.replace(plan.recipe, run_dir=str(plan.run_dir)))


def _write_run(plan: Plan, texts: dict[str, str]) -> None:
    (plan.run_dir / "logs").mkdir(exist_ok=True)
    write_atomic(plan.run_dir / "recipe.yaml", _recipe_text(plan))
    write_atomic(plan.run_dir / "slurm" / "cluster.toml", plan.cluster_file.read_bytes())
    for stage, text in texts.items():
        write_atomic(plan.script_path(stage), text)
    if texts:
        (plan.run_dir / "STOP").unlink(missing_ok=True)


def _submit_chain(plan: Plan, todo: Sequence[str], alive: dict[str, int]) -> dict[str, int]:
    submitted: dict[str, int] = {}
    after: list[str] = []
    for stage in CHAIN:
        if stage in todo:
            submitted[stage] = sbatch(plan.script_path(stage), after)
            write_jobs(plan.run_dir, submitted)
        if stage in submitted or stage in alive:
            after = [f"afterok:{submitted.get(stage) or alive[stage]}"]
    return submitted


def write_jobs(run_dir: Path, submitted: dict[str, int]) -> None:
    """Add job numbers to RUN/slurm/jobs.json: what `status` shows when SLURM has forgotten a job."""
    write_atomic(_jobs_file(run_dir), json.dumps({**written_jobs(run_dir), **submitted}, indent=1))


def written_jobs(run_dir: Path) -> dict[str, int]:
    """The newest job number of each stage that RUN/slurm/jobs.json knows."""
    return {stage_of(word): number for word, number in (read_json(_jobs_file(run_dir)) or {}).items()}


def _jobs_file(run_dir: Path) -> Path:
    return run_dir / "slurm" / "jobs.json"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a run directory against a second `submit`."""
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another submit works on {path.parent.parent}: wait for it") from None
        yield


def plan_of(
    recipe: Recipe, *, cluster: str, run_dir: Path | None, code_dir: Path, nodes: str | None, stages: Sequence[str]
) -> Plan:
    """A plan from what the command line gives."""
    return Plan(
        recipe,
        find_cluster(cluster),
        (run_dir or Path(recipe.resolved_run_dir)).absolute(),
        code_dir.absolute(),
        Nodes.parse(nodes) if nodes else None,
        tuple(stages),
    )
