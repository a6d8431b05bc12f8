"""Every refusal of a stage that comes late: preflight knows it, or it cannot be known before there are results."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.__main__ import main
from tests.end_to_end.breaking import ROOT
from tests.end_to_end.mistakes import BEFORE_ANY_WORK
from tests.end_to_end.test_mistakes import place, template

__all__ = ["place", "template"]  # fixtures

LATE = ("evaluation", "decoding", "search", "assemble", "report", "label.py", "recover.py", "scoring.py")
EARLIER = "the output of an earlier stage is missing, damaged or edited"
MEASURED = "it is measured, or depends on what a model writes"
OWN_COMMAND = "an option or an argument of another command, which refuses it at its start"
REFUSALS = {  # what a refusal says, its values left out: the mistake by which preflight tells it, or why it cannot
    "{} is not a Hugging Face folder: it needs config.json and *.safetensors": "other model",
    "{} has no tokenizer: save one beside the model (tokenizer.save_pretrained)": "peer without a tokenizer",
    "evaluate.folders calls a system {}: use letters, digits, and . _ + - behind the first": "peer called as no file",
    "evaluate.folders calls a system {}, as systems of this run are called: give it another name (NAME=FOLDER)":
        "peer called as an assembly",
    "two systems are called {}: give a peer another name (evaluate.folders: NAME=FOLDER)": "peers of one name",
    "evaluate.folders: {} is of no encoder-decoder ({})": "peer that is a decoder",
    "evaluate.folders: the tokenizer in {} has {} tokens, its model's embedding only {}: save the tokenizer that "
    "belongs to it": "peer with too many tokens",
    "evaluate.folders: {} names no decoder_start_token_id: add it to its settings": "peer without a start",
    "evaluate.bleu_tokenizer is {}, which cannot be made here ({})": "tokenizer of BLEU",
    "evaluate.metricx: {} holds no model: it needs config.json and weights": "MetricX missing",
    "evaluate.metricx: {} is of no MetricX model (model_type {}, vocab_size {}): give one such as "
    "google/metricx-24-hybrid-large-v2p6": "MetricX of another kind",
    "evaluate.metricx: {} has no tokenizer: copy that of google/mt5-xl beside the model": "MetricX without a tokenizer",
    "{} has {}, which decoding here does not carry: give a copy of the model without {} as teacher.folder":
        "settings of generation",
    "{} cannot be read ({})": "settings of generation damaged",
    "{} has {} {}: it must be {}": "number of generation",
    "recover.assembly is empty: name the assembly to tune, such as e2x3-d6": OWN_COMMAND,
    "recover.optim.num_steps is 0: there would be nothing to compare": "recover without steps",
    "baseline theseus has one granularity, which does not make {}: give it baseline.ratios that one granularity makes, "
    "such as 2, 3 or 6": "baseline of two granularities",
    "search.budgets: {} is beyond the coarsest assembly, which takes {}": "budget",
    "{} (the scores of all others are in {})": "other model",
    "no test examples in {}: give a test part (data.test)": "no test texts",
    "{}": MEASURED,
    "{} is missing: run stage {} first": EARLIER,
    "{} is missing: run stage distill first": EARLIER,
    "{} is missing: run stage evaluate first": EARLIER,
    "{} is missing: run stage evaluate first, or give another run with --run": EARLIER,
    "{} is missing: run stage teacher first": EARLIER,
    "two systems of {} are called {}: run stage assemble again": EARLIER,
    "{} must hold exactly one teacher: run stage assemble again": EARLIER,
    "{} is no JSON ({}): run stage data again": EARLIER,
    '{} is no example: it must be an object with the texts "id" and "source"': EARLIER,
    '{} ({}) has no reference: give a "target", or "references" as a list of texts': EARLIER,
    "{} is not a checkpoint (no config.json): run stage assemble again": EARLIER,
    "system {} does not fit: the {} has {} layers and modular layers for {}: run stage assemble again": EARLIER,
    "{} has modular layers for {} {}, not those of granularities {}: set the recipe's back, or run stage distill":
        EARLIER,
    "{} does not read back ({}: {}): not published": EARLIER,
    "{} reads back as another model (its logits are up to {} apart): not published; run python -m pipeline doctor, and "
    "the same command again": EARLIER,
    "{} is not of what stage {} holds now: run stages assemble and evaluate again": EARLIER,
    "the teacher could not be decoded ({}): there is nothing to compare with": MEASURED,
    "{}+{} layers do not fit into the memory of {} to be timed: set search.latency_examples to 0, or search on a "
    "larger device": MEASURED,
    "no assembly keeps within {} when it is timed: give more, or remove this budget": MEASURED,
    "no output of the teacher passes the rule ({}): {}": MEASURED,
    "no assembly of this run fits; {}": MEASURED,
    "{} and {} were not scored on the same examples: evaluate them again": MEASURED,
    "{} and {} have no system of the same name": MEASURED,
    "--num_beams is {}: choose at least 1": OWN_COMMAND,
    "--min_chrf is {}: choose a value from 0 to 100": OWN_COMMAND,
    "{} has no pairs: the rule compares with references (data.task: pairs)": OWN_COMMAND,
    "{} has no system {}: {}": OWN_COMMAND,
    "give a budget: --latency-ms, --bytes or --keep": OWN_COMMAND,
    "--keep {} is a share of the teacher's {}: write 0.98 for 98 %": OWN_COMMAND,
    "the scores have no {}: run stage evaluate again": EARLIER,
    "{} is not a size: write 300M, 1.5G or 200Mi": OWN_COMMAND,
}  # fmt: skip
TOLD = sorted(set(REFUSALS.values()) & BEFORE_ANY_WORK.keys())


def refusals() -> Iterator[tuple[Path, str]]:
    """(file, message with {} for values) of each error for users that a late stage raises."""
    files = [path for name in LATE for path in [ROOT / "pipeline" / name]]
    for path in [each for file in files for each in (sorted(file.glob("*.py")) if file.is_dir() else [file])]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("ValueError", "FileNotFoundError"):
                yield path, message_of(call.args[0])


def message_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return message_of(node.left) + message_of(node.right)
    return "".join(map(message_of, node.values)) if isinstance(node, ast.JoinedStr) else "{}"


def test_every_late_refusal_is_in_the_list_and_the_list_has_no_other() -> None:
    found = {text: path for path, text in refusals()}
    assert len(found) > 40
    new = {text: str(path.relative_to(ROOT)) for text, path in found.items() if text not in REFUSALS}
    assert not new, "tell it before a run starts (pipeline/planning/checks.py), and enter the mistake here"
    assert not REFUSALS.keys() - found.keys()
    reasons = (EARLIER, MEASURED, OWN_COMMAND)
    assert not {each for each in REFUSALS.values() if each not in BEFORE_ANY_WORK and each not in reasons}


@pytest.mark.parametrize("name", TOLD)
def test_preflight_tells_what_a_late_stage_would_refuse(
    name: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mistake = BEFORE_ANY_WORK[name]
    mistake.break_it()
    capfd.readouterr()
    with pytest.raises(SystemExit) as raised:
        main(["run", "--dry-run", "--config", "recipe.yaml", *mistake.options.split()])
    error = capfd.readouterr().err
    assert raised.value.code == 2, error
    assert mistake.says in error
    assert not Path("run").exists()
