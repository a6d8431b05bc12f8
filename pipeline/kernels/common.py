"""What all losses share."""

from __future__ import annotations

import torch
from torch import Tensor

USED_UP = "the fused loss makes its gradient once, in forward: call it again to run backward again"


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
