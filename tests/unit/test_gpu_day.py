"""The script for the first minutes on a GPU runs from end to end where there is none."""

from __future__ import annotations

import json
import subprocess

import torch

from pipeline.bench import gpu_day
from pipeline.bench.__main__ import main
from pipeline.bench.gpu_day_gathers import _through_host


def test_every_part_comes_to_its_end_in_the_dry_mode(tmp_path):
    assert main(["gpu-day", "--dry", "--write", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [each["part"] for each in found] == list(gpu_day.SECONDS)
    assert all(each["figures"] for each in found)
    text = (tmp_path / "gpu_day.md").read_text()
    assert "dry: tiny sizes" in text.splitlines()[0]
    assert "## step: ok" in text
    assert sum(gpu_day.SECONDS.values()) <= 1.5 * gpu_day.LIMIT_S, "limits are not all reached in one day"


def test_what_a_part_found_before_it_hung_is_kept_and_the_next_runs(tmp_path, monkeypatch, capsys):
    def run(command, timeout, **options):
        if "machine" in command:
            raise subprocess.TimeoutExpired(
                command, timeout, output=b'{"part": "machine", "figures": {"torch": "x"}}\n'
            )
        return subprocess.CompletedProcess(command, 1, "", "CUDA error: no kernel image")

    monkeypatch.setattr(gpu_day.subprocess, "run", run)
    assert main(["gpu-day", "--part", "machine", "--part", "shapes", "--write", str(tmp_path)]) == 2
    machine, shapes = json.loads((tmp_path / "gpu_day.json").read_text())
    assert (machine["status"], machine["figures"]) == ("ok", {"torch": "x"})
    assert (shapes["status"], shapes["said"]) == ("exit code 1", "CUDA error: no kernel image")
    assert "not all parts came to their end: shapes" in capsys.readouterr().err


class OnGpu(torch.Tensor):
    """As a collective sees a GPU's tensor."""

    @property
    def is_cuda(self):
        return True

    def cpu(self):
        return self.as_subclass(torch.Tensor).clone()


def test_collectives_of_two_ranks_on_one_gpu_go_through_the_host():
    def gather(whole, part, group, async_op=False):
        assert not isinstance(whole, OnGpu), "gloo would refuse it"
        assert not isinstance(part, OnGpu)
        assert (group, async_op) == ("of all", False)
        whole.copy_(torch.cat([part, 2 * part]))

    part = torch.ones(2).as_subclass(OnGpu)
    for by_name in (True, False):
        whole = torch.zeros(4).as_subclass(OnGpu)
        if by_name:
            _through_host(gather)(whole=whole, part=part, group="of all", async_op=True).wait()
        else:
            assert _through_host(gather)(whole, part, group="of all") is None
        assert whole.tolist() == [1, 1, 2, 2]
    on_host = torch.zeros(2)
    _through_host(lambda tensor, async_op: tensor.fill_(5.0))(on_host)
    assert on_host.tolist() == [5, 5]
