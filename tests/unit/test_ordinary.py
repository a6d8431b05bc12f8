"""A model folder says of itself what it is: config.json against names, shapes and bytes of the weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from pipeline.ordinary import check_ordinary, save_ordinary, write_settings
from tests.tiny import KINDS, hf_logits, random_batch, tiny_model


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def damage(folder, weights=lambda weights: None, **settings):
    """Change weights in place, and settings; None takes one away."""
    found = load_file(folder / "model.safetensors")
    weights(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    changed = {key: value for key, value in {**settings_of(folder), **settings}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(changed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_told_as_it_is_stored(tmp_path, kind):
    model = tiny_model(kind, 2, 1)
    save_ordinary(model, tmp_path)
    is_stored = "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert is_stored == (kind in ("v1.1", "mt5", "bart-scaled"))
    assert settings_of(tmp_path)["tie_word_embeddings"] == (not is_stored)
    batch = random_batch(4)
    assert torch.equal(
        hf_logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval(), batch), hf_logits(model, batch)
    )
    assert "2+1 layers" in check_ordinary(tmp_path)


def test_a_tied_head_that_is_not_scaled_is_written_out(tmp_path):
    """No setting says it to transformers 4: there a tied head is a scaled one."""
    model = tiny_model("mt5", 2, 1)
    model.lm_head.weight = model.shared.weight
    expected = hf_logits(model, random_batch(4))
    save_ordinary(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["shared.weight"])
    assert settings_of(tmp_path)["tie_word_embeddings"] is False
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.equal(hf_logits(loaded, random_batch(4)), expected)


def head_of_its_own(weights):
    weights["lm_head.weight"] = weights["shared.weight"] + 1


def no_head(weights):
    del weights["lm_head.weight"]


def no_embedding(weights):
    del weights["shared.weight"]


def no_norm(weights):
    del weights["encoder.final_layer_norm.weight"]


def one_layer_less(weights):
    for name in [name for name in weights if name.startswith("encoder.block.1.")]:
        del weights[name]


CONTRADICTIONS = {
    "a head of its own, said to be tied": ("v1.1", {"tie_word_embeddings": True}, "set it to false"),
    "a BART's head of its own, said to be tied": ("bart-scaled", {"tie_word_embeddings": True}, "set it to false"),
    "a head that is not there": ("v1.0", {"tie_word_embeddings": False}, "no lm_head.weight"),
    "a BART's head that is not there": ("bart", {"tie_word_embeddings": False}, "no lm_head.weight"),
    "a scaled head of its own": ("v1.1", {"scale_decoder_outputs": True}, "readers go by one or the other"),
    "a tied head, not scaled": ("v1.0", {"scale_decoder_outputs": False}, "readers go by one or the other"),
    "an encoder less deep": ("v1.1", {"num_layers": 1}, r"says nothing of layer encoder\.block\.1"),
    "a deeper encoder": ("v1.1", {"num_layers": 3}, r"lack encoder\.block\.2\..* asks for"),
    "a deeper decoder": ("v1.1", {"num_decoder_layers": 2}, r"lack decoder\.block\.1\..* asks for"),
    "a BART's depth": ("bart", {"decoder_layers": 2}, r"lack decoder\.layers\.1\..* asks for"),
    "another width": ("v1.1", {"d_model": 16}, r"has shape \[.*32.*\], but config.json says"),
    "a wider feed-forward": ("v1.1", {"d_ff": 64}, r"wi_0\.weight has shape \[48, 32\]"),
    "other heads": ("v1.1", {"num_heads": 2}, "has shape .* but config.json says"),
    "another vocabulary": ("v1.1", {"vocab_size": 96}, r"has shape \[64, 32\], but config.json says \[96, 32\]"),
    "gated, said not to be": ("v1.1", {"feed_forward_proj": "relu"}, r"lack .*DenseReluDense\.wi\.weight"),
    "not gated, said to be": ("v1.0", {"feed_forward_proj": "gated-gelu"}, r"lack .*DenseReluDense\.wi_0\.weight"),
    "gated by one key alone": ("v1.1", {"is_gated_act": False}, "its feed_forward_proj means True"),
    "another activation by one key": ("v1.1", {"dense_act_fn": "relu"}, "its feed_forward_proj means gelu_new"),
    "fewer buckets": ("v1.1", {"relative_attention_num_buckets": 16}, "relative_attention_bias.weight has shape"),
    "a BART's positions": ("bart", {"max_position_embeddings": 64}, "embed_positions.weight has shape"),
    "a start token beyond": ("v1.1", {"decoder_start_token_id": 64}, "beyond its 64 tokens"),
    "no start token": ("v1.1", {"decoder_start_token_id": None}, "names no decoder_start_token_id"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_settings_that_contradict_the_weights_are_refused(tmp_path, name):
    kind, settings, message = CONTRADICTIONS[name]
    save_ordinary(tiny_model(kind, 2, 1), tmp_path)
    check_ordinary(tmp_path)
    damage(tmp_path, **settings)
    with pytest.raises(ValueError, match=message) as refused:
        check_ordinary(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        ("v1.0", head_of_its_own, "set it to false"),
        ("v1.1", no_head, "no lm_head.weight"),
        ("v1.1", no_embedding, "lack shared.weight"),
        ("v1.1", no_norm, "lack encoder.final_layer_norm.weight"),
        ("v1.1", one_layer_less, "lack encoder.block.1"),
    ],
)
def test_weights_that_contradict_the_settings_are_refused(tmp_path, kind, weights, message):
    save_ordinary(tiny_model(kind, 2, 1), tmp_path)
    damage(tmp_path, weights)
    with pytest.raises(ValueError, match=message):
        check_ordinary(tmp_path)


def test_what_no_setting_can_say_is_not_written(tmp_path):
    """A head of its own whose inputs are scaled: transformers 4 would tie it or not scale."""
    save_ordinary(tiny_model("v1.1", 2, 1), tmp_path)
    told = settings_of(tmp_path) | {"tie_word_embeddings": True, "scale_decoder_outputs": True}
    with pytest.raises(ValueError, match=r"another matrix than shared\.weight"):
        write_settings(tmp_path, told)


def test_an_mt5_that_is_said_to_be_tied_is_read_in_two_ways(tmp_path):
    save_ordinary(tiny_model("mt5", 2, 1), tmp_path)
    damage(tmp_path, no_head, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="transformers 4 scales in mt5 and 5 does not"):
        check_ordinary(tmp_path)


def test_an_equal_copy_of_the_embedding_may_be_called_tied(tmp_path):
    def copied(weights):
        weights["lm_head.weight"] = weights["shared.weight"].clone()

    save_ordinary(tiny_model("v1.0", 2, 1), tmp_path)
    damage(tmp_path, copied)
    check_ordinary(tmp_path)
