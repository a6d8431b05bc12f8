"""The built-in corpus: distinct, unambiguous, repeatable, with combinations that only the test part holds."""

from __future__ import annotations

import itertools

import pytest

from data_prep import demo
from data_prep.demo import HELD_OUT_PAIRS, DemoPair, is_held_out, make_corpus

Corpus = dict[str, list[DemoPair]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus(seed=0, num_pairs=6000, num_validation=200, num_test=500)


def neighbours(pair: DemoPair) -> set[tuple[str, str]]:
    kinds = pair.kind.split("+")
    return set(itertools.pairwise(kinds))


def test_parts_have_their_sizes_and_share_no_source(corpus: Corpus) -> None:
    assert {name: len(pairs) for name, pairs in corpus.items()} == {"train": 5300, "validation": 200, "test": 500}
    sources = [pair.source for pairs in corpus.values() for pair in pairs]
    assert len(set(sources)) == 6000


def test_held_out_combinations_occur_in_the_test_part_only(corpus: Corpus) -> None:
    for name in ("train", "validation"):
        assert not any(neighbours(pair) & HELD_OUT_PAIRS or pair.held_out for pair in corpus[name])
    flags = [pair.held_out for pair in corpus["test"]]
    assert sum(flags) == 200
    assert flags == [bool(neighbours(pair) & HELD_OUT_PAIRS) for pair in corpus["test"]]
    assert len(set(flags[:50])) == 2, "the two sorts are mixed"


def test_every_kind_is_trained_on_both_sides_of_other_pairs(corpus: Corpus) -> None:
    trained = set().union(*map(neighbours, corpus["train"]))
    kinds = {kind for pair in HELD_OUT_PAIRS for kind in pair}
    assert len(trained) == len(kinds) ** 2 - len(HELD_OUT_PAIRS)


def test_the_corpus_is_a_function_of_the_seed(corpus: Corpus) -> None:
    assert make_corpus(0, 6000, 200, 500) == corpus
    assert make_corpus(1, 6000, 200, 500)["train"][:5] != corpus["train"][:5]


def test_texts_survive_the_tokenizer(corpus: Corpus) -> None:
    texts = [text for pairs in corpus.values() for pair in pairs for text in (pair.source, pair.target)]
    assert not any("\u00a0" in text or "\u202f" in text or "  " in text or text != text.strip() for text in texts)


def test_number_words_hold_no_and_so_that_lists_are_unambiguous(corpus: Corpus) -> None:
    for pair in corpus["train"]:
        assert pair.source.count(" and ") == pair.target.count(" und ") == (1 if "+" in pair.kind else 0)


def test_some_pairs_read_as_a_person_would_write_them(corpus: Corpus) -> None:
    targets = {pair.source: pair.target for pair in make_corpus(0, 30_000, 1, 1)["train"]}
    assert len(targets) > 29_000
    sample = " / ".join(f"{source} = {target}" for source, target in targets.items())
    for german in (" und ", " Euro", " %", "Kilometer pro Stunde", "hundert", "Freitag, ", " US-Dollar"):
        assert german in sample
    assert is_held_out(("time", "date", "price"))
    assert not is_held_out(("price", "date"))


def test_a_date_has_one_german_form_also_in_may() -> None:
    german_of: dict[str, str] = {}
    for day in range(2 * 366):
        for form in ("short", "medium", "long", "full", "MMMM y"):
            english, german = demo._date(day, form)
            assert german_of.setdefault(english, german) == german
