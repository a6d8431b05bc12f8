"""The paths of the hidden-state loss as test parameters."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from pipeline.kernels.hidden import cpu, reference

HAS_CUDA = torch.cuda.is_available()

# (path, device). The fused kernel runs on the GPU where there is one, in the interpreter where there is none.
PATHS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("fused", "cpu"), id="interpreter", marks=pytest.mark.skipif(HAS_CUDA, reason="compiled here")),
    pytest.param(
        ("reference", "cuda"),
        id="reference-cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")],
    ),
    pytest.param(
        ("fused", "cuda"),
        id="fused-cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")],
    ),
]


def module_of(path: str) -> ModuleType:
    if path != "fused":
        return {"reference": reference, "cpu": cpu}[path]
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    if not HAS_CUDA and isinstance(tl.sum, JITFunction):
        pytest.fail("triton was imported before tests/kernels/conftest.py; set TRITON_INTERPRET=1 for this run")
    from pipeline.kernels.hidden import gpu

    return gpu
