"""Assembled checkpoints are ordinary ones: plain transformers loads them and computes what training computed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from pipeline.assemble import scores_of
from pipeline.assemble import write as assemble
from pipeline.assemble.requests import requested_assemblies
from pipeline.assemble.systems import describe
from pipeline.assemble.write import Parts, write_checkpoint
from pipeline.bench.families import save_library
from pipeline.config.recipe import AssembleConfig, DistillConfig, Recipe
from pipeline.rundir.files import write_atomic
from pipeline.rundir.run_dir import RunDir
from pipeline.spans.spans import Assembly, modular_spans, tilings
from tests.tiny import KINDS, hf_logits, random_batch, read_plainly, tiny_model
from tests.unit.test_modular import modular_of, perturb
from tests.unit.test_switching import generated


def make_run(tmp_path, kind, num_layers=6, granularities=(2, 3, 6)):
    """(run, modular model) with a teacher folder and the module library of the modular model."""
    run = RunDir(tmp_path)
    teacher = tiny_model(kind, num_layers, num_layers)
    teacher.save_pretrained(run.teacher_model)
    modular = modular_of(teacher, granularities=(granularities, granularities))
    perturb(modular)
    save_library(modular, run)
    return run, modular


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["e1x6-d1x6", "e2x3-d3x2", "e6-d6", "e6-d1x4.2", "e3.1x3-d6"])
def test_plain_transformers_computes_what_training_computed(tmp_path, kind, text):
    run, modular = make_run(tmp_path, kind)
    assembly = Assembly.parse(text)
    write_checkpoint(Parts.of(run), assembly, tmp_path / "out")
    loaded = read_plainly(tmp_path / "out")
    batch = random_batch(4)
    with torch.no_grad():
        expected = modular(batch, (assembly,)).student_logits_NV
    torch.testing.assert_close(hf_logits(loaded, batch), expected, atol=2e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = read_plainly(tmp_path / "again")
    assert torch.equal(hf_logits(again, batch), hf_logits(loaded, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_every_assembly_survives_saving_and_plain_loading(tmp_path, kind):
    """All tilings of 3+3 layers, among them encoders much shallower than their decoders: equal logits and equal beam-4
    output, in memory, from the folder, and from a folder that plain transformers saved again."""
    run, _ = make_run(tmp_path, kind, num_layers=3, granularities=(2, 3))
    parts = Parts.of(run)
    every = list(tilings(3, modular_spans(3, (2, 3))))
    assert len(every) == 3
    batch = random_batch(4)
    for assembly in (Assembly(encoder, decoder) for encoder in every for decoder in every):
        write_checkpoint(parts, assembly, tmp_path / "out")
        loaded = read_plainly(tmp_path / "out")
        loaded.save_pretrained(tmp_path / "again")
        models = (
            parts.models.assembly(assembly),
            loaded,
            read_plainly(tmp_path / "again"),
        )
        logits, beams = [hf_logits(m, batch) for m in models], [generated(m, batch, 4) for m in models]
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[1], logits[2])
        assert torch.equal(beams[0], beams[1])
        assert torch.equal(beams[1], beams[2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_own_checkpoint_is_bitwise_the_teacher(tmp_path, kind):
    run, _ = make_run(tmp_path, kind)
    write_checkpoint(Parts.of(run), Assembly.parse("e1x6-d1x6"), tmp_path / "out")
    ours, teacher = (AutoModelForSeq2SeqLM.from_pretrained(f).eval() for f in (tmp_path / "out", run.teacher_model))
    batch = random_batch(5)
    assert torch.equal(hf_logits(ours, batch), hf_logits(teacher, batch))
    for num_beams in (1, 4):
        assert torch.equal(generated(ours, batch, num_beams), generated(teacher, batch, num_beams))


def damage_a_weight(weights, config):
    name = next(name for name in weights if name.endswith("wo.weight"))
    weights[name] = weights[name] * 1.001


def lose_a_weight(weights, config):
    del weights["decoder.block.0.layer.1.layer_norm.weight"]


def change_the_depth(weights, config):
    config["num_layers"] = 3


def swap_two_layers(weights, config):
    for name in [name for name in weights if name.startswith("encoder.block.0.") and "relative" not in name]:
        other = name.replace("block.0", "block.1")
        weights[name], weights[other] = weights[other], weights[name]


def change_the_scale(weights, config):
    config["scale_decoder_outputs"] = not config["scale_decoder_outputs"]


@pytest.mark.parametrize(
    "damage", [damage_a_weight, lose_a_weight, change_the_depth, swap_two_layers, change_the_scale]
)
def test_what_does_not_read_back_is_never_published(tmp_path, monkeypatch, damage):
    run, _ = make_run(tmp_path, "v1.0")
    parts = Parts.of(run)
    real = assemble.write_settings

    def write_damaged(folder, settings):
        real(folder, settings)
        weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        damage(weights, config)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(assemble, "write_settings", write_damaged)
    with pytest.raises(ValueError, match="not published"):
        write_checkpoint(parts, Assembly.parse("e3x2-d2x3"), tmp_path / "out" / "e3x2-d2x3")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    write_checkpoint(parts, Assembly.parse("e3x2-d2x3"), tmp_path / "out" / "e3x2-d2x3")
    assert (tmp_path / "out" / "e3x2-d2x3" / "model.safetensors").is_file()


def test_an_alias_of_the_depth_does_not_win_over_it(tmp_path):
    """As in facebook/bart-large's config.json: transformers reads num_hidden_layers as the encoder's depth."""
    run, _ = make_run(tmp_path, "bart")
    path = run.teacher_model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 6}))
    write_checkpoint(Parts.of(run), Assembly.parse("e3x2-d1x6"), tmp_path / "out")
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").config.encoder_layers == 2


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


def test_a_stack_left_whole_is_never_asked_for_modular_layers():
    distill = DistillConfig(granularities=(2, 3), encoder_granularities=())
    recipe = Recipe(distill=distill, assemble=AssembleConfig(ratios=(1.2, 1.5)))
    stacks = distill.stacks((6, 6))
    assert list(map(str, requested_assemblies(recipe, stacks))) == [
        "e1x6-d1x6",
        "e1x6-d1x2.2x2",
        "e1x6-d3x2",
    ]
    assert str(stacks.coarsest()) == "e1x6-d3x2"
    bad = replace(recipe, assemble=AssembleConfig(ratios=(), assemblies=("e2x3-d1x6",)))
    with pytest.raises(ValueError, match="modular layers for none of them"):
        requested_assemblies(bad, bad.distill.stacks((6, 6)))


def test_requests_name_each_assembly_once_and_refuse_what_does_not_fit():
    recipe = Recipe(assemble=AssembleConfig(ratios=(1.1, 6.0), assemblies=("e2x3-d1x6",)))
    requests = requested_assemblies(recipe, recipe.distill.stacks((6, 6)))
    assert list(map(str, requests)) == ["e1x6-d1x6", "e1x6-d1x4.2", "e6-d6", "e2x3-d1x6"]
    assert requests[Assembly.parse("e6-d6")] == [("size-first", 6.0), ("speed-first", 6.0)]
    for wrong in ("e2x4-d1x6", "e1.2x2.1-d1x6"):
        bad = replace(recipe, assemble=AssembleConfig(assemblies=(wrong,)))
        with pytest.raises(ValueError, match=f"assembly {wrong} does not fit"):
            requested_assemblies(bad, bad.distill.stacks((6, 6)))


@pytest.mark.parametrize("text", ["e6-d1x6", "e3x2-d2x3", "e1x6-d6"])
def test_either_stack_may_be_the_deeper_one(tmp_path, text):
    """transformers takes the length of the cache from the encoder: a deeper decoder needs a key in its config."""
    run, _ = make_run(tmp_path, "v1.1")
    write_checkpoint(Parts.of(run), Assembly.parse(text), tmp_path / "out")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    sources = random_batch(1).source_BS
    with_cache, without = (
        model.generate(sources, attention_mask=sources != 0, max_new_tokens=6, min_new_tokens=6, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_a_folder_says_what_it_is_and_what_it_scored(tmp_path):
    run, _ = make_run(tmp_path, "v1.1")
    write_checkpoint(Parts.of(run), Assembly.parse("e2x3-d3x2"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    library = json.loads((run.library / "library.json").read_text())
    for text in ("`e2x3-d3x2`", "3 + 2 layers", "5 of them", library["teacher_sha256"][:16], "from_pretrained"):
        assert text in card
    assert "Scores" not in card
    quality = {
        "bleu": 31.5,
        "bleu_low": 30,
        "bleu_high": 33,
        "num_examples": 8,
        "signatures": {"bleu": "nrefs:1|tok:13a"},
    }
    hashes = Parts.of(run).hashes
    weights = {"teacher": hashes["teacher_sha256"], "modular": hashes["modular_sha256"]}
    found = {"quality": quality, "key": {"decoding": {"num_beams": 4}, "weights": weights}}
    score = run.stage("evaluate") / "scores" / "e2x3-d3x2.json"
    write_atomic(score, json.dumps(found))
    assert scores_of(run, "e2x3-d3x2", hashes) == []  # of an evaluation that is not done
    write_atomic(run.stage("evaluate") / "stage.json", "{}")
    assert scores_of(run, "e2x3-d3x2", {**hashes, "modular_sha256": "of other weights"}) == []
    write_atomic(score, json.dumps({"failed": "out of memory", "key": found["key"]}))
    assert scores_of(run, "e2x3-d3x2", hashes) == []
    write_atomic(score, json.dumps(found))
    scores = scores_of(run, "e2x3-d3x2", hashes)
    assert scores[0].startswith("On 8 test examples, num_beams 4")
    assert scores[-1] == "| bleu | 31.5 (30 to 33) | nrefs:1 tok:13a |"
    write_checkpoint(Parts.of(run), Assembly.parse("e2x3-d3x2"), tmp_path / "out", scores=scores)
    assert scores[-1] in (tmp_path / "out" / "README.md").read_text()
