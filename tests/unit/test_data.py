"""Training input: the same global batches for any world and any restart, every example once, budgets kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.publish import publish_bytes
from data_prep.reader import SplitReader
from data_prep.shards import (
    FORMAT_VERSION,
    Block,
    Ledger,
    Manifest,
    Split,
    cut_block,
    make_shard,
    publish_index,
    read_manifest,
)
from pipeline.data import Batches, Cursor, MicroBatch, StepBatch, evaluation_batches

Rows = tuple[list[np.ndarray], list[np.ndarray]]
NUM_EXAMPLES = 230
PAD_ID = 0


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """230 examples of 1-20 source and 1-12 target tokens and two extremes; source token 0 of example i is 100 + i."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    rng = np.random.Generator(np.random.Philox(7))
    sources = [rng.integers(1, 90, rng.integers(1, 21)).astype(np.uint16) for _ in range(NUM_EXAMPLES)]
    targets = [rng.integers(1, 90, rng.integers(1, 13)).astype(np.uint16) for _ in range(NUM_EXAMPLES)]
    sources[3], targets[3] = np.full(25, 5, np.uint16), np.full(1, 5, np.uint16)  # the longest source: a short target
    sources[4], targets[4] = np.full(1, 5, np.uint16), np.full(16, 5, np.uint16)
    for number, ids in enumerate(sources):
        ids[0] = 100 + number
    publish_data(folder, [[(sources, targets)]])
    return folder


def publish_data(folder: Path, sets: list[list[Rows]], weights: tuple[int, ...] = (0,), part: str = "train") -> None:
    """A finished data directory: `sets` holds for each set its shards, a shard its sources and targets."""
    shards = []
    for rows in (shard for shards_of_set in sets for shard in shards_of_set):
        shards.append(make_shard(f"{part}/{len(shards):06d}.tar", cut_block(Block.of(*rows), 32)))
        publish_bytes(folder / shards[-1].entry.path, shards[-1].payload)
    count = sum(shard.entry.examples for shard in shards)
    split = Split(
        shards=tuple(shard.entry for shard in shards),
        shards_of_sets=tuple(map(len, sets)),
        index=publish_index(folder, part, [shard.blocks for shard in shards]),
        ledger=Ledger(read=count, written=count, dropped={}, truncated={}),
    )
    described = tuple({"name": f"set{number}", "weight": weight} for number, weight in enumerate(weights))
    Manifest(FORMAT_VERSION, "hash", {}, (), {"pad_id": PAD_ID}, described, {part: split}).publish(folder)


def batches_of(
    data_dir: Path, seed: int = 0, tokens: int = 150, per_step: int = 4, window: int = 64, workers: int = 0
) -> Batches:
    return Batches(data_dir, "train", seed, tokens, per_step, window, workers)


def one_epoch(batches: Batches, epoch: int = 0) -> list[StepBatch]:
    steps, cursor = [], Cursor(epoch=epoch)
    while cursor.epoch == epoch:
        batch, cursor = batches.step(cursor, 0, 1)
        steps.append(batch)
    return steps


def micro_batches_of(steps: list[StepBatch]) -> list[MicroBatch]:
    return [micro_batch for step in steps for micro_batch in step.micro_batches]


def same(first: MicroBatch, second: MicroBatch) -> bool:
    return (
        first.index == second.index
        and np.array_equal(first.example_ids, second.example_ids)
        and torch.equal(first.source_BS, second.source_BS)
        and torch.equal(first.source_mask_BS, second.source_mask_BS)
        and torch.equal(first.labels_BT, second.labels_BT)
    )


geometry = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**40),
        "tokens": st.integers(32, 400),
        "per_step": st.integers(1, 12),
        "window": st.integers(1, 300),
    }
)


@settings(max_examples=60, deadline=None)
@given(geometry, st.integers(0, 5))
def test_an_epoch_holds_every_example_once_within_the_budget(data_dir: Path, shape: dict[str, int], epoch: int) -> None:
    batches = batches_of(data_dir, **shape)
    steps = one_epoch(batches, epoch)
    micro_batches = micro_batches_of(steps)
    seen = np.concatenate([m.example_ids for m in micro_batches])
    assert sorted(seen.tolist()) == list(range(NUM_EXAMPLES))
    assert len(steps) == batches.steps_per_epoch(epoch)
    assert all(m.source_BS.numel() + m.labels_BT.numel() <= shape["tokens"] for m in micro_batches)
    assert all([m.index for m in step.micro_batches] == list(range(shape["per_step"])) for step in steps)


@settings(max_examples=40, deadline=None)
@given(geometry, st.integers(1, 6), st.integers(0, 30), st.integers(0, 3))
def test_any_world_and_workers_see_the_same_global_batches(
    data_dir: Path, shape: dict[str, int], world: int, start: int, workers: int
) -> None:
    shape = {**shape, "per_step": shape["per_step"] * world}
    whole = batches_of(data_dir, **shape).steps(Cursor(), 0, 1)
    ranks = [batches_of(data_dir, **shape, workers=workers).steps(Cursor(), rank, world) for rank in range(world)]
    for _ in range(3 + start % 4):
        step, cursor = next(whole)
        parts = [next(rank) for rank in ranks]
        assert {part_cursor for _, part_cursor in parts} == {cursor}
        together = sorted((m for part, _ in parts for m in part.micro_batches), key=lambda m: m.index)
        assert all(same(a, b) for a, b in zip(together, step.micro_batches, strict=True))
        for part, _ in parts:
            assert len(part.micro_batches) == shape["per_step"] // world
            assert part.num_target_tokens == step.num_target_tokens
            assert part.num_source_tokens == step.num_source_tokens


@settings(max_examples=30, deadline=None)
@given(geometry, st.integers(0, 60))
def test_a_restored_cursor_continues_the_stream(data_dir: Path, shape: dict[str, int], taken: int) -> None:
    stream = batches_of(data_dir, **shape).steps(Cursor(), 0, 1)
    cursor = Cursor()
    for _ in range(taken):
        _, cursor = next(stream)
    again = batches_of(data_dir, **shape).steps(Cursor.from_dict(cursor.to_dict()), 0, 1)
    for _ in range(5):
        (step, after), (other, other_after) = next(stream), next(again)
        assert after == other_after
        assert all(same(a, b) for a, b in zip(step.micro_batches, other.micro_batches, strict=True))


def digest_of(micro_batches: list[MicroBatch]) -> str:
    digest = hashlib.sha256()
    for m in sorted(micro_batches, key=lambda m: m.index):
        digest.update(repr((m.index, m.example_ids.tolist(), tuple(m.source_BS.shape))).encode())
        for tensor in (m.source_BS, m.source_mask_BS, m.labels_BT):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_300_restarts_with_other_ranks_and_workers_continue_the_identical_stream(data_dir: Path) -> None:
    """From a random step, through JSON of at most 1 KiB; every stop changes ranks and workers. Two epochs of it."""
    shape = {"tokens": 120, "per_step": 12, "window": 50}
    expected, cursors = [], [Cursor()]
    for step, cursor in batches_of(data_dir, **shape).steps(Cursor(), 0, 1):
        if cursor.epoch == 2:
            break
        expected.append(digest_of(step.micro_batches))
        cursors.append(cursor)
    rng = np.random.Generator(np.random.Philox(11))
    for trial in range(300):
        first = int(rng.integers(len(expected)))
        state = json.dumps(cursors[first].to_dict())
        assert len(state) <= 1024
        world, workers = int(rng.choice([1, 2, 3, 4, 6, 12])), int(rng.integers(3))
        batches, cursor = batches_of(data_dir, **shape, workers=workers), Cursor.from_dict(json.loads(state))
        for number in range(first, min(first + 2, len(expected))):
            parts = [batches.step(cursor, rank, world) for rank in range(world)]
            assert digest_of([m for part, _ in parts for m in part.micro_batches]) == expected[number], (trial, number)
            (cursor,) = {after for _, after in parts}
            assert cursor == cursors[number + 1]


def test_padding_masks_labels_and_counts(data_dir: Path) -> None:
    for step in one_epoch(batches_of(data_dir)):
        assert step.num_source_tokens == sum(
            int(m.source_mask_BS.sum()) for m in step.micro_batches if len(m.example_ids)
        )
        assert step.num_target_tokens == sum(int((m.labels_BT != -100).sum()) for m in step.micro_batches)
        assert step.num_micro_batches_with_data == sum(len(m.example_ids) > 0 for m in step.micro_batches)
        for m in step.micro_batches:
            assert m.source_BS.dtype == m.labels_BT.dtype == torch.int64
            assert m.source_mask_BS.dtype == torch.bool
            if len(m.example_ids) == 0:
                assert (m.source_BS.tolist(), m.labels_BT.tolist()) == ([[PAD_ID]], [[-100]])
                continue
            assert m.source_BS[:, 0].tolist() == (100 + m.example_ids).tolist()
            assert torch.equal(m.source_mask_BS, m.source_BS != PAD_ID)
            assert m.source_mask_BS.any(dim=0).all(), "no column of padding only"


def test_order_differs_between_seeds_and_epochs(data_dir: Path) -> None:
    orders = {
        tuple(np.concatenate([m.example_ids for m in micro_batches_of(one_epoch(batches_of(data_dir, seed), epoch))]))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    }
    assert len(orders) == 3
    batches = batches_of(data_dir, per_step=1000)  # one step is one window of 64 examples
    firsts = [batches.step(Cursor(epoch=epoch), 0, 1)[0].micro_batches for epoch in range(2)]
    assert len({frozenset(np.concatenate([m.example_ids for m in first]).tolist()) for first in firsts}) == 2


def test_bucketing_beats_the_unsorted_order(data_dir: Path) -> None:
    def share(window: int) -> float:
        micro_batches = micro_batches_of(one_epoch(batches_of(data_dir, tokens=150, per_step=1, window=window)))
        real = sum(int(m.source_mask_BS.sum()) + int((m.labels_BT != -100).sum()) for m in micro_batches)
        return real / sum(m.source_BS.numel() + m.labels_BT.numel() for m in micro_batches)

    assert share(230) > 0.8
    assert share(230) > share(8)


def test_the_longest_step_is_as_large_as_any(data_dir: Path) -> None:
    batches = batches_of(data_dir, per_step=6)
    largest = micro_batches_of(one_epoch(batches))
    longest_example = max(int((m.source_mask_BS.sum(1) + (m.labels_BT != -100).sum(1)).max()) for m in largest)
    for rank in range(2):
        longest = batches.longest_step(rank, 2).micro_batches
        assert longest[0].source_BS.shape[1] + longest[0].labels_BT.shape[1] >= longest_example
        assert [m.index for m in longest] == [rank, rank + 2, rank + 4]
        assert max(m.source_BS.shape[1] for m in longest) == max(m.source_BS.shape[1] for m in largest)
        assert max(m.labels_BT.shape[1] for m in longest) == max(m.labels_BT.shape[1] for m in largest)
        assert all(m.source_BS.numel() + m.labels_BT.numel() <= 150 for m in longest)
    step = batches.longest_step(0, 1)
    assert step.num_target_tokens == sum(int((m.labels_BT != -100).sum()) for m in step.micro_batches)


def test_evaluation_batches_are_sorted_whole_and_repeatable(data_dir: Path) -> None:
    batches = evaluation_batches(data_dir, "train", 100)
    assert sorted(i for m in batches for i in m.example_ids.tolist()) == list(range(NUM_EXAMPLES))
    again = evaluation_batches(data_dir, "train", 100)
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    part = evaluation_batches(data_dir, "train", 100, max_examples=23)
    assert sorted(i for m in part for i in m.example_ids.tolist()) == list(range(0, NUM_EXAMPLES, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 20}, r"tokens_per_micro_batch is 20, but the longest example has \d+ tokens"),
        ({"per_step": 0}, "micro_batches_per_step is 0: choose at least 1"),
        ({"window": 0}, "window_examples is 0"),
    ],
)
def test_impossible_geometry_is_refused(data_dir: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches_of(data_dir, **change)


def test_a_world_that_does_not_divide_and_a_foreign_cursor_are_refused(data_dir: Path) -> None:
    batches = batches_of(data_dir, per_step=4)
    with pytest.raises(ValueError, match="4 micro-batches per step do not divide among 3 ranks"):
        batches.step(Cursor(), 0, 3)
    for cursor in (Cursor(0, 99, 0), Cursor(0, 0, 999)):
        with pytest.raises(ValueError, match="other data"):
            batches.step(cursor, 0, 1)


@pytest.mark.parametrize("world", range(1, 65))
def test_every_rank_has_the_same_number_of_steps_and_every_example_is_seen_once(data_dir: Path, world: int) -> None:
    """By arithmetic: the steps of a rank are those of the world, and its micro-batches are dealt out."""
    batches = batches_of(data_dir, per_step=64 * world // np.gcd(64, world), window=100)
    seen: list[int] = []
    num_steps = []
    for rank in range(world):
        cursor, count = Cursor(), 0
        while cursor.epoch == 0:
            step, cursor = batches.step(cursor, rank, world)
            seen += [i for m in step.micro_batches for i in m.example_ids.tolist()]
            count += 1
        num_steps.append(count)
    assert max(num_steps) == min(num_steps)
    assert sorted(seen) == list(range(NUM_EXAMPLES))


def test_any_place_of_an_epoch_is_reached_by_reading_its_window_only(data_dir: Path, tmp_path: Path) -> None:
    """The last window reads although every other block is destroyed."""
    shutil.copytree(data_dir, tmp_path / "data")
    batches = batches_of(data_dir, window=32)
    last = Cursor(0, batches.windows_per_epoch - 1, 0)
    expected = batches.step(last, 0, 1)[0]
    examples = np.concatenate([m.example_ids for m in expected.micro_batches])
    path = tmp_path / "data/train/000000.tar"
    payload = bytearray(path.read_bytes())
    reader = SplitReader(data_dir, read_manifest(data_dir), "train")
    kept = set((np.searchsorted(reader.starts, examples, side="right") - 1).tolist())
    assert len(kept) < len(reader.starts) - 1
    for block, offset in enumerate(reader.index["offset"].tolist()):
        if block not in kept:
            payload[offset] ^= 1
    path.write_bytes(payload)
    damaged = batches_of(tmp_path / "data", window=32)
    again = damaged.step(last, 0, 1)[0]
    assert all(same(a, b) for a, b in zip(expected.micro_batches, again.micro_batches, strict=True))
    with pytest.raises(ValueError, match=r"train/000000.tar: block \d is damaged"):
        one_epoch(damaged)


def test_a_mixture_holds_its_weights_in_every_window_and_every_example_once_a_pass(tmp_path: Path) -> None:
    """Sets of 70, 30 and 45 examples with weights 3, 1 and 2; a window of 24 has 12, 4 and 8 of them."""
    sizes, weights = (70, 30, 45), (3, 1, 2)
    sets = []
    for number, size in enumerate(sizes):
        rows = [np.full(2 + i % 5, 10 * number + 3, np.uint16) for i in range(size)]
        sets.append([(rows[:20], rows[:20]), (rows[20:], rows[20:])])
    (tmp_path / "train").mkdir()
    publish_data(tmp_path, sets, weights)
    batches = batches_of(tmp_path, tokens=40, window=24)
    first = np.cumsum([0, *sizes])
    seen: list[list[int]] = [[], [], []]
    for epoch in range(4):
        for number in range(batches.windows_per_epoch):
            cursor, places = Cursor(epoch, number, 0), []
            while (cursor.epoch, cursor.window) == (epoch, number):
                step, cursor = batches.step(cursor, 0, 1)
                places += [i for m in step.micro_batches for i in m.example_ids.tolist()]
            counts = np.histogram(places, bins=first)[0]
            if len(places) == 24:
                assert np.abs(counts - np.array([12, 4, 8])).max() <= 1  # an epoch of 145 does not end on a cycle of 6
            for k in range(3):
                seen[k] += [i - first[k] for i in places if first[k] <= i < first[k + 1]]
    total = 4 * sum(sizes)
    assert [len(s) for s in seen] == pytest.approx([total * w / 6 for w in weights], abs=1)
    for k, size in enumerate(sizes):
        counts = np.bincount(seen[k], minlength=size)
        assert counts.max() - counts.min() <= 1, "passes follow one another"
