"""What a score must be known by, and which other folders are scored."""

from __future__ import annotations

import dataclasses
import errno

import pytest

from pipeline.assemble.systems import System
from pipeline.config.recipe import EvaluateConfig, Recipe
from pipeline.evaluation import peers
from pipeline.evaluation.subject import Subject
from pipeline.ordinary import save_ordinary
from pipeline.rundir.run_dir import RunDir
from tests.tiny import tiny_t5


def test_a_score_names_the_type_that_it_was_decoded_in_where_that_is_not_the_checkpoints(tmp_path):
    save_ordinary(tiny_t5("v1.1", 1, 1), tmp_path / "model")
    sizes = dict.fromkeys(
        ("num_encoder_layers", "num_decoder_layers", "num_parameters", "num_non_embedding_parameters", "bytes"), 1
    )
    system = System(
        name="own", kind="finetuned", folder="model", assembly="e1-d1", requests=(), ratio_layers=1.0, **sizes
    )
    keys = {
        dtype: Subject(
            dataclasses.replace(Recipe(), evaluate=EvaluateConfig(dtype=dtype)),
            RunDir(tmp_path),
            [system],
            [{"source": "a", "target": "b"}],
            "test",
        ).key(system)
        for dtype in ("checkpoint", "tf32", "bfloat16")
    }
    assert "dtype" not in keys["checkpoint"]["decoding"], "scores from before there was a choice still count"
    assert [keys[dtype]["decoding"]["dtype"] for dtype in ("tf32", "bfloat16")] == ["tf32", "bfloat16"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
def test_a_peers_folder_is_refused_for_what_does_not_pass_by_itself(number, monkeypatch):
    def fail(text):
        raise OSError(number, f"{text} cannot be read")

    monkeypatch.setattr(peers, "peer", fail)
    if number == errno.ESTALE:
        with pytest.raises(OSError, match="other cannot be read"):
            peers.read_peers(["other"])
    else:
        assert peers.read_peers(["other"]) == ([], [f"[Errno {number}] other cannot be read"])
