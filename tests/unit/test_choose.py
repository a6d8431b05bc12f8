"""The command lines that read published scores: which assembly fits a budget, and what two systems differ in."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import AutoModelForSeq2SeqLM

from pipeline.report import choose, compare
from pipeline.report.data import read_rows
from pipeline.rundir.files import write_atomic
from pipeline.rundir.run_dir import RunDir
from tests.unit.test_assemble import make_run
from tests.unit.test_report import run  # noqa: F401 a fixture


@pytest.fixture
def scored(run: RunDir) -> RunDir:  # noqa: F811
    """The same with the stamps of the stages that the scores come from; the hash of an output is the stage's name."""
    for name, upstream in (
        ("teacher", ()),
        ("distill", ()),
        ("assemble", ("teacher", "distill")),
        ("evaluate", ("assemble",)),
    ):
        identity = {f"output of {each}": each for each in upstream}
        stamp = {"inputs": {"identity": identity}, "outputs_hash": name}
        write_atomic(run.stage(name) / "stage.json", json.dumps(stamp))
    return run


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        ({"keep": 0.99}, "e2x3-d2x3"),
        ({"keep": 0.97}, "e3x2-d2x3"),
        ({"keep": 0.9}, "e6-d6"),
        ({"latency_ms": 20.0}, "e1x4.2-d6"),
        ({"latency_ms": 1000.0}, "e1x6-d1x6"),
        ({"num_bytes": 2.3e6}, "e3x2-d2x3"),
        ({"num_bytes": 2.3e6, "latency_ms": 28.0}, "e6-d6"),
        ({"keep": 0.97, "latency_ms": 29.5}, "e1x4.2-d6"),
    ],
)
def test_the_choice(run: RunDir, budget, name):  # noqa: F811
    assert choose.choose(read_rows(run.scores)[0], **budget).name == name


def test_all_of_the_teachers_score_fits_whatever_it_is(run: RunDir):  # noqa: F811
    """100 * 41.0002 / 41.0002 is 99.99999999999999."""
    rows = [replace(row, scores={**row.scores, "bleu": 41.0002}) for row in read_rows(run.scores)[0]]
    assert choose.choose(rows, keep=1.0).scores["bleu"] == 41.0002


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a budget"),
        (["--latency-ms", "1"], "no assembly of this run fits; the fastest is e6-d6 with 12.0 ms"),
        (["--bytes", "10K"], "the smallest is e6-d6 with 1000000 bytes"),
        (["--keep", "1.2"], "e1x6-d1x6 keeps most, 100.0 %"),
        (["--keep", "98"], "write 0.98 for 98 %"),
        (["--bytes", "many"], "'many' is not a size"),
        (["--bytes", "1.2.3M"], "'1.2.3M' is not a size"),
    ],
)
def test_what_does_not_fit_is_told(scored: RunDir, arguments, message):
    with pytest.raises(ValueError, match=message):
        choose.choose_command(["--run", str(scored.root), *arguments])


@pytest.mark.parametrize("stage", ["teacher", "distill", "assemble"])
def test_scores_of_what_the_run_no_longer_makes_are_refused(scored: RunDir, stage):
    path = scored.stage(stage) / "stage.json"
    stamp = json.loads(path.read_text())
    for now in ({**stamp, "outputs_hash": "of another training"}, None):  # None: begun again
        path.unlink() if now is None else path.write_text(json.dumps(now))
        with pytest.raises(ValueError, match=f"not of what stage {stage} holds now: run stages assemble and evaluate"):
            choose.choose_command(["--run", str(scored.root), "--keep", "0.9"])


def test_scores_that_are_being_made_again_are_refused(scored: RunDir):
    (scored.stage("evaluate") / "stage.json").unlink()
    with pytest.raises(ValueError, match="run stages assemble and evaluate again"):
        choose.choose_command(["--run", str(scored.root), "--keep", "0.9"])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"keep": 0.9}, "fits; the teacher has no score to keep$"),
        ({"latency_ms": 5.0}, "fits; no latency was measured$"),
    ],
)
def test_what_was_not_measured_is_told(run: RunDir, budget, message):  # noqa: F811
    rows = [
        replace(row, scores={**row.scores, "bleu": 0.0}, latency_ms=None) for row in read_rows(run.scores)[0]
    ]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        choose.choose(rows, **budget)


def test_sizes():
    assert [choose.bytes_of(text) for text in ("300M", "1.5G", "200Mi", "2KB", "7", ".5k", "2.M")] == [
        3e8,
        1.5e9,
        200 * 2**20,
        2e3,
        7,
        500,
        2e6,
    ]


def test_the_choice_is_exported_as_a_checkpoint(scored: RunDir, tmp_path, capsys):
    made, _ = make_run(tmp_path / "made", "v1.1")
    (row,) = [row for row in read_rows(scored.scores)[0] if row.name == "e6-d6"]
    choose.export(made, row, tmp_path / "out")
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").config.num_layers == 1
    with pytest.raises(ValueError, match="is not empty"):
        choose.export(made, replace(row, assembly="e1x6-d1x6"), tmp_path / "out")
    choose.choose_command(["--run", str(scored.root), "--keep", "0.9"])
    told = "e6-d6: 90.0 BLEU (89.0 to 91.0, 91.8 % of the teacher's), 1+1 layers (6.00x fewer)"
    assert capsys.readouterr().out.startswith(told)


def test_another_score_may_be_gone_by(run: RunDir):  # noqa: F811
    """As of summaries, where the one that BLEU puts last is the best by ROUGE."""
    rows = [
        replace(row, scores={**row.scores, "rougeL": 50.0 if row.name == "e6-d6" else 30.0})
        for row in read_rows(run.scores)[0]
    ]
    assert choose.choose(rows, latency_ms=1000.0, metric="rougeL").name == "e6-d6"
    assert choose.choose(rows, keep=1.2, metric="rougeL").name == "e6-d6"
    assert choose.shares_of(rows, "rougeL")["e6-d6"] == pytest.approx(100 * 50 / 30)
    older = [replace(row, scores={"bleu": row.bleu}) for row in rows]
    with pytest.raises(ValueError, match="the scores have no ROUGE-L: run stage evaluate again"):
        choose.choose(older, keep=0.9, metric="rougeL")


def give_references(run: RunDir) -> None:  # noqa: F811
    """References that can be told apart."""
    for path in (run.stage("evaluate") / "outputs").glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().split("\n") if line]
        lines = [{**record, "reference": f"word {record['id']} end of it"} for record in records]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_two_systems_are_compared(run: RunDir, capsys):  # noqa: F811
    give_references(run)
    compare.compare_command(["e1x6-d1x6", f"{run.root}:e6-d6", "--run", str(run.root)])
    out = capsys.readouterr().out
    assert "A e1x6-d1x6, B e6-d6, 8 test examples" in out
    assert "1 of 8 outputs changed" in out
    assert "-8.0  (p = " in out
    assert "B         word 3 <script>alert('x')</script>" in out


def test_two_runs_are_compared(run: RunDir, capsys):  # noqa: F811
    give_references(run)
    compare.compare_command([str(run.root), str(run.root)])
    out = capsys.readouterr().out
    assert out.count("+0.0") == out.count("1.000") == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["e6-d7", "e6-d6"], "has no system e6-d7: did you mean e6-d6"),
        (["nowhere:e6-d6", "e6-d6"], "run stage evaluate first"),
    ],
)
def test_what_cannot_be_compared_is_told(run: RunDir, arguments, message):  # noqa: F811
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare.compare_command([*arguments, "--run", str(run.root)])


def test_other_examples_are_refused(run: RunDir):  # noqa: F811
    path = run.stage("evaluate") / "outputs/e6-d6.jsonl"
    path.write_text(path.read_text().replace('"id": "3"', '"id": "9"'))
    with pytest.raises(ValueError, match="not scored on the same examples"):
        compare.compare_command(["e1x6-d1x6", "e6-d6", "--run", str(run.root)])
