"""What `run` makes of a stage that is told to stop, is killed, or is not to be started: on a stand-in for the stage."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from pipeline import run as running
from pipeline.config import Recipe
from pipeline.rundir import RunDir
from tests.patience import wait_until

SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    (stage / "REQUEUE").touch()
    sys.exit(85)
stage = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, save)
(stage / "ready").touch()
time.sleep(1000)
"""
SAVES_NOTHING = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'ready').touch(); time.sleep(1000)"


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Runs stage teacher with a program in its place."""
    (tmp_path / "teacher").mkdir()

    def start(program: str) -> None:
        command = [sys.executable, "-c", program, str(tmp_path / "teacher")]
        monkeypatch.setattr(running, "stage_command", lambda *_: command)
        running.run_stage("teacher", Recipe(), RunDir(tmp_path), [])

    return start


def signal_when_ready(stage: Path, number: int) -> None:
    def wait() -> None:
        wait_until((stage / "ready").exists)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_what_saves_is_waited_for(number, started, tmp_path, capsys):
    before = signal.getsignal(number)
    signal_when_ready(tmp_path / "teacher", number)
    with pytest.raises(SystemExit) as ended:
        started(SAVES)
    assert ended.value.code == 85
    assert "saved its state" in capsys.readouterr().out
    assert signal.getsignal(number) is before


def test_a_stage_that_saves_nothing_ends_with_the_signal(started, tmp_path, capsys):
    signal_when_ready(tmp_path / "teacher", signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        started(SAVES_NOTHING)
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "teacher was ended by SIGTERM: run the same command again to continue\n"


def test_a_stage_that_was_done_when_the_signal_came_is_told_so(started, tmp_path, capsys):
    signal_when_ready(tmp_path / "teacher", signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        started(f"import os, signal; signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n{SAVES_NOTHING}")
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.startswith("teacher is done, and the run was ended by SIGTERM: ")


def test_a_stage_that_the_kernel_kills_is_told(started, capsys):
    with pytest.raises(SystemExit) as ended:
        started("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "teacher was ended by SIGKILL, perhaps for want of memory\n"


def test_no_stage_is_begun_while_the_stop_file_is_there(started, tmp_path, capsys):
    (tmp_path / "STOP").touch()
    with pytest.raises(SystemExit) as ended:
        started("raise AssertionError")
    assert ended.value.code == 85
    assert capsys.readouterr().out.startswith("stopped before teacher, because ")


def test_a_stage_leaves_the_input_of_the_shell_alone(started, tmp_path):
    """As in `while read recipe; do python -m pipeline run ...; done < recipes`."""
    program = "import pathlib, sys; pathlib.Path(sys.argv[1], 'read').write_text(sys.stdin.read())"
    ours, (reads, writes) = os.dup(0), os.pipe()
    try:
        os.write(writes, b"the next recipe\n")
        os.close(writes)
        os.dup2(reads, 0)
        started(program)
    finally:
        os.dup2(ours, 0)
        os.close(ours)
        os.close(reads)
    assert (tmp_path / "teacher" / "read").read_text() == ""
