"""One side of the data benchmark, in a process of its own: map, read or floor."""

from __future__ import annotations

import gzip
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

IGNORED_LABEL = -100
BATCH = 32
Pair = tuple[np.ndarray, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def map_with_datasets(path: str, tokenizer: str, kind: str, processes: int, cache: str) -> None:
    """.jsonl.gz -> ids in Arrow files by datasets.map, as its documentation does it: batched, columns removed."""
    import datasets
    import sentencepiece

    datasets.disable_progress_bars()
    if kind == "hf":
        from transformers import T5Tokenizer

        hf = T5Tokenizer.from_pretrained(tokenizer, extra_ids=0)

        def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
            source = hf(rows["source"], truncation=True, max_length=512)["input_ids"]
            target = hf(rows["target"], truncation=True, max_length=128)["input_ids"]
            return {"input_ids": source, "labels": target}
    else:
        sp = sentencepiece.SentencePieceProcessor(model_file=f"{tokenizer}/spiece.model")

        def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
            ids = (sp.encode(rows[name], out_type=int, num_threads=1) for name in ("source", "target"))
            source, target = (
                [[*row[: most - 1], 1] for row in rows] for rows, most in zip(ids, (512, 128), strict=True)
            )
            return {"input_ids": source, "labels": target}

    rows = datasets.load_dataset("json", data_files=path, cache_dir=cache, split="train")
    num_proc = processes if processes > 1 else None
    rows.map(encode, batched=True, remove_columns=rows.column_names, num_proc=num_proc)


def floor(path: str, tokenizer: str) -> None:
    """Print the seconds of SentencePiece alone on all texts."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=f"{tokenizer}/spiece.model")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [text for row in rows for text in (row["source"], row["target"])]
    begin = time.perf_counter()
    for start in range(0, len(texts), 4096):
        sp.encode(texts[start : start + 4096], out_type="numpy", num_threads=1)
    print(time.perf_counter() - begin)


# ---- reading


def batches_of_pairs(pairs: Iterable[Pair]) -> Iterator[Batch]:
    """Per-sample arrays -> padded int64 batches of 32, as a collate function does it."""
    batch: list[Pair] = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == BATCH:
            yield collate(batch)
            batch = []
    if batch:
        yield collate(batch)


def collate(batch: list[Pair]) -> Batch:
    source = np.zeros((len(batch), max(len(pair[0]) for pair in batch)), dtype=np.int64)
    labels = np.full((len(batch), max(len(pair[1]) for pair in batch)), IGNORED_LABEL, dtype=np.int64)
    mask = np.zeros(source.shape, dtype=bool)
    for row, (source_ids, target_ids) in enumerate(batch):
        source[row, : len(source_ids)] = source_ids
        mask[row, : len(source_ids)] = True
        labels[row, : len(target_ids)] = target_ids
    return source, mask, labels


def our_batches(out: Path) -> Iterator[Batch]:
    from data_prep.reader import SplitReader
    from data_prep.shards import read_manifest
    from pipeline.data import padded

    reader = SplitReader(out, read_manifest(out), "train")
    for examples in reader.stretches(25_600):
        for start in range(0, len(examples), BATCH):
            stop = min(start + BATCH, len(examples))
            source, mask = padded(examples.source_ids, examples.source_offsets[start : stop + 1], 0)
            labels, _ = padded(examples.target_ids, examples.target_offsets[start : stop + 1], IGNORED_LABEL)
            yield source, mask, labels


def all_pairs(out: Path) -> Iterator[Pair]:
    """Every example of our data directory as arrays, to write the baselines' layouts from."""
    from data_prep.reader import SplitReader
    from data_prep.shards import read_manifest

    reader = SplitReader(out, read_manifest(out), "train")
    for block in reader.blocks():
        sources, targets = (np.cumsum(lengths, dtype=np.int64)[:-1] for lengths in block.lengths)
        yield from zip(np.split(block.source_ids, sources), np.split(block.target_ids, targets), strict=True)


def write_webdataset(pairs: Iterable[Pair], folder: Path) -> None:
    """One raw member a sample: of the per-sample layouts (raw, msgpack, pickle, JSON, one .npy or raw member a side)
    the one that is read fastest."""
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=10_000, verbose=0, encoder=False) as writer:
        for number, (source, target) in enumerate(pairs):
            head = np.array([source.itemsize, len(source)], dtype="<u4")
            writer.write({"__key__": f"{number:08d}", "ids": head.tobytes() + source.tobytes() + target.tobytes()})


def read_webdataset(folder: Path) -> Iterator[Pair]:
    import webdataset

    paths = sorted(map(str, folder.glob("*.tar")))
    for sample in webdataset.WebDataset(paths, shardshuffle=False):
        member = sample["ids"]
        width, length = np.frombuffer(member, "<u4", 2)
        ids = np.frombuffer(member, f"<u{width}", offset=8)
        yield ids[:length], ids[length:]


def write_streaming(pairs: Iterable[Pair], folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"source": "ndarray:uint16", "target": "ndarray:uint16"}
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for source, target in pairs:
            writer.write({"source": source, "target": target})


def read_streaming(folder: Path) -> Iterator[Pair]:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=False, batch_size=BATCH)
    for number in range(len(dataset)):  # indexed: the fastest way that it offers in one process
        row = dataset[number]
        yield row["source"], row["target"]


def write_litdata(pairs: Iterable[Pair], folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(cache_dir=str(folder / "lit"), chunk_bytes=1 << 26)
    (folder / "lit").mkdir(exist_ok=True)
    for number, (source, target) in enumerate(pairs):
        writer[number] = {"source": source, "target": target}
    writer.done()
    writer.merge()


def read_litdata(folder: Path) -> Iterator[Pair]:
    from litdata import StreamingDataset

    for row in StreamingDataset(str(folder / "lit"), shuffle=False):
        yield row["source"], row["target"]


LAYOUTS: dict[str, tuple[str, Callable[..., None], Callable[[Path], Iterator[Pair]]]] = {
    "webdataset": ("a raw member by sample", write_webdataset, read_webdataset),
    "streaming": ("MDS, ndarray by sample", write_streaming, read_streaming),
    "litdata": ("chunks, ndarray by sample", write_litdata, read_litdata),
}


def read(side: str, out: Path, folder: Path) -> None:
    """Print seconds, bytes and the hash of the batches of one side, which is written first where it is not yet."""
    from pipeline.bench.data import digest_of

    logging.disable(logging.WARNING)
    result: dict[str, Any] = {"layout": "ours"}
    if side == "ours":
        make: Callable[[], Iterator[Batch]] = lambda: our_batches(out)  # noqa: E731
        stored = [*(out / "train").glob("*.tar"), out / "train/index.npy"]
        result["raw_s"] = _raw_seconds(out)
    else:
        layout, write, pairs = LAYOUTS[side]
        result["layout"] = layout
        if not any(folder.iterdir()):
            write(all_pairs(out), folder)
        make = lambda: batches_of_pairs(pairs(folder))  # noqa: E731
        stored = [path for path in folder.rglob("*") if path.is_file()]
    result["bytes"] = sum(path.stat().st_size for path in stored)
    result["hash"] = digest_of(make())  # warms caches of files and code for all sides alike
    begin = time.perf_counter()
    for _ in make():
        pass
    result["seconds"] = time.perf_counter() - begin
    sys.stdout.write("\n" + json.dumps(result) + "\n")


def _raw_seconds(out: Path) -> float:
    """Reading, checking and decoding all blocks and no more."""
    from data_prep.reader import SplitReader
    from data_prep.shards import read_manifest

    begin = time.perf_counter()
    for _ in SplitReader(out, read_manifest(out), "train").blocks():
        pass
    return time.perf_counter() - begin


def main(arguments: list[str]) -> None:
    if arguments[0] == "map":
        map_with_datasets(arguments[1], arguments[2], arguments[3], int(arguments[4]), arguments[5])
    elif arguments[0] == "read":
        read(arguments[1], Path(arguments[2]), Path(arguments[3]))
    else:
        floor(arguments[1], arguments[2])


if __name__ == "__main__":
    main(sys.argv[1:])
