"""What the doctor says of a machine: ok, or what to do about it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import doctor
from pipeline.__main__ import main
from pipeline.ordinary import save_ordinary
from tests.tiny import tiny_t5


def test_every_check_is_told_and_a_failure_is_an_error(monkeypatch, capsys, tmp_path):
    def broken(run_dir: Path) -> str:
        raise ValueError("no wheels: get some")

    monkeypatch.setattr(doctor, "CHECKS", {"wheels": broken, "road": lambda run_dir: "dry"})
    with pytest.raises(ValueError, match=r"cannot run the pipeline yet: wheels$"):
        doctor.doctor(tmp_path)
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["failed", "wheels"]
    assert "no wheels: get some" in first
    assert second.split()[:2] == ["ok", "road"]


def test_storage_is_tried_in_the_nearest_folder_that_exists(tmp_path):
    assert f"{tmp_path}: " in doctor._storage(tmp_path / "runs" / "new")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"/proc cannot be written .*choose another run_dir"):
        doctor._storage(Path("/proc/new"))


def test_slurm_is_needed_only_inside_a_job(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "only needed to submit jobs" in doctor._slurm(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ValueError, match=r"inside job 7, but .*load the site's SLURM module"):
        doctor._slurm(tmp_path)


def test_a_command_that_fails_is_told_in_one_line():
    with pytest.raises(ValueError, match=r"^ValueError: three$"):
        doctor._output_of(["python3", "-c", "raise ValueError('three')"])


def test_a_model_folder_is_examined_in_one_line(tmp_path, capsys):
    save_ordinary(tiny_t5("v1.1", 2, 1), tmp_path)
    main(["doctor", str(tmp_path)])
    assert capsys.readouterr().out == (
        f"ok      {tmp_path}: t5, 2+1 layers, a head of its own; config.json agrees with the weights\n"
    )
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", str(tmp_path)])
    (told,) = capsys.readouterr().err.splitlines()[-1:]
    assert "tie_word_embeddings true, but lm_head.weight is another matrix than shared.weight: set it to false" in told


def test_a_machine_with_one_gpu_trains_a_little_too():
    """There a step leaves a layer without any use, where several ranks use each other's."""
    told = doctor._output_of([sys.executable, "-m", "pipeline.doctor"]).splitlines()[-1]
    assert told.startswith("1 ranks over ")
    assert all(name in told for name in doctor.TRIED)


def test_a_gpu_that_only_emulates_bf16_is_refused(monkeypatch, tmp_path):
    properties = SimpleNamespace(name="Old", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ValueError, match=r"Old has no bf16: use an NVIDIA GPU of compute capability 8\.0 or newer"):
        doctor.CHECKS["devices"](tmp_path)
