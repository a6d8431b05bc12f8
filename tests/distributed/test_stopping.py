"""Stopping in good order on real ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time

import pytest

from tests.distributed import stopping
from tests.forks import run_ranks, start_ranks, wait_for, with_group


@pytest.mark.parametrize(("num_ranks", "asked_rank", "latest"), [(1, 0, 3), (3, 0, 4), (3, 2, 4)])
def test_all_ranks_stop_at_the_same_step_soon_after_one_was_asked(tmp_path, num_ranks, asked_rank, latest):
    codes = run_ranks(num_ranks, with_group, stopping.stop_by_signal, tmp_path, asked_rank, 3)
    assert codes == [0] * num_ranks
    steps = {int((tmp_path / f"rank_{rank}").read_text()) for rank in range(num_ranks)}
    assert steps == {latest}


def say(folder, num_ranks):
    return [(folder / f"rank_{rank}").read_text() for rank in range(num_ranks)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_leave_when_a_rank_dies_or_stops_and_name_it(tmp_path, number):
    """Three ranks in step; rank 1 is killed or stopped in the middle. The others wait for it in a collective."""
    processes = start_ranks(3, with_group, stopping.steps_under_watch, tmp_path, log=tmp_path)
    while not (tmp_path / "go").exists():
        time.sleep(0.02)
    os.kill(processes[1].pid, number)
    codes = wait_for([processes[0], processes[2]])
    wait_for(processes, timeout_s=0)
    assert codes == [1, 1]
    for text in say(tmp_path, 3)[::2]:
        assert "rank 1 (process" in text
        assert ("has died" if number == signal.SIGKILL else "has not been heard of") in text
        assert "rank 1 on " in text
        assert ": step 3, forward of e2x3-d6" in text


@pytest.mark.parametrize(
    ("is_seen", "said"), [(True, r"rank 1 \(process \d+ on .*\) has died"), (False, "rank 1.* of 3 ha(s|ve) not come")]
)
def test_a_rank_that_dies_before_the_ranks_have_met_is_named(tmp_path, is_seen, said):
    codes = run_ranks(3, stopping.rank_that_dies_on_its_way, tmp_path, is_seen, log=tmp_path)
    assert codes == [1, -signal.SIGKILL if is_seen else 0, 1]
    for text in say(tmp_path, 3)[::2]:
        assert re.search(said, text)


def test_what_an_earlier_start_has_left_is_not_believed(tmp_path):
    stale = {"rank": 1, "host": socket.gethostname(), "pid": 1, "start": "0", "beat": 7, "left": None}
    stale |= {"namespace": os.readlink("/proc/self/ns/pid"), "step": 3, "phase": "forward", "draw": ""}
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat" / "rank_00001.json").write_text(json.dumps(stale))
    codes = run_ranks(2, stopping.rank_that_comes_late, tmp_path, log=tmp_path)
    assert codes == [0, 0], say(tmp_path, 2)


def test_a_rank_killed_in_the_middle_of_a_beat_leaves_a_whole_record(tmp_path):
    record = tmp_path / "heartbeat" / "rank_00000.json"
    for trial in range(40):
        (process,) = start_ranks(1, stopping.beats_without_pause, tmp_path)
        while stopping.record_of(tmp_path, 0)["pid"] != process.pid:
            time.sleep(0.001)
        time.sleep(0.001 * trial)
        process.kill()
        process.join()
        assert json.loads(record.read_text())["pid"] == process.pid


def test_a_hang_with_all_ranks_alive_is_reported_with_the_place_of_every_rank(tmp_path):
    codes = run_ranks(3, with_group, stopping.rank_that_waits, tmp_path, log=tmp_path)
    assert codes == [1, 1, 1]
    said = say(tmp_path, 3)
    assert any("no progress for" in text for text in said)
    for rank, place in ((0, "step 3, backward"), (1, "step 2, data"), (2, "step 3, backward")):
        assert any(f"rank {rank} on " in text and f": {place}" in text for text in said)


def test_an_error_of_one_rank_is_in_the_message_of_the_others(tmp_path):
    codes = run_ranks(2, with_group, stopping.rank_that_fails, tmp_path, log=tmp_path)
    assert codes == [1, 1]
    own, other = say(tmp_path, 2)[::-1]
    assert own.rstrip().endswith("ValueError: a shard is missing")
    assert "rank 1 has left (ValueError: a shard is missing)" in other
