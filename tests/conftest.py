"""Set-up of all tests. Triton must know of its interpreter before anything imports it, and transformers does."""

from __future__ import annotations

import os

import hypothesis
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("no deadline", deadline=None)  # how long an example takes says nothing here
hypothesis.settings.load_profile("no deadline")
