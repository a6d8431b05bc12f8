"""Strangers' model folders: what the file says is what is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.decoding.rules import generation_settings, refuse_unknown
from pipeline.families import family_of
from pipeline.model import load_model
from pipeline.ordinary import save_ordinary
from pipeline.pretrained import config_of, model_of, settings_of, shapes_in
from pipeline.trim import trim
from tests.tiny import hf_logits, random_batch, tiny_model

NAMES = {"encoder": "encoder.embed_tokens.weight", "decoder": "decoder.embed_tokens.weight"}


def saved(folder: Path, kind: str, **settings: Any) -> dict[str, torch.Tensor]:
    """A tiny model; its weights as they are stored."""
    save_ordinary(tiny_model(kind, 2, 2), folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return load_file(folder / "model.safetensors")


def store(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file({name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "mt5", "umt5"])
@pytest.mark.parametrize("stacks", [("decoder",), ("encoder",), ("encoder", "decoder")])
def test_an_embedding_under_another_name_is_the_embedding(tmp_path: Path, kind: str, stacks: tuple[str, ...]) -> None:
    """transformers 5.17 takes a T5's head for it, without a word."""
    weights = saved(tmp_path, kind)
    embedding, head = weights.pop("shared.weight"), weights.get("lm_head.weight")
    store(tmp_path, weights | {NAMES[stack]: embedding for stack in stacks})
    model: Any = load_model(tmp_path)
    shared = family_of(model.config.model_type).take_shared(model)
    assert torch.equal(shared.embedding.weight, embedding)
    assert torch.equal(shared.head.weight, embedding if head is None else head)
    again = tmp_path / "again"
    again.mkdir()
    save_ordinary(load_model(tmp_path), again)
    found = load_file(again / "model.safetensors")
    assert torch.equal(found["shared.weight"], embedding)
    assert ("lm_head.weight" in found) == (head is not None)
    ids = torch.tensor([[5, 6, 7]])
    wanted = tiny_model(kind, 2, 2)(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(model_of(again)(input_ids=ids, decoder_input_ids=ids).logits, wanted)


@pytest.mark.parametrize("kind", ["pegasus", "marian"])
def test_sinusoids_that_a_file_lacks_are_computed(tmp_path: Path, kind: str) -> None:
    weights = saved(tmp_path, kind)
    store(tmp_path, {name: weight for name, weight in weights.items() if "embed_positions" not in name})
    assert torch.equal(
        hf_logits(load_model(tmp_path), random_batch(0)), hf_logits(tiny_model(kind, 2, 2), random_batch(0))
    )
    lacking = {
        name: weight for name, weight in weights.items() if "decoder.layer_norm" not in name and "fc1" not in name
    }
    store(tmp_path, lacking)
    with pytest.raises(ValueError, match=r"such as model\.decoder\.layer"):
        load_model(tmp_path)


def test_two_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    weights = saved(tmp_path, "v1.1")
    other = weights["shared.weight"] + 1
    store(tmp_path, weights | {"decoder.embed_tokens.weight": other})
    with pytest.raises(ValueError, match=r"shared.weight and decoder.embed_tokens.weight are two embeddings"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("v1.1", {"d_kv": 8.0, "layer_norm_epsilon": 1, "initializer_factor": 1, "dropout_rate": 0, "num_layers": 2.0}),
        ("v1.1", {"use_cache": 1, "is_encoder_decoder": 1, "pad_token_id": 0.0}),
        ("bart", {"encoder_layerdrop": 0, "decoder_layerdrop": 0, "init_std": 1, "scale_embedding": 0}),
        ("bart", {"max_position_embeddings": 40.0, "eos_token_id": 2.0, "dropout": 0}),
    ],
)
def test_numbers_that_are_equal_are_taken(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    saved(tmp_path, kind, **settings)
    config = config_of(tmp_path)
    assert {name: getattr(config, name) for name in settings} == settings
    assert load_model(tmp_path).config.d_model == 32


@pytest.mark.parametrize("value", ["64", 64.5, [64], None, True])
def test_a_number_that_is_none_is_one_line_with_file_and_field(tmp_path: Path, value: Any) -> None:
    saved(tmp_path, "v1.1", d_kv=value)
    for read in (config_of, load_model, lambda folder: trim(folder, ["a"], tmp_path / "out")):
        with pytest.raises(ValueError, match=r"config.json does not fit its model type \(.*'d_kv'") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stacks", [("decoder",), ("encoder", "decoder")])
def test_weights_of_pytorch_are_read_by_the_same_names(tmp_path: Path, stacks: tuple[str, ...]) -> None:
    weights = saved(tmp_path, "v1.1")
    embedding, head = weights.pop("shared.weight"), weights["lm_head.weight"]
    torch.save(weights | {NAMES[stack]: embedding for stack in stacks}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    model: Any = load_model(tmp_path)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.equal(model.lm_head.weight, head)
    assert shapes_in(tmp_path)["lm_head.weight"] == list(head.shape)


def test_an_absent_number_of_layers_may_be_null(tmp_path: Path) -> None:
    saved(tmp_path, "v1.1", num_decoder_layers=None)
    assert "num_decoder_layers" not in settings_of(tmp_path)
    assert load_model(tmp_path).config.num_decoder_layers == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder_no_repeat_ngram_size": 1}, {"min_new_tokens": 1}, {"max_time": 1},
        {"remove_invalid_values": True},
    ],
)  # fmt: skip
def test_a_setting_of_generation_that_is_1_or_true_is_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"has {next(iter(settings))}, which decoding here does not carry"):
        refuse_unknown(generation_settings(tmp_path), tmp_path)


def test_settings_of_generation_that_do_nothing_and_equal_numbers_are_taken(tmp_path: Path) -> None:
    told = {"guidance_scale": 1, "num_return_sequences": 1, "bad_words_ids": None, "suppress_tokens": [], "top_k": 5}
    numbers = {"min_length": 5.0, "eos_token_id": [1, 5], "repetition_penalty": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(told | numbers))
    config = generation_settings(tmp_path)
    refuse_unknown(config, tmp_path)
    found = {name: getattr(config, name) for name in numbers}
    assert found == numbers
    assert json.dumps(found["min_length"]) == "5"
