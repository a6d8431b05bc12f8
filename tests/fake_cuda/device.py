"""A CUDA device that computes nothing, for a torch that was built without CUDA.

With it fake tensors run forward and backward on "cuda:0": shapes, dtypes and devices are checked as on a GPU, and no
value is ever there. Import this module before torch.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def build(library: Path) -> None:
    """Compile the device, which takes seconds.

    Raises:
        subprocess.CalledProcessError: the compiler refuses it.
    """
    torch = _torch()
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", str(SOURCE), "-o", str(library)]
    subprocess.run([*command, f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-lc10", "-ltorch_cpu"], check=True)


def load(library: Path) -> None:
    """Make the device known to this process."""
    assert "torch" not in sys.modules, "torch asks for its hooks once, when it is imported"
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are to be launched, not interpreted
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
