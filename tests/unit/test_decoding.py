"""Cached decoding of views gives the tokens that transformers' generate gives on the exported folders."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from pipeline.assemble.write import Parts, write_checkpoint
from pipeline.bench import tokens
from pipeline.bench.__main__ import main as bench
from pipeline.decoding import decoder, padded_sources, together
from pipeline.decoding.greedy import NOTHING, lay_out_drafts
from pipeline.decoding.plain import generate, up_to_end
from pipeline.decoding.rules import rules_of
from pipeline.decoding.together import LayerCalls, Member, decode_together
from pipeline.decoding.views import load_pool
from pipeline.spans.prefixes import count_layers, count_prefixes
from pipeline.spans.spans import Assembly
from tests.tiny import KINDS, read_plainly
from tests.unit.test_assemble import make_run

ASSEMBLIES = ("e1x6-d1x6", "e1x6-d2x3", "e2x3-d2x3", "e2x3-d6", "e1x4.2-d3x2")
MAX_NEW = 11
SETTINGS = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "beams, early": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "beams, never": {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.5},
    "greedy, changed scores": {"no_repeat_ngram_size": 2, "min_length": 4, "repetition_penalty": 1.3},
    "beams, changed scores": {
        "num_beams": 4, "no_repeat_ngram_size": 3, "min_length": 5, "forced_bos_token_id": 7, "forced_eos_token_id": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """A run with a teacher and a library of random weights, and the exported folders."""
    run, _ = make_run(tmp_path_factory.mktemp("run"), request.param)
    for text in ASSEMBLIES:
        write_checkpoint(Parts.of(run), Assembly.parse(text), run.root / text)
    return run


def texts(seed: int, count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [[*torch.randint(2, 64, (length,), generator=generator).tolist(), 1] for length in lengths]


def members() -> list[Member]:
    parsed = {text: Assembly.parse(text) for text in ASSEMBLIES}
    return [Member(text, each.encoder.spans, each.decoder.spans) for text, each in parsed.items()]


def by_transformers(folder, sources, settings) -> list[list[int]]:
    model = read_plainly(folder)
    source_BS, mask_BS = padded_sources(model, sources)
    ids_BT = model.generate(input_ids=source_BS, attention_mask=mask_BS, max_new_tokens=MAX_NEW, **settings)[:, 1:]
    return [up_to_end(ids, {model.config.eos_token_id}) for ids in ids_BT.tolist()]


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_generate(run, name, monkeypatch):
    monkeypatch.setitem(together.TOKENS_PER_PART, "cpu", 40)  # several parts, put together again for decoding
    monkeypatch.setattr(decoder, "GROWTH", 3)  # caches grow several times
    settings, sources = SETTINGS[name], texts(1, 12, 10)
    pool = load_pool(run.teacher_model, torch.device("cpu"), run.library)
    config = pool.model.generation_config.to_dict()
    pool.model.generation_config = GenerationConfig(**{**config, **settings, "num_beams": 1})
    rules = rules_of(pool.model, MAX_NEW, settings.get("num_beams", 1))
    expected = {text: by_transformers(run.root / text, sources, settings) for text in ASSEMBLIES}
    references = [[*output[: 1 + i], 5, 1] for i, output in enumerate(expected[ASSEMBLIES[0]])]
    found = decode_together(pool, members(), sources, references, rules)
    assert {text: found[text].tokens for text in ASSEMBLIES} == expected
    without = decode_together(pool, members(), sources, None, rules)
    assert {text: (each.tokens, each.losses) for text, each in without.items()} == {
        t: (expected[t], []) for t in expected
    }
    assert len({tuple(output) for each in expected.values() for output in each}) > 5, "outputs that hardly differ"


@pytest.mark.parametrize("name", ["greedy", "beams, early", "greedy, changed scores"])
def test_each_output_begins_with_what_its_example_asks_for(run, name):
    settings, sources, some = SETTINGS[name], texts(3, 6, 10), ASSEMBLIES[:3]
    forced = [(7, 9)[i % 2] for i in range(len(sources))]
    pool = load_pool(run.teacher_model, torch.device("cpu"), run.library)
    config = pool.model.generation_config.to_dict() | settings | {"num_beams": 1}
    pool.model.generation_config = GenerationConfig(**config | {"forced_bos_token_id": 5})
    rules, expected = rules_of(pool.model, MAX_NEW, settings.get("num_beams", 1)), {}
    for text in some:
        model = read_plainly(run.root / text)
        model.generation_config = GenerationConfig(**config)
        expected[text] = generate(model, sources, MAX_NEW, rules.num_beams, forced)
    assert [output[0] for output in expected[some[0]]] == forced
    alone = settings | {"forced_bos_token_id": forced[1]}
    assert expected[some[0]][1] == by_transformers(run.root / some[0], sources[1:2], alone)[0]
    references = [[*output[: 1 + i], 5, 1] for i, output in enumerate(expected[some[0]])]
    for guesses in (references, None):
        found = decode_together(pool, members()[:3], sources, guesses, rules, forced_bos_ids=forced)
        assert {text: found[text].tokens for text in some} == expected


def test_losses_are_those_of_the_exported_models(run):
    sources, references = texts(1, 7, 10), texts(2, 7, 15)
    pool = load_pool(run.teacher_model, torch.device("cpu"), run.library)
    found = decode_together(pool, members(), sources, references, rules_of(pool.model, 3, 1))
    for text in ASSEMBLIES:
        model = read_plainly(run.root / text)
        for source, reference, loss in zip(sources, references, found[text].losses, strict=True):
            labels = torch.tensor([reference])
            with torch.no_grad():
                mean = model(input_ids=torch.tensor([source]), labels=labels).loss
            assert loss == pytest.approx(float(mean) * len(reference), rel=1e-5)


def test_references_that_break_off_leave_nothing_in_the_outputs(run):
    sources = texts(1, 6, 10)
    expected = by_transformers(run.root / ASSEMBLIES[0], sources, {})
    references = [output[: 2 + i] for i, output in enumerate(expected)]  # right as far as they go, and without an end
    pool = load_pool(run.teacher_model, torch.device("cpu"))
    found = decode_together(pool, members()[:1], sources, references, rules_of(pool.model, MAX_NEW, 1))
    assert found[ASSEMBLIES[0]].tokens == expected


def test_layers_are_called_once_for_each_distinct_prefix(run):
    calls = LayerCalls()
    pool = load_pool(run.teacher_model, torch.device("cpu"), run.library)
    decode_together(pool, members(), texts(1, 3, 5), texts(2, 3, 5), rules_of(pool.model, 3, 1), calls)
    encoders = [member.encoder for member in members()]
    assert calls.encoder == count_prefixes(encoders) == 6 + 3 + 1 < count_layers(encoders)
    # e1x6: 6 + 3, e2x3: 3 + 1, e1x4.2: 2
    assert calls.decoder == 9 + 4 + 2


def test_what_generate_would_do_and_rules_do_not_carry_is_refused(run):
    pool = load_pool(run.teacher_model, torch.device("cpu"))
    pool.model.generation_config.encoder_no_repeat_ngram_size = 3
    with pytest.raises(ValueError, match="encoder_no_repeat_ngram_size"):
        rules_of(pool.model, 3, 1)


def test_drafts_are_laid_side_by_side():
    class Rules:
        max_new_tokens = 3

    laid = lay_out_drafts([[[5], [6, 7]], [[1, 2, 3, 4], []]], Rules(), torch.device("cpu"))  # type: ignore[arg-type]
    n = NOTHING
    assert laid.tolist() == [[n, 5, n, n, n, n, 1, 2, 3, n], [n, 6, 7, n, n, n, n, n, n, n]]


def test_the_comparison_at_full_size_tells_what_differs(monkeypatch, capsys):
    monkeypatch.setattr(tokens, "MAX_NEW", 6)
    options = ["tokens", "--random", "bart", "--examples", "4", "--num-beams", "2"]
    assert bench(options) == 0
    assert "agree on 20 of 20; ours differs on 0 of these. Others: 0 (0.00%)" in capsys.readouterr().out
    whole = tokens.together

    def changed(case, num_beams):
        found = whole(case, num_beams)
        found["e6-d6"][2] = [5, 1]
        return found

    monkeypatch.setattr(tokens, "together", changed)
    assert bench(options) == 2
    printed = capsys.readouterr()
    assert "ours differs on 1 of these" in printed.out
    assert "e6-d6, input 2: OURS DIFFERS" in printed.out
    assert printed.err.startswith("error: outputs differ by more than ties")


def test_the_comparison_reads_a_umt5_as_its_assemblies_compute(tmp_path, capsys):
    run, _ = make_run(tmp_path, "umt5")
    write_checkpoint(Parts.of(run), Assembly.parse("e2x3-d2x3"), tmp_path / "out")
    sources = texts(1, 12, 10)
    case = tokens.Case(
        "umt5", run.teacher_model, run.library, {"e2x3-d2x3": tmp_path / "out"}, sources, sources, MAX_NEW, 1000
    )
    tokens.compare(case, num_beams=4)
    assert "ours differs on 0 of these" in capsys.readouterr().out


def test_gaps_are_those_of_the_tokens_or_texts_that_differ():
    class Model(torch.nn.Module):
        """Says a token with a log probability that is 0.1 less than that of the one before it in the vocabulary."""

        generation_config = GenerationConfig(length_penalty=1.0)

        def forward(self, input_ids, labels, use_cache):
            logits_V = -torch.arange(40, dtype=torch.float64) / 10
            return type("Output", (), {"logits": logits_V.expand(1, labels.shape[1], 40)})

    model, alike = Model(), [[5, 7, 1], [5, 9, 1], [5, 7, 1]]
    assert tokens.max_gap(model, [2], alike, 1) == pytest.approx(0.2)
    assert tokens.max_gap(model, [2], alike, 4) == pytest.approx(0.2 / 3)
    assert tokens.max_gap(model, [2], [[5, 7], [5, 7, 1]], 1) == float("inf"), "one goes on: no token to compare"


def test_weights_are_in_the_type_that_is_asked_for(run):
    """Those of the module library, too; and products are rounded only where that is asked for."""
    for dtype, expected, rounds in (
        ("bfloat16", torch.bfloat16, False), ("tf32", torch.float32, True), ("checkpoint", torch.float32, False),
    ):  # fmt: skip
        pool = load_pool(run.teacher_model, torch.device("cpu"), run.library, dtype)
        weights = [w for layers in pool.layers.values() for layer in layers.values() for w in layer.parameters()]
        assert {weight.dtype for weight in (*weights, *pool.shared.parameters())} == {expected}
        assert torch.backends.cuda.matmul.allow_tf32 is rounds
        found = decode_together(pool, members()[:2], [[5, 6, 1]], [[7, 1]], rules_of(pool.model, 3, 1))
        assert all(len(each.tokens[0]) <= 3 for each in found.values())
