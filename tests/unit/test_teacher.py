"""What the teacher stage writes is what it trained, for tied and untied heads."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data_prep.config import DataConfig
from data_prep.encode import train_sentencepiece
from pipeline import teacher as teacher_stage
from pipeline.config.recipe import EvaluateConfig, Recipe, TeacherConfig
from pipeline.families import decoder_inputs
from pipeline.model.huggingface import load_model
from pipeline.rundir.run_dir import RunDir
from pipeline.rundir.stage import Stage
from pipeline.training import whole_model as teacher
from tests.tiny import KINDS, hf_logits, random_batch, read_plainly, tiny_bart, tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_trained_weights_are_written_and_an_untied_head_stays_untied(tmp_path, monkeypatch, kind):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    train_sentencepiece([f"{number} words" for number in range(300)], 40, False, tokenizer / "spiece.model")
    trained, start = tiny_model(kind, seed=1), tiny_model(kind, seed=2)
    for each in (trained, start):  # as the tokenizer numbers them
        each.config.pad_token_id, each.config.eos_token_id = 0, 1
        each.generation_config.pad_token_id, each.generation_config.eos_token_id = 0, 1
    for (_, ours), (_, theirs) in zip(start.named_buffers(), trained.named_buffers(), strict=True):
        ours.copy_(theirs)  # BART's logits bias, which does not train
    weights = {f"model.{name}": parameter.detach() for name, parameter in trained.named_parameters()}
    monkeypatch.setattr(teacher, "checkpoints", lambda folder: [folder])
    monkeypatch.setattr(teacher, "full_weights", lambda checkpoint: weights)
    stage = Stage(RunDir(tmp_path), "teacher", {}, {})
    start.save_pretrained(tmp_path / "start")
    teacher.save_trained(load_model(tmp_path / "start"), stage, tmp_path / "out", tokenizer)
    loaded = read_plainly(tmp_path / "out")
    batch = random_batch(0)
    torch.testing.assert_close(hf_logits(loaded, batch), hf_logits(trained, batch), atol=1e-6, rtol=1e-6)


def test_texts_longer_than_learned_positions_are_refused(tmp_path):
    tiny_bart().save_pretrained(tmp_path / "model")
    data = DataConfig(tokenizer="t", max_source_tokens=41, max_target_tokens=40)
    recipe = Recipe(
        data=data, teacher=TeacherConfig(folder=str(tmp_path / "model")), evaluate=EvaluateConfig(max_new_tokens=40)
    )
    with pytest.raises(ValueError, match=r"max_source_tokens is 41, but .* has 40 positions"):
        teacher_stage._starting_model(recipe, RunDir(tmp_path))
    short = dataclasses.replace(recipe, data=dataclasses.replace(data, max_source_tokens=40))
    assert teacher_stage._starting_model(short, RunDir(tmp_path)).config.encoder_layers == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_computes_what_it_does_with_the_usual_mask(kind):
    batch = random_batch(0)
    model = tiny_model(kind).double()
    sums = [teacher.full_model_task(model).module(batch).task_sum]
    starts_BT = decoder_inputs(model.config, batch.labels_BT)
    texts = {"input_ids": batch.source_BS, "attention_mask": batch.source_mask_BS, "decoder_input_ids": starts_BT}
    logits_BTV = model(**texts, use_cache=False).logits
    sums.append(torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum"))
    trained = [each for each in model.parameters() if each.requires_grad]
    of_task, of_plain = (torch.autograd.grad(each, trained, allow_unused=True) for each in sums)
    torch.testing.assert_close(*sums, check_dtype=False)
    for mine, plain in zip(of_task, of_plain, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-3)  # losses and norms are in float32


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t5gemma2"])
def test_a_batch_without_padding_takes_the_memory_of_one_with_it(kind):
    """A run rehearses with such a one."""
    model = teacher.full_model_task(tiny_model(kind)).module
    padded = random_batch(0)
    full = dataclasses.replace(padded, source_mask_BS=torch.ones_like(padded.source_mask_BS))
    assert not padded.source_mask_BS.all()
    kept = []
    for batch in (padded, full):
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(batch)
        kept.append(sum(storages.values()))
        del outputs
    assert kept[0] == kept[1]
