"""Every way through the pipeline that a GPU takes, on a fake one; run as a program, in a process of its own.

    python -m tests.fake_cuda.paths LIBRARY    # as tests.fake_cuda.device.build makes it

Prints JSON: for each path its launches and waits, and the error that ended it, if any.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.fake_cuda import device

if __name__ == "__main__":
    device.load(Path(sys.argv[1]))

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from pipeline.config import LossConfig
from pipeline.data import MicroBatch
from pipeline.decoding import Member, Pool, Rules, decode_together
from pipeline.families import FAMILIES, family_of
from pipeline.kernels import HeadObjective
from pipeline.model import Draws, GlobalCounts, ModularModel, Objectives, Wanted
from pipeline.search.losses import assembly_losses
from pipeline.spans import STACKS, Assembly, Span
from pipeline.training.clock import PhaseClock
from pipeline.training.engine import place_buffers
from pipeline.training.validation import Translation, Validator
from pipeline.training.whole_model import DistilledModel, full_model_task
from pipeline.world import World
from tests.fake_cuda.watch import DEVICE, Enough, Watch
from tests.tiny import tiny_model

DRAWS = tuple(map(Assembly.parse, ("e2-d2", "e2-d1x2", "e1x2-d2")))
COUNTS = GlobalCounts(num_target_tokens=21, num_micro_batches=1, upstream=2.0)
GRANULARITIES = ((2,), (2,))


class Models:
    """A teacher and its modular layers on the fake device, as the engine leaves them there.

    Args:
        kind: one of tests.tiny.KINDS.
    """

    def __init__(self, kind: str) -> None:
        self.family = family_of(kind if kind in FAMILIES else "t5")
        self.teacher = self._new(kind)
        self.modular = ModularModel(self._new(kind), self.family, GRANULARITIES, "first", share_memory=True)
        self.student = self._new(kind)
        for model in (self.teacher, self.student, self.modular):
            _buffers_stay_on_the_host(model)
            place_buffers(model, DEVICE, torch.bfloat16)

    def _new(self, kind: str) -> Any:
        torch.set_default_dtype(torch.bfloat16)
        try:
            # not .to(DEVICE): moved parameters are of another kind of fake tensor; and some are drawn by their values
            with DEVICE, no_init_weights():
                model = tiny_model(kind, num_layers=2, num_decoder_layers=2)
        finally:
            torch.set_default_dtype(torch.float32)
        self.family.prepare_for_training(model)
        return model


def _buffers_stay_on_the_host(model: nn.Module) -> None:
    """ZeRO-3 moves and casts parameters, not buffers."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.zeros(buffer.shape)


def batch_of() -> MicroBatch:
    source_BS = torch.ones(3, 12, dtype=torch.long, device=DEVICE)
    return _micro_batch(source_BS)


def _micro_batch(source_BS: torch.Tensor) -> MicroBatch:
    labels_BT = source_BS[:, :7].clone()
    places_N = torch.arange(labels_BT.numel(), device=labels_BT.device)
    return MicroBatch(0, np.arange(3), source_BS, source_BS.bool(), labels_BT, places_N)


def distillation(models: Models, draws: Draws, losses: LossConfig) -> None:
    """Forward, losses and backward of one micro-batch."""
    objectives = Objectives(losses)
    outputs = models.modular(batch_of(), draws, objectives.wanted(0, COUNTS))
    terms = objectives.local_terms if draws is None else objectives.replacing_terms
    (terms(0, outputs, COUNTS).total * COUNTS.upstream).backward()


def teacher(models: Models) -> None:
    task = full_model_task(models.teacher)
    task.loss_terms(0, task.module(batch_of()), COUNTS).total.backward()


def distilled(models: Models) -> None:
    module = DistilledModel(models.student, models.teacher)
    module(batch_of(), HeadObjective(task=1.0, logit=1.0)).head.share.backward()


def validation(models: Models) -> None:
    """Losses of two micro-batches, and one greedily decoded."""
    host = _micro_batch(torch.ones(3, 12, dtype=torch.long))
    wanted = Wanted(HeadObjective(task=1.0))
    world = World(0, 1, 0, DEVICE)
    validator = Validator(
        models.modular, world, None, PhaseClock(torch.device("cpu")),  # type: ignore[arg-type]
        args={"coarsest": (DRAWS[1:2], wanted)}, batches=[host, host], decoded=[host],
        translation=Translation({"coarsest": (DRAWS[1:2],)}, end_id=1, score=lambda outputs, references: 0.0),
    )  # fmt: skip
    validator.losses()
    validator.bleu()


def search(models: Models) -> None:
    assembly_losses(models.modular, models.family, batch_of(), DRAWS)


def decoding(models: Models, num_beams: int) -> None:
    """Some tokens of two members; without values nothing ends by itself."""
    model = models.modular
    layers: dict[str, dict[Span, nn.Module]] = {
        stack: {Span(i, i): leaf.layer for i, leaf in enumerate(model.teacher[stack])}
        | {span: model.modular[stack][str(span)].layer for span in model.stacks.spans_of(stack)}
        for stack in STACKS
    }
    pool = Pool(models.family, model.shared, layers, models.teacher, Path(), DEVICE)
    members = [Member(str(each), each.encoder.spans, each.decoder.spans) for each in DRAWS]
    rules = Rules(start_id=0, eos_ids=(1,), pad_id=0, max_new_tokens=5, num_beams=num_beams)
    decode_together(pool, members, [[4, 5, 1], [6, 1]], [[7, 1], [8, 9, 1]], rules)


def seen(path: Callable[[], None], most_waits: int = 10**9) -> dict[str, Any]:
    """What one way through the pipeline asks of the device."""
    watch, error = Watch(most_waits), None
    try:
        with watch:
            path()
    except Enough:
        pass
    except Exception as found:
        error = "".join(traceback.format_exception(found))[-4000:]
    return {"launches": watch.num_launches, "waits": dict(watch.waits), "error": error}


def all_paths(kind: str) -> dict[str, dict[str, Any]]:
    """By name what each path asks for."""
    found: dict[str, dict[str, Any]] = {}
    models = Models(kind)
    variants = {"fused": LossConfig(), "plain": LossConfig(fused=False)}
    if models.family.has_attention_losses:
        variants["attention"] = LossConfig(attention_self=0.5, attention_cross=0.5)
    for name, losses in variants.items():
        found[f"local, {name}"] = seen(partial(distillation, models, None, losses))
        found[f"replacing, {name}"] = seen(partial(distillation, models, DRAWS, losses))
    for path in (teacher, distilled, search, validation):
        found[path.__name__] = seen(partial(path, models))
    for num_beams in (1, 2):
        found[f"decoding, {num_beams} beams"] = seen(partial(decoding, models, num_beams), most_waits=40)
    return found


if __name__ == "__main__":
    with FakeTensorMode():
        print(json.dumps(all_paths(sys.argv[2])))
