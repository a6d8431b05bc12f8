"""The report from a canned set of scores: what the tables say, and that the page is one safe, self-contained file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config.recipe import Recipe
from pipeline.evaluation.stage import csv_text
from pipeline.report.choose import choose
from pipeline.report.data import (
    SERIES,
    Row,
    count_text,
    frontier,
    headlines,
    load_report,
    read_jsonl,
    series,
    table_lines,
)
from pipeline.report.page import SHAPES, Axis, bleu_axis, nice_ticks, render_page
from pipeline.report.stage import cells, markdown, print_table, quality_picture, report
from pipeline.rundir.run_dir import RunDir
from pipeline.scoring import METRICS

EVIL = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "br", "hr", "img", "input", "link", "path", "line", "rect", "polyline"}


def digest_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


SYSTEMS = (  # name, kind, assembly, requests, layers of each stack, BLEU, ms
    ("e1x6-d1x6", "teacher", "e1x6-d1x6", "", (6, 6), 98.0, 60.0),
    ("e2x3-d2x3", "assembly", "e2x3-d2x3", "size-first 2", (3, 3), 97.1, 30.0),
    ("drop-e2x3-d2x3", "dropped", "e2x3-d2x3", "", (3, 3), 4.0, 30.5),
    ("e1x4.2-d6", "assembly", "e1x4.2-d6", "speed-first 2", (5, 1), 96.5, 15.0),
    ("drop-e1x4.2-d6", "dropped", "e1x4.2-d6", "", (5, 1), 2.0, 15.5),
    ("e6-d6", "assembly", "e6-d6", "size-first 6; speed-first 6", (1, 1), 90.0, 12.0),
    ("drop-e6-d6", "dropped", "e6-d6", "", (1, 1), 0.5, 12.0),
    ("e3x2-d2x3", "assembly", "e3x2-d2x3", "", (2, 3), 95.5, 29.0),
    ("finetuned-e6-d6", "finetuned", "e6-d6", "", (1, 1), 61.0, 12.0),
)


def scores_row(
    name: str, kind: str, assembly: str, requests: str, layers: tuple[int, int], bleu: float, ms: float
) -> dict[str, str]:
    size = 100_000 * sum(layers)
    values: dict[str, Any] = {
        "name": name, "kind": kind, "assembly": assembly, "requests": requests, "failed": "",
        "encoder_layers": layers[0], "decoder_layers": layers[1], "ratio_layers": 12 / sum(layers),
        "ratio_non_embedding": 1_200_000 / size, "ratio_bytes": 1_250_000 / (size + 50_000),
        "parameters": size + 50_000, "non_embedding_parameters": size, "bytes": 4 * (size + 50_000),
        "layer_flops": 2 * size, "percent_of_teacher": 100 * bleu / 98, "p_value": "" if kind == "teacher" else 0.04,
        "examples": 8, "time_latency_ms": ms, "time_latency_ms_low": ms - 1, "time_latency_ms_high": ms + 1,
        "time_speedup": 60 / ms, "time_tokens_per_s": 50_000 / ms, "time_peak_memory_bytes": 5 * size,
    }  # fmt: skip
    for metric in METRICS:
        values |= {metric: bleu, f"{metric}_low": max(0.0, bleu - 1), f"{metric}_high": min(100.0, bleu + 1)}
    return {key: str(value) for key, value in values.items()}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run directory with everything that a report reads, and markup in every text that comes from data."""
    folder = tmp_path / "evaluate"
    for each in ("scores", "outputs"):
        (folder / each).mkdir(parents=True)
    failed = {**scores_row("e1x2-d6", "assembly", "e1x2-d6", "", (2, 1), 0.0, 1.0), "failed": "out of memory"}
    failed |= {name: "" for name in failed if name.startswith(("time_", *METRICS, "percent", "p_value"))}
    (folder / "scores.csv").write_text(csv_text([*(scores_row(*system) for system in SYSTEMS), failed]))
    for name, *_ in SYSTEMS:
        quality: dict[str, Any] = {"num_examples": 8, "signatures": {"bleu": "nrefs:1|case:mixed", "chrf": EVIL}}
        quality["languages"] = {"de": {"bleu": 40.0 + len(name)}, EVIL: {"bleu": 1.0}}
        key = {
            "weights": {},
            "test": "ab",
            "decoding": {},
        }
        score = {"quality": quality, "key": key, "dtype": "float32", "device": "cpu", "versions": {"torch": "2"}}
        (folder / f"scores/{name}.json").write_text(json.dumps(score))
        ends = [EVIL if (name, i) == ("e6-d6", 3) else "end" for i in range(8)]
        records = [
            {"id": str(i), "source": f"{EVIL} {i}", "reference": EVIL, "output": f"word {i} {end}"}
            for i, end in enumerate(ends)
        ]
        (folder / f"outputs/{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "assemble").mkdir()
    weights = {f"models/{name}/model.safetensors": {"sha256": digest_of(name)} for name, *_ in SYSTEMS}
    (tmp_path / "assemble/stage.json").write_text(json.dumps({"outputs": weights}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text(json.dumps({"plan_hash": "hash-of-the-plan"}))
    (tmp_path / "distill").mkdir()
    losses = [{"step": 0, "validation/e6-d6": 3.0}, {"step": 5, "loss": 1.0}, {"step": 10, "validation/e6-d6": 0.5}]
    unfinished = '{"step": 20, "valid'
    (tmp_path / "distill/metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in losses) + unfinished)
    return RunDir(tmp_path)


class Page(HTMLParser):
    """Collects what a page holds; refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def page(run: RunDir) -> str:
    return render_page(load_report(Recipe(name=EVIL), run))


def test_page_is_whole_and_refers_to_nothing_outside(page: str) -> None:
    parsed = Page(page)
    assert not [each for each in parsed.attributes if each[1] in ("src", "href", "xlink:href", "action", "data")]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.replace("http://www.w3.org/2000/svg", ""))
    assert {tag for tag, _, _ in parsed.attributes}.isdisjoint({"link", "img", "iframe"})
    assert page.count("<script") == page.count('<script>\n"use strict";') == 1, "only our own"
    assert "prefers-color-scheme: dark" in page
    assert all(f"--{name}:" in page for name in SHAPES)


def test_page_of_systems_that_were_not_timed(run: RunDir) -> None:
    """As where a teacher runs out of memory in the batch that costs are measured on."""
    data = load_report(Recipe(), run)
    untimed = dataclasses.replace(data, rows=[dataclasses.replace(row, speedup=None) for row in data.rows])
    assert "faster at batch 1" in render_page(data)
    assert "faster at batch 1" not in render_page(untimed)


def test_page_escapes_every_text(page: str) -> None:
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    texts = "".join(Page(page).texts)
    assert f"{EVIL} 3" in texts, "a source is shown as it is"
    assert f"Run {EVIL}:" in texts


def test_page_says_what_was_measured(page: str) -> None:
    parsed = Page(page)
    texts = " ".join(
        " ".join([*parsed.texts, *(value for _, name, value in parsed.attributes if name == "aria-label")]).split()
    )
    for expected in ("hash-of-the-plan", "nrefs:1|case:mixed", "Computed on cpu", digest_of("e6-d6")):
        assert expected in texts
    assert "Smallest that keeps 99 % of the teacher's BLEU 2\u00d7 fewer layers e2x3-d2x3" in texts
    assert "Smallest that keeps 95 % of the teacher's BLEU 2.4\u00d7 fewer layers e3x2-d2x3" in texts
    assert "Smallest that keeps 90 % of the teacher's BLEU 6\u00d7 fewer layers e6-d6" in texts
    assert "e2x3-d2x3 (size-first): 97.1 BLEU (96.1 to 98.1), 99.1 % of the teacher" in texts, "hover text of a point"
    assert "e6-d6: 0.5 after step 10" in texts, "validation losses"


def test_table_lines_are_in_order_with_dropping_beside(run: RunDir) -> None:
    data = load_report(Recipe(), run)
    lines = [(line.group, line.asked, line.row.name, line.dropped and line.dropped.bleu) for line in data.lines]
    assert lines == [
        ("teacher", None, "e1x6-d1x6", None),
        ("size-first", 2.0, "e2x3-d2x3", 4.0),
        ("size-first", 6.0, "e6-d6", 0.5),
        ("speed-first", 2.0, "e1x4.2-d6", 2.0),
        ("speed-first", 6.0, "e6-d6", 0.5),
        ("named", None, "e3x2-d2x3", None),
        ("finetuned", None, "finetuned-e6-d6", None),
    ]
    assert cells(data.lines[1]) == [
        "size-first", "2", "2.00", "3+3", "e2x3-d2x3", "97.1", "1.0", "99.1", "4.0", "97.1",
        "650 K", "2.6", "30.0", "2.00", "1,667",
    ]  # fmt: skip


def test_headlines_take_the_smallest_that_keeps_enough() -> None:
    def row(name: str, size: int, percent: float | None, kind: str = "assembly") -> Row:
        return Row(
            name=name, kind=kind, assembly=name, requests=(), encoder_layers=1, decoder_layers=1, ratio_layers=1.0,
            ratio_non_embedding=1.0, ratio_bytes=1.0, parameters=size, non_embedding_parameters=size, bytes=size,
            scores={"bleu": percent or 0.0}, percent=percent, p_value=None, examples=1, latency_ms=1.0,
            latency_ms_low=1.0, latency_ms_high=1.0, speedup=1.0, tokens_per_s=None, peak_memory_bytes=None,
            layer_flops=None,
        )  # fmt: skip

    smaller = [row("a", 5, 99.0), row("b", 4, 99.5), row("c", 3, 97.9), row("d", 1, 99, "dropped")]
    rows = [row("t", 9, 100.0, "teacher"), *smaller]
    found = [(keep, each and each.name) for keep, each in headlines(rows)]
    assert found == [(99, "b"), (98, "b"), (95, "c"), (90, "c")]
    without_percent = headlines([row("t", 9, None, "teacher"), row("a", 5, None)])
    assert [each for _, each in without_percent] == [None] * 4
    assert [line.group for line in table_lines(rows)] == ["teacher", "named", "named", "named"]


def test_differing_outputs_are_those_that_differ(run: RunDir) -> None:
    (only,) = load_report(Recipe(), run).differing
    assert only.source == f"{EVIL} 3"
    assert only.outputs[0] == ("e1x6-d1x6", [("word 3 end", False)])
    assert dict(only.outputs)["e6-d6"] == [("word 3", False), (EVIL, True)]


def test_an_assembly_of_both_presets_is_drawn_in_both(run: RunDir) -> None:
    found = {name: [row.name for row in rows] for name, rows in series(load_report(Recipe(), run).rows).items()}
    assert found["size-first"] == ["e6-d6", "e2x3-d2x3"]
    assert found["speed-first"] == ["e6-d6", "e1x4.2-d6"]
    assert found["named"] == ["e3x2-d2x3"]


def test_the_frontier_is_what_none_beats(run: RunDir) -> None:
    rows = load_report(Recipe(), run).rows
    by_size = [row.name for row in frontier(rows, lambda row: row.non_embedding_parameters)]
    assert by_size == ["e6-d6", "e3x2-d2x3", "e2x3-d2x3", "e1x6-d1x6"]
    assert [row.name for row in frontier(rows, lambda row: row.latency_ms)] == [
        "e6-d6", "e1x4.2-d6", "e2x3-d2x3", "e1x6-d1x6",
    ]  # fmt: skip


def test_what_failed_is_named_and_not_drawn(run: RunDir, page: str) -> None:
    data = load_report(Recipe(), run)
    assert data.failed == [("e1x2-d6", "out of memory")]
    assert "e1x2-d6" not in {row.name for row in data.rows}
    assert "Left out: <code>e1x2-d6</code>, out of memory." in page


def test_models_of_an_engine_are_told_apart_from_their_checkpoints(run: RunDir) -> None:
    name = "ct2-int8-e2x3-d2x3"
    for folder, suffix in (("scores", ".json"), ("outputs", ".jsonl")):
        shutil.copy(run.root / f"evaluate/{folder}/e2x3-d2x3{suffix}", run.root / f"evaluate/{folder}/{name}{suffix}")
    engine = scores_row(name, "engine", "e2x3-d2x3", "", (3, 3), 96.0, 10.0) | {"bytes": "700000", "layer_flops": ""}
    (run.scores).write_text(csv_text([*(scores_row(*system) for system in SYSTEMS), engine]))
    data = load_report(Recipe(), run)
    line = next(line for line in markdown(data).splitlines() if name in line)
    assert "| engine |" in line
    assert "| 0.7 |" in line
    assert [row.name for row in series(data.rows)["engine"]] == [name]
    assert name not in {row.name for row in frontier(data.rows, lambda row: row.bytes)}, "headlines are of checkpoints"
    page = render_page(data)
    assert f'data-name="{name}"' in page
    assert "MB of weights" in page
    assert SERIES["engine"] in page
    assert quality_picture(data)
    assert choose(data.rows, num_bytes=1e6).name == name
    assert choose(data.rows, keep=0.97).name == name, "the fewest bytes"
    assert choose(data.rows, keep=0.98).name == "e2x3-d2x3"


def test_languages_have_their_own_scores(page: str) -> None:
    assert "By language" in page
    assert f"<td>{40.0 + len('e2x3-d2x3'):.1f}</td>" in page


def test_terminal_table_fits(run: RunDir) -> None:
    data = load_report(Recipe(), run)
    for width, exact in ((200, True), (84, False)):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        print_table(data, console)
        text = console.export_text()
        assert "\u2026" not in text, "nothing is cut"
        assert ("exact %" in text) == exact
        assert "e1x4.2-d6" in text


def test_markdown_has_all_lines(run: RunDir) -> None:
    lines = markdown(load_report(Recipe(), run)).splitlines()
    assert len(lines) == 2 + 7
    assert len({line.count("|") for line in lines}) == 1


def test_report_writes_all_files(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    report(Recipe(), run)
    folder = run.stage("report")
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir()} == {"quality.png", "report.html", "scores.csv", "scores.md"}
    (events,) = (run.tensorboard / "report").iterdir()
    assert events.stat().st_size > (folder / "quality.png").stat().st_size / 2
    assert "report.html" in capsys.readouterr().out
    before = (folder / "report.html").read_bytes()
    report(Recipe(), run)
    assert (folder / "report.html").read_bytes() == before


def test_report_needs_scores(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run stage evaluate first"):
        report(Recipe(), RunDir(tmp_path))


def test_axes(run: RunDir) -> None:
    rows = load_report(Recipe(), run).rows
    broken = bleu_axis(rows)
    assert broken(0) > broken(85) > broken(100)
    assert broken(90) - broken(95) > 2 * (broken(10) - broken(15)), "the assemblies' part is stretched"
    assert len(bleu_axis([row for row in rows if row.kind == "dropped"] + [rows[0]]).knots) == 3
    assert Axis(((0.0, 0.0), (10.0, 100.0)), ())(2.5) == 25.0
    assert nice_ticks(0, 1.04e6, 6) == [0, 2e5, 4e5, 6e5, 8e5, 1e6]
    assert nice_ticks(85, 100, 5) == [85, 90, 95, 100]


def test_csv_is_the_same_text_each_time() -> None:
    rows = [{"name": "a, b", "time_ms": "1"}, {"name": 'c "d"', "time_ms": "2"}]
    assert csv_text(rows) == 'name,time_ms\n"a, b",1\n"c ""d""",2\n'
    assert csv_text(rows) == csv_text([dict(row) for row in rows])


def test_small_things(tmp_path: Path) -> None:
    assert [count_text(n) for n in (12, 1500, 2_155_000, 3e9)] == ["12", "1.5 K", "2.15 M", "3 B"]
    assert read_jsonl(tmp_path / "none.jsonl") == []
