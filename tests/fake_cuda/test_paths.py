"""Every way through the pipeline on a fake GPU: nothing mixes devices or dtypes, and the host waits only where it must.

A copy, a value or a mask as an index makes the host wait until the device has done all that is queued. So a new wait in
a micro-batch fails here, whoever brings it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.fake_cuda import device
from tests.patience import PATIENCE_S


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    if shutil.which("g++") is None:
        assert "CI" not in os.environ, "CI runs the paths on a fake GPU: apt-get install g++"
        pytest.skip("no g++ here, which the fake GPU is compiled with")
    library = tmp_path_factory.mktemp("device") / "device.so"
    device.build(library)
    found = {}
    for kind in ("v1.1", "umt5", "bart", "t5gemma2"):
        command = [sys.executable, "-m", "tests.fake_cuda.paths", str(library), kind]
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert told.returncode == 0, told.stderr[-3000:]
        found[kind] = json.loads(told.stdout)
    return found


def test_no_path_mixes_devices_or_dtypes(paths):
    assert {
        (kind, name): seen["error"] for kind, of in paths.items() for name, seen in of.items() if seen["error"]
    } == {}


@pytest.mark.parametrize("phase", ["local", "replacing"])
def test_training_of_modular_layers_never_waits(paths, phase):
    found = {(kind, name): seen["waits"] for kind, of in paths.items() for name, seen in of.items() if phase in name}
    assert len(found) > 3
    assert set(map(str, found.values())) == {"{}"}, found


@pytest.mark.parametrize("name", ["teacher", "distilled", "search"])
def test_other_micro_batches_never_wait(paths, name):
    assert [of[name]["waits"] for of in paths.values()] == [{}] * len(paths)


def test_validation_waits_for_its_results_only(paths):
    """Once for the loss; once for each token that is decoded, and for outputs and references."""
    validation = "training/validation.py"
    for of in paths.values():
        assert of["validation"]["waits"] == {
            f"list, {validation} _loss": 1, f"value, {validation} _greedy": 1, f"list, {validation} _bleu": 2,
        }  # fmt: skip
