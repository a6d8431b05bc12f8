"""A stand-in for the programs of the stages, so that what batch scripts do can be tried in seconds: it counts steps,
saves, stops, crashes and hangs as RUN/behave.json says, and keeps the promises of pipeline/training/preempt.py, without
torch."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from slurm.cluster import Cluster, find_cluster, load_cluster
from slurm.render import Nodes, Script, render
from tests.patience import wait_until
from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]

PIPELINE = """
import json, os, signal, sys, time
from pathlib import Path

stage, run = sys.argv[1], Path(sys.argv[sys.argv.index("--run_dir") + 1])
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
behave, folder, stop = json.loads((run / "behave.json").read_text()), run / stage, run / "STOP"
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(True))
folder.mkdir(exist_ok=True)


def save(step):
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").write_text("{}")


def meet(place, whatever=False):
    # as a collective would: nobody goes on without the others; false when they stop instead
    everyone = [Path(os.environ["logs"]) / f"{place}-{each}" for each in range(size)]
    everyone[rank].touch()
    while not all(path.exists() for path in everyone):
        if not whatever and (asked or stop.exists()):
            return False
        time.sleep(0.01)
    return True


def train():
    published = sorted(folder.glob("checkpoints/step_*"))
    step = int(published[-1].name[5:]) if published else 0
    meet("begins")
    print(f"rank {rank} of {size} starts at step {step}", flush=True)
    (folder / f"running-{rank}").touch()
    while step < behave.get("num_steps", 3):
        if rank == size - 1 and step == behave.get("crash_at"):
            raise RuntimeError(f"boom at step {step}")
        if rank == size - 1 and step == behave.get("mistake_at"):
            print("error: num_steps is wrong", flush=True)
            sys.exit(2)
        while step == behave.get("hang_at"):
            time.sleep(0.1)
        step += 1
        time.sleep(0.05)
        if rank == 0:
            with open(folder / "metrics.jsonl", "a") as file:
                print(json.dumps({"step": step, "task": 1 / step, "tokens_per_s": 1000.0}), file=file)
        if step % 10 == 0 and meet(f"step_{step}") and rank == 0:
            save(step)
        if asked or stop.exists():
            meet("stops", whatever=True)
            if rank == 0:
                save(step)
                (folder / "REQUEUE").touch()
            meet("saved", whatever=True)
            sys.exit(85)
    if meet("ends") and rank == 0:
        save(step)


def evaluate():
    (folder / "scores").mkdir(exist_ok=True)
    if rank == behave.get("die_once") and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "scores" / f"{rank}-of-{size}.json").touch()


print(stage, "reads", sys.argv[sys.argv.index("--config") + 1], flush=True)
if stage in ("teacher", "distill", "baseline"):
    train()
elif stage == "evaluate":
    evaluate()
elif stage == behave.get("slow_stage"):
    time.sleep(1000)
"""

DATA_PREP = """
import json, os, signal, sys, time
from pathlib import Path

command, out = sys.argv[1], Path(sys.argv[sys.argv.index("--out") + 1])
if command == "plan":
    sys.exit()
rank = int(os.environ["SLURM_PROCID"])
dying, died = json.loads((out.parent / "behave.json").read_text()).get("die_once"), out / "died"
(out / "train").mkdir(parents=True, exist_ok=True)
if dying is not None and "SLURM_RESTART_COUNT" not in os.environ:
    if rank == dying:
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not died.exists():
        time.sleep(0.01)
    time.sleep(4)  # in which a launcher that lets no rank live on would end this one
(out / "train" / f"{rank:06d}.tar").touch()
(out / "manifest.json").write_text("{}")
"""


def cluster_file(path: Path, **facts: str | int) -> Path:
    """The cluster file of two small nodes, with some facts changed."""
    text = find_cluster("local").read_text()
    for key, value in facts.items():
        text, count = re.subn(rf"^{key} = .*", f"{key} = {json.dumps(value)}", text, flags=re.MULTILINE)
        assert count == 1, key
    path.write_text(text)
    return path


class StandIn:
    """A run directory, with a space in its name as users have them, whose jobs run the stand-in programs."""

    def __init__(self, slurm: SlurmCluster, folder: Path, **cluster: Any) -> None:
        self.slurm = slurm
        self.run = folder / "a run"
        for name in ("logs", "slurm"):
            (self.run / name).mkdir(parents=True)
        (self.run / "recipe.yaml").write_text("name: a run\n")
        self.code = folder / "code"
        for package, text in (("pipeline", PIPELINE), ("data_prep", DATA_PREP)):
            (self.code / package).mkdir(parents=True)
            (self.code / package / "__init__.py").touch()  # else a package on PYTHONPATH would go before it
            (self.code / package / "__main__.py").write_text(text)
        (self.code / "slurm").symlink_to(ROOT / "slurm")
        self.facts: dict[str, Any] = {"python": sys.executable, "launcher": "srun", **cluster}
        self.cluster: Cluster = replace(load_cluster(find_cluster("local")), **self.facts)
        self.behave()

    def behave(self, **how: Any) -> None:
        (self.run / "behave.json").write_text(json.dumps(how))

    def cluster_file(self) -> Path:
        return cluster_file(self.run.parent / "here.toml", **{name: getattr(self.cluster, name) for name in self.facts})

    def script(self, stage: str, nodes: str | None = None) -> Path:
        path = self.run / "slurm" / f"{stage}.sbatch"
        script = Script(
            stage=stage,
            cluster=self.cluster,
            name="a run",
            run_dir=self.run,
            code_dir=self.code,
            nodes=Nodes.parse(nodes) if nodes else None,
        )
        path.write_text(render(script))
        return path

    def sbatch(self, stage: str, nodes: str | None = None) -> int:
        return self.slurm.sbatch(self.script(stage, nodes))

    def train(self, stage: str = "teacher", num_ranks: int = 2, nodes: str | None = None) -> int:
        """Job number of a training stage in which all ranks train."""
        job = self.sbatch(stage, nodes)
        self.wait_running(stage, num_ranks)
        return job

    def wait_running(self, stage: str = "teacher", num_ranks: int = 2) -> None:
        self.wait(lambda: all((self.run / stage / f"running-{rank}").exists() for rank in range(num_ranks)))

    def wait(self, true: Callable[[], bool]) -> None:
        wait_until(true, look_every_s=0.1, told=self.log)

    def wait_requeued(self, job: int, restarts: int = 1) -> None:
        """Wait until a job was put back into the queue; SLURM starts it again after some seconds."""
        self.wait(lambda: self.slurm.job(job)["Restarts"] == str(restarts))

    def log(self) -> str:
        """All logs of the run."""
        files = sorted(path for path in (self.run / "logs").rglob("*") if path.is_file())
        return "\n".join(f"== {path.relative_to(self.run)}\n{path.read_text(errors='replace')}" for path in files)

    def told(self, job: int | str, stage: str = "teacher") -> str:
        """What a job says in its own log."""
        return (self.run / "logs" / f"{stage}-{job}.out").read_text()
