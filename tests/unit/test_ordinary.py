"""A model folder says of itself what it is: config.json against names, shapes and bytes of the weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from pipeline.__main__ import main
from pipeline.assemble import Parts, write_checkpoint
from pipeline.ordinary import check_ordinary, save_ordinary, write_settings
from pipeline.spans import Assembly
from pipeline.training import save_model
from tests.evaluated import train_tokenizer
from tests.tiny import KINDS, hf_logits, random_batch, read_plainly, tiny_model


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
    assert is_stored == (kind in ("v1.1", "mt5", "umt5", "bart-scaled"))
    assert settings_of(tmp_path)["tie_word_embeddings"] == (not is_stored)
    batch = random_batch(4)
    assert torch.equal(hf_logits(read_plainly(tmp_path), batch), hf_logits(model, batch))
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
    "a BART's head that is not there": ("bart", {"tie_word_embeddings": False}, "(no|such as) lm_head.weight"),
    "a scaled head of its own": ("v1.1", {"scale_decoder_outputs": True}, "readers go by one or the other|to false"),
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
    "an alias of the depth": ("v1.1", {"num_hidden_layers": 1}, r"says nothing of layer encoder\.block\.1"),
    "an alias of the heads": (
        "bart",
        {"num_attention_heads": 2},
        "num_attention_heads 2 and encoder_attention_heads 4",
    ),
    "another class": ("v1.1", {"architectures": ["T5Stack"]}, "but this is a T5ForConditionalGeneration"),
    "stacks that share weights": ("v1.1", {"tie_encoder_decoder": True}, "has tie_encoder_decoder True"),
    "a decoder alone": ("bart", {"is_encoder_decoder": False}, "has is_encoder_decoder False"),
    "another type": ("v1.1", {"dtype": "bfloat16"}, "has dtype bfloat16, but the weights are F32"),
    "another type by the older key": (
        "v1.1",
        {"torch_dtype": "float16"},
        "has dtype float16, float32, but the weights",
    ),
    "beams in one file": ("v1.1", {"num_beams": 4}, "has num_beams 4, but generation_config.json None"),
    "another forced end": ("bart", {"forced_eos_token_id": 3}, "forced_eos_token_id 3, but generation_config.json 2"),
    "another end": ("v1.1", {"eos_token_id": 3}, "eos_token_id 3, but generation_config.json 1"),
}
WRITTEN_ANEW = (  # by assemble, from the weights
    "a head of its own, said to be tied", "a head that is not there", "a tied head, not scaled", "another type",
    "another type by the older key",
)  # fmt: skip


def refusal(capsys, folder):
    """What `doctor FOLDER` says in its one line."""
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", str(folder)])
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return told


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_settings_that_contradict_the_weights_are_refused(tmp_path, capsys, name):
    kind, settings, message = CONTRADICTIONS[name]
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    save_ordinary(tiny_model(kind, 2, 1), teacher)
    damage(teacher, **settings)
    assert re.search(message, refusal(capsys, teacher))
    if name in WRITTEN_ANEW:
        write_checkpoint(Parts.load(teacher, None), Assembly.parse("e1x2-d1"), out)
        check_ordinary(out)
        return
    with pytest.raises(ValueError, match=message) as refused:
        write_checkpoint(Parts.load(teacher, None), Assembly.parse("e1x2-d1"), out)
    assert "\n" not in str(refused.value)
    assert not out.exists()


BESIDE = {
    "from the model's settings": ("generation_config", {"_from_model_config": True}, "may pass it over: remove it"),
    "a forbidden token beyond": ("generation_config", {"suppress_tokens": [3, 64]}, "beyond its 64 tokens"),
    "another start": ("generation_config", {"decoder_start_token_id": 5}, "decoder_start_token_id 0, but generation_"),
    "a list where 4 wants names": ("tokenizer_config", {"extra_special_tokens": ["<x>"]}, "a list of extra_special"),
    "a class that 4 lacks": ("tokenizer_config", {"tokenizer_class": "TokenizersBackend"}, "cannot read"),
    "another padding": ("tokenizer_config", {"pad_token": "<unk>"}, "<unk>, which is token 2, but config.json pad_"),
    "another end of text": ("tokenizer_config", {"eos_token": "<pad>"}, "<pad>, which is token 0, but config.json e"),
    "a token numbered twice": (
        "tokenizer_config", {"added_tokens_decoder": {"9": {"content": "</s>"}}}, "</s> as token 9, but tokenizer.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_files_beside_the_settings_that_contradict_them_are_refused(tmp_path, capsys, name):
    file, settings, message = BESIDE[name]
    train_tokenizer(tmp_path / "tokenizer", ["a b c d", "b a d c"]).save_pretrained(tmp_path / "tokenizer")
    save_model(tiny_model("v1.1", 2, 1), tmp_path / "teacher", tmp_path / "tokenizer")
    check_ordinary(tmp_path / "teacher")
    path = tmp_path / "teacher" / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert re.search(message, refusal(capsys, tmp_path / "teacher"))
    parts, out = Parts.load(tmp_path / "teacher", None), tmp_path / "out"
    if name in ("from the model's settings", "a list where 4 wants names", "a class that 4 lacks"):
        write_checkpoint(parts, Assembly.parse("e1x2-d1"), out)  # as earlier versions wrote them: made right
        check_ordinary(out)
        return
    with pytest.raises(ValueError, match=message) as refused:
        write_checkpoint(parts, Assembly.parse("e1x2-d1"), out)
    assert "\n" not in str(refused.value)
    assert not out.exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    train_tokenizer(tmp_path / "tokenizer", ["a b c d e f g", "b a d c"]).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer\.json has token \d+, but config\.json vocab_size 8"):
        save_model(tiny_model("v1.1", 2, 1, vocab_size=8), tmp_path / "model", tmp_path / "tokenizer")
    assert not (tmp_path / "model").exists()


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
