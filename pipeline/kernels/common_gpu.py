"""What the kernels of all losses share: dtypes, registers, tables, and the launch that rescales gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 4096  # ROWS x COLS: 32 elements a thread and input with 4 warps, more warps where rows are longer
ALIGNMENT = 16  # bytes of one vector load; strides and D must be multiples of as many elements
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def max_registers(num_warps: int) -> int:
    """Registers that a thread may take: by itself ptxas spills a few values for the next step of occupancy."""
    return min(160, 65_536 // (32 * num_warps))  # a multiprocessor has 65,536


def to_device(lines: list[list[int]], device: torch.device) -> Tensor:
    # From pinned memory the copy is queued like a kernel; from pageable memory the host would wait for it.
    return torch.tensor(lines, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def rescale(gradients: Sequence[Tensor | None], grad_P: Tensor, upstream: float) -> None:
    """Multiply contiguous gradients, made for `upstream`, in place by grad_P / upstream; one launch for all of them,
    which reads nothing where the factor is 1."""
    lines = [[gradient.data_ptr(), gradient.numel()] if gradient is not None else [0, 0] for gradient in gradients]
    num_blocks = triton.cdiv(max(line[1] for line in lines), TILE_ELEMENTS)
    aligned = not any(value % ALIGNMENT for line in lines for value in line)
    dtype = next(gradient.dtype for gradient in gradients if gradient is not None)
    with torch.cuda.device_of(grad_P):
        rescale_kernel[(len(lines) * num_blocks,)](
            to_device(lines, grad_P.device), grad_P, grad_P.stride(0), upstream, len(lines),
            DTYPE=TRITON_DTYPES[dtype], ALIGNED=aligned, ROWS=4, COLS=TILE_ELEMENTS // 4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["grad_stride", "num_pairs"])
def rescale_kernel(
    table: tl.tensor,
    grad_P: tl.tensor,
    grad_stride: tl.tensor,
    upstream: tl.tensor,
    num_pairs: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """gradient *= grad / upstream, where that is not 1. The table has (address, elements) of each gradient."""
    pair = tl.program_id(0) % num_pairs
    block = tl.program_id(0) // num_pairs
    factor = tl.load(grad_P + pair * grad_stride) / upstream  # grad_P is often one expanded scalar (stride 0)
    if factor != 1.0:
        num_elements = tl.load(table + pair * 2 + 1)
        first = (block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]) * COLS
        rows = tl.load(table + pair * 2).to(tl.pointer_type(DTYPE)) + first
        if ALIGNED:
            num_elements = tl.multiple_of(num_elements, 16)
            rows = tl.multiple_of(rows, [16, 16])
        col = tl.arange(0, COLS)[None, :]
        keep = first + col < num_elements
        value = tl.load(rows + col, mask=keep, other=0.0).to(tl.float32)
        tl.store(rows + col, (value * factor).to(DTYPE), mask=keep)
