"""Counts, memory and traffic of a training run, and what `auto` makes of them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from pipeline.config.recipe import BatchConfig, LoopConfig
from pipeline.families import family_of
from pipeline.footprint.estimate import (
    GIB,
    Machine,
    choose_ds_config,
    local_flops,
    plan,
    summary,
    traffic,
    useful_flops,
)
from pipeline.footprint.rank_memory import memory
from pipeline.footprint.sharding import Sharding, read_ds_config
from pipeline.footprint.sizes import sizes_of
from pipeline.model.leaves import ModularLeaf, TeacherLeaf
from pipeline.model.modular import ModularModel
from pipeline.spans.spans import Assembly
from tests.tiny import tiny_t5

BATCH = BatchConfig(tokens_per_micro_batch=16384, micro_batches_per_step=64)


def sizes_of_modular(model, granularities=(2, 3, 6)):
    modular = ModularModel(
        model, family_of(model.config.model_type), (granularities, granularities), "last", share_memory=True
    )
    return sizes_of(modular, [TeacherLeaf, ModularLeaf]), modular


@pytest.fixture(scope="module")
def t5_large():
    config = T5Config(d_model=1024, d_kv=64, d_ff=4096, num_heads=16, num_layers=24, decoder_start_token_id=0)
    with torch.device("meta"):
        return sizes_of_modular(T5ForConditionalGeneration(config))[0]


@pytest.fixture(scope="module")
def mt5_xxl():
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
    config = MT5Config(vocab_size=250112, tie_word_embeddings=False, decoder_start_token_id=0, **sizes)
    with torch.device("meta"):
        return sizes_of_modular(MT5ForConditionalGeneration(config))[0]


def gpus(num_ranks, gib=80, ranks_per_node=8):
    return Machine(num_ranks, min(num_ranks, ranks_per_node), gib * GIB, is_gpu=True)


def test_a_module_is_counted_parameter_by_parameter():
    sizes, modular = sizes_of_modular(tiny_t5("v1.1"))
    assert sizes.num_trained == sum(p.numel() for p in modular.parameters() if p.requires_grad)
    assert sizes.num_frozen == sum(p.numel() for p in modular.parameters() if not p.requires_grad)
    assert sum(leaf.trained for leaf in sizes.leaves) == 12
    assert sum(leaf.stack == "decoder" for leaf in sizes.leaves) == 12
    assert sizes.vocabulary == 64
    assert sizes.num_trained_of_rest == 0


def test_three_granularities_train_about_as_much_as_the_layers_of_the_teacher(t5_large):
    """12 + 8 + 4 modular layers for 24."""
    layers = [
        sum(leaf.num_parameters for leaf in t5_large.leaves if leaf.trained is trained) for trained in (True, False)
    ]
    assert layers[0] == layers[1]
    assert t5_large.num_frozen == pytest.approx(737.7e6, rel=1e-3)  # T5-large's size in the literature


def test_memory_by_hand(t5_large):
    """Stage 3 in bf16 on 4 ranks: weights 2 bytes; fp32 weights, moments and gradients 16; shared out."""
    sharding = Sharding.of("zero3", 4, 4)
    needs = memory(t5_large, sharding, 1024, recompute=False)
    total, trained = t5_large.num_frozen + t5_large.num_trained, t5_large.num_trained
    assert needs.device["weights"] == 2 * total / 4
    assert needs.device["fp32 weights and moments"] + needs.device["gradients"] == 16 * trained / 4
    assert not needs.host
    kept = memory(t5_large, Sharding.of("zero3_hpz", 16, 4), 1024, recompute=False)
    assert kept.device["weights kept in the node"] == 2 * total / 4
    replicated = memory(t5_large, Sharding.of("zero2_replicated", 4, 4), 1024, recompute=False)
    assert replicated.device["weights"] == 2 * total
    assert "gathered layers" not in replicated.device
    offloaded = memory(t5_large, Sharding.of("zero3_offload", 4, 4), 1024, recompute=False)
    assert offloaded.host_total == pytest.approx(2 * total / 4 + 20 * trained / 4)
    assert offloaded.device_total < needs.device_total - 20 * trained / 4
    assert needs.device["gathered layers"]
    assert "gradients to step with" not in needs.device
    assert memory(t5_large, sharding, 1024, recompute=True).device["activations"] < needs.device["activations"] / 2


def test_a_setting_that_is_null_is_deepspeeds_default(tmp_path):
    config = read_ds_config("zero2_replicated")
    config["zero_optimization"]["overlap_comm"] = None
    path = tmp_path / "null.json"
    path.write_text(json.dumps(config))
    assert Sharding.of(str(path), 2, 2).num_buckets == 1


def test_the_optimizer_copies_gradients_when_there_are_no_activations(t5_large, tmp_path):
    """The larger of both moments counts; on CPUs a pass holds what gloo receives into, too."""
    config = read_ds_config("zero3")
    config["zero_optimization"] |= {"stage3_max_live_parameters": 0, "sub_group_size": 3e8}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(config))
    on_gpu, on_cpu = (
        memory(t5_large, Sharding.of(str(path), 2, 2, is_gpu=gpu), 8, recompute=False) for gpu in (True, False)
    )
    assert on_gpu.device == on_cpu.device
    assert on_gpu.device["gradients to step with"] == 4 * 3e8
    assert not {"activations", "gathered layers"} & on_gpu.device.keys()
    on_gpu, on_cpu = (
        memory(t5_large, Sharding.of(str(path), 2, 2, is_gpu=gpu), 16384, recompute=False).device
        for gpu in (True, False)
    )
    assert "gradients to step with" not in on_gpu
    assert on_gpu["gathered layers"] == 2 * max(t5_large.rest)
    assert on_cpu["gathered layers"] == 2 * on_gpu["gathered layers"]


def test_layers_that_are_gathered_ahead_stay_up_to_the_bound(t5_large, mt5_xxl):
    """Of a model below it, which then lies whole on each rank while a pass runs."""
    sharding = Sharding.of("zero3", 8, 8)
    assert memory(t5_large, sharding, 16384, recompute=False).device["gathered layers"] == 2 * (
        1e9 + max(t5_large.rest)
    )
    needs = memory(mt5_xxl, sharding, 16384, recompute=False)
    assert needs.device["gathered layers"] == 2 * (1e9 + max(mt5_xxl.rest))
    small = dataclasses.replace(t5_large, leaves=tuple(leaf for leaf in t5_large.leaves if leaf.trained)[:20])
    whole = small.num_trained + small.num_frozen
    assert memory(small, sharding, 16384, recompute=False).device["gathered layers"] == 2 * whole


@pytest.mark.parametrize("is_gpu", [True, False])
def test_what_a_pass_holds_by_hand(t5_large, is_gpu):
    """T5-large in bf16: a decoder layer has 8 linear maps of 1024 to 1024 and two between 1024 and 4096. On CPUs gloo
    receives gradients into a buffer of its own."""
    sharding = Sharding.of("zero3", 4, 4, is_gpu=is_gpu)
    width, decoder = 8 * 2048 + 2 * 5120, 8 * 2**20 + 2 * 2**22 + 3 * 1024
    device = memory(t5_large, sharding, 16384, recompute=False).device
    assert device["reduction buffer"] == 2 * 2e8
    assert device["gradients of a layer"] == 2 * decoder * (1 if is_gpu else 2)
    assert device["activations"] == 2 * 16384 * 24 * width
    assert device["logits"] == 2 * 2 * 32128 * 8192
    again = memory(t5_large, sharding, 2 * 16384, recompute=True).device
    assert again["activations"] == 2 * 2 * 16384 * (24 * width / 8 + width)
    assert again["logits"] == 2**30  # in chunks
    encoder = next(leaf for leaf in t5_large.leaves if leaf.trained)
    small = dataclasses.replace(t5_large, leaves=(*(leaf for leaf in t5_large.leaves if not leaf.trained), encoder))
    device = memory(small, sharding, 16384, recompute=False).device
    assert device["reduction buffer"] == 2 * encoder.num_parameters
    assert device["gradients of a layer"] == 2 * encoder.num_parameters * (1 if is_gpu else 2)
    trained = dataclasses.replace(t5_large, num_trained_of_rest=sum(t5_large.rest))
    assert memory(trained, sharding, 16384, recompute=False).device["logits"] == (2 + 12) * 32128 * 8192


def test_plain_linear_layers_keep_what_was_gathered_until_backward(t5_large, tmp_path):
    """In the local phase that is every modular layer, whatever the number of ranks; not where layers run again."""
    config = read_ds_config("zero3")
    config["zero_optimization"]["memory_efficient_linear"] = False
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(config))
    ours, plain = (
        [memory(t5_large, Sharding.of(name, 64, 8), 16384, recompute=each).device_total for each in (False, True)]
        for name in ("zero3", str(path))
    )
    assert plain[0] - ours[0] == pytest.approx(2 * t5_large.num_trained)
    assert plain[1] == ours[1]
    coarse = dataclasses.replace(
        t5_large, leaves=tuple(leaf for leaf in t5_large.leaves if not leaf.trained) + t5_large.leaves[-1:]
    )
    assert memory(coarse, Sharding.of(str(path), 64, 8), 16384, recompute=False).device[
        "weights kept for backward"
    ] == (
        2 * t5_large.num_trained  # a path of nearly all teacher layers, which are as many parameters
    )


@pytest.mark.parametrize("is_gpu", [True, False])
def test_the_copy_for_saving_lies_in_the_memory_of_the_host(t5_large, is_gpu):
    """Which on a CPU is the rank's own."""
    sharding = Sharding.of("zero3", 4, 4, is_gpu=is_gpu)
    alone, beside = (memory(t5_large, sharding, 1024, recompute=False, save_beside=each) for each in (False, True))
    copy = 12 * t5_large.num_trained / 4
    assert beside.device_total - alone.device_total == pytest.approx(0 if is_gpu else copy)
    assert beside.host_total == pytest.approx(copy if is_gpu else 0)


def test_traffic_by_hand(t5_large):
    total, trained = t5_large.num_frozen + t5_large.num_trained, t5_large.num_trained
    sharded = traffic(t5_large, Sharding.of("zero3", 16, 8), num_micro_batches=2)
    assert sharded.gathered == pytest.approx(2 * 2 * total * 2 * 15 / 16)
    assert sharded.reduced == pytest.approx(2 * trained * 2 * 15 / 16)
    assert sharded.between_nodes == pytest.approx((sharded.gathered + sharded.reduced) * (1 / 2) / (15 / 16))
    replicated = traffic(t5_large, Sharding.of("zero2_replicated", 16, 8), num_micro_batches=2)
    assert replicated.gathered == pytest.approx(2 * trained * 15 / 16)
    kept = traffic(t5_large, Sharding.of("zero3_hpz", 16, 8), num_micro_batches=2)
    # frozen weights cross once in a run, trained ones once after each step, gradients in each micro-batch
    assert kept.between_nodes == pytest.approx((2 * trained + 2 * trained * 2) / 2)
    assert traffic(t5_large, Sharding.of("zero3", 8, 8), num_micro_batches=2).between_nodes == 0


@pytest.mark.parametrize(
    ("model", "machine", "chosen"),
    [
        ("t5_large", gpus(8), "zero2_replicated"),
        ("mt5_xxl", gpus(16, gib=192), "zero2_replicated"),
        ("mt5_xxl", gpus(16, gib=64), "zero3_hpz"),
        ("mt5_xxl", gpus(8, gib=80), "zero3"),
        ("mt5_xxl", gpus(2, gib=80), "zero3_offload"),
        ("t5_large", Machine(2, 2, 64 * GIB, is_gpu=False), "zero2_cpu"),
        ("t5_large", Machine(4, 4, 21 * GIB, is_gpu=False), "zero3_cpu"),
    ],
)
def test_auto_takes_what_moves_least_of_what_fits(model, machine, chosen, request):
    sizes = request.getfixturevalue(model)
    batch = dataclasses.replace(BATCH, tokens_per_micro_batch=4096)
    name, said = plan(sizes, machine, batch, LoopConfig(ds_config="auto", recompute_activations=model == "mt5_xxl"))
    assert name == chosen
    trained, configuration, needed = said
    assert f"DeepSpeed configuration {chosen}, chosen by auto" in configuration
    assert f"{sizes.num_trained:,} parameters" in trained
    assert f"{machine.num_ranks} ranks" in needed


def test_auto_says_what_to_do_when_nothing_fits(mt5_xxl):
    with pytest.raises(ValueError, match=r"nothing fits into 13.6 GiB .*zero3_offload.*more ranks"):
        choose_ds_config(mt5_xxl, gpus(1, gib=16), 16384, recompute=False)


def test_a_named_configuration_stays_and_is_described(t5_large):
    name, said = plan(t5_large, gpus(2), BATCH, LoopConfig(ds_config="zero3"))
    assert name == "zero3"
    assert "as the recipe says" in said[1]
    assert "a checkpoint takes 7.88 GiB" in said[-1]
    assert "3.94 GiB of host memory" in said[-1]  # the copy of what is saved
    assert all(len(line.split()) <= 25 for line in said)
    _, alone = plan(t5_large, gpus(2), BATCH, LoopConfig(ds_config="zero3", save_beside=False))
    assert "of host memory" not in alone[-1]
    sharding = Sharding.of("zero3_offload", 2, 2)
    assert "of host memory" in summary(t5_large, sharding, BATCH, LoopConfig(), "because")[-1]


def test_useful_flops_count_parameters_and_tokens():
    sizes, modular = sizes_of_modular(tiny_t5("v1.1"), granularities=(6,))
    encoder, decoder = (
        next(leaf.num_parameters for leaf in sizes.leaves if leaf.stack == stack) for stack in ("encoder", "decoder")
    )
    cross = 2 * 32 * 32  # keys and values of the source tokens
    expected = 6 * 2 * encoder * 10 + 6 * 2 * ((decoder - cross) * 4 + cross * 10)  # teacher
    expected += 6 * encoder * 10 + 6 * 4 * ((decoder - cross) * 4 + cross * 10)  # student
    expected += 6 * modular.shared.head.weight.numel() * 4
    draw = Assembly.parse("e6-d1x6")
    assert useful_flops(sizes, 10, 4, [draw]) == useful_flops(sizes, 10, 4, [draw, draw]) == expected
    # a second student is the teacher through the encoder, and shares no decoder layer; the teacher's logits are there
    expected += 6 * ((decoder - cross) * 4 + cross * 10) + 4 * modular.shared.head.weight.numel() * 4
    assert useful_flops(sizes, 10, 4, [draw, Assembly.parse("e1x6-d6")]) == expected


def test_memory_knows_what_several_draws_keep(t5_large):
    """Nothing more while their paths together are no longer than the teacher's; else as much as they are longer."""
    sharding = Sharding.of("zero2_replicated", 4, 4)

    def activations(*draws: str, recompute: bool = False) -> float:
        sizes = dataclasses.replace(t5_large, draws=tuple(map(Assembly.parse, draws)))
        return memory(sizes, sharding, 16384, recompute=recompute).device["activations"]

    one = activations()
    assert activations("e2x12-d2x12") == activations("e2x12-d2x12", "e6x4-d6x4") == one
    longest = "e2.1x22-d1x24", "e3.1x21-d1x24"
    assert activations(*longest) == pytest.approx(one * 48 / 24)  # the decoder, of 24 layers for each
    assert activations(*longest, longest[0]) == activations(*longest)
    widest = max(leaf.width for leaf in t5_large.leaves)
    deeper = activations(*longest, recompute=True) - activations(recompute=True)
    assert deeper == pytest.approx(2 * 16384 * 24 * widest / 8)


def test_local_flops_count_the_teacher_once_and_no_gradient_of_its_encoding():
    sizes, _ = sizes_of_modular(tiny_t5("v1.1"), granularities=(6,))
    encoder, decoder = (
        next(leaf.num_parameters for leaf in sizes.leaves if leaf.stack == stack) for stack in ("encoder", "decoder")
    )
    cross = 2 * 32 * 32  # keys and values of the source tokens
    through = encoder * 10 + (decoder - cross) * 4 + cross * 10  # one layer of each stack
    assert local_flops(sizes, 10, 4) == (6 * 2 + 6) * through - 2 * cross * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "stage 3, or stage 2"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "without offload"),
        ({"fp16": {"enabled": True}}, "bf16 or fp32"),
        ({"gradient_clipping": 1.0}, "the recipe decides these"),
        ({"zero_optimization": True}, "mine.json: zero_optimization is True: it must be a JSON object"),
        ({"bf16": True}, "mine.json: bf16 is True"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size is"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param must be"),
    ],
)
def test_configurations_that_the_engine_does_not_run_are_refused(tmp_path, change, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(read_ds_config("zero3") | change))
    with pytest.raises(ValueError, match=message):
        read_ds_config(str(path))
    with pytest.raises(ValueError, match=r"choose from .*zero2_replicated.* auto"):
        read_ds_config("zero4")
