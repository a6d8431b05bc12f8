"""Switching between assemblies in one process, against loading each from its own folder."""

from __future__ import annotations

import argparse
import gc
import mmap
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from pipeline.bench import Measure, report
from pipeline.library.switching import ModuleLibrary
from pipeline.spans.spans import STACKS, modular_spans
from pipeline.spans.stacks import Stacks

GRANULARITIES = (2, 3, 6)
REQUESTS = tuple((preset, ratio) for ratio in (1.2, 1.5, 2.0, 3.0) for preset in ("size-first", "speed-first"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=768, help="d_model of the teacher (default 768, T5-base)")
    parser.add_argument("--layers", type=int, default=12, help="teacher layers of each stack (default 12)")
    parser.add_argument("--rounds", type=int, default=5, help="times each assembly is switched to (default 5)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the table to DIR as Markdown, too")


def main(arguments: argparse.Namespace) -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    library = random_library(arguments.width, arguments.layers)
    texts = requested(arguments.layers)
    one, all_alive = memory_bytes(library, texts)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / text for text in texts]
        for folder, text in zip(folders, texts, strict=True):
            library.assembly(text).save_pretrained(folder, max_shard_size="100TB")
        sizes = [(folder / "model.safetensors").stat().st_size for folder in folders]
        ours_s, theirs_s = [], []
        for _ in range(arguments.rounds):
            for folder, text in zip(folders, texts, strict=True):
                ours_s.append(_seconds(lambda text=text: library.assembly(text)))
                theirs_s.append(_seconds(lambda folder=folder: AutoModelForSeq2SeqLM.from_pretrained(folder)))
    measures = [
        Measure(
            "switch", "one switch", 1e3 * statistics.median(ours_s), 1e3 * statistics.median(theirs_s),
            "from_pretrained, file cached", "ms", 0.0,
        ),
        Measure(
            "switch", f"memory of the 2nd to {len(texts)}th assembly alive",
            max(mmap.PAGESIZE, all_alive - one) / 2**20,  # a page is the least that can be seen
            sum(sizes[1:]) / 2**20, "their checkpoints", "MiB", 0.0,
        ),
    ]  # fmt: skip
    notes = (
        f"T5 v1.1 of {arguments.layers}+{arguments.layers} layers, d_model {arguments.width}, random weights in fp32, "
        f"granularities {GRANULARITIES}; {len(texts)} assemblies ({', '.join(texts)}), each switched to "
        f"{arguments.rounds} times, medians. Resident memory with 1 alive: {one / 2**20:,.0f} MiB, with {len(texts)}: "
        f"{all_alive / 2**20:,.0f} MiB ({all_alive / one - 1:+.2%}); every one had run once."
    )
    report("switch", measures, notes, arguments.write)


def random_library(width: int, num_layers: int) -> ModuleLibrary:
    """A T5 v1.1 and modular layers of all granularities, with random weights."""
    sizes: Any = {"decoder_start_token_id": 0}
    config = T5Config(
        d_model=width, d_ff=int(2.667 * width), num_heads=width // 64, num_layers=num_layers,
        feed_forward_proj="gated-gelu", **sizes,
    )  # fmt: skip
    teacher = T5ForConditionalGeneration(config)
    weights = {
        f"{stack}.{span}.{name}": weight.clone()
        for stack in STACKS
        for span in modular_spans(num_layers, GRANULARITIES)
        for name, weight in getattr(teacher, stack).block[1].state_dict().items()
    }
    return ModuleLibrary(teacher, weights)


def requested(num_layers: int) -> list[str]:
    """The assemblies that both presets take for ratios from 1.2 to 3."""
    stacks = Stacks.of((num_layers, num_layers), (GRANULARITIES, GRANULARITIES))
    found = [stacks.preset(preset, ratio) for preset, ratio in REQUESTS]
    return [str(assembly) for assembly in dict.fromkeys(found)]


def memory_bytes(library: ModuleLibrary, texts: list[str]) -> tuple[int, int]:
    """Resident memory with the first assembly alive, and with all of them."""
    ids = torch.arange(16)[None]
    alive: list[Any] = []
    found: list[int] = []
    # the widest paths first, so that nothing but the models themselves is new to the second measurement
    whole = str(library.stacks.teacher())
    with torch.inference_mode():
        for _ in range(3):
            for text in (whole, *texts):
                library.assembly(text)(input_ids=ids, decoder_input_ids=ids)
        for text in texts:
            alive.append(library.assembly(text))
            alive[-1](input_ids=ids, decoder_input_ids=ids)
            gc.collect()
            found.append(_resident_bytes())
    return found[0], found[-1]


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError("this system does not tell resident memory in /proc/self/status")


def _seconds(action: Any) -> float:
    begin = time.perf_counter()
    result = action()
    taken = time.perf_counter() - begin
    del result
    return taken
