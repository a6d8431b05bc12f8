"""The README.md of an exported folder: what it is, where it comes from, what it scored, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.rundir import RunDir, read_json
from pipeline.spans import Assembly

CARD = "README.md"
LOADING = """    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    folder = "."  # this folder
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["a text"], return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=128)
    print(tokenizer.batch_decode(outputs, skip_special_tokens=True))
"""


def loading_of(folder: Path, loading: str = LOADING) -> str:
    """How the checkpoint in a folder is used, as code; a tokenizer with tokens of languages is told them first."""
    language = (read_json(folder / "tokenizer_config.json") or {}).get("src_lang")
    if not language:
        return loading
    told = (
        f'    tokenizer.src_lang = tokenizer.tgt_lang = "{language}"  # of the text, and of what is to be written\n'
        f'    first = tokenizer(text_target="").input_ids[0]\n'
    )
    before, line, after = loading.partition("    inputs = ")
    return before + told + line + after.replace("**inputs", "**inputs, forced_bos_token_id=first")


def card_of(
    assembly: Assembly,
    *,
    kind: str,
    dropped: bool,
    library: Mapping[str, Any] | None,
    loading: str = LOADING,
    scores: Sequence[str] = (),
) -> str:
    """The text of a model card.

    Args:
        kind: the model's type, such as t5.
        dropped: layers of the teacher were left out, and nothing stands for them.
        library: what library.json says; None where there is no module library.
        loading: how this folder is used, as code.
        scores: lines of `scores_of`.
    """
    encoder, decoder = assembly.encoder, assembly.decoder
    num_modular = sum(length > 1 for length in (*encoder.lengths, *decoder.lengths))
    made = "layers of the teacher were left out" if dropped else f"{num_modular} of them are modular layers"
    facts = {
        "model": f"{kind}, {encoder.num_layers} + {decoder.num_layers} layers (encoder + decoder); {made}",
        "assembly": f"`{'drop-' if dropped else ''}{assembly}`: how many layers of the teacher each layer stands for",
        "teacher": f"{encoder.num_teacher_layers} + {decoder.num_teacher_layers} layers",
    }
    if library is not None:
        identity = library.get("inputs", {}).get("identity", {})
        facts["teacher"] += f", sha256 of its weights {library['teacher_sha256'][:16]}"
        facts["module library"] = f"sha256 {library['modular_sha256'][:16]}"
        if "output of data" in identity:
            facts["data plan"] = f"manifest {identity['output of data'][:16]}"
    table = [f"| {name} | {fact} |" for name, fact in facts.items()]
    scored = ["## Scores", "", *scores, ""] if scores else []
    head = ["---", "library_name: transformers", "tags: [modular-transformers]", "---", f"# {assembly}", ""]
    return "\n".join([*head, "| | |", "|---|---|", *table, "", *scored, "## Use", "", loading])


def write_trimmed_card(original: Path, folder: Path, num_kept: int, num_tokens: int) -> None:
    """The card of a folder without part of its vocabulary: what was done, and below it the original's card."""
    facts = f"`{original.name}` with {num_kept:,} of its {num_tokens:,} tokens. It computes for them what it did."
    before = (original / CARD).read_text(encoding="utf-8") if (original / CARD).is_file() else ""
    write_card(
        folder, "\n".join([f"# {original.name}, trimmed", "", facts, "", "## Use", "", loading_of(folder), before])
    )


def scores_of(run: RunDir, name: str, hashes: Mapping[str, str]) -> list[str]:
    """What stage evaluate found for a system of a run, with signatures; empty where it has not been there, could not
    score it, or scored other weights.

    Args:
        hashes: of the weights that teacher and library have now, as library.json has them.
    """
    found = read_json(run.stage("evaluate") / "scores" / f"{name}.json")
    if found is None or "failed" in found or not (run.stage("evaluate") / "stage.json").is_file():
        return []
    scored = found["key"]["weights"]
    if any(scored.get(each, hashes[f"{each}_sha256"]) != hashes[f"{each}_sha256"] for each in ("teacher", "modular")):
        return []
    quality, decoding = found["quality"], found["key"]["decoding"]
    signatures = quality.get("signatures", {})
    lines = [
        f"On {quality['num_examples']} test examples, num_beams {decoding['num_beams']}; 95 % intervals in brackets.",
        "", "| metric | score | signature |", "|---|---|---|",
    ]  # fmt: skip
    for metric, value in quality.items():
        if f"{metric}_low" in quality:
            low, high = quality[f"{metric}_low"], quality[f"{metric}_high"]
            signature = signatures.get("rouge" if metric.startswith("rouge") else metric, "")
            lines.append(f"| {metric} | {value:.4g} ({low:.4g} to {high:.4g}) | {signature.replace('|', ' ')} |")
    return lines


def write_card(folder: Path, text: str) -> None:
    (folder / CARD).write_text(text, encoding="utf-8")
