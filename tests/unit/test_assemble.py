"""Assembled checkpoints are ordinary ones: plain transformers loads them and computes what training computed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from pipeline.assemble import Parts, describe, requested_assemblies, write_checkpoint
from pipeline.config import AssembleConfig, Recipe
from pipeline.rundir import RunDir
from pipeline.spans import Assembly
from tests.tiny import random_batch, tiny_t5
from tests.unit.test_modular import hf_logits, modular_of, perturb

KINDS = ["v1.0", "v1.1", "mt5"]


def make_run(tmp_path, kind):
    """(run, modular model) with a teacher folder and the module library of the modular model."""
    run = RunDir(tmp_path)
    teacher = tiny_t5(kind)
    teacher.save_pretrained(run.teacher_model)
    modular = modular_of(teacher)
    perturb(modular)
    run.library.mkdir(parents=True)
    weights = {
        f"{stack}.{span}.{name}": weight.contiguous()
        for stack, leaves in modular.modular.items()
        for span, leaf in leaves.items()
        for name, weight in leaf.layer.state_dict().items()
    }
    save_file(weights, run.library / "modular.safetensors")
    return run, modular


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["e1x6-d1x6", "e2x3-d3x2", "e6-d6", "e6-d1x4.2", "e3.1x3-d6"])
def test_plain_transformers_computes_what_training_computed(tmp_path, kind, text):
    run, modular = make_run(tmp_path, kind)
    assembly = Assembly.parse(text)
    write_checkpoint(Parts.of(run), assembly, tmp_path / "out")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    batch = random_batch(4)
    with torch.no_grad():
        expected = modular(batch, assembly).student_logits_NV
    torch.testing.assert_close(hf_logits(loaded, batch), expected, atol=2e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(hf_logits(again, batch), hf_logits(loaded, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_own_assembly_has_the_teachers_weights(tmp_path, kind):
    run, _ = make_run(tmp_path, kind)
    write_checkpoint(Parts.of(run), Assembly.parse("e1x6-d1x6"), tmp_path / "out")
    ours, teacher = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run.teacher_model))
    assert ours.keys() == teacher.keys()
    assert all(torch.equal(ours[name], teacher[name]) for name in ours)


def test_dropping_layers_keeps_teacher_layers_and_needs_no_library(tmp_path):
    run, _ = make_run(tmp_path, "v1.0")
    (run.library / "modular.safetensors").unlink()
    write_checkpoint(Parts.of(run, library=False), Assembly.parse("e2x3-d6"), tmp_path / "out", dropped=True)
    ours, teacher = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run.teacher_model))
    for ours_layer, teacher_layer in ((0, 0), (1, 2), (2, 5)):
        name = "encoder.block.{}.layer.1.DenseReluDense.wo.weight"
        assert torch.equal(ours[name.format(ours_layer)], teacher[name.format(teacher_layer)])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_decoder_layers"] == 1


def test_sizes_count_the_vocabulary_apart(tmp_path):
    run, _ = make_run(tmp_path, "v1.1")
    write_checkpoint(Parts.of(run), Assembly.parse("e6-d6"), tmp_path / "out")
    system = describe(run, tmp_path / "out", "assembly", "e6-d6", Assembly.parse("e6-d6"))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert system.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert system.num_parameters - system.num_non_embedding_parameters == 2 * 64 * 32
    assert system.ratio_layers == 6


def test_requests_name_each_assembly_once_and_refuse_what_does_not_fit():
    recipe = Recipe(assemble=AssembleConfig(ratios=(1.1, 6.0), assemblies=("e2x3-d1x6",)))
    requests = requested_assemblies(recipe, (6, 6))
    assert list(map(str, requests)) == ["e1x6-d1x6", "e1x6-d1x4.2", "e6-d6", "e2x3-d1x6"]
    assert requests[Assembly.parse("e6-d6")] == [("size-first", 6.0), ("speed-first", 6.0)]
    for wrong in ("e2x4-d1x6", "e1.2x2.1-d1x6"):
        bad = replace(recipe, assemble=AssembleConfig(assemblies=(wrong,)))
        with pytest.raises(ValueError, match=f"assembly {wrong} does not fit"):
            requested_assemblies(bad, (6, 6))
