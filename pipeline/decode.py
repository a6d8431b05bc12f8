"""Decoding of plain checkpoint folders: the test part in batches of like length, and latency one example at a time.

Shapes: T output tokens of one example, B examples of a batch.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.config import Recipe

MAX_EXAMPLES_PER_BATCH = 256
NUM_WARMUP = 2
EXAMPLES_PER_ROUND = 4
MEMORY_SHARE = 0.25  # of the free memory, for all systems loaded at once; a job's limit may lie below the machine's


@dataclass(frozen=True)
class Decoded:
    """Output texts in the order of the sources, output tokens in all (end-of-sequence included), and wall seconds."""

    outputs: list[str]
    num_tokens: int
    seconds: float


def load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Model (in the dtype of its checkpoint, ready to decode) and tokenizer of a folder; never from a network."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def decode(model: Any, tokenizer: Any, sources: list[str], recipe: Recipe, beat: Callable[[], None]) -> Decoded:
    """Decode all sources, greedily or with beams as recipe.evaluate says; `beat` is called after each batch."""
    settings = recipe.evaluate
    encoded = tokenizer(sources, truncation=True, max_length=recipe.data.max_source_tokens).input_ids
    outputs, num_tokens, begin = [""] * len(encoded), 0, time.perf_counter()
    for batch in batches_of([len(ids) for ids in encoded], settings.tokens_per_batch):
        inputs = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            ids_BT = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=settings.max_new_tokens,
                num_beams=settings.num_beams,
                do_sample=False,
            )[:, 1:].cpu()
        num_tokens += int((ids_BT != tokenizer.pad_token_id).sum())
        for i, text in zip(batch, tokenizer.batch_decode(ids_BT, skip_special_tokens=True), strict=True):
            outputs[i] = text
        beat()
    return Decoded(outputs, num_tokens, time.perf_counter() - begin)


def batches_of(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Positions of examples in batches of like length, the longest first so that memory is short at once or never.

    A batch holds at most `tokens_per_batch` padded tokens (but always one example) and MAX_EXAMPLES_PER_BATCH examples.
    """
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room == 0:
            batches.append([])
            room = max(1, min(MAX_EXAMPLES_PER_BATCH, tokens_per_batch // max(1, lengths[i])))
        batches[-1].append(i)
        room -= 1
    return batches


def latencies(
    folders: Mapping[str, Path], pairs: Sequence[tuple[str, str]], recipe: Recipe, device: torch.device
) -> dict[str, dict[str, float]]:
    """Latency of each system at batch 1: median ms of one example, and ms for one output token over all examples.

    Each example is decoded for exactly as many tokens as its reference has, so that a system that rambles or stops
    early is neither slower nor faster than its layers make it. Tokenising is not counted. All systems take turns, a few
    examples at a time and every other round backwards, so that a drift of the machine meets all of them alike; systems
    that do not fit in memory together are measured one after the other.
    """
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in folders.values()]
    together = sum(sizes) < MEMORY_SHARE * free_memory(device)
    groups = [list(folders)] if together else [[name] for name in folders]
    result: dict[str, dict[str, float]] = {}
    for group in groups:
        loaded = {name: load(folders[name], device) for name in group}
        result |= _time_group(loaded, pairs, recipe)
        del loaded
        gc.collect()
    return result


def _time_group(
    loaded: Mapping[str, tuple[Any, Any]], pairs: Sequence[tuple[str, str]], recipe: Recipe
) -> dict[str, dict[str, float]]:
    for model, tokenizer in loaded.values():
        for i in range(NUM_WARMUP):
            _time_one(model, tokenizer, pairs[i % len(pairs)], recipe)
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in loaded}
    for turn, first in enumerate(range(0, len(pairs), EXAMPLES_PER_ROUND)):
        for name in list(loaded)[:: -1 if turn % 2 else 1]:
            for pair in pairs[first : first + EXAMPLES_PER_ROUND]:
                taken[name].append(_time_one(*loaded[name], pair, recipe))
    return {
        name: {
            "latency_ms": 1000 * statistics.median(seconds for seconds, _ in each),
            "ms_per_token": 1000 * sum(seconds for seconds, _ in each) / sum(tokens for _, tokens in each),
        }
        for name, each in taken.items()
    }


def _time_one(model: Any, tokenizer: Any, pair: tuple[str, str], recipe: Recipe) -> tuple[float, int]:
    """Seconds to decode one source for as many tokens as the reference has, and that number."""
    source, reference = pair
    ids = tokenizer(source, truncation=True, max_length=recipe.data.max_source_tokens).input_ids
    num_tokens = min(len(tokenizer(text_target=reference).input_ids), recipe.evaluate.max_new_tokens)
    ids_1T = torch.tensor([ids], device=model.device)
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            num_beams=recipe.evaluate.num_beams,
            do_sample=False,
        ).cpu()
    return time.perf_counter() - begin, num_tokens


def free_memory(device: torch.device) -> int:
    """Bytes of memory that nothing uses now, on the device that models are loaded to."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
