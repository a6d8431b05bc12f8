"""Distil one encoder-decoder teacher into modular layers, then assemble checkpoints of any size.

Imports go one way (tests/unit/test_imports.py holds it):
arithmetic < formats < pieces < machinery < programs; design and vocabulary are in README.md.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch, from its first tensor on: large ones on huge pages
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
    # lengths differ from batch to batch: segments that grow leave no gaps on a GPU
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import data_prep  # refuses an old Python
