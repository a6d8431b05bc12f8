"""What goes wrong with a whole process, its interpreter, its port or its workers, is one line, too."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.config import run_program
from pipeline.training import join_world
from tests.forks import run_forked
from tests.patience import PATIENCE_S, wait_until

ROOT = Path(__file__).resolve().parents[2]
TWO_RANKS = [sys.executable, "-m", "pipeline.launch", "--standalone", "--nproc-per-node", "2"]


def test_a_training_stage_before_its_data_is_named(tmp_path: Path) -> None:
    """In a process of its own: it joins a process group."""
    words = ["teacher", "--config", "demo", "--run_dir", str(tmp_path / "none")]
    result = run_forked(main, words, environment=os.environ)
    assert result.returncode == 2
    assert result.stderr == "error: stage teacher needs the output of stage data: run that first\n"


def test_an_old_python_is_named() -> None:
    code = "import sys; sys.version_info = (3, 10, 2); sys.version = '3.10.2 x'; import pipeline"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: Python 3.11 or newer is needed, this is 3.10.2\n"


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        result = run_forked(partial(run_program, verbose=False), join_world, environment=environment)
    assert result.returncode == 2, result.stderr
    assert f"error: port {port} of 127.0.0.1 cannot be used" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_worker_that_fails_is_named_in_one_line(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit('error: a line')\ntime.sleep(1000)\n"
    )
    result = subprocess.run(
        [*TWO_RANKS, str(worker)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert result.returncode == 1
    said, launcher = result.stderr.splitlines()
    assert said == "error: a line"
    assert re.fullmatch(r"rank 1 \(process \d+\) ended first, with exit code 1", launcher)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_launcher_that_is_ended_says_so_in_one_line(tmp_path: Path, number: signal.Signals) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).touch()\n"
        "time.sleep(1000)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        [*TWO_RANKS, str(worker), str(tmp_path)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: all((tmp_path / rank).exists() for rank in "01"))
    launcher.send_signal(number)
    _, said = launcher.communicate(timeout=PATIENCE_S)
    assert (launcher.returncode, said) == (128 + signal.SIGTERM, "ended by SIGTERM, and the ranks with it\n")


def test_ctrl_c_in_a_run_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "run", "--config", "minute", "--run_dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as at a terminal, wherever the tests run
    )
    wait_until((tmp_path / "run/teacher/inputs.json").exists)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    _, said = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 130
    assert [line for line in said.splitlines() if not line.startswith("[0/2] teacher: ")] == [
        "stopped; the same command goes on from what is saved"
    ]
