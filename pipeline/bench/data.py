"""Data: tokenise, store, read and start again, against datasets.map, webdataset, mosaicml-streaming and litdata.

Every side does the same work in processes of its own: from a .jsonl.gz of pairs to something ready to train from, and
from that to the same padded int64 batches. Baselines that are not installed are left out by name.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.demo import make_corpus
from data_prep.encode import train_sentencepiece
from data_prep.reader import SplitReader
from data_prep.shards import read_manifest
from data_prep.stats import bucketed_efficiency
from pipeline.bench import Measure, report
from pipeline.bench.data_restart import first_batch, rerun

MPIEXEC = Path(sys.executable).with_name("mpiexec")
DATASETS = {
    "datasets + HF tokenizer": ("hf", 1),
    "datasets + SentencePiece": ("sp", 1),
    "the same, 2 processes": ("sp", 2),
}
PACKAGES = {"webdataset": "webdataset", "streaming": "mosaicml-streaming", "litdata": "litdata"}
PARTS = ("encode", "read", "padding", "first_batch", "rerun")
TRAINING_RECORDS = 20_000  # of each file, for a tokenizer
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", nargs="+", default=[], metavar="NAME=FILE", help=".jsonl.gz with source and target")
    parser.add_argument(
        "--text", nargs="*", default=[], metavar="NAME=FILE", help=".jsonl.gz with text, for padding only"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder with spiece.model (default: trained on the files)")
    parser.add_argument("--vocab_size", type=int, default=512, help="of the tokenizer that is trained")
    parser.add_argument("--rows", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many runs counts")
    parser.add_argument("--write", type=Path, help="folder for a results file")


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        bench = _Bench(Path(scratch), arguments)
        measures: list[Measure] = []
        for name, path in bench.pairs.items():
            bench.build(name, path)
            measures += bench.encode(name, path) if "encode" in arguments.rows else []
            measures += bench.read(name) if "read" in arguments.rows else []
            measures += first_batch(name, bench.out(name)) if "first_batch" in arguments.rows else []
        if "rerun" in arguments.rows:
            measures.append(rerun(bench.build, bench.out("rerun"), bench.builtin_pairs()))
        notes = bench.padding() if "padding" in arguments.rows else ""
        if bench.left_out:
            notes += "\nNot installed, left out: " + ", ".join(sorted(bench.left_out))
        report("data", measures, notes, arguments.write)


def _named(pairs: list[str]) -> list[tuple[str, Path]]:
    for pair in pairs:
        if "=" not in pair or not Path(pair.partition("=")[2]).is_file():
            raise ValueError(f"{pair!r}: write NAME=FILE with a .jsonl.gz file that exists")
    return [(pair.partition("=")[0], Path(pair.partition("=")[2])) for pair in pairs]


@dataclass
class _Bench:
    scratch: Path
    arguments: argparse.Namespace

    def __post_init__(self) -> None:
        self.left_out: set[str] = set()
        self.pairs = dict(_named(self.arguments.pairs)) or {"builtin": self.builtin_pairs()}
        self.texts = dict(_named(self.arguments.text))
        self.tokenizer = self.arguments.tokenizer or self._train_tokenizer()
        self.tokens: dict[str, int] = {}

    def builtin_pairs(self) -> Path:
        """30,000 pairs of the built-in corpus."""
        path = self.scratch / "builtin.jsonl.gz"
        if path.exists():
            return path
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for pair in make_corpus(0, 30_000, 1, 1)["train"]:
                file.write(json.dumps({"source": pair.source, "target": pair.target}, ensure_ascii=False) + "\n")
        return path

    def _train_tokenizer(self) -> Path:
        folder = self.scratch / "tokenizer"
        folder.mkdir()
        num_sentinels = 100 if self.texts else 0
        size = self.arguments.vocab_size
        train_sentencepiece(self._training_texts(), size, True, folder / "spiece.model", num_sentinels)
        return folder

    def _training_texts(self) -> Iterator[str]:
        for path in (*self.pairs.values(), *self.texts.values()):
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for row in map(json.loads, itertools.islice(file, TRAINING_RECORDS)):
                    yield from (row[field] for field in ("source", "target", "text") if field in row)

    # ---- ours

    def out(self, name: str, ranks: int = 1) -> Path:
        """Where a build is put."""
        return self.scratch / f"{name}-{ranks}"

    def build(self, name: str, path: Path, ranks: int = 1, anew: bool = True, **settings: Any) -> float:
        """Seconds of a whole `data_prep build`, start of the processes included."""
        recipe, out = self.scratch / f"{name}.json", self.out(name, ranks)
        data = {"corpus": "files", "train": [str(path)], "tokenizer": str(self.tokenizer)}
        recipe.write_text(json.dumps({"data": data | settings}))
        if anew:
            shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "data_prep", "build", "--config", str(recipe), "--out", str(out)]
        seconds = _seconds(command if ranks == 1 else [str(MPIEXEC), "-n", str(ranks), *command])
        shards = read_manifest(out).splits["train"].shards
        self.tokens[name] = sum(shard.source_tokens + shard.target_tokens for shard in shards)
        return seconds

    def encode(self, name: str, path: Path) -> list[Measure]:
        """Tokenise end to end: seconds by million tokens; and one rank against two."""
        if find_spec("datasets") is None:
            self.left_out.add("datasets")
            return []
        times: dict[str, float] = {}

        def keep_fastest(label: str, seconds: float) -> None:
            times[label] = min(times.get(label, math.inf), seconds)
            print(f"{name}: {label} {seconds:.2f} s", file=sys.stderr, flush=True)

        for _ in range(self.arguments.repeats):  # interleaved, so that a busy machine hurts all alike
            for ranks in (1, 2):
                keep_fastest(f"ours on {ranks} rank(s)", self.build(name, path, ranks))
            for label, (kind, processes) in DATASETS.items():
                with tempfile.TemporaryDirectory(dir=self.scratch) as cache:
                    side = ["map", str(path), str(self.tokenizer), kind, str(processes), cache]
                    keep_fastest(label, _seconds([sys.executable, "-m", "pipeline.bench.data_baselines", *side]))
        ours = {ranks: times[f"ours on {ranks} rank(s)"] for ranks in (1, 2)}
        floor = _floor_of_tokenising(path, self.tokenizer)
        millions = self.tokens[name] / 1e6
        rows = [(ranks, label, times[label]) for label, (_, ranks) in DATASETS.items()]
        measures = [
            Measure("data", f"{name}: tokenise on {ranks} rank(s)", ours[ranks] / millions, seconds / millions, label,
                    "s by million tokens", floor / ranks / millions)
            for ranks, label, seconds in rows
        ]  # fmt: skip
        measures.append(
            Measure("data", f"{name}: tokenise on 2 ranks", ours[2] / millions, ours[1] / millions, "ours on 1 rank",
                    "s by million tokens", ours[1] / 2 / millions)
        )  # fmt: skip
        return measures

    def read(self, name: str) -> list[Measure]:
        """Stored data to padded batches of 32 in order, and bytes on disk."""
        out = self.out(name)
        reader = SplitReader(out, read_manifest(out), "train")
        sides = [*PACKAGES]
        results: dict[str, dict[str, Any]] = {}
        for side in ("ours", *sides):
            if side in PACKAGES and find_spec(side) is None:
                self.left_out.add(PACKAGES[side])
                continue
            results[side] = self._read_side(side, name, out)
        expected = results["ours"]["hash"]
        for side, result in results.items():
            if result["hash"] != expected:
                raise ValueError(f"{name}: the batches of {side} differ from ours; the comparison means nothing")
        count = len(reader)
        raw = results["ours"]["raw_s"]
        print(
            f"{name}: raw block decoding {self.tokens[name] / raw / 1e6:.0f} M tokens/s, {count / raw:,.0f} examples/s"
        )
        payload = self.tokens[name] * (2 if reader.block(0).source_ids.itemsize == 2 else 4)
        measures = []
        for side, result in results.items():
            if side == "ours":
                continue
            ours = results["ours"]
            measures.append(
                Measure("data", f"{name}: read", ours["seconds"] / count * 1e6, result["seconds"] / count * 1e6,
                        f"{PACKAGES[side]} {result['layout']}", "us by example", raw / count * 1e6)
            )  # fmt: skip
            measures.append(
                Measure("data", f"{name}: bytes", ours["bytes"] / payload, result["bytes"] / payload,
                        f"{PACKAGES[side]} {result['layout']}", "of the ids alone", 1.0)
            )  # fmt: skip
        return measures

    def _read_side(self, side: str, name: str, out: Path) -> dict[str, Any]:
        command = [sys.executable, "-m", "pipeline.bench.data_baselines", "read", side, str(out)]
        best: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            for _ in range(self.arguments.repeats):
                done = subprocess.run([*command, folder], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise ValueError(f"{side} failed: {done.stderr.strip().splitlines()[-1]}")
                result = json.loads(done.stdout.splitlines()[-1])
                if not best or result["seconds"] < best["seconds"]:
                    best = result
        return best

    def padding(self) -> str:
        """Real over padded tokens, micro-batches of 32 bucketed in windows of 25,600 examples."""
        lines = ["Real over padded tokens, micro-batches of 32 examples, windows of 25,600:"]
        for name, path in self.texts.items():
            self.build(name, path, task="span_corruption", source_field="text")
        for name in (*self.pairs, *self.texts):
            out = self.out(name)
            reader = SplitReader(out, read_manifest(out), "train")
            examples = reader.read(np.arange(len(reader)))
            shares = bucketed_efficiency(examples.source_lengths, examples.target_lengths, 32, 25_600)
            lines.append(f"{name}: encoder {shares[0]:.1%}, decoder {shares[1]:.1%}")
        return "\n".join(lines)


def _seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    if done.returncode:
        raise ValueError(f"{' '.join(command[:4])} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return time.perf_counter() - begin


def _floor_of_tokenising(path: Path, tokenizer: Path) -> float:
    """Seconds that the SentencePiece library alone takes for all texts, in a process of its own."""
    command = [sys.executable, "-m", "pipeline.bench.data_baselines", "floor", str(path), str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def digest_of(batches: Any) -> str:
    """Hash of padded batches, for showing that two sides made the same."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in batch:
            digest.update(repr(tensor.shape).encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()
