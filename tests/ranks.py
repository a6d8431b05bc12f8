"""Run a function of a test module on real ranks: separate processes with a real process group between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.world import free_port
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(num_ranks: int, function: str, timeout_s: float = PATIENCE_S, **kwargs: Any) -> list[Any]:
    """What `function` ("package.module:name") returns on each rank, through JSON.

    Raises:
        AssertionError: a rank failed or hung; carries the output of all ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        processes = []
        for rank in range(num_ranks):
            output = Path(folder) / f"{rank}.json"
            command = [sys.executable, "-m", "tests.ranks", function, json.dumps(kwargs), str(output)]
            each = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        try:
            texts = [process.communicate(timeout=timeout_s)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        codes = [process.returncode for process in processes]
        assert not any(codes), f"exit codes {codes}:\n" + "\n".join(text[-3000:] for text in texts)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def _main(function: str, kwargs: str, output: str) -> None:
    import importlib

    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(kwargs))
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
