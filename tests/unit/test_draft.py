"""Drafts: the teacher's own greedy output, in fewer passes of the teacher, from a folder that plain generate takes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from pipeline import draft
from pipeline.assemble import Parts
from pipeline.ordinary import check_ordinary
from pipeline.rundir import RunDir
from pipeline.spans import Assembly, Stacks
from tests.readers.test_readers import exported

NUM_NEW_TOKENS = 9


def make_parts(root, kind):
    exported(root, kind, ())
    return Parts.of(RunDir(root / "run"))


def random_examples(vocabulary_size, count=3):
    generator = torch.Generator().manual_seed(5)
    sources = [torch.randint(3, vocabulary_size, (1, 4 + index), generator=generator) for index in range(count)]
    return [{"input_ids": source_BS, "attention_mask": torch.ones_like(source_BS)} for source_BS in sources]


@pytest.mark.parametrize("kind", ["v1.1", "bart"])
def test_a_draft_changes_nothing_but_the_time(tmp_path, kind):
    parts = make_parts(tmp_path, kind)
    ways = draft.ways_of(parts)
    assert [way.assembly for way in ways[3:]] == [
        *["e1x4-d4"] * 3, *["e1x4-d2x2"] * 3, *["e4-d4"] * 3, *["e4-d2x2"] * 3,
    ]  # fmt: skip
    examples = random_examples(300)
    found = draft.measure(parts, ways, examples, NUM_NEW_TOKENS)
    differing = [way for way, each in found.items() if each.num_equal < len(examples)]
    assert kind == "bart" or not differing
    assert not any(way.assembly for way in differing)  # prompt lookup fails where a BART forces its last token
    own, chosen = found[ways[0]], draft.best(found, len(examples))
    assert own.num_passes == own.num_tokens
    assert found[chosen].num_tokens == own.num_tokens
    assert min(found[way].num_passes for way in ways[3:]) < own.num_passes
    draft.write_draft(parts, chosen, found, tmp_path / "draft")
    check_ordinary(tmp_path / "draft")
    written = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "draft").eval()
    assert written.generation_config.num_assistant_tokens == chosen.num_assistant_tokens
    teacher = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "teacher" / "model").eval()
    options = {"num_beams": 1, "do_sample": False, "max_new_tokens": NUM_NEW_TOKENS}
    for inputs in examples:
        assert torch.equal(
            teacher.generate(**inputs, **options), teacher.generate(**inputs, **options, assistant_model=written)
        )
    told = json.loads((tmp_path / "draft" / "draft.json").read_text())
    assert told["chosen"] == chosen.name
    assert len(told["ways"]) == len(ways)


def test_a_draft_that_changes_the_output_is_not_chosen():
    slow, fast = draft.Way("slow", "e1x2-d2"), draft.Way("fast", "e2-d2")
    found = {draft.Way(draft.ALONE): draft.Found(3, 10, 10, 4), slow: draft.Found(2, 10, 5, 4)}
    assert draft.best(found | {fast: draft.Found(1, 10, 5, 3)}, 4) == slow
    assert draft.best(found | {fast: draft.Found(1, 10, 5, 4)}, 4) == fast
    with pytest.raises(ValueError, match="no draft gave exactly the teacher's outputs"):
        draft.best({fast: draft.Found(1, 10, 5, 3)}, 4)


def test_a_library_without_shallow_decoders_cannot_draft():
    with pytest.raises(ValueError, match="no decoder of half the teacher's layers"):
        draft.candidates(Stacks.of((6, 6), ((2, 3), ())))
    assert Assembly.parse("e1x6-d3x2") in draft.candidates(Stacks.of((6, 6), ((), (2, 3))))
