"""Layer calls and time of losses of many assemblies: one tree of common prefixes against one assembly at a time.

A random 24+24 model of small width; calls are counted in the run and compared with the distinct prefixes by arithmetic.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.bench import Measure, report
from pipeline.config.recipe import DistillConfig
from pipeline.data import MicroBatch
from pipeline.families import family_of
from pipeline.families.t5 import new_t5
from pipeline.model.draws import Sampler
from pipeline.model.modular import ModularModel
from pipeline.search.losses import LayerCalls, assembly_losses
from pipeline.search.stage import best_by_size, single
from pipeline.spans.paths import path_of
from pipeline.spans.prefixes import count_layers, count_prefixes
from pipeline.spans.spans import PRESETS, Assembly

DEPTH = (24, 24)
RATIOS = (1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
NUM_DRAWS = 50
CANDIDATES_PER_SIZE = 4
SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "dropout": 0.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", type=Path, metavar="DIR", help="also write the table to a file in this folder")


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    teacher = new_t5(256, {**SIZES, "num_layers": DEPTH[0], "num_decoder_layers": DEPTH[1]}, seed=0).eval()
    model = ModularModel(teacher, family_of("t5"), ((2, 3, 6), (2, 3, 6)), "last")
    for parameter in model.modular.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    batch = random_batch()
    measures = []
    for name, assemblies in sets_of(model, batch).items():
        measures += compare(name, model, batch, assemblies)
    notes = f"24+24 layers, d_model 64, {len(batch.labels_BT)} examples of {batch.labels_BT.shape[1]} tokens"
    report("search", measures, notes, arguments.write)


def random_batch() -> MicroBatch:
    source_BS, labels_BT = torch.randint(2, 256, (8, 24)), torch.randint(2, 256, (8, 24))
    return MicroBatch(0, np.arange(8), source_BS, torch.ones_like(source_BS, dtype=torch.bool), labels_BT)


def sets_of(model: ModularModel, batch: MicroBatch) -> dict[str, list[Assembly]]:
    """The assemblies of the presets, uniform draws, and what a search on this model measures after scoring spans."""
    stacks, teacher = model.stacks, model.stacks.teacher()
    presets = {stacks.preset(preset, ratio) for preset in PRESETS for ratio in RATIOS}
    sampler = Sampler(DistillConfig(sampler="uniform"), seed=0, stacks=stacks)
    singles = {(stack, span): single(stack, span, teacher) for stack, _, spans in stacks for span in spans}
    losses = dict(
        zip(
            (teacher, *singles.values()),
            assembly_losses(model, family_of("t5"), batch, [teacher, *singles.values()]).tolist(),
            strict=True,
        )
    )
    scores = {s: {span: losses[singles[s, span]] - losses[teacher] for span in spans} for s, _, spans in stacks}
    candidates = best_by_size(CANDIDATES_PER_SIZE, stacks, scores, {}, ())
    return {
        "presets": sorted(presets, key=str),
        "50 uniform draws": [sampler.draw(400 + i, 0) for i in range(NUM_DRAWS)],
        "spans one at a time": list(singles.values()),
        "the search's candidates": list(dict.fromkeys(candidates)),
    }


def compare(name: str, model: ModularModel, batch: MicroBatch, assemblies: Sequence[Assembly]) -> list[Measure]:
    family, paths = family_of("t5"), [path_of(each) for each in assemblies]
    calls = LayerCalls()
    begin = time.perf_counter()
    together = assembly_losses(model, family, batch, assemblies, calls)
    together_s = time.perf_counter() - begin
    begin = time.perf_counter()
    alone = torch.cat([assembly_losses(model, family, batch, [each]) for each in assemblies])
    alone_s = time.perf_counter() - begin
    assert torch.equal(together, alone), "the tree changes no loss"
    counted, prefixes = calls.encoder + calls.decoder, count_prefixes(paths)
    assert counted == prefixes, (counted, prefixes)
    label, one_by_one = f"{name} ({len(assemblies)})", "one by one"
    return [
        Measure("search", f"layer calls, {label}", counted, count_layers(paths), one_by_one, "calls", prefixes),
        Measure(
            "search", f"time, {label}", together_s, alone_s, one_by_one, "s", alone_s * prefixes / count_layers(paths)
        ),
    ]
