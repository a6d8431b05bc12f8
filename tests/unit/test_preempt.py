"""Being asked to stop: each way by itself, on one process; ranks agree in distributed/test_stopping.py."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from pipeline.training.preempt import StopSignal
from pipeline.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_stop_and_handlers_are_given_back(tmp_path, number):
    before = signal.getsignal(number)
    with StopSignal(tmp_path / "STOP", ALONE, lead_s=60) as stop:
        assert not stop.asked()
        os.kill(os.getpid(), number)
        assert stop.asked()
        assert stop.asked()
    assert signal.getsignal(number) is before


def test_a_file_asks_to_stop(tmp_path):
    stop = StopSignal(tmp_path / "STOP", ALONE, lead_s=60)
    assert not stop.asked()
    (tmp_path / "STOP").touch()
    assert stop.asked()


@pytest.mark.parametrize(
    ("left_s", "lead_s", "asked_after_s"),
    [(1000, 300, 700), (1000, 1200, 500), (1000, 0, 1000)],
)
def test_the_end_of_the_jobs_time_asks_to_stop(tmp_path, monkeypatch, left_s, lead_s, asked_after_s):
    """`lead_s` before the end, but never in the first half of a job that is shorter than that."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + left_s))
    stop = StopSignal(tmp_path / "STOP", ALONE, lead_s=lead_s)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + asked_after_s - 5)
    assert not stop.asked()
    monkeypatch.setattr(time, "monotonic", lambda: now + asked_after_s + 5)
    assert stop.asked()


def test_without_a_deadline_time_does_not_ask(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    stop = StopSignal(tmp_path / "STOP", ALONE, lead_s=60)
    monkeypatch.setattr(time, "monotonic", lambda: 1e12)
    assert not stop.asked()


def test_a_time_that_has_passed_is_of_a_job_before(tmp_path, monkeypatch):
    """As in a shell that has outlived its allocation."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 100))
    assert not StopSignal(tmp_path / "STOP", ALONE, lead_s=60).asked()
