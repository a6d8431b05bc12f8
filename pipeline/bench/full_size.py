"""The whole way at full size on CPUs: train on 2 ranks, save, resume on 1, assemble, load; memory and time of each.

The teacher has the configuration of a public model and random weights; ZeRO-3 in bf16. Weights are worth nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

from data_prep.demo import make_corpus
from data_prep.encode import SPIECE, train_sentencepiece
from pipeline.bench import Measure, report
from pipeline.bench.speeds import copied_bytes_per_s, matmul_flops, written_bytes_per_s
from pipeline.config.cli import parse_recipe, recipe_parser
from pipeline.config.recipe import Recipe
from pipeline.footprint.estimate import GIB, Machine
from pipeline.footprint.sharding import read_ds_config
from pipeline.planning.disk import bytes_of_stages
from pipeline.planning.forecast import TrainingCost, costs_of
from pipeline.planning.planned import Planned
from pipeline.planning.public_models import public_config

LEAST_FREE_GIB = 0.8
"""What must stay free on the machine; below it the run is ended, so that no other process is."""
BUCKET = 20_000_000
"""Elements of the reduction buffer and of layers that are gathered ahead."""
SUB_GROUP = 50_000_000
"""Elements that the optimizer steps through at a time; as many gradients are copied."""
NUM_RANKS = 2
TIMES_COPIED = 4
"""Of what gloo gathers: into the kernel, out of it, into its own buffer, and from there."""
BYTES_STEPPED = 48
"""Of a rank's trainable parameter in a step: fp32 weight, moments and gradient and its copy, read and written."""
NUM_REHEARSED = 2
"""Steps of both phases before the first."""
OF_A_STEP = ("data", "forward", "backward", "optimizer")
IDLE = "baseline (of none)"
"""A training stage that joins, finds nothing to train and ends: what a rank takes before it has a model."""
NUM_STEPS = 3
RATIOS = (2.0, 6.0)
LOAD = """
import sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generate(**tokenizer("the old man", return_tensors="pt"), max_new_tokens=4)
    print(folder, model.config.num_layers, model.config.num_decoder_layers, f"{model.num_parameters():,}")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="t5-large", help="a public model known offline (default t5-large)")
    parser.add_argument("--folder", type=Path, default=Path("runs/full_size"), help="where to work; removed at the end")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the table to DIR as Markdown, too")


def main(arguments: argparse.Namespace) -> None:
    folder = arguments.folder.absolute() / arguments.model
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _measure(arguments.model, folder, arguments.write)
    finally:
        shutil.rmtree(folder)


def _measure(name: str, folder: Path, write: Path | None) -> None:
    recipe_path = _write_inputs(name, folder)
    recipe = parse_recipe(recipe_parser("full-size", ""), ["--config", str(recipe_path)])[0]
    planned = Planned.of(recipe)
    machine = Machine(NUM_RANKS, NUM_RANKS, 0.0, is_gpu=False)
    cost = next(each for each in costs_of(planned, machine) if each.name == "distill")
    run_dir = folder / "run"
    steps = _run(folder, recipe_path, run_dir)
    built = [each for each in sorted((run_dir / "assemble" / "models").iterdir()) if each.name.startswith("e")]
    steps.append(watched("from_pretrained", [sys.executable, "-c", LOAD, *map(str, built)], folder))
    records = [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
    expected_s, floor_s = _expected_s(cost, run_dir, steps, records)
    measures = [*_sizes(steps, cost, planned, run_dir), *_times(steps, records, expected_s, floor_s)]
    report(f"full_size_{name}", measures, _notes(name, steps, cost, recipe, expected_s), write)


def _write_inputs(name: str, folder: Path) -> Path:
    """Model, tokenizer, texts, DeepSpeed configuration and recipe; the path of the recipe."""
    settings = dict(public_config(name))
    config: Any = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    with torch.device("meta"):
        model: Any = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    if settings.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.fill_(1.0) if parameter.dim() == 1 else parameter.data.normal_(std=0.02)
    teacher = folder / "teacher"
    model.save_pretrained(teacher, max_shard_size="1GB")
    corpus = make_corpus(0, 300, 20, 20)
    for part, pairs in corpus.items():
        rows = [json.dumps({"source": each.source, "target": each.target}) + "\n" for each in pairs]
        (folder / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
    train_sentencepiece((text for pair in corpus["train"] for text in (pair.source, pair.target)), 512, True,
                        teacher / SPIECE)  # fmt: skip
    ds_config = read_ds_config("zero3")
    ds_config["zero_optimization"] |= {
        "reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET, "sub_group_size": SUB_GROUP,
        "stage3_max_live_parameters": BUCKET,
        "overlap_comm": False,
    }  # fmt: skip
    (folder / "zero3.json").write_text(json.dumps(ds_config))
    batch = {"tokens_per_micro_batch": 96, "micro_batches_per_step": NUM_RANKS}
    loop = {"ds_config": str(folder / "zero3.json"), "save_beside": False, "keep_checkpoints": 1, "keep_best": False,
            "validation_examples": 2, "log_every_steps": 1}  # fmt: skip
    recipe = {
        "name": name,
        "run_dir": str(folder / "run"),
        "data": {
            "corpus": "files", "tokenizer": str(teacher), "max_source_tokens": 32, "max_target_tokens": 16,
            **{part: [str(folder / f"{part}.jsonl")] for part in ("train", "validation", "test")},
        },
        "teacher": {"folder": str(teacher), "optim": {"num_steps": 0}, "batch": batch},
        "distill": {"local_steps": 1, "optim": {"num_steps": NUM_STEPS}, "batch": batch, "loop": loop},
        "baseline": {"optim": {"num_steps": 0}},
        "assemble": {"ratios": list(RATIOS), "presets": ["size-first"]},
        "launch": {"num_ranks": NUM_RANKS, "num_mpi_ranks": 1},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _run(folder: Path, recipe: Path, run_dir: Path) -> list[Step]:
    """Every stage as a process of its own; distillation once on 2 ranks and a step more on 1."""

    def stage(label: str, name: str, num_ranks: int = 1, *options: str) -> Step:
        launch = ["-m", "pipeline.launch", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
        command = [sys.executable, *launch, "-m", "pipeline", name, "--config", str(recipe), *options]
        return watched(label, command, folder)

    build = ["-m", "data_prep", "build", "--config", str(recipe), "--out", str(run_dir / "data")]
    found = [watched("data", [sys.executable, *build], folder), stage("teacher", "teacher")]
    found.append(stage(f"distill on {NUM_RANKS} ranks", "distill", NUM_RANKS))
    found.append(stage("resume on 1 rank", "distill", 1, "--distill.optim.num_steps", str(NUM_STEPS + 1), "--extend"))
    longer = ("--distill.optim.num_steps", str(NUM_STEPS + 1))
    found.append(stage(IDLE, "baseline", 1, *longer))
    found.append(stage("assemble", "assemble", 1, *longer))
    return found


@dataclass
class Step:
    """One command and the memory of its processes, looked at ten times a second."""

    name: str
    seconds: float = 0.0
    private: dict[int, float] = field(default_factory=dict)
    """Highest private memory (RssAnon) of each process, in bytes."""
    together: float = 0.0
    """Highest sum of it over all processes at once."""
    least_free: float = float("inf")

    @property
    def largest(self) -> float:
        return max(self.private.values())


def watched(name: str, command: list[str], folder: Path) -> Step:
    """Run a command to its end.

    Raises:
        ValueError: it failed, or was ended because the machine ran out of memory.
    """
    step = Step(name)
    print(f"{name} ...", flush=True)
    started_at = time.monotonic()
    with open(folder / "log.txt", "ab") as log:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=_die_first,
        )  # fmt: skip
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, step, done))
    watcher.start()
    process.wait()
    done.set()
    watcher.join()
    step.seconds = time.monotonic() - started_at
    print(f"{name}: {step.seconds:.0f} s, {step.largest / GIB:.2f} GiB, together {step.together / GIB:.2f} GiB, "
          f"{step.least_free / GIB:.1f} GiB left on the machine", flush=True)  # fmt: skip
    if process.returncode:
        tail = "\n".join((folder / "log.txt").read_text(errors="replace").splitlines()[-20:])
        print(tail, file=sys.stderr)
        raise ValueError(f"{name} ended with exit code {process.returncode}; what it said last stands above")
    return step


def _die_first() -> None:
    """Should memory run out, the kernel takes this process before any other."""
    Path("/proc/self/oom_score_adj").write_text("1000")


def _watch(session: int, step: Step, done: threading.Event) -> None:
    while not done.wait(0.1):
        private = {pid: count for pid in _pids(session) if (count := _private_bytes(pid))}
        for pid, count in private.items():
            step.private[pid] = max(count, step.private.get(pid, 0))
        step.together = max(step.together, sum(private.values()))
        free = int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024
        step.least_free = min(step.least_free, free)
        if free < LEAST_FREE_GIB * GIB:
            for pid in private:
                os.kill(pid, signal.SIGKILL)


def _pids(session: int) -> list[int]:
    """Processes of a session, and of the sessions that torchrun starts for its workers below it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found = [session]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _private_bytes(pid: int) -> int:
    try:
        match = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def _named(steps: list[Step], name: str) -> Step:
    return next(step for step in steps if step.name == name)


def _sizes(steps: list[Step], cost: TrainingCost, planned: Planned, run_dir: Path) -> list[Measure]:
    """Memory of training on both ranks and disk of all stages, against the estimate."""
    train, idle = _named(steps, f"distill on {NUM_RANKS} ranks"), _named(steps, IDLE).largest
    on_disk = _bytes_on_disk(run_dir)
    needed = cost.memory.device_total
    floor = sum(cost.memory.device[name] for name in ("weights", "fp32 weights and moments", "gradients"))
    both, both_over_idle = NUM_RANKS * needed, train.together - NUM_RANKS * idle
    rows = [
        ("memory of a rank over an idle one", train.largest - idle, needed, "estimate", floor),
        ("memory of both ranks over idle ones", both_over_idle, both, "estimate", NUM_RANKS * floor),
        ("disk at the end", on_disk, sum(bytes_of_stages(planned).values()), "estimate, at most", on_disk),
    ]
    return [Measure("full_size", what, a / GIB, b / GIB, name, "GiB", c / GIB) for what, a, b, name, c in rows]


def _times(
    steps: list[Step], records: list[dict[str, Any]], expected_s: dict[str, float], floor_s: float
) -> list[Measure]:
    """The steps of training on both ranks, and all of it, against the estimate."""
    stepped_s = sum(record[f"seconds_per_step/{phase}"] for record in records[:NUM_STEPS] for phase in OF_A_STEP)
    share = NUM_STEPS / (NUM_STEPS + NUM_REHEARSED)
    whole_s = _named(steps, f"distill on {NUM_RANKS} ranks").seconds
    return [
        Measure(
            "full_size", f"{NUM_STEPS} steps", stepped_s, share * expected_s["steps"], "estimate", "s", share * floor_s
        ),
        Measure("full_size", "training on both ranks", whole_s, sum(expected_s.values()), "estimate", "s", floor_s),
    ]


def _expected_s(
    cost: TrainingCost, run_dir: Path, steps: list[Step], records: list[dict[str, Any]]
) -> tuple[dict[str, float], float]:
    """(Seconds that training on both ranks should take, by what for; those that the matrix products of its steps alone
    take), at the speeds of this machine: matrix products in bf16 on one thread a rank, copies in memory, files that are
    written and read. Loading sends every weight to every rank once, and so does a validation, for a third of a step's
    products; a start is what a stage takes that finds nothing to do."""
    torch.set_num_threads(1)
    num_steps = NUM_STEPS + NUM_REHEARSED
    num_validations = sum(name.startswith("validation/") for name in records[NUM_STEPS - 1])
    product_s = cost.flops / cost.num_steps / NUM_RANKS / matmul_flops()
    copied_per_s = copied_bytes_per_s()
    gather_s = TIMES_COPIED * NUM_RANKS * cost.traffic.gathered / 2 / copied_per_s  # of all weights once
    reduce_s = TIMES_COPIED * NUM_RANKS * cost.traffic.reduced / copied_per_s
    update_s = BYTES_STEPPED * cost.sizes.num_trained / NUM_RANKS / copied_per_s
    expected_s = {
        "start": _named(steps, IDLE).seconds,
        "loading": gather_s,
        "steps": num_steps * (product_s + 2 * gather_s + reduce_s + update_s),
        "validation": num_validations * (product_s / 3 + gather_s),
        "saving": _bytes_on_disk(run_dir / "distill") / written_bytes_per_s(run_dir),
    }
    return expected_s, num_steps * product_s


def _bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _notes(name: str, steps: list[Step], cost: TrainingCost, recipe: Recipe, expected_s: dict[str, float]) -> str:
    rows = [
        f"| {step.name} | {step.seconds:.0f} | {step.largest / GIB:.2f} | {step.together / GIB:.2f} |" for step in steps
    ]
    parts = ", ".join(f"{part} {count / GIB:.2f}" for part, count in cost.memory.device.items())
    return "\n".join(
        [
            f"{name} with random weights: {cost.sizes.num_trained:,} trainable, {cost.sizes.num_frozen:,} frozen "
            f"parameters, granularities {recipe.distill.granularities};",
            f"ZeRO-3 in bf16 on {NUM_RANKS} CPU ranks, {recipe.distill.batch.tokens_per_micro_batch} tokens a "
            f"micro-batch. Estimate of a rank in GiB: {parts}.",
            "Estimate of training in s: "
            + ", ".join(f"{part} {seconds:.0f}" for part, seconds in expected_s.items())
            + f"; {NUM_REHEARSED} steps of a rehearsal among its {NUM_STEPS + NUM_REHEARSED} steps.",
            "",
            "| step | s | largest process (GiB) | all its processes (GiB) |",
            "|---|---|---|---|",
            *rows,
        ]
    )
