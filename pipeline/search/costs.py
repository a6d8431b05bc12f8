"""What an assembly costs, from the number of layers of each stack: layers, parameters, bytes, measured milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data_prep.publish import discard
from data_prep.reader import SplitReader
from data_prep.shards import read_manifest
from pipeline.assemble import Parts, stacks_of, write_checkpoint
from pipeline.config import Recipe
from pipeline.evaluation import Sample, costs
from pipeline.model import ModularModel
from pipeline.rundir import RunDir, Stage, digest_of, publish_sealed, read_sealed
from pipeline.spans import STACKS, Assembly, Cost, Shape, Stacks, Tiling, costs_of_sizes, shape_of


def costs_of(run: RunDir, model: ModularModel, timer: ShapeTimer | None) -> dict[str, Cost]:
    """Costs by name. Time is that of four corner shapes, fitted as a fixed part and a part for each layer."""
    encoder, decoder = (
        sum(parameter.numel() for parameter in model.teacher[stack][0].parameters()) for stack in STACKS
    )
    for stack, size in zip(STACKS, (encoder, decoder), strict=True):
        for leaf in (*model.teacher[stack], *model.modular[stack].values()):
            assert sum(parameter.numel() for parameter in leaf.parameters()) == size, (
                "layers of a stack are of one size"
            )
    fixed = sum(parameter.numel() for parameter in model.shared.parameters())
    parameters = Cost(fixed, encoder, decoder)
    weights = run.teacher_model / "model.safetensors"
    width = weights.stat().st_size / parameters.of(model.stacks.num_layers)
    found = costs_of_sizes(parameters, width)
    if timer is not None:
        found["ms"] = _fitted(timer.milliseconds(_corners(model.stacks)))
    return found


def _corners(stacks: Stacks) -> list[Shape]:
    """The teacher's shape, the coarsest, and either stack alone as short as it gets."""
    shapes = zip(stacks.num_layers, shape_of(stacks.coarsest()), strict=True)
    sides = [sorted({longest, shortest}) for longest, shortest in shapes]
    return [(encoder, decoder) for encoder in sides[0] for decoder in sides[1]]


def _fitted(milliseconds: dict[Shape, float]) -> Cost:
    matrix = np.array([(1, *shape) for shape in milliseconds], dtype=float)
    solution, *_ = np.linalg.lstsq(matrix, np.array(list(milliseconds.values())), rcond=None)
    return Cost(*(float(each) for each in solution))


class ShapeTimer:
    """Times shapes on this device as stage evaluate times systems: layers kept from the teacher, batch 1."""

    def __init__(self, recipe: Recipe, run: RunDir, stage: Stage, device: torch.device) -> None:
        self._recipe, self._run, self._device = recipe, run, device
        self._folder = stage.folder / "shapes"
        settings = recipe.evaluate
        made_of = [run.output_hash("data"), run.output_hash("teacher"), str(device)]
        self._made_of = [made_of, recipe.search.latency_examples, settings.max_new_tokens, settings.num_beams]
        if settings.dtype != "checkpoint":
            self._made_of.append(settings.dtype)

    def milliseconds(self, shapes: Sequence[Shape]) -> dict[Shape, float]:
        """Median latency of an example in ms, all in one go; a result published before is not taken again.

        Raises:
            ValueError: the device has no memory for a shape.
        """
        key = digest_of([*self._made_of, shapes])
        path = self._folder / f"times-{key[:12]}.json"
        record = read_sealed(path)
        if record is None:
            record = {"ms": [each["latency_ms"] for each in self._measure(shapes)]}
            publish_sealed(path, record)
        return dict(zip(shapes, record["ms"], strict=True))

    def _measure(self, shapes: Sequence[Shape]) -> list[dict[str, float]]:
        parts = Parts.of(self._run, library=False)
        totals = stacks_of(self._recipe, self._run).num_layers
        folders: dict[str, Path] = {}
        for shape in shapes:
            encoder, decoder = (
                Tiling((1,) * (n - 1) + (total - n + 1,)) for n, total in zip(shape, totals, strict=True)
            )
            folder = folders[str(shape)] = self._folder / f"{shape[0]}+{shape[1]}"
            write_checkpoint(parts, Assembly(encoder, decoder), folder, dropped=True)
        times = costs(folders, self._sample(), self._device, self._recipe.evaluate.dtype)
        for folder in folders.values():
            discard(folder)
        for shape in shapes:
            if str(shape) not in times:
                raise ValueError(
                    f"{shape[0]}+{shape[1]} layers do not fit into the memory of {self._device} to be timed: set "
                    "search.latency_examples to 0, or search on a larger device"
                )
        return [times[str(shape)] for shape in shapes]

    def _sample(self) -> Sample:
        """Validation examples, evenly spread; nothing is asked but latency, so the batch is the first of them."""
        reader = SplitReader(self._run.data, read_manifest(self._run.data), "validation")
        examples = reader.read(np.arange(len(reader)))
        count = min(self._recipe.search.latency_examples, len(examples))
        picked = [number * len(examples) // count for number in range(count)]
        sources = [examples.source_ids[slice(*examples.source_offsets[i : i + 2])].tolist() for i in picked]
        targets = [examples.target_ids[slice(*examples.target_offsets[i : i + 2])].tolist() for i in picked]
        settings = self._recipe.evaluate
        pairs = [(s, min(len(t), settings.max_new_tokens)) for s, t in zip(sources, targets, strict=True)]
        return Sample(pairs, sources[:1], 1, (sources[0], targets[0]), settings.num_beams)
