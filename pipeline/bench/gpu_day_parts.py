"""The parts of a GPU day; run by pipeline/bench/gpu_day.py, each in a process of its own.

    python -m pipeline.bench.gpu_day_parts NAME ... [--dry]     # prints a line of JSON a part

Shapes: B examples, S source tokens, T target tokens, D model width.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from transformers import BartConfig, BartForConditionalGeneration, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from pipeline import doctor
from pipeline.bench.gpu_day_gathers import gathers
from pipeline.bench.step_model import loss_of, new_engine, new_task, random_batch, t5
from pipeline.bench.timing import num_launches
from pipeline.checkpoints.format import Snapshot
from pipeline.decoding.plain import weights_in
from pipeline.families import StackInputs, family_of
from pipeline.model import ModularModel, compile_layers
from pipeline.spans import STACKS
from pipeline.training.engine import Engine, join_world
from pipeline.training.loop import Task
from pipeline.world import World

Figures = dict[str, Any]
LARGE: dict[str, Any] = {
    "model": {"num_layers": 24, "d_model": 1024, "d_ff": 2816}, "tokens": (8192, 32768), "source": 512, "target": 128,
    "shapes": 20, "steps": 4, "new_tokens": 32,
}  # fmt: skip
TINY: dict[str, Any] = {
    "model": {"num_layers": 2, "d_model": 64, "d_ff": 64}, "tokens": (96,), "source": 48, "target": 8, "shapes": 2,
    "steps": 1, "new_tokens": 2,
}  # fmt: skip
VOCABULARY = 32128


def machine(world: World, size: dict[str, Any]) -> Figures:
    """What the doctor says, and which attention is chosen for biases as T5 has them."""
    for name in ("python", "packages", "devices", "kernels"):
        print(name, doctor.CHECKS[name](Path()), file=sys.stderr)
    found: Figures = {"torch": torch.__version__, "CUDA": torch.version.cuda or "none"}
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    states = torch.randn(3, 2, 4, 48, 64, device=world.device, dtype=dtype)
    for num_keys in (48, 41):
        query, key, value = (each[:, :, :num_keys] for each in states)
        bias = torch.zeros(2, 4, num_keys, num_keys, device=world.device, dtype=dtype)
        choice = torch._fused_sdp_choice(query, key, value, attn_mask=bias)
        found[f"attention with a bias of {num_keys} keys"] = SDPBackend(choice).name
    return found


def shapes(world: World, size: dict[str, Any]) -> Figures:
    """One layer on many shapes, each for the first time: planning of attention, and copies of biases in short rows."""
    model = T5ForConditionalGeneration(t5(**{**size["model"], "num_layers": 1}, vocab_size=64))
    family, layer = family_of("t5"), model.encoder.block[0]
    shared: Any = family.take_shared(model.requires_grad_(False))
    shared.to(world.device, torch.bfloat16)
    layer = layer.to(world.device, torch.bfloat16).requires_grad_(True)
    found: Figures = {}
    for name, cudnn, aligned, first in (
        ("as it is", False, True, 3), ("rows not aligned", False, False, 4), ("cuDNN", True, True, 5),
    ):  # fmt: skip
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        seconds = []
        for index in range(size["shapes"]):
            num_tokens = size["source"] - 16 * index - first
            mask_BL = torch.ones(max(1, 4096 // num_tokens), num_tokens, dtype=torch.bool, device=world.device)
            bias = shared.inputs("encoder", mask_BL).self_bias
            inputs = StackInputs(bias if aligned else bias.contiguous())
            state_BLD = torch.randn(*mask_BL.shape, size["model"]["d_model"], device=world.device, dtype=torch.bfloat16)
            _wait(world)
            started_at = time.perf_counter()
            family.call_layer(layer, state_BLD, None, inputs).sum().backward()
            _wait(world)
            seconds.append(time.perf_counter() - started_at)
        found |= {f"ms of a new shape, {name}": 1e3 * median(seconds), f"{name}: GiB": _peak_gib(world)}
    torch.backends.cuda.enable_cudnn_sdp(False)
    return found


def step(world: World, size: dict[str, Any]) -> Figures:
    """Steps of the engine by configuration and size of a micro-batch: time, launches, waits for the device."""
    found: Figures = {}
    for ds_config in ("zero2_replicated", "zero3"):
        with torch.device(world.device if world.is_main else "meta"):
            task = new_task(T5ForConditionalGeneration(t5(**size["model"])))
        engine = new_engine(task, world, ds_config)
        for tokens in size["tokens"]:
            _peak_gib(world)
            run = _stepper(engine, task, world, size, tokens)
            run()
            seconds = []
            for _ in range(size["steps"]):
                _wait(world)
                started_at = time.perf_counter()
                run()
                _wait(world)
                seconds.append(time.perf_counter() - started_at)
            name = f"{ds_config}, {tokens} tokens"
            found |= {f"ms of a step, {name}": 1e3 * median(seconds), f"GiB, {name}": _peak_gib(world)}
            if world.device.type == "cuda":
                found |= {f"waits, {name}": _num_waits(run), f"launches, {name}": num_launches(run)}
        del task, engine, run
    return found


def _stepper(engine: Engine, task: Task, world: World, size: dict[str, Any], tokens: int) -> Callable[[], None]:
    """Makes a step of another shape each time that it is called."""
    numbers = iter(range(1000))

    def run() -> None:
        number = next(numbers)
        source, target = size["source"] - number % 7, size["target"] - number % 5
        batch = random_batch(number, (max(1, tokens // (source + target)), source, target), VOCABULARY, world.device)
        engine.backward(loss_of(engine, task, 10 + number, batch, 1))
        engine.step(1e-4)

    return run


def _num_waits(run: Callable[[], None]) -> int:
    """Operations that wait for the device; a batch that is made there waits, too."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in said)


def kernels(world: World, size: dict[str, Any]) -> Figures:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels"]
    if world.device.type != "cuda":
        return {"pytest": "needs a GPU"}
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-2000:], file=sys.stderr)
    return {"pytest": done.stdout.strip().splitlines()[-1], "exit code": done.returncode}


def bart(world: World, size: dict[str, Any]) -> Figures:
    """A step of a BART under ZeRO-3, whose buffer must have moved, and a snapshot of its state."""
    width = size["model"]["d_model"]
    of_stack = {"layers": size["model"]["num_layers"], "attention_heads": width // 64, "ffn_dim": 4 * width}
    stacks = {f"{stack}_{key}": value for stack in STACKS for key, value in of_stack.items()}
    task = new_task(BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, d_model=width, **stacks)))
    engine = new_engine(task, world, "zero3")
    run = _stepper(engine, task, world, size, size["tokens"][0])
    run()
    slices = list(engine.slices())
    seconds, snapshot = _seconds(world, lambda: Snapshot(slices))
    taken, _ = _seconds(world, lambda: snapshot.take(slices))
    size_gib = sum(each.nbytes for part in slices for each in part.tensors.values()) / 2**30
    return {"snapshot GiB": size_gib, "s to allocate": seconds, "s to copy": taken}


def norm(world: World, size: dict[str, Any]) -> Figures:
    """T5's norm against torch's own in one kernel."""
    width = size["model"]["d_model"]
    own = T5LayerNorm(width).to(world.device, torch.bfloat16)
    state_BD = torch.randn(8192 if world.device.type == "cuda" else 64, width, device=world.device).bfloat16()
    found: Figures = {}
    for name, run in {
        "T5LayerNorm": lambda: own(state_BD),
        "F.rms_norm": lambda: F.rms_norm(state_BD, (width,), own.weight, own.variance_epsilon),
    }.items():
        run()
        found[f"us, {name}"] = 1e6 * min(_seconds(world, run)[0] for _ in range(20))
    ours, theirs = own(state_BD).float(), F.rms_norm(state_BD, (width,), own.weight, own.variance_epsilon).float()
    found["largest difference"] = (ours - theirs).abs().max().item()
    return found


def compiled(world: World, size: dict[str, Any]) -> Figures:
    """A step with layers as they are and compiled: time, launches."""
    task = new_task(T5ForConditionalGeneration(t5(**size["model"])))
    engine = new_engine(task, world, "zero2_replicated")
    run = _stepper(engine, task, world, size, size["tokens"][0])
    found: Figures = {}
    for name in ("as they are", "compiled"):
        if name == "compiled":
            backend = "inductor" if world.device.type == "cuda" else "eager"
            found["outcome"] = compile_layers(cast(ModularModel, task.module), lambda good: good, backend)
        found[f"s of the first step, {name}"], _ = _seconds(world, run)
        run()  # lengths of any kind are compiled for in the second
        found[f"ms of a step, {name}"] = 1e3 * median(_seconds(world, run)[0] for _ in range(size["steps"]))
        if world.device.type == "cuda":
            found[f"launches, {name}"] = num_launches(run)
    return found


def decoding(world: World, size: dict[str, Any]) -> Figures:
    """Tokens a second of transformers' generate in each of evaluate.dtype."""
    found: Figures = {}
    for dtype in ("checkpoint", "tf32", "bfloat16"):
        wanted = weights_in(dtype) or torch.float32
        model: Any = T5ForConditionalGeneration(t5(**size["model"])).eval()
        model.to(world.device, wanted)
        ids_BS = torch.randint(2, VOCABULARY, (16, size["source"]), device=world.device)
        count = size["new_tokens"]
        options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
        run = _generating(model, ids_BS, options)
        run()
        found[f"tokens/s, {dtype}"] = 16 * count / _seconds(world, run)[0]
    weights_in("checkpoint")
    return found


def _generating(model: Any, ids_BS: torch.Tensor, options: dict[str, Any]) -> Callable[[], Any]:
    return lambda: model.generate(input_ids=ids_BS, **options)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(world: World, run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    _wait(world)
    started_at = time.perf_counter()
    result = run()
    _wait(world)
    return time.perf_counter() - started_at, result


def _peak_gib(world: World) -> float:
    """Of the device since the last call; 0 without a GPU."""
    if world.device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


PARTS: dict[str, Callable[[World, dict[str, Any]], Figures]] = {
    each.__name__: each for each in (machine, shapes, step, kernels, gathers, bart, norm, decoding, compiled)
}


def main(arguments: list[str]) -> None:
    size = TINY if "--dry" in arguments else LARGE
    world = join_world()
    for name in arguments:
        if name in PARTS:
            print(json.dumps({"part": name, "figures": PARTS[name](world, size)}), flush=True)
    world.close()


if __name__ == "__main__":
    main(sys.argv[1:])
