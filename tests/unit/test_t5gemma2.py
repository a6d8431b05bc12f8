"""T5Gemma 2: layers of two kinds, a config in parts, rotary positions, and a vision tower that texts never use."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.families import family_of
from pipeline.model.huggingface import load_model
from pipeline.model.leaves import initial_layer
from pipeline.model.modular import ModularModel
from pipeline.ordinary import check_ordinary, save_ordinary
from pipeline.spans.spans import modular_spans
from tests.tiny import ATTENTION_TYPES, FULL, SLIDING, hf_logits, random_batch, tiny_model

KEYS = {  # keys of the public config.json of 270M-270M, by part
    (): """architectures attention_dropout bos_token_id classifier_dropout_rate decoder dropout_rate dtype encoder
        eoi_token_index eos_token_id image_token_index initializer_range is_encoder_decoder model_type pad_token_id
        transformers_version vocab_size""",
    ("decoder",): """_sliding_window_pattern attention_bias attention_dropout attn_logit_softcapping dropout_rate dtype
        final_logit_softcapping head_dim hidden_activation hidden_size initializer_range intermediate_size layer_types
        max_position_embeddings model_type num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps
        query_pre_attn_scalar rope_parameters sliding_window use_bidirectional_attention use_cache vocab_size""",
    ("encoder",): """attention_dropout boi_token_index dropout_rate dtype eoi_token_index image_token_index model_type
        initializer_range mm_tokens_per_image text_config vision_config vocab_size""",
    ("encoder", "text_config"): """_name_or_path add_cross_attention chunk_size_feed_forward decoder_start_token_id
        finetuning_task id2label is_decoder is_encoder_decoder label2id output_attentions output_hidden_states prefix
        problem_type return_dict sep_token_id task_specific_params tie_word_embeddings tokenizer_class""",
    ("decoder", "rope_parameters"): "full_attention sliding_attention",
    ("decoder", "rope_parameters", "full_attention"): "factor rope_theta rope_type",
}  # fmt: skip


@pytest.mark.parametrize("part", KEYS)
def test_every_key_of_a_t5gemma2_and_of_its_parts_is_on_one_of_four_lists(part):
    keys = family_of("t5gemma2").keys
    for name in part:
        keys = keys.parts[name]
    for key in KEYS[part].split():
        lists = (keys.carried, keys.harmless, {*keys.only, *keys.equal}, keys.parts)
        assert sum(key in each for each in lists) == 1 + (key in keys.carried & keys.harmless), key
    assert family_of("t5gemma2").keys.refusal(tiny_model("t5gemma2").config.to_dict()) is None


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (["decoder"], {"final_logit_softcapping": 30.0}),
        (["encoder", "text_config"], {"attn_logit_softcapping": 50.0}),
        (["encoder", "text_config"], {"use_bidirectional_attention": True}),
        (["decoder", "rope_parameters", "full_attention"], {"rope_type": "yarn"}),
        ([], {"tie_word_embeddings": False}),
        ([], {"encoder": "small"}),
    ],
)
def test_what_a_part_of_a_t5gemma2_does_not_carry_is_refused_by_its_key(part, settings):
    told = tiny_model("t5gemma2").config.to_dict()
    changed = told
    for name in part:
        changed = changed[name]
    changed |= settings
    (key,) = settings
    assert family_of("t5gemma2").keys.refusal(told).startswith(f"has {key} ")


@pytest.mark.parametrize("init", ["first", "middle", "last", "average"])
def test_a_modular_layer_has_the_attention_type_of_the_last_layer_of_its_span(init):
    model = tiny_model("t5gemma2")
    for stack, kinds in zip(("encoder", "decoder"), ATTENTION_TYPES, strict=True):
        layers = family_of("t5gemma2").layers(model, stack)
        for span in modular_spans(6, (2, 3, 6)):
            layer = initial_layer(layers, span, init)
            assert layer.attention_type == layer.self_attn.layer_type == kinds[span.last]
            assert layer.self_attn.is_sliding == (kinds[span.last] == SLIDING)


def test_layer_types_are_written_for_the_layers_that_are_kept():
    """transformers would give them to these by their index: the first five of six would be sliding."""
    family, told = family_of("t5gemma2"), tiny_model("t5gemma2").config.to_dict()
    changed = family.with_layers(told, {"encoder": [1, 3], "decoder": [5]})
    assert family.depths(changed) == (2, 1)
    assert changed["encoder"]["text_config"]["layer_types"] == [FULL, SLIDING]
    assert changed["decoder"]["layer_types"] == [FULL]
    assert family.depths(told) == (6, 6), "the original is as it was"
    for stack in (told["encoder"]["text_config"], told["decoder"]):
        del stack["layer_types"]
    changed = family.with_layers(told, {"encoder": [4, 5], "decoder": range(6)})
    assert changed["encoder"]["text_config"]["layer_types"] == [SLIDING, FULL]


def test_a_t5gemma2_is_trained_with_positions_that_bf16_does_not_round_and_its_vision_tower_as_it_is():
    model = tiny_model("t5gemma2")
    trained = copy.deepcopy(model)
    family_of("t5gemma2").prepare_for_training(trained)
    assert trained.state_dict().keys() == model.state_dict().keys()
    batch = random_batch(8)
    assert torch.equal(hf_logits(trained, batch), hf_logits(model, batch))
    modular = ModularModel(copy.deepcopy(trained), family_of("t5gemma2"), ((2,), (2,)), "last")
    assert torch.equal(modular(batch, [modular.stacks.teacher()]).student_logits_NV, hf_logits(model, batch))
    frozen = {name for name, parameter in trained.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "vision_tower" in name or "projector" in name}
    positions_1L = torch.arange(500, 520)[None]
    for stack in ("encoder.text_model", "decoder"):
        theirs, ours = (each.model.get_submodule(stack).rotary_emb for each in (model, trained.bfloat16()))
        for kind in (FULL, SLIDING):
            states = torch.empty(0, dtype=torch.float32)
            assert_equal = zip(ours(states, positions_1L, kind), theirs(states, positions_1L, kind), strict=True)
            assert all(torch.equal(a, b) for a, b in assert_equal)


def test_parts_of_a_public_t5gemma2_are_read_in_one_type_and_under_their_older_names(tmp_path):
    """The public config.json has a dtype in each part, in which transformers loads that part whatever is asked."""
    model = tiny_model("t5gemma2", 2, 2)
    save_ordinary(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith(family_of("t5gemma2").layer_prefix("encoder")) for name in weights)
    older = {name.replace(".vision_tower.", ".vision_tower.vision_model."): each for name, each in weights.items()}
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((tmp_path / "config.json").read_text())
    parts = told["encoder"]["text_config"], told["encoder"]["vision_config"], told["encoder"], told["decoder"]
    for part in parts:
        part["dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(told))
    check_ordinary(tmp_path)
    loaded = load_model(tmp_path)
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    save_ordinary(loaded, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "dtype" not in again["decoder"].keys() | again["encoder"].keys() | again["encoder"]["text_config"].keys()


def test_outputs_of_a_t5gemma2_begin_in_decoding_as_in_training(tmp_path):
    save_ordinary(tiny_model("t5gemma2", 2, 2), tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder_start_token_id": 0}))
    with pytest.raises(ValueError, match=r"bos_token_id 2, but generation_config.json decoder_start_token_id 0: "):
        check_ordinary(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text()) | {"decoder_start_token_id": 0}
    assert "unless they are equal" in family_of("t5gemma2").keys.refusal(told)
