"""torch.compile for the layers, where it works; where it does not, they run as they are."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pipeline.model.leaves import CallLayer, ModularLeaf, TeacherLeaf
from pipeline.model.modular import ModularModel
from pipeline.spans import STACKS

NUM_GRAPHS = 64
"""Most graphs of the compiled function. Each kind of layer has one for the teacher's pass, one for that of students
through teacher layers and one for modular layers, and more for sizes of 1."""


def compile_layers(model: ModularModel, everywhere: Callable[[bool], bool], backend: str = "inductor") -> str:
    """Have the layers called through one function that torch compiles for batches and lengths of any size. Collective.

    Args:
        model: where it trains.
        everywhere: whether something is so on all ranks: the layers of all are compiled or none's.

    Returns:
        What became of it, in one line.
    """
    started_at, reason = time.monotonic(), ""
    call_layer = torch.compile(model.family.call_layer, dynamic=True, backend=backend)
    torch._dynamo.config.recompile_limit = NUM_GRAPHS
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        reason = "not under ZeRO-3, where weights come and go"
    else:
        try:
            _try(model, call_layer)
        except Exception as error:  # of compilers, of any kind
            cause = getattr(error, "inner_exception", error)
            reason = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
    if not everywhere(not reason):
        return f"layers are not compiled: {reason or 'another rank cannot'}"
    for leaf in model.modules():
        if isinstance(leaf, (TeacherLeaf, ModularLeaf)):
            leaf.compiled = call_layer
    return f"layers are compiled by {backend}, the first of each stack in {time.monotonic() - started_at:.0f} s"


def _try(model: ModularModel, call_layer: CallLayer) -> None:
    """Forward and backward through a layer of each stack, without a gradient for any weight."""
    mask_BL = torch.ones(2, 5, dtype=torch.bool, device=next(model.parameters()).device)
    start_BLD = model.shared.embed("encoder", mask_BL.long()).detach().requires_grad_()
    state_BLD = None
    for stack, masks in zip(STACKS, ([mask_BL], [mask_BL, mask_BL]), strict=True):
        inputs = model.shared.inputs(stack, *masks)
        state_BLD = call_layer(model.teacher[stack][0].layer, start_BLD, state_BLD, inputs)
    assert state_BLD is not None
    torch.autograd.grad(state_BLD.sum(), start_BLD)
