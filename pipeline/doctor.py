"""Check this machine or allocation: what will run, what will not, and what to do about it.

Run by itself (`python -m pipeline.doctor`, under torchrun) it is the small training that one of the checks starts.

Shapes: B examples, D features.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data_prep.publish import fsync_folder
from pipeline.world import World

MINIMUM_PYTHON = (3, 11)
PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "sentencepiece", "webdataset", "mpi4py", "sacrebleu")
TIMEOUT_S = 100
TRIED = {
    "zero3_cpu": (torch.float32, 1e-4),
    "zero2_replicated": (torch.bfloat16, 0.03),
    "zero3": (torch.bfloat16, 0.03),
    "zero3_hpz": (torch.bfloat16, 0.03),
}
"""DeepSpeed configurations that are tried, their type, and how far losses may be from plain PyTorch's: by rounding."""
PROBE_BYTES = 64 * 2**20


def doctor(run_dir: Path, names: Sequence[str] = ()) -> None:
    """Print one line for each check: ok, or what failed and what to do about it.

    Args:
        names: of the checks; empty: all.

    Raises:
        ValueError: something that a run needs is missing.
    """
    failed = []
    for name in names or CHECKS:
        started_at = time.perf_counter()
        try:
            said, verdict = CHECKS[name](run_dir), "ok"
        except Exception as error:  # whatever it is, the other checks are wanted too
            said, verdict = str(error) or type(error).__name__, "failed"
            failed.append(name)
        print(f"{verdict:<7} {name:<11} {time.perf_counter() - started_at:5.1f} s  {said}", flush=True)
    if failed:
        raise ValueError(f"this machine cannot run the pipeline yet: {', '.join(failed)}")


def examine(folders: Sequence[str]) -> None:
    """Print what each model folder is, once its config.json is held against its weights.

    Raises:
        FileNotFoundError: one is no model folder.
        ValueError: one says of itself what it is not.
    """
    from pipeline.ordinary import check_ordinary

    for folder in folders:
        print(f"ok      {check_ordinary(Path(folder))}", flush=True)


def _python(run_dir: Path) -> str:
    if sys.version_info < MINIMUM_PYTHON:
        raise ValueError(f"{sys.version.split()[0]} is too old: make PYTHON=python3.11")
    return sys.version.split()[0]


def _packages(run_dir: Path) -> str:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: pip install -r requirements.txt, in that order of lines")
    return ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)


def _devices(run_dir: Path) -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"{properties.name} has no bf16: use an NVIDIA GPU of compute capability 8.0 or newer")
        return f"{torch.cuda.device_count()} x {properties.name} with {memory}, CUDA {torch.version.cuda}, NCCL"
    if shutil.which("nvidia-smi"):
        raise ValueError("there is an NVIDIA driver, but this torch has no CUDA: install the torch build for your CUDA")
    return f"no GPU: CPU with {os.cpu_count()} cores, gloo"


def _collectives(run_dir: Path) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return _output_of([*torchrun, "-m", "pipeline.doctor"]).strip().splitlines()[-1]


def _storage(run_dir: Path) -> str:
    """What checkpoints need: write, fsync, rename, and a folder that can be synced."""
    place = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-", ignore_cleanup_errors=True) as folder:
            temporary, final = Path(folder) / "probe.tmp", Path(folder) / "probe"
            data = os.urandom(2**20) * (PROBE_BYTES // 2**20)
            started_at = time.perf_counter()
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            seconds = time.perf_counter() - started_at
            temporary.rename(final)
            fsync_folder(Path(folder))
            if final.read_bytes() != data:
                raise ValueError(f"{place} does not give back what was written: choose another run_dir")
    except OSError as error:
        raise ValueError(f"{place} cannot be written ({error}): choose another run_dir") from None
    free_gib = shutil.disk_usage(place).free / 2**30
    return f"{place}: {PROBE_BYTES / 2**20 / seconds:.0f} MiB/s with fsync, {free_gib:.0f} GiB free"


def _kernels(run_dir: Path) -> str:
    from pipeline.kernels import HiddenPair, hidden_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and find_spec("triton") is None:
        raise ValueError("triton is missing: the fused kernels need it on a GPU")
    states = torch.randn(3, 2, 7, 64, device=device)
    pair = HiddenPair(states[0], states[1], torch.ones(2, 7, dtype=torch.bool, device=device), states[2])
    torch.testing.assert_close(hidden_loss([pair], "span"), hidden_loss([pair], "span", eager=True))
    return f"hidden loss on {device} equals its definition"


def _mpi(run_dir: Path) -> str:
    from data_prep.processes import mpiexec, on_this_machine

    # one rank prints: lines of several may come out mixed
    count = "from mpi4py import MPI; world = MPI.COMM_WORLD; n = world.allreduce(1); world.rank or print(n)"
    output = _output_of([mpiexec(), "-n", "2", sys.executable, "-c", count], on_this_machine(os.environ))
    if output.strip() != "2":
        raise ValueError(f"two MPI ranks do not see each other: {output!r}; mpiexec and mpi4py must be of one MPI")
    return f"2 ranks by {mpiexec()}"


def _slurm(run_dir: Path) -> str:
    job = os.environ.get("SLURM_JOB_ID")
    try:
        version = _output_of(["sbatch", "--version"]).strip()
        partitions = _output_of(["sinfo", "--noheader", "--format", "%P"]).split()
    except (FileNotFoundError, ValueError) as error:
        if job:
            raise ValueError(
                f"inside job {job}, but {error}: load the site's SLURM module in the batch script"
            ) from None
        return f"none that answers (only needed to submit jobs): {error}"
    return f"{version}, partitions {', '.join(partitions)}" + (f", inside job {job}" if job else "")


def _output_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired:
        raise ValueError(f"no answer within {TIMEOUT_S} s from: {' '.join(command)}") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        told = [line for line in lines if "Error" in line] or lines or ["no output"]
        raise ValueError(told[-1].strip())
    return done.stdout


CHECKS: dict[str, Callable[[Path], str]] = {
    "python": _python,
    "packages": _packages,
    "devices": _devices,
    "collectives": _collectives,
    "storage": _storage,
    "kernels": _kernels,
    "mpi": _mpi,
    "slurm": _slurm,
}


class _Branch(nn.Module):
    """A layer that a step may or may not use, as modular layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, state_BD: torch.Tensor, use: bool) -> torch.Tensor:
        return self.linear(state_BD) if use else state_BD.view_as(state_BD)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(_Branch() for _ in range(3))

    def forward(self, batch_BD: torch.Tensor, uses: Sequence[bool]) -> torch.Tensor:
        state_BD = batch_BD.detach().requires_grad_()
        for branch, use in zip(self.branches, uses, strict=True):
            state_BD = branch(state_BD, use)
        return state_BD.float().square().sum()


def train_a_little(world: World) -> str:
    """On every rank: each collective that ZeRO uses, and a training under each kind of configuration."""
    _try_collectives(world)
    for ds_config, (dtype, tolerance) in TRIED.items():
        _train(world, ds_config, dtype, tolerance)
    ranks = f"{world.size} ranks over {dist.get_backend()}"
    return f"{ranks}; {', '.join(TRIED)}, with layers that a step does not use, equal plain PyTorch"


def _try_collectives(world: World) -> None:
    device, size = world.device, world.size
    mine = torch.full((4,), float(world.rank), device=device)
    everyone = torch.arange(size, device=device).float().repeat_interleave(4)
    gathered = torch.empty(4 * size, device=device)
    dist.all_gather_into_tensor(gathered, mine)
    reduced = torch.empty(4, device=device)
    dist.reduce_scatter_tensor(reduced, everyone)
    assert torch.equal(gathered, everyone), f"all-gather on rank {world.rank} gives {gathered.tolist()}"
    assert torch.equal(reduced, mine * size), f"reduce-scatter on rank {world.rank} gives {reduced.tolist()}"
    assert world.sum(mine.clone())[0] == size * (size - 1) / 2, "all-reduce is wrong"


def _train(world: World, ds_config: str, dtype: torch.dtype, tolerance: float, num_steps: int = 6) -> None:
    """A training whose ranks and steps use different layers, which must equal plain PyTorch. A library that keeps
    gradients of layers that a step did not use fails here."""
    from pipeline.config import OptimConfig
    from pipeline.training import Engine

    device, size = world.device, world.size
    optim = OptimConfig(beta2=0.95, max_grad_norm=1e6)
    engine = Engine(
        _Branches(),
        world=world,
        ds_config=ds_config,
        optim=optim,
        leaf_classes=[_Branch],
        lr_factor=lambda name: 1.0,
        clip_group=lambda name: "all",
        num_accumulated=1,
    )
    plain = _Branches().to(device)
    for parameter in plain.parameters():
        parameter.grad = torch.zeros_like(parameter)  # AdamW passes over what has none, and a step of zeros counts
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(optim.beta1, optim.beta2), weight_decay=0.0)
    for step in range(num_steps):
        batches_NBD = torch.randn(size, 8, 16, generator=torch.Generator().manual_seed(step)).to(device)
        uses = [[(step + rank + branch) % 3 != 0 for branch in range(3)] for rank in range(size)]
        loss = engine(batches_NBD[world.rank].to(dtype), uses[world.rank])
        engine.backward(loss)
        engine.step(0.01)
        adamw.zero_grad(set_to_none=False)
        losses = [plain(batch_BD, use) for batch_BD, use in zip(batches_NBD, uses, strict=True)]
        torch.stack(losses).sum().backward()
        adamw.step()
        difference = abs(loss.item() - losses[world.rank].item()) / losses[world.rank].item()
        assert difference < tolerance, (
            f"step {step} of {ds_config} differs from plain PyTorch by {difference:.1e}: install the versions of "
            "requirements.txt"
        )


def main() -> None:
    from pipeline.training import join_world

    world = join_world()
    told = train_a_little(world)
    if world.is_main:
        print(told)
    world.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
