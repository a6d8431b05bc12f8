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
    started_at, reason = time.monotonic(), _obstacle(model)
    if not reason:
        try:
            torch._dynamo.config.recompile_limit, torch._dynamo.config.suppress_errors = NUM_GRAPHS, False
            call_layer = torch.compile(model.family.call_layer, dynamic=True, backend=backend)
            _try(model, call_layer)
        except Exception as error:  # of compilers, of any kind
            cause = getattr(error, "inner_exception", error)
            reason = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
    if not everywhere(not reason):
        return f"layers are not compiled: {reason or 'another rank cannot'}"
    torch._dynamo.config.suppress_errors = True  # what was not tried and cannot be compiled runs as it is
    for leaf in model.modules():
        if isinstance(leaf, (TeacherLeaf, ModularLeaf)):
            leaf.compiled = call_layer
    return f"layers are compiled by {backend}, the first of each stack in {time.monotonic() - started_at:.0f} s"


def _obstacle(model: ModularModel) -> str:
    """Why there is no need to try; empty where there is."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "not under ZeRO-3, where weights come and go"
    if any(leaf.recompute for leaf in model.modules() if isinstance(leaf, ModularLeaf)):
        return "not with recompute_activations, which makes a function of its own of each"
    return ""


def _try(model: ModularModel, call_layer: CallLayer) -> None:
    """Forward and backward through a teacher layer and a modular one of each stack, whose weights get no gradient."""
    mask_BL = torch.ones(2, 5, dtype=torch.bool, device=next(model.parameters()).device)
    start_BLD = model.shared.embed("encoder", mask_BL.long()).detach().requires_grad_()
    encoded_BLD = None
    for stack, masks in zip(STACKS, ([mask_BL], [mask_BL, mask_BL]), strict=True):
        inputs = model.shared.inputs(stack, *masks)
        for leaf in (model.teacher[stack][0], *list(model.modular[stack].values())[:1]):
            state_BLD = call_layer(leaf.layer, start_BLD, encoded_BLD, inputs)
            trained = [parameter for parameter in leaf.parameters() if parameter.requires_grad]
            torch.autograd.grad(state_BLD.sum(), [start_BLD, *trained], allow_unused=True)
        encoded_BLD = state_BLD.detach().requires_grad_()
