"""The traps of ZeRO that the engine steps around: the same training with one of its fixes taken out again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

import pipeline.training.engine
from pipeline.config.recipe import LossConfig
from pipeline.model.leaves import ModularLeaf
from pipeline.training.engine import join_world
from tests.distributed.engine_ranks import Run, in_fp32, reference, settings_of, sgd

# gradients far above 1, which nothing clips
SETTINGS = settings_of(8, 2)
SETTINGS = dataclasses.replace(
    SETTINGS,
    losses=LossConfig(hidden=100.0, logit=100.0, task=100.0),
    optim=dataclasses.replace(SETTINGS.optim, learning_rate=1e-5, max_grad_norm=1e9),
)


def _leaves_are_no_leaves() -> Any:
    return mock.patch("pipeline.training.engine.set_z3_leaf_modules")


def _initialize_without(key: str) -> Any:
    """DeepSpeed's default instead of what the engine sets."""
    initialize = pipeline.training.engine.deepspeed.initialize

    def without(config: dict[str, Any], **others: Any) -> Any:
        return initialize(config={k: v for k, v in config.items() if k != key}, **others)

    return mock.patch("pipeline.training.engine.deepspeed.initialize", without)


@contextlib.contextmanager
def _unused_leaves_are_not_called() -> Iterator[None]:
    def modular(self: ModularLeaf, state: torch.Tensor, encoded: Any, use: bool, *others: Any) -> Any:
        return nn.Module.__call__(self, state, encoded, use, *others) if use else state

    with mock.patch.object(ModularLeaf, "__call__", modular):
        yield


@contextlib.contextmanager
def _states_are_keywords() -> Iterator[None]:
    def modular(self: ModularLeaf, state: torch.Tensor, encoded: Any, use: bool, *others: Any) -> Any:
        rest = dict(zip(("inputs", "capture"), others, strict=True))
        return nn.Module.__call__(self, state_BLD=state, encoded_BSD=encoded, use=use, **rest)

    with mock.patch.object(ModularLeaf, "__call__", modular):
        yield


@contextlib.contextmanager
def _states_require_no_grad() -> Iterator[None]:
    class Torch:
        def __getattr__(self, name: str) -> Any:
            return (lambda: False) if name == "is_grad_enabled" else getattr(torch, name)

    with mock.patch("pipeline.model.streams.torch", Torch()):
        yield


def _gradients_come_in_any_order() -> Any:
    return mock.patch("pipeline.training.partitions._reduce_leaf_by_leaf")


def _ranks_are_averaged() -> Any:
    def backward(self: Any, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        self._last_of_step = True

    return mock.patch("pipeline.training.engine.Engine.backward", backward)


TRAPS: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "leaves are no leaves": _leaves_are_no_leaves,
    "DeepSpeed clips by default": lambda: _initialize_without("gradient_clipping"),
    "gradients accumulate in bf16": lambda: _initialize_without("data_types"),
    "unused leaves are not called": _unused_leaves_are_not_called,
    "states are keywords": _states_are_keywords,
    "states require no grad": _states_require_no_grad,
    "gradients come in any order": _gradients_come_in_any_order,
    "ranks are averaged": _ranks_are_averaged,
}


def trained(folder: str, trap: str, ds_config: str) -> dict[str, Any]:
    """Largest difference of a weight from plain PyTorch in terms of the largest that a weight moved, and how often
    DeepSpeed found its trace of leaves wrong; with `ds_config` as it is where it is bf16, else in fp32."""
    world = join_world()
    path = ds_config if ds_config == "zero3" else in_fp32(ds_config, folder)
    with TRAPS[trap](), mock.patch("torch.optim.AdamW", sgd):
        run = Run(world.size, path, settings=SETTINGS, world=world)
        before = run.weights()
        invalidated = _count_invalidations(run)
        for step in range(SETTINGS.optim.num_steps):
            run.step(step)
    weights = run.weights()
    world.close()
    if not world.is_main:
        return {}
    _, expected = reference(world.size, SETTINGS, sgd)
    moved = max((expected[name] - before[name]).abs().max() for name in expected)
    error = max((weights[name] - expected[name]).abs().max() for name in expected)
    return {"error": (error / moved).item(), "invalidated": len(invalidated)}


def _count_invalidations(run: Run) -> list[None]:
    found: list[None] = []
    offload = getattr(run.engine._engine.optimizer, "parameter_offload", None)
    if offload is not None:
        coordinator = offload.param_coordinator
        invalidate = coordinator._invalidate_trace
        coordinator._invalidate_trace = lambda: (found.append(None), invalidate())
    return found
