"""What systems cost to run, measured on their plain checkpoint folders: latency, throughput, memory, layer FLOPs.

Latency is that of one example at batch 1, decoded for exactly as many tokens as its reference has, so that a system
that rambles or stops early is neither slower nor faster than its layers make it. Throughput is that of one full batch,
for as many tokens as the middle one of all references has. Tokenising is not counted, and every model has a warm-up.
All systems take turns, a few examples at a time and every other round backwards, so that a drift of the machine meets
all of them alike; systems that do not fit in memory together are measured one after the other.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.decoding import MAX_EXAMPLES_PER_BATCH, load, padded_sources
from pipeline.engines import Translator
from pipeline.evaluation.peers import most_positions
from pipeline.world import is_out_of_memory, release_memory

NUM_WARMUP = 2
EXAMPLES_PER_ROUND = 4
THROUGHPUT_REPEATS = 3
WEIGHTS = (".safetensors", ".bin")
MEMORY_SHARE = 0.25  # of the free memory, for all systems loaded at once; a job's limit may lie below the machine's

Costs = dict[str, float]


@dataclass(frozen=True)
class Sample:
    """What is decoded to measure costs, as token ids."""

    pairs: Sequence[tuple[list[int], int]]
    """(source, number of output tokens) of the examples for latency."""
    batch: Sequence[list[int]]
    """Sources of one full batch."""
    batch_tokens: int
    """Output tokens of each of them."""
    typical: tuple[list[int], list[int]]
    """(source, reference) that FLOPs are counted on."""
    num_beams: int


def costs(
    folders: Mapping[str, Path],
    sample: Sample,
    device: torch.device,
    dtype: str = "checkpoint",
    may_fail: Collection[str] = (),
    engines: Collection[str] = (),
) -> dict[str, Costs]:
    """Costs of each system; one that runs out of memory is left out, and one that may fail and does.

    latency_ms (median), latency_ms_low and latency_ms_high (quartiles), ms_per_token; tokens_per_s (median of
    THROUGHPUT_REPEATS batches), tokens_per_s_low and _high (slowest and fastest); peak_memory_bytes of the full batch,
    weights included; layer_flops of one typical example.

    Args:
        dtype: as evaluate.dtype of a recipe.
        engines: those that are models of CTranslate2; FLOPs, and memory on a GPU, are not known of them.
    """
    release_memory(device)  # what decoding has left in the allocator is free, though the device does not say so
    sizes = [path.stat().st_size for folder in folders.values() for path in folder.glob("*") if path.suffix in WEIGHTS]
    together = sum(sizes) < MEMORY_SHARE * free_memory(device)
    groups = [list(folders)] if together else [[name] for name in folders]
    result: dict[str, Costs] = {}
    for group in groups:
        loaded: dict[str, Any] = {}
        for name in group:
            try:
                folder = folders[name]
                loaded[name] = Translator(folder, device) if name in engines else load(folder, device, dtype)[0]
                result[name] = _memory_and_flops(loaded[name], sample, device)
            except Exception as error:
                if not is_out_of_memory(error) and name not in may_fail:
                    raise
                loaded.pop(name, None)
                release_memory(device)
        try:
            for measure in (_latencies, _throughputs):
                for name, each in measure(loaded, sample).items():
                    result[name] |= each
        except Exception as error:  # with all of them loaded there is less memory than when each was tried
            if not is_out_of_memory(error) and not set(may_fail) & loaded.keys():
                raise
            for name in loaded:
                del result[name]
            groups += [[name] for name in loaded] if len(loaded) > 1 else []
            release_memory(device)
        del loaded
        gc.collect()
    return result


def _latencies(models: Mapping[str, Any], sample: Sample) -> dict[str, Costs]:
    for model in models.values():
        for i in range(NUM_WARMUP):
            source, num_tokens = sample.pairs[i % len(sample.pairs)]
            _seconds(model, [source], num_tokens, sample.num_beams)
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn, first in enumerate(range(0, len(sample.pairs), EXAMPLES_PER_ROUND)):
        for name in list(models)[:: -1 if turn % 2 else 1]:
            for source, num_tokens in sample.pairs[first : first + EXAMPLES_PER_ROUND]:
                taken[name].append(_seconds(models[name], [source], num_tokens, sample.num_beams))
    found = {}
    for name, seconds in taken.items():
        num_tokens = sum(_possible(models[name], count) for _, count in sample.pairs)
        low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        found[name] = {
            "latency_ms": 1000 * middle,
            "latency_ms_low": 1000 * low,
            "latency_ms_high": 1000 * high,
            "ms_per_token": 1000 * sum(seconds) / num_tokens,
        }
    return found


def _throughputs(models: Mapping[str, Any], sample: Sample) -> dict[str, Costs]:
    """The pass that memory was measured on is the warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(THROUGHPUT_REPEATS):
        for name in list(models)[:: -1 if turn % 2 else 1]:
            taken[name].append(_seconds(models[name], sample.batch, sample.batch_tokens, sample.num_beams))
    found = {}
    for name, seconds in taken.items():
        num_tokens = _possible(models[name], sample.batch_tokens) * len(sample.batch)
        found[name] = {
            "tokens_per_s": num_tokens / statistics.median(seconds),
            "tokens_per_s_low": num_tokens / max(seconds),
            "tokens_per_s_high": num_tokens / min(seconds),
        }
    return found


def _possible(model: Any, num_tokens: int) -> int:
    """So many output tokens, or as many as a model has positions for."""
    longest = None if isinstance(model, Translator) else most_positions(model.config)[1]
    return min(num_tokens, longest or num_tokens)


def _seconds(model: Any, sources: Sequence[list[int]], num_tokens: int, num_beams: int) -> float:
    """Seconds to decode a batch for so many tokens."""
    if isinstance(model, Translator):
        begin = time.perf_counter()
        model.generate(sources, num_tokens, num_beams, min_new_tokens=num_tokens)
        return time.perf_counter() - begin
    longest_source, num_tokens = most_positions(model.config)[0], _possible(model, num_tokens)
    vocab_size = model.get_input_embeddings().num_embeddings  # of a peer, for which the ids were not made
    sources = [[min(each, vocab_size - 1) for each in ids[:longest_source]] for ids in sources]
    source_BS, mask_BS = padded_sources(model, sources)
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=source_BS,
            attention_mask=mask_BS,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            num_beams=num_beams,
            do_sample=False,
        ).cpu()
    return time.perf_counter() - begin


def _memory_and_flops(model: Any, sample: Sample, device: torch.device) -> Costs:
    is_engine = isinstance(model, Translator)
    weights = model.num_bytes if is_engine else sum(each.numel() * each.element_size() for each in model.parameters())
    before = _start_of_peak(device)
    _seconds(model, sample.batch, sample.batch_tokens, sample.num_beams)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    memory = {"peak_memory_bytes": float(weights + max(0, peak - before))}
    if is_engine:
        return memory if device.type == "cpu" else {}
    return memory | {"layer_flops": layer_flops(model, sample)}


def layer_flops(model: Any, sample: Sample) -> float:
    """Floating-point operations of all layers for the typical example, teacher-forced; the head is not counted."""
    last = model.get_input_embeddings().num_embeddings - 1
    source, reference = (
        torch.tensor([ids[:longest]], device=model.device).clamp(max=last)
        for ids, longest in zip(sample.typical, most_positions(model.config), strict=True)
    )
    counter = FlopCounterMode(display=False)
    # the MATH backend is made of matrix products, which the counter knows on every device
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        model(input_ids=source, labels=reference, use_cache=False)
    counts = counter.get_flop_counts()
    head = next((sum(each.values()) for name, each in counts.items() if name.endswith("lm_head")), 0)
    return float(counter.get_total_flops() - head)


def _start_of_peak(device: torch.device) -> int:
    """Begin to watch for a peak of memory; bytes in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set
    return _status("VmRSS")


def _status(name: str) -> int:
    """Bytes that the kernel gives under this name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def full_batch(sources: Sequence[list[int]], tokens_per_batch: int) -> list[list[int]]:
    """The longest examples that make one full batch."""
    longest = sorted(sources, key=len, reverse=True)
    return longest[: max(1, min(MAX_EXAMPLES_PER_BATCH, tokens_per_batch // len(longest[0])))]


def free_memory(device: torch.device) -> int:
    """Bytes of memory that nothing uses now, on the device that models are loaded to."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
