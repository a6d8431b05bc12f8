"""Sizes by arithmetic, against real models and against the documented tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

import pipeline.spans
from pipeline.families import family_of, sizes_of, stored_weights
from pipeline.ordinary import save_ordinary
from pipeline.spans.sizes import ModelSizes, preset_table, t5_sizes
from pipeline.spans.spans import Assembly, teacher_assembly
from tests.tiny import KINDS, tiny_model

RATIOS = (1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
T5 = {"gated": False, "tied": True, "vocab_size": 32128}
DOCUMENTED = {
    "6 + 6 layers: T5-small (60.5 M parameters)": t5_sizes(num_layers=6, d_model=512, d_ff=2048, **T5),
    "12 + 12 layers: T5-base (222.9 M parameters)": t5_sizes(num_layers=12, d_model=768, d_ff=3072, **T5),
    "24 + 24 layers: T5-large (737.7 M parameters)": t5_sizes(num_layers=24, d_model=1024, d_ff=4096, **T5),
    "24 + 24 layers: mT5-large (1229.6 M parameters)": t5_sizes(
        num_layers=24, d_model=1024, d_ff=2816, gated=True, tied=False, vocab_size=250112
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["e1x6-d1x6", "e2x3-d6", "e6-d1x4.2"])
def test_sizes_are_those_of_real_models(tmp_path, kind, text):
    model, assembly = tiny_model(kind), Assembly.parse(text)
    family = family_of(model.config.model_type)
    sizes = sizes_of(stored_weights(model, family), family)
    real = tiny_model(kind, assembly.encoder.num_layers, assembly.decoder.num_layers)
    save_ordinary(real, tmp_path)
    counts = {name: tensor.numel() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert sizes.num_layers == (6, 6)
    assert sizes.parameters(assembly) == sum(counts.values())
    embeddings = sum(n for name, n in counts.items() if name.endswith((
        "shared.weight", "embed_tokens.weight", "embed_positions.weight", "lm_head.weight", "final_logits_bias",
    )))  # fmt: skip
    assert sizes.non_embedding(assembly) == sum(counts.values()) - embeddings
    assert sizes.bytes(assembly) == 4 * sizes.parameters(assembly)


@pytest.mark.parametrize(
    ("model_class", "config", "arguments"),
    [
        (T5ForConditionalGeneration, T5Config(), {"num_layers": 6, "d_model": 512, "d_ff": 2048, **T5}),
        (
            MT5ForConditionalGeneration,
            MT5Config(d_model=1024, d_ff=2816, num_layers=2, num_heads=16),
            {"num_layers": 2, "d_model": 1024, "d_ff": 2816, "gated": True, "tied": False, "vocab_size": 250112},
        ),
    ],
)
def test_the_formula_counts_what_transformers_builds(model_class, config, arguments):
    with torch.device("meta"):
        model = model_class(config)
    head = 0 if arguments["tied"] else model.lm_head.weight.numel()  # transformers ties until weights are loaded
    sizes = t5_sizes(**arguments)
    teacher = teacher_assembly(*sizes.num_layers)
    unique = {id(p): p.numel() for p in model.parameters()}
    tied = model.lm_head.weight is model.shared.weight
    assert sizes.parameters(teacher) == sum(unique.values()) + (head if tied else 0)


def test_ratios_are_of_the_teacher():
    sizes = ModelSizes(num_layers=(4, 4), encoder_layer=10, decoder_layer=20, embeddings=60, rest=0)
    ratios = sizes.ratios(Assembly.parse("e4-d2x2"))
    assert (ratios.layers, ratios.non_embedding) == (8 / 3, 120 / 50)
    assert ratios.parameters == ratios.bytes == 180 / 110


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_documented_tables_are_what_the_presets_do(name):
    text = (Path(pipeline.spans.__file__).parent / "presets.md").read_text(encoding="utf-8")
    sizes = DOCUMENTED[name]
    assert f"## {name}\n\n{preset_table(sizes, (2, 3, 6), RATIOS)}\n" in text
    millions = sizes.parameters(teacher_assembly(*sizes.num_layers)) / 1e6
    assert f"({millions:.1f} M parameters)" in name
