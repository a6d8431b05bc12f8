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
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from pipeline.kernels import hidden_triton
from pipeline.kernels.reference import MIN_DENOMINATOR

ARCHITECTURES = (80, 90)
DTYPES = (tl.bfloat16, tl.float16, tl.float32)


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """(name, kernel, types of the run-time arguments, compile-time arguments) at D = 1024 and 4096."""
    for dtype in DTYPES:
        for chunks in (1, 4):
            tile = {
                "S_DTYPE": dtype,
                "T_DTYPE": dtype,
                "ALIGNED": True,
                "ROWS": hidden_triton.TILE_ELEMENTS // hidden_triton.MAX_COLS,
                "COLS": hidden_triton.MAX_COLS,
                "CHUNKS": chunks,
            }
            suffix = f"{dtype} d{chunks * hidden_triton.MAX_COLS}"
            sums = {"table": "*i64", "partials": "*fp32", "num_pairs": "i32", "num_blocks": "i32"}
            for span in (False, True):
                name = f"partials {'span' if span else 'mse'} {suffix}"
                yield name, hidden_triton.partials_kernel, sums, {"SPAN": span, **tile}
            scales = {"table": "*i64", "grad_P": "*fp32", "grad_stride": "i32", "scale_P": "*fp32", "num_pairs": "i32"}
            yield f"gradient {suffix}", hidden_triton.gradient_kernel, scales, tile
    sums = {"partials": "*fp32", "loss_P": "*fp32", "scale_P": "*fp32", "num_pairs": "i32", "num_blocks": "i32"}
    yield "reduce", hidden_triton.reduce_kernel, sums, {"EPS": MIN_DENOMINATOR, "LANES": hidden_triton.REDUCE_LANES}


def measure(kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int) -> dict[str, int]:
    """Compile one kernel for sm_<architecture>. Raises RuntimeError with the words of ptxas when it refuses."""
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": hidden_triton.NUM_WARPS}
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
    for name, kernel, types, constants in variants():
        for architecture in ARCHITECTURES:
            figures = measure(kernel, types, constants, architecture)
            print(json.dumps({"kernel": name, "sm": architecture, **figures}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
