"""The kernels compile for A100 (sm_80) and H100/H200 (sm_90) without a GPU, spill nothing and load 16 bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_kernels_compile_ahead_of_time() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pipeline.kernels.resources"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["sm"] for line in lines} == {80, 90}
    assert {line["kernel"].split()[0] for line in lines} == {"change", "loss", "reduce", "rescale", "head", "attention"}
    for line in lines:
        holds_tiles = line["kernel"].startswith("attention")  # for matrix products
        assert line["spill_bytes"] == 0, line
        assert line["shared_bytes"] <= (80 * 1024 if holds_tiles else 1024), line
        assert line["registers"] <= (255 if holds_tiles else 240), line
        if line["kernel"] != "reduce":  # one that reads the table without alignment hints loads 2 bytes at once
            assert line["widest_load_bytes"] == 16, line
