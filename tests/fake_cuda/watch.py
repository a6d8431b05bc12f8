"""What a GPU would be asked to do: operations queued, and whatever makes the host wait for it.

Values are not there. What is read of one is a guess, and a mask as an index finds all places: so counts are of one way
through code that branches on values.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

DEVICE = torch.device("cuda", 0)
PIPELINE = Path(__file__).resolve().parents[2] / "pipeline"
BY_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh")


class Enough(Exception):
    """A loop that goes by values has waited as often as it was to."""


class Watch(TorchDispatchMode):
    """Counts what is done within it, on fake tensors.

    Args:
        most_waits: raise `Enough` at the next one.
    """

    def __init__(self, most_waits: int = 10**9) -> None:
        super().__init__()
        self._most_waits = most_waits
        self.num_launches = 0
        """Operations on the device, each as one launch, and Triton kernels."""
        self.waits: Counter[str] = Counter()
        """How often the host waits, by what for and where."""
        self._pinned: dict[int, torch.UntypedStorage] = {}  # held: an address is not to be used again

    def __enter__(self) -> Watch:
        self._patches = ExitStack()
        for owner, name, new in (
            (FakeTensor, "tolist", lambda tensor: self._tolist(tensor)),
            (FakeTensor, "data_ptr", lambda tensor: 0),
            (JITFunction, "run", lambda kernel, *args, **kwargs: self._launch()),
            (torch.cuda, "_exchange_device", lambda index: 0),
            (torch.cuda, "_maybe_exchange_device", lambda index: 0),
        ):
            self._patches.enter_context(patch.object(owner, name, new))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        on_device = any(each.device == DEVICE for each in _tensors((args, kwargs)))
        if on_device and name == "nonzero":
            self._wait("nonzero")
            return _everywhere(args[0])
        if on_device and name in (
            "_local_scalar_dense",
            "item",
        ):  # in inference mode operations come as they are called
            self._wait("value")
            return 1
        if on_device and name in BY_INDEX:
            args = (args[0], self._indices(args[1]), *args[2:])
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        with _disable_current_modes():  # what is lifted is a real tensor yet
            was_pinned = name == "lift_fresh" and args[0].is_pinned()
        out = func(*args, **kwargs)
        if name == "lift_fresh":
            out.constant = None  # operations on a value that is known would run, and there is no device
        if was_pinned or kwargs.get("pin_memory"):
            self._pin(out)
        if name in ("_to_copy", "to", "copy_"):
            self._copied(*((args[1], args[0]) if name == "copy_" else (args[0], out)), kwargs, args)
        if not func.is_view and name not in NO_LAUNCH and any(each.device == DEVICE for each in _tensors(out)):
            self._launch()
        return out

    def _indices(self, indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """What indices become on the device: a mask is searched for its places."""
        found: list[torch.Tensor | None] = []
        for index in indices:
            if index is not None and index.device != DEVICE and index.dim():
                self._wait("index from the host")
                index = torch.empty_like(index, device=DEVICE)
            if index is not None and index.dtype == torch.bool:
                self._wait("mask as an index")
                found += _everywhere(index).unbind(1)
            else:
                found.append(index)
        return found

    def _copied(self, source: torch.Tensor, target: torch.Tensor, kwargs: Any, args: Any) -> None:
        if source.device == target.device:
            return
        host, way = (source, "to") if target.device == DEVICE else (target, "from")
        queued = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if not queued or host.untyped_storage()._cdata not in self._pinned:
            self._wait(f"copy {way} the device")

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage
        return tensor

    def _tolist(self, tensor: torch.Tensor) -> Any:
        if tensor.device == DEVICE:
            self._wait("list")
        value: Any = 1.0 if tensor.is_floating_point() else 1
        for size in reversed(tensor.shape):
            value = [value] * size
        return value

    def _launch(self) -> None:
        self.num_launches += 1

    def _wait(self, what: str) -> None:
        self.waits[f"{what}, {_place()}"] += 1
        if self.waits.total() > self._most_waits:
            raise Enough


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def _everywhere(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.numel(), mask.dim(), dtype=torch.long, device=DEVICE)


def _place() -> str:
    """The innermost function of the pipeline that is being run."""
    frame: Any = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PIPELINE in path.parents:
            return f"{path.relative_to(PIPELINE)} {frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"
