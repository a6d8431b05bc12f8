"""The module library in use: models that share storage, equal to the teacher, to training and to plain checkpoints."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from pipeline.bench.__main__ import main as bench
from pipeline.bench.families import save_library, weights_of
from pipeline.library.switching import ModuleLibrary
from pipeline.rundir.run_dir import RunDir
from pipeline.spans.spans import Assembly, Span
from tests.tiny import KINDS, hf_logits, random_batch, tiny_model
from tests.unit.test_modular import modular_of, perturb

TEXTS = ["e2x3-d3x2", "e6-d6", "e6-d1x4.2", "e3.1x3-d6", "e1.1.2x2-d1x6"]


def library_of(kind: str):
    """(library, the modular model with the same weights, an untouched teacher)."""
    teacher = tiny_model(kind)
    modular = modular_of(teacher)
    perturb(modular)
    return ModuleLibrary(copy.deepcopy(teacher), weights_of(modular)), modular, teacher


def generated(model, batch, num_beams: int) -> torch.Tensor:
    return model.generate(
        input_ids=batch.source_BS,
        attention_mask=batch.source_mask_BS,
        num_beams=num_beams,
        max_new_tokens=8,
        do_sample=False,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_all_teacher_assembly_is_bitwise_the_teacher(kind):
    library, _, teacher = library_of(kind)
    model = library.assembly("e1x6-d1x6")
    batch = random_batch(0)
    assert torch.equal(hf_logits(model, batch), hf_logits(teacher, batch))
    for num_beams in (1, 4):
        assert torch.equal(generated(model, batch, num_beams), generated(teacher, batch, num_beams))


@pytest.mark.parametrize("kind", KINDS)
def test_assemblies_compute_what_training_computed_and_disturb_no_other(kind):
    library, modular, teacher = library_of(kind)
    batch = random_batch(1)
    models = {text: library.assembly(text) for text in TEXTS}  # all alive at once
    for text, model in models.items():
        with torch.no_grad():
            expected = modular(batch, (Assembly.parse(text),)).student_logits_NV
        torch.testing.assert_close(hf_logits(model, batch), expected, atol=2e-5, rtol=1e-5)
        lengths = [len(library.family.layers(model, stack)) for stack in ("encoder", "decoder")]
        assert lengths == [Assembly.parse(text).encoder.num_layers, Assembly.parse(text).decoder.num_layers]
        # with the cache and without, the same tokens: every layer finds its own keys and values
        cached = generated(model, batch, 1)
        model.generation_config.use_cache = False
        assert torch.equal(generated(model, batch, 1), cached)
    assert torch.equal(hf_logits(library.assembly("e1x6-d1x6"), batch), hf_logits(teacher, batch))
    assert library.teacher.generation_config.use_cache
    assert library.family.depths(library.teacher.config.to_dict()) == (6, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_assemblies_share_one_storage(kind):
    library, _, _ = library_of(kind)
    own = {tensor.data_ptr() for model in (library.teacher,) for tensor in model.state_dict().values()}
    own |= {
        tensor.data_ptr()
        for layers in library.layers.values()
        for layer in layers.values()
        for tensor in layer.state_dict().values()
    }
    models = [library.assembly(text) for text in TEXTS]
    for model in models:
        assert {tensor.data_ptr() for tensor in model.state_dict().values()} <= own
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
    layers = [library.family.layers(model, "decoder")[-1] for model in models[:2]]
    assert layers[0] is not layers[1]  # shares tensors, not modules: a place in a stack is one model's own


def test_the_benchmark_prints_both_sides(capsys):
    assert bench(["switch", "--width", "64", "--layers", "6", "--rounds", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["measure"] for line in lines] == ["one switch", "memory of the 2nd to 8th assembly alive"]
    assert all(line["baseline"] > 0 for line in lines)


def test_layers_may_be_put_in_any_order():
    """Layer dropping: what stands for the spans need not cover the stack."""
    library, _, _ = library_of("v1.1")
    model = library.model_of({"encoder": [Span(0, 0), Span(5, 5)], "decoder": [Span(3, 3)]})
    dropped = tiny_model("v1.1", 2, 1)
    state = {n: w for n, w in tiny_model("v1.1").state_dict().items() if ".block." not in n or "relative" in n}
    for name, weight in tiny_model("v1.1").state_dict().items():
        for old, new in (("encoder.block.0", "encoder.block.0"), ("encoder.block.5", "encoder.block.1")):
            if name.startswith(old):
                state[name.replace(old, new)] = weight
        if name.startswith("decoder.block.3"):
            state[name.replace("decoder.block.3", "decoder.block.0")] = weight
    dropped.load_state_dict(state)
    assert torch.equal(hf_logits(model, random_batch(2)), hf_logits(dropped, random_batch(2)))


def test_loading_checks_what_it_reads(tmp_path):
    run = RunDir(tmp_path)
    teacher = tiny_model("bart")
    teacher.save_pretrained(run.teacher_model)
    with pytest.raises(FileNotFoundError, match=r"library.json is missing: run stage distill first"):
        ModuleLibrary.load(run.teacher_model, run.library)
    modular = modular_of(teacher, granularities=((3,), (3,)))
    perturb(modular)
    save_library(modular, run)
    library = ModuleLibrary.load(run.teacher_model, run.library)
    assert library.stacks.spans_of("encoder") == (Span(0, 2), Span(3, 5))
    with torch.no_grad():
        expected = modular(random_batch(0), (Assembly.parse("e3x2-d1x3.3"),)).student_logits_NV
    ours = hf_logits(library.assembly("e3x2-d1x3.3"), random_batch(0))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    for wrong in ("e2x3-d1x6", "e3-d1x6", "e3x2-d1x5"):
        with pytest.raises(ValueError, match=f"assembly {wrong} does not fit: the .* modular layers for 0-2, 3-5"):
            library.assembly(wrong)
    half = ModuleLibrary.load(run.teacher_model, run.library, dtype=torch.bfloat16).assembly("e3x2-d3x2")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}

    path = run.library / "modular.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"does not match .* it is damaged"):
        ModuleLibrary.load(run.teacher_model, run.library)
    content[-5] ^= 1
    path.write_bytes(content)
    tiny_model("bart", seed=1).save_pretrained(run.teacher_model)
    with pytest.raises(ValueError, match="not the teacher that the library was trained for"):
        ModuleLibrary.load(run.teacher_model, run.library)
