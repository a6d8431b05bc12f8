"""Run a function of a test module on real ranks, and have what it returns: forked processes, a real process group."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tests import forks
from tests.patience import PATIENCE_S


def run_ranks(num_ranks: int, function: str, timeout_s: float = PATIENCE_S, **kwargs: Any) -> list[Any]:
    """What `function` ("package.module:name") returns on each rank, through JSON.

    Raises:
        AssertionError: a rank failed or hung; carries the output of all ranks.
    """
    module, name = function.split(":")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        codes = forks.run_ranks(num_ranks, _answer, module, name, kwargs, folder, log=folder, timeout_s=timeout_s)
        said = [(folder / f"rank_{rank}").read_text() for rank in range(num_ranks)]
        assert codes == [0] * num_ranks, f"exit codes {codes}:\n" + "\n".join(text[-3000:] for text in said)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def _answer(module: str, name: str, kwargs: dict[str, Any], folder: Path) -> None:
    result = getattr(importlib.import_module(module), name)(**kwargs)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
