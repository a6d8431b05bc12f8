"""Set-up of all tests. Triton must know of its interpreter before anything imports it, and transformers does."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("no deadline", deadline=None)  # how long an example takes says nothing here
hypothesis.settings.load_profile("no deadline")

# Files that take longest, longest first: several processes (pytest -n 2 --dist loadfile) begin with them, so that none
# is left over at the end while the others have nothing to do. Those that compute alternate with those that wait.
LONGEST_FIRST = (
    "end_to_end/test_road.py", "slurm/test_scripts.py", "distributed/test_training.py", "slurm/test_submit.py",
    "slurm/test_chain.py", "distributed/test_engine.py", "end_to_end/test_evaluate.py", "distributed/test_stopping.py",
    "distributed/test_checkpoint.py", "distributed/test_data_build.py", "end_to_end/test_readme.py",
    "kernels/test_resources.py", "end_to_end/test_mistakes.py", "kernels/test_hidden_loss.py",
)  # fmt: skip
PLACE = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
assert all(path.is_file() for path in PLACE), "a file was renamed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: PLACE.get(item.path, len(PLACE)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped, in one line a reason."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
