"""`python -m pipeline bench families` over tiny models: families agree with transformers, and what does not is seen."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.bench import families
from pipeline.bench.__main__ import main
from pipeline.footprint.estimate import GIB
from pipeline.ordinary import read_model
from pipeline.planning.public_models import PUBLIC
from pipeline.rundir import RunDir
from tests.tiny import tiny_model

KINDS = ("v1.1", "umt5", "mbart", "marian", "t5gemma2")


def found_of(kind, folder, **options):
    """What the bench finds of a tiny model."""
    settings = tiny_model(kind).config.to_dict()
    if "init_std" in settings:  # of all matrices, whatever their width
        settings["init_std"] = 0.2
    return families.agreement(kind, settings, RunDir(folder), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_agrees_with_transformers(kind, tmp_path):
    found = found_of(kind, tmp_path)
    assert found.assemblies == ["e1x6-d1x6", "e2x3-d2x3", "e3x2-d3x2", "e6-d6"]
    assert found.logits_apart == 0
    assert found.greedy_equal == found.beam_equal == found.outputs == 64
    assert found.distinct > 16, "outputs differ between assemblies and between sources"
    assert found.peak_gib > found.weights_gib > 0


def test_bf16_halves_what_is_held(tmp_path):
    found = found_of("v1.1", tmp_path, dtype=torch.bfloat16)
    assert found.logits_apart == 0
    assert found.greedy_equal == found.beam_equal == found.outputs
    assert found.weights_gib * GIB < 5 * found.parameters, "teacher and about as many modular layers, 2 bytes each"


def test_the_coarsest_alone_holds_no_other_modular_layers(tmp_path):
    found = found_of("v1.1", tmp_path, coarsest=True)
    assert found.assemblies == ["e6-d6"]
    assert found.greedy_equal == found.beam_equal == found.outputs == 16
    assert found.weights_gib * GIB < 6 * found.parameters, "two modular layers beside twelve of the teacher"


def test_another_model_in_a_folder_is_seen(monkeypatch, tmp_path):
    def read(folder):
        model, info = read_model(folder)
        model.get_encoder().get_input_embeddings().weight *= -1
        return model, info

    monkeypatch.setattr(families, "read_model", read)
    found = found_of("v1.1", tmp_path)
    assert found.logits_apart > 0.1
    assert max(found.greedy_equal, found.beam_equal) < found.outputs


def test_a_model_has_a_row_and_a_line_of_json(monkeypatch, capsys):
    monkeypatch.setitem(PUBLIC, "t5-tiny", tiny_model("v1.1", 2, 2).config.to_dict())
    monkeypatch.setattr(families, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))  # starts in no time
    assert main(["families", "t5-tiny"]) == 0
    *_, row, line = capsys.readouterr().out.splitlines()
    assert row.startswith("| t5-tiny | float32 | 0.0 M | e1x2-d1x2, e2-d2 | ")
    assert json.loads(line)["model"] == "t5-tiny"


def test_a_model_that_is_not_known_is_one_line(capsys):
    assert main(["families", "no-such"]) == 2
    assert capsys.readouterr().err.startswith("error: no-such is not here and no public model known offline (")
