"""What is peculiar to each family, against the unmodified Hugging Face model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM
from transformers.models.bart.modeling_bart import shift_tokens_right
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from pipeline.config import LossConfig
from pipeline.families import StackInputs, family_of
from pipeline.model.huggingface import check_losses, load_model
from pipeline.ordinary import save_ordinary
from pipeline.pretrained import model_of
from pipeline.spans import STACKS
from tests.tiny import (
    KINDS,
    SLIDING,
    hf_logits,
    random_batch,
    tiny_bart,
    tiny_model,
    tiny_t5,
)


def parts(model):
    """(family, shared parts, layers by stack) of a copy that is taken apart."""
    family = family_of(model.config.model_type)
    own = copy.deepcopy(model)
    layers = {stack: list(family.layers(own, stack)) for stack in ("encoder", "decoder")}
    return family, family.take_shared(own), layers


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_states_before_the_first_layer_and_decoder_inputs_are_the_models_own(kind):
    """T5: plain embeddings. BART and its kin: scaled or not, learned positions from offset 2 or sinusoids, a norm of
    each stack's own or none."""
    model = tiny_model(kind)
    family, shared, _ = parts(model)
    batch = random_batch(6)
    start_id = getattr(model.config, family.start_key)
    ids_BT = shift_tokens_right(batch.labels_BT, model.config.pad_token_id, start_id)
    assert torch.equal(shared.decoder_inputs(batch.labels_BT), ids_BT)
    outputs = model(input_ids=batch.source_BS, decoder_input_ids=ids_BT, output_hidden_states=True)
    assert torch.equal(shared.embed("encoder", batch.source_BS), outputs.encoder_hidden_states[0])
    assert torch.equal(shared.embed("decoder", ids_BT), outputs.decoder_hidden_states[0])
    positions_1T = torch.arange(ids_BT.shape[1])[None]
    assert torch.equal(shared.embed_at(ids_BT[:, 3:], positions_1T[:, 3:]), outputs.decoder_hidden_states[0][:, 3:])


@pytest.mark.parametrize(("kind", "norm_class"), [("v1.1", T5LayerNorm), ("umt5", UMT5LayerNorm)])
@torch.no_grad()
def test_t5_is_trained_with_norms_that_are_rounded_once(kind, norm_class):
    """In fp32 equal to transformers' own, in bf16 within half a unit in the last place of float64's value."""
    model = tiny_model(kind)
    trained = copy.deepcopy(model)
    family_of(model.config.model_type).prepare_for_training(trained)
    assert trained.state_dict().keys() == model.state_dict().keys()
    before = [each for each in model.modules() if isinstance(each, norm_class)]
    after = [each for each in trained.modules() if isinstance(each, torch.nn.RMSNorm)]
    assert len(after) == len(before) == 6 * 2 + 6 * 3 + 2
    assert not any(isinstance(each, norm_class) for each in trained.modules())
    batch = random_batch(8)
    torch.testing.assert_close(hf_logits(trained, batch), hf_logits(model, batch), atol=1e-6, rtol=1e-6)
    norm, width = after[0].to(torch.bfloat16), model.config.d_model
    norm.weight.copy_(torch.linspace(0.5, 2.0, width))
    state_ND = torch.randn(200, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact_ND = state_ND.double() * (state_ND.double().square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    exact_ND *= norm.weight.double()
    assert ((norm(state_ND).double() - exact_ND).abs() <= 2**-8 * 1.001 * exact_ND.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_follows_the_last_layer_is_the_models_own(kind):
    """Final norm or none (BART, Marian); tied and untied heads; v1.0's scale; BART's bias."""
    model = tiny_model(kind)
    _, shared, _ = parts(model)
    ends = []
    family_of(model.config.model_type).layers(model, "decoder")[-1].register_forward_hook(
        lambda module, args, output: ends.append(output[0] if isinstance(output, tuple) else output)
    )
    batch = random_batch(7)
    expected = hf_logits(model, batch)
    logits = shared.logits(shared.finish("decoder", ends[0][batch.labels_BT != -100]))
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (kind not in ("v1.1", "mt5", "umt5", "bart-scaled"))


def test_t5_1_0_scales_its_states_before_the_head():
    for kind, scale in (("v1.0", 32**-0.5), ("v1.1", 1.0), ("mt5", 1.0), ("umt5", 1.0)):
        assert parts(tiny_t5(kind))[1].head.scale == scale


def test_a_umt5_scales_its_states_where_its_config_says_that_its_head_is_its_embedding(tmp_path):
    """transformers 5.17 scales every umT5's. 5.24 saves two keys, of which one is true whatever it read."""
    untied = tiny_model("umt5", 2, 2)
    tied = copy.deepcopy(untied)
    tied.lm_head.weight = tied.shared.weight
    tied.config.update({"tie_word_embeddings": True, "scale_decoder_outputs": True})
    for name, model, scale in (
        ("untied", untied, 1.0), ("tied", tied, 32**-0.5), ("not said", tied, 32**-0.5), ("5.24's", untied, 1.0),
    ):  # fmt: skip
        save_ordinary(model, tmp_path / name)
        path = tmp_path / name / "config.json"
        told = json.loads(path.read_text())
        assert told["tie_word_embeddings"] == (model is tied)
        if name == "not said":
            del told["tie_word_embeddings"], told["scale_decoder_outputs"]
        if name == "5.24's":
            told |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
        path.write_text(json.dumps(told))
        loaded = load_model(tmp_path / name)
        assert parts(loaded)[1].head.scale == scale
        assert torch.equal(hf_logits(loaded.eval(), random_batch(0)), hf_logits(model, random_batch(0)))


def test_position_bias_is_taken_out_of_block_0_and_only_there():
    family, shared, layers = parts(tiny_t5())
    for stack in ("encoder", "decoder"):
        names = {name for layer in layers[stack] for name, _ in layer.named_parameters()}
        assert not any(family.is_shared_weight(name) for name in names)
    assert {name for name, _ in shared.named_parameters() if "table" in name} == {
        "bias.encoder.table.weight",
        "bias.decoder.table.weight",
    }


@torch.no_grad()
def test_every_layer_of_a_umt5_has_a_bias_of_its_own_and_takes_it_along():
    """Far distances, too, of which several share a bucket; and in a decoder, cached or not, none sees later tokens."""
    model = tiny_model("umt5", 3, 3)
    family, shared, layers = parts(model)
    assert {name for name, _ in shared.named_parameters() if "bias" in name} == set()
    tables = [layer.layer[0].SelfAttention.relative_attention_bias.weight for each in layers.values() for layer in each]
    assert len({table.data_ptr() for table in tables}) == 6
    ids_BL = torch.randint(2, 64, (2, 300), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.arange(300) < torch.tensor([[300], [250]])
    expected = model(
        input_ids=ids_BL, attention_mask=mask_BL, decoder_input_ids=ids_BL, decoder_attention_mask=mask_BL,
        output_hidden_states=True,
    )  # fmt: skip
    states = (expected.encoder_hidden_states, expected.decoder_hidden_states)
    sources = ((None, None), (expected.encoder_last_hidden_state, mask_BL))
    for stack, before, (encoded, source_mask) in zip(STACKS, states, sources, strict=True):
        inputs = shared.inputs(stack, mask_BL if stack == "encoder" else mask_BL[:1], source_mask)
        for index in (0, 1):
            found_BLD = family.call_layer(layers[stack][index], before[index], encoded, inputs)
            torch.testing.assert_close(found_BLD[mask_BL], before[index + 1][mask_BL], atol=2e-5, rtol=1e-5)
        family.place_layer(layers[stack][1], 0, layers[stack][0])
        assert layers[stack][1].layer[0].SelfAttention.relative_attention_bias.weight.data_ptr() in {
            table.data_ptr() for table in tables
        }


@pytest.mark.parametrize("read", [load_model, model_of])
@torch.no_grad()
def test_targets_of_a_umt5_see_nothing_that_follows_them(tmp_path, read):
    """transformers 5.17 hides it from them only where some target is padded."""
    tiny_model("umt5", 2, 2).save_pretrained(tmp_path)
    model, ids_BT = read(tmp_path), torch.tensor([[4, 5, 6, 7]])
    changed_BT = torch.tensor([[4, 5, 6, 8]])
    before, after = (model(input_ids=ids_BT, decoder_input_ids=each).logits for each in (ids_BT, changed_BT))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


@pytest.mark.parametrize("kind", ["bart", "m2m_100"])
def test_no_layer_is_dropped_in_training(tmp_path, kind):
    """The checkpoint asks for layer drop at 0.9: without the guard hardly a layer of a training step would run."""
    model = tiny_bart(kind)
    model.save_pretrained(tmp_path)
    batch = random_batch(8)
    torch.manual_seed(0)
    assert not torch.allclose(hf_logits(model.train(), batch), hf_logits(model.eval(), batch))
    loaded = load_model(tmp_path)
    assert torch.equal(hf_logits(loaded.train(), batch), hf_logits(model.eval(), batch))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").train()
    assert torch.equal(hf_logits(again, batch), hf_logits(model, batch))


@pytest.mark.parametrize("kind", ["bart", "mbart", "pegasus", "m2m_100", "marian"])
def test_longest_texts(kind):
    assert family_of(kind).max_positions(tiny_model(kind).config) == 40


def test_relative_positions_have_no_end():
    assert family_of("mt5").max_positions(tiny_t5("mt5").config) is None


BOTH = " attention_heads ffn_dim layerdrop layers"  # of encoder and decoder
FAIRSEQ = """activation_dropout activation_function architectures attention_dropout bos_token_id d_model
    decoder_start_token_id dropout eos_token_id init_std is_encoder_decoder max_length max_position_embeddings
    model_type num_beams num_hidden_layers pad_token_id scale_embedding transformers_version use_cache vocab_size"""
STYLES = """ add_bias_logits add_final_layer_norm classif_dropout classifier_dropout gradient_checkpointing id2label
    label2id normalize_before normalize_embedding static_position_embeddings _num_labels forced_eos_token_id"""
KEYS = {  # of the public config.json files; values are those of transformers where it knows the key
    "bart": FAIRSEQ + STYLES + " early_stopping forced_bos_token_id no_repeat_ngram_size task_specific_params prefix",
    "mbart": FAIRSEQ + STYLES + " output_past tokenizer_class early_stopping _name_or_path task_specific_params",
    "pegasus": FAIRSEQ + STYLES + " extra_pos_embeddings force_bos_token_to_be_generated length_penalty",
    "m2m_100": FAIRSEQ + " early_stopping gradient_checkpointing tokenizer_class torch_dtype",
    "marian": FAIRSEQ + STYLES + " bad_words_ids decoder_vocab_size share_encoder_decoder_embeddings _name_or_path",
    "t5": """architectures d_ff d_kv d_model decoder_start_token_id dropout_rate eos_token_id feed_forward_proj
        n_positions initializer_factor is_encoder_decoder layer_norm_epsilon model_type num_decoder_layers num_heads
        num_layers output_past pad_token_id relative_attention_num_buckets relative_attention_max_distance
        task_specific_params
        tie_word_embeddings transformers_version use_cache vocab_size dense_act_fn is_gated_act tokenizer_class""",
    "umt5": """architectures classifier_dropout d_ff d_kv d_model decoder_start_token_id dense_act_fn dropout_rate
        eos_token_id feed_forward_proj initializer_factor is_encoder_decoder is_gated_act layer_norm_epsilon model_type
        num_decoder_layers num_heads num_layers output_past pad_token_id relative_attention_max_distance
        relative_attention_num_buckets scalable_attention tie_word_embeddings tokenizer_class torch_dtype
        transformers_version use_cache vocab_size""",
}  # fmt: skip


@pytest.mark.parametrize("kind", KEYS)
def test_every_key_of_a_public_config_is_on_one_of_three_lists(kind):
    keys = family_of(kind).keys
    public = KEYS[kind].split()
    if kind not in ("t5", "umt5"):
        public += [f"{stack}_{name}" for stack in ("encoder", "decoder") for name in BOTH.split()]
    for key in public:
        assert (key in keys.carried) + (key in keys.harmless) + (key in keys.only or key in keys.equal) >= 1, key
        assert not (key in keys.only and key in keys.carried | keys.harmless)
    assert keys.refusal(CONFIG_MAPPING[kind]().to_dict()) is None


def test_attention_losses_are_refused_where_a_family_has_none():
    check_losses("t5gemma2", LossConfig())
    check_losses("bart", LossConfig(attention_self=1.0))
    for name in ("attention_self", "attention_cross"):
        with pytest.raises(ValueError, match=f"distill.losses.{name} is 0.5, but t5gemma2 has no attention losses"):
            check_losses("t5gemma2", LossConfig(**{name: 0.5}))


REFUSED = {
    "norms elsewhere": ("bart", {"normalize_before": True}),
    "no norms elsewhere": ("mbart", {"normalize_before": False}),
    "learned positions": ("pegasus", {"static_position_embeddings": False}),
    "no norm behind the last layer": ("m2m_100", {"add_final_layer_norm": False}),
    "two vocabularies": ("marian", {"share_encoder_decoder_embeddings": False}),
    "two vocabularies of other sizes": ("marian", {"decoder_vocab_size": 65}),
    "a head of its own": ("m2m_100", {"tie_word_embeddings": False}),
    "sparse attention": ("pegasus", {"attention_type": "block_sparse"}),
    "stacks that share weights": ("mbart", {"tie_encoder_decoder": True}),
    "fewer bits": ("t5", {"quantization_config": {"bits": 4}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_family_does_not_carry_is_refused_by_its_key(tmp_path, name):
    kind, settings = REFUSED[name]
    tiny_model("v1.1" if kind == "t5" else kind, 1, 1).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    (key,) = settings
    with pytest.raises(ValueError, match=f"config.json has {key} ") as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)


class AttentionCalls(TorchDispatchMode):
    """Keeps (operator, address of the mask, whether the mask requires grad) of every attention that runs."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "scaled_dot_product" in str(func):
            mask = kwargs["attn_mask"]
            self.found.append((func, mask.data_ptr(), mask.requires_grad))
        return func(*args, **kwargs)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "umt5"])
def test_layers_hand_the_stacks_own_bias_to_the_fast_attention(kind):
    """No zero bias for cross-attention, no copy of the bias in any layer, and nothing that requires grad in it, which
    would keep PyTorch from its fused attention (on CPU and CUDA alike)."""
    family, shared, layers = parts(tiny_model(kind))
    shared.requires_grad_(False)
    batch = random_batch(5, longest=24)  # few tokens take another way
    encoder = shared.inputs("encoder", batch.source_mask_BS)
    ones_1T = torch.ones_like(batch.labels_BT[:1], dtype=torch.bool)
    decoder = shared.inputs("decoder", ones_1T, batch.source_mask_BS)
    encoded_BSD = shared.embed("encoder", batch.source_BS)
    target_BTD = shared.embed("decoder", shared.decoder_inputs(batch.labels_BT)).requires_grad_()
    with AttentionCalls() as calls:
        family.call_layer(layers["encoder"][1], encoded_BSD.requires_grad_(), None, encoder)
        family.call_layer(layers["decoder"][1], target_BTD, encoded_BSD, decoder)
    fast = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    biases = [encoder.self_bias, decoder.self_bias, decoder.cross_bias]
    if kind == "t5gemma2":  # full attention, then one sliding window over the target, all of the source beside it
        biases[1:] = [decoder.merged_biases[SLIDING]]
    assert calls.found == [(fast, bias.data_ptr(), False) for bias in biases]
    assert decoder.cross_bias.shape == (len(batch.source_BS), 1, 1, batch.source_BS.shape[1])


@pytest.mark.parametrize("kind", ["v1.1", "bart"])
def test_rows_of_biases_start_where_a_gpus_attention_takes_them(kind):
    """Also those of several students, and the others are as if they stood in a row."""
    model = tiny_model(kind)
    _, shared, _ = parts(model.requires_grad_(False))
    for num_tokens in (1, 16, 21):
        mask_BL = torch.arange(num_tokens) < torch.tensor([[num_tokens], [max(1, num_tokens - 3)]])
        biases = [shared.inputs(stack, mask_BL).self_bias for stack in ("encoder", "decoder")]
        inputs = StackInputs(biases[0], shared.cross_bias(mask_BL)).repeated(3)
        assert torch.equal(inputs.self_bias, biases[0].repeat(3, 1, 1, 1))
        for bias in (*biases, inputs.self_bias, inputs.cross_bias, shared.cross_bias(mask_BL)):
            assert all(stride % 16 == 0 for stride in bias.stride()[:-1])
            assert bias.stride(-1) == 1
