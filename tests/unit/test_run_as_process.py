"""A process that does one program: how it ends, and when garbage is collected in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROCESS = """
import atexit, gc, sys
from data_prep.processes import collect_garbage, run_as_process

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
kept.itself = kept

def program():
    atexit.register(print, "registered")
    sys.stdout.write("written ")
    {program}

run_as_process(program)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    code = PROCESS.format(program=program)
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # else nothing is left to write at the end
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("program", "code", "error"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(85)", 85, ""),
        ("sys.exit('in words')", 1, "in words\n"),
        ("raise KeyboardInterrupt", 130, "stopped; the same command goes on from what is saved\n"),
        ("assert not gc.isenabled()", 0, ""),
        ("collect_garbage(); assert gc.isenabled(); gc.collect()", 0, ""),
    ],
)
def test_it_ends_with_its_code_and_all_output_and_takes_nothing_apart(program: str, code: int, error: str) -> None:
    ended = run(program)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "written registered\n", error)


def test_an_error_is_shown_as_ever_and_the_process_taken_apart() -> None:
    ended = run("collect_garbage(); raise KeyError('of a program')")
    assert ended.returncode == 1
    assert ended.stderr.endswith("KeyError: 'of a program'\n")
    assert ended.stdout == "written registered\ntaken apart\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    closed = "import os; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1); atexit.unregister(print)"
    ended = run(closed)
    assert (ended.returncode, ended.stderr) == (0, "")
