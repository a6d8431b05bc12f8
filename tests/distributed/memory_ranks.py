"""What the ranks of test_engine.py run: what an engine holds, and what is left of it."""

from __future__ import annotations

import gc
import weakref

from tests.distributed.engine_ranks import Run


def left_after_closing(ds_config: str) -> list[str]:
    """What of a model and its optimizer is still in memory when an engine is closed and the model is let go."""
    run = Run(2, ds_config)
    run.step(0)
    state = run.engine._adamw.state
    tensors = {"fp32 weights": run.engine._partition.flats[0], "moments": next(iter(state.values()))["exp_avg"]}
    found = {name: weakref.ref(each) for name, each in {**tensors, "model": run.task.module}.items()}
    run.engine.close()
    world = run.world
    del run, state, tensors
    gc.collect()
    world.close()
    return [name for name, each in found.items() if each() is not None]


def kept_by_name(ds_config: str) -> int:
    """Parameters that stage 3 gathers for all of a forward because somebody has read them outside of their module."""
    run = Run(2, ds_config)
    run.step(0)
    found = sum(len(getattr(module, "_external_params", {})) for module in run.engine._engine.module.modules())
    run.world.close()
    return found


def room_for_a_gradient(ds_config: str) -> tuple[int, int]:
    """(elements of stage 2's buffer, of the largest gradient that goes through it)."""
    run = Run(2, ds_config)
    largest = max(each.numel() for each in run.task.module.parameters() if each.requires_grad)
    found = run.engine._engine.optimizer.reduce_bucket_size, largest
    run.world.close()
    return found
