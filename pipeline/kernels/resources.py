"""Registers, spills, shared memory and widest load of every kernel, compiled ahead of time: no GPU needed.

    python -m pipeline.kernels.resources            one line of JSON a kernel, dtype and architecture

Uses the ptxas that comes with triton. Must run without TRITON_INTERPRET, under which nothing is compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from pipeline.kernels import common_gpu
from pipeline.kernels.attention import gpu as attention_gpu
from pipeline.kernels.head import gpu as head_gpu
from pipeline.kernels.hidden import gpu as hidden_gpu
from pipeline.kernels.hidden.reference import MIN_DENOMINATOR, MIN_NORM

ARCHITECTURES = (80, 90)
POINTERS = {tl.bfloat16: "*bf16", tl.float16: "*fp16", tl.float32: "*fp32"}


class Variant(NamedTuple):
    """One kernel as it is compiled: the types of its run-time and the values of its compile-time arguments."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    aligned: tuple[str, ...] = ()
    """Arguments that are multiples of 16, which a launch would find out."""
    max_registers: int | None = None
    """Of a thread; None: common_gpu.max_registers."""


def variants() -> Iterator[Variant]:
    """Hidden-state kernels at D = 1024 and 4096, the row kernel of the head in every form that changes its code,
    the attention kernels with heads of 64 and 128 channels."""
    for dtype in POINTERS:
        for cols in (1024, 4096) if dtype != tl.float16 else (4096,):  # alike to bf16; the widest is the tightest
            tile = {
                "T_DTYPE": dtype,
                "ALIGNED": True,
                "TILES": hidden_gpu.TILES,
                "ROWS": (rows := hidden_gpu.rows_of_tile(cols)),
                "COLS": cols,
            }
            sums = {"table": "*i64", "partials": "*fp32", "num_pairs": "i32", "num_blocks": "i32"}
            suffix, num_warps = f"{dtype} d{cols}", rows * cols // 1024
            yield Variant(f"change {suffix}", hidden_gpu.change_kernel, sums, tile, num_warps)
            tile |= {"S_DTYPE": dtype, "EPS": MIN_DENOMINATOR, "NORM_EPS": MIN_NORM, "LANES": hidden_gpu.LANES}
            for mode in ("mse", "span", "cosine"):
                types = {**sums, "scale": "fp32"}
                yield Variant(f"loss {mode} {suffix}", hidden_gpu.loss_kernel, types, {"MODE": mode, **tile}, num_warps)
        types = {"table": "*i64", "grad_P": "*fp32", "grad_stride": "i32", "upstream": "fp32", "num_pairs": "i32"}
        constants = {"DTYPE": dtype, "ALIGNED": True, "ROWS": 4, "COLS": common_gpu.TILE_ELEMENTS // 4}
        yield Variant(f"rescale {dtype}", common_gpu.rescale_kernel, types, constants)
        if dtype != tl.float16:
            yield from _head_variants(dtype)
    for dtype, width in ((tl.bfloat16, 64), (tl.bfloat16, 128), (tl.float32, 64)):
        yield from _attention_variants(dtype, width)
    types = {"partials": "*fp32", "share_P": "*fp32", "loss_P": "*fp32", "num_pairs": "i32", "num_blocks": "i32"}
    constants = {"EPS": MIN_DENOMINATOR, "LANES": hidden_gpu.LANES}
    yield Variant("reduce", hidden_gpu.reduce_kernel, {**types, "weight": "fp32"}, constants)


def _attention_variants(dtype: Any, width: int) -> Iterator[Variant]:
    """With everything that takes registers: bias, causal mask, gradient."""
    pointer, size = POINTERS[dtype], dtype.primitive_bitwidth // 8
    states = dict.fromkeys(("s_query", "s_key", "t_query", "t_key", "bias_HR"), pointer)
    masks = {"query_mask": "*i32", "key_mask": "*i32", "num_counted": "*i64", "logs": "*fp32"}
    sizes = dict.fromkeys(("num_queries", "num_keys", "num_heads", "width"), "i32")
    types = {**states, **masks, "scale": "fp32", "pull": "fp32", **sizes, "gradient": pointer}
    constants = {
        "WITH_BIAS": True,
        "CAUSAL": True,
        "BLOCK": attention_gpu.BLOCK[size],
        "STEP": attention_gpu.STEP[size],
        "WIDTH": width,
        "S_DOT": dtype,
        "T_DOT": dtype,
    }
    aligned = (*states, "logs", "num_heads", "width", "gradient")
    warps = attention_gpu.num_warps(width)
    name, kernel = f"attention keys {dtype} k{width}", attention_gpu.keys_kernel
    of_keys = Variant(name, kernel, types, constants, warps, aligned, max_registers=attention_gpu.MAX_REGISTERS)
    yield of_keys
    yield of_keys._replace(
        name=f"attention queries {dtype} k{width}",
        kernel=attention_gpu.queries_kernel,
        types={**types, "partials": "*fp32"},
        constants={**constants, "WITH_GRADIENT": True},
    )


def _head_variants(dtype: Any) -> Iterator[Variant]:
    pointer = POINTERS[dtype]
    types = {
        "student_MV": pointer, "teacher_MV": pointer, "labels_M": "*i64", "task_M": "*fp32", "logit_M": "*fp32",
        "row_stride": "i32", "vocabulary": "i32", "task": "fp32", "pull": "fp32", "inverse_temperature": "fp32",
    }  # fmt: skip
    for tempered in (False, True):
        for reverse in (False, True):
            constants = {
                "WITH_TEACHER": True,
                "TEMPERED": tempered,
                "REVERSE": reverse,
                "WITH_GRADIENT": True,
                "BLOCK": head_gpu.BLOCK,
            }
            name = f"head {dtype}{' tempered' * tempered}{' reverse' * reverse}"
            aligned = ("student_MV", "teacher_MV", "row_stride")
            yield Variant(name, head_gpu.rows_kernel, types, constants, head_gpu.NUM_WARPS, aligned)


def measure(variant: Variant, architecture: int) -> dict[str, int]:
    """Compile one kernel for sm_<architecture>. Raises RuntimeError with the words of ptxas when it refuses."""
    signature = variant.types | dict.fromkeys(variant.constants, "constexpr")
    names = variant.kernel.arg_names
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=divisible)
    most = variant.max_registers or common_gpu.max_registers(variant.num_warps)
    options = {"num_warps": variant.num_warps, "maxnreg": most}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx)
        assert target
        command = [get_ptxas(architecture).path, "-v", f"-arch={target[1]}", str(path), "-o", f"{path}.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ptxas refused the kernel for sm_{architecture}: {result.stderr.strip()}")
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return {
        "registers": _number(r"Used (\d+) registers", result.stderr),
        "spill_bytes": _number(r"(\d+) bytes spill stores", result.stderr)
        + _number(r"(\d+) bytes spill loads", result.stderr),
        "shared_bytes": compiled.metadata.shared,
        "widest_load_bytes": max((int(count or 1) * int(bits) // 8 for count, bits in loads), default=0),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"ptxas said nothing like {pattern!r}: {text}"
    return int(found[1])


def main() -> int:
    if triton.knobs.runtime.interpret:
        print("nothing is compiled in the interpreter; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    for variant in variants():
        for architecture in ARCHITECTURES:
            figures = measure(variant, architecture)
            print(json.dumps({"kernel": variant.name, "sm": architecture, **figures}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
