"""Fused losses. `hidden_loss` takes the fastest path for the device; `reference` is the definition of all paths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from pipeline.kernels import hidden_cpu, reference
from pipeline.kernels.reference import HiddenPair, Mode

__all__ = ["HiddenPair", "Mode", "hidden_loss"]


def hidden_loss(pairs: Sequence[HiddenPair], mode: Mode) -> Tensor:
    """Normalised hidden-state loss of each pair, fp32 [P]; the contract is `reference.hidden_loss`.

    CUDA: all pairs in two launches forward and one backward (needs triton; without it the eager definition).
    CPU: plain PyTorch with fewer passes than the definition.
    """
    device = pairs[0].student_BTD.device.type if pairs else "cpu"
    if device == "cuda" and _has_triton():
        from pipeline.kernels import hidden_triton  # late: importing triton takes a second, and a CPU has no use for it

        return hidden_triton.hidden_loss(pairs, mode)
    return (hidden_cpu if device == "cpu" else reference).hidden_loss(pairs, mode)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
