"""Tokens of all assemblies in one batch against transformers' generate, which is run twice: alone and in batches of 32.

Where transformers agrees with itself ours must say the same. Where it does not, two outputs are as good as tied, and
the gap between their scores, in float64, must show it: for greedy decoding between the first two tokens that differ,
for beam search between the two texts (log probability a token, as the length penalty has it).
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from data_prep.publish import sha256_of
from pipeline.assemble.write import Parts, write_checkpoint
from pipeline.bench.evaluate import load_subject
from pipeline.decoding.plain import batches_of, padded_sources, up_to_end
from pipeline.decoding.rules import rules_of
from pipeline.decoding.together import Member, decode_together
from pipeline.decoding.views import load_pool
from pipeline.evaluation.slices import tokenize
from pipeline.ordinary import read_model
from pipeline.rundir.run_dir import RunDir
from pipeline.spans.spans import STACKS, Assembly, Span
from pipeline.tokenizer import load_tokenizer

NUM_ASSEMBLIES = 5
HF_BATCH = 32
MAX_OTHERS = 0.002
MAX_GAP = 1e-4
VOCABULARY, DEPTH, MAX_NEW = 128, 6, 48  # of random models
RANDOM_ASSEMBLIES = ("e1x6-d1x6", "e1x6-d2x3", "e2x3-d3x2", "e3x2-d1x6", "e6-d6")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Assemblies of one teacher, as views and as exported folders, and what they decode."""

    name: str
    teacher: Path
    library: Path
    folders: dict[str, Path]
    """By text of the assembly."""
    sources: list[list[int]]
    references: list[list[int]]
    max_new_tokens: int
    tokens_per_batch: int


@dataclass(frozen=True)
class Other:
    """One output where transformers does not agree with itself, or ours with it."""

    assembly: str
    example: int
    agrees: bool
    """transformers with itself."""
    gap: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, default=None, help="run directory with exported models")
    parser.add_argument("--random", choices=("mt5", "bart"), default=None, help="a small random model instead of a run")
    parser.add_argument("--examples", type=int, default=500, help="inputs of each assembly")
    parser.add_argument("--num-beams", type=int, nargs="+", default=[1, 4], help="1 is greedy")


def main(arguments: argparse.Namespace) -> None:
    """Print the figures of each kind of decoding.

    Raises:
        ValueError: outputs differ where they must not, too many of them, or by too much.
    """
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if (arguments.run is None) == (arguments.random is None):
        raise ValueError("give either --run RUN or --random mt5 or bart")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.run is not None:
            case = case_of_run(arguments.run, arguments.examples)
        else:
            case = random_case(Path(folder), arguments.random, arguments.examples)
        for num_beams in arguments.num_beams:
            compare(case, num_beams)


def case_of_run(root: Path, num_examples: int) -> Case:
    """The teacher, the coarsest assembly and others between them."""
    subject = load_subject(root, num_examples, 1)
    systems = [each for each in subject.systems if each.kind in ("teacher", "assembly")]
    systems.sort(key=lambda each: -each.num_parameters)
    last = len(systems) - 1
    chosen = {systems[round(i * last / (NUM_ASSEMBLIES - 1))].name for i in range(NUM_ASSEMBLIES)}
    sources, references = (
        tokenize(load_tokenizer(subject.run.teacher_model), subject, side) for side in ("source", "target")
    )
    return Case(
        name=subject.recipe.name,
        teacher=subject.run.teacher_model,
        library=subject.run.library,
        folders={each.assembly: subject.folder_of(each) for each in systems if each.name in chosen},
        sources=sources,
        references=references,
        max_new_tokens=subject.recipe.evaluate.max_new_tokens,
        tokens_per_batch=subject.recipe.evaluate.tokens_per_batch,
    )


def random_case(folder: Path, kind: str, num_examples: int) -> Case:
    """A random teacher with a random module library, and texts of very different lengths.

    A reference is the first half of what the teacher says, so that drafts are right as far as that.
    """
    run = RunDir(folder)
    model = random_model(kind)
    model.save_pretrained(run.teacher_model)
    write_random_library(model, run)
    parts, folders = Parts.of(run), {}
    for text in RANDOM_ASSEMBLIES:
        folders[text] = run.stage("assemble") / text
        write_checkpoint(parts, Assembly.parse(text), folders[text])
    draw = random.Random(0)
    sources = [[*draw.choices(range(3, VOCABULARY), k=draw.randint(1, 60)), 1] for _ in range(num_examples)]
    said = by_transformers(model, sources, HF_BATCH, MAX_NEW, 1)
    references = [[*text[: len(text) // 2], 3, 1] for text in said]
    return Case(f"random {kind}", run.teacher_model, run.library, folders, sources, references, MAX_NEW, 1000)


def random_model(kind: str) -> Any:
    """A small mT5 or BART with weights so large that its outputs hang on its inputs, and an end of sequence that is
    likely enough to come before the limit in many of them (a tied head would say the last token again for ever)."""
    torch.manual_seed(0)
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "vocab_size": VOCABULARY}
    if kind == "mt5":
        sizes: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": DEPTH}
        model: Any = transformers.MT5ForConditionalGeneration(
            transformers.MT5Config(**ids, **sizes, num_decoder_layers=DEPTH)
        )
    else:
        stacks: dict[str, Any] = {
            f"{stack}_{name}": value
            for stack in STACKS
            for name, value in {"layers": DEPTH, "ffn_dim": 128, "attention_heads": 4}.items()
        }
        config = transformers.BartConfig(
            **ids,
            **stacks,
            d_model=64,
            max_position_embeddings=128,
            bos_token_id=2,
            forced_eos_token_id=None,
            tie_word_embeddings=False,
        )
        model = transformers.BartForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        model.lm_head.weight.normal_()
        model.lm_head.weight[1] *= 2.2
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    return model.eval()


def write_random_library(model: Any, run: RunDir) -> None:
    """Modular layers of granularities 2, 3 and 6: the first layer of each span, changed."""
    library = load_pool(run.teacher_model, CPU).layers
    spans = [Span(first, first + size - 1) for size in (2, 3, 6) for first in range(0, DEPTH, size)]
    weights = {
        f"{stack}.{span}.{name}": weight + 0.5 * weight.std() * torch.randn_like(weight)
        if weight.dim() == 2
        else weight
        for stack in STACKS
        for span in spans
        for name, weight in library[stack][Span(span.first, span.first)].state_dict().items()
    }
    run.library.mkdir(parents=True)
    save_file({name: weight.clone() for name, weight in weights.items()}, run.library / "modular.safetensors")
    files = {"teacher": run.teacher_model / "model.safetensors", "modular": run.library / "modular.safetensors"}
    manifest: dict[str, Any] = {f"{name}_sha256": sha256_of(path) for name, path in files.items()}
    manifest["spans"] = {stack: [str(span) for span in spans] for stack in STACKS}
    (run.library / "library.json").write_text(json.dumps(manifest))


def compare(case: Case, num_beams: int) -> None:
    """Decode everything three times and print what was found; raises as main says."""
    found, others = together(case, num_beams), []
    lengths: list[int] = []
    texts: set[tuple[int, ...]] = set()
    for text, folder in case.folders.items():
        model, _ = read_model(folder, dtype=torch.float32)
        alone = by_transformers(model, case.sources, 1, case.max_new_tokens, num_beams)
        batched = by_transformers(model, case.sources, HF_BATCH, case.max_new_tokens, num_beams)
        lengths += map(len, alone)
        texts |= {tuple(each) for each in alone}
        for i, (source, *outputs) in enumerate(zip(case.sources, alone, batched, found[text], strict=True)):
            if not outputs[0] == outputs[1] == outputs[2]:
                gap = max_gap(model, source, outputs, num_beams)
                others.append(Other(text, i, outputs[0] == outputs[1], gap))
    count, wrong = len(lengths), [each for each in others if each.agrees]
    largest = max((each.gap for each in others), default=0.0)
    print(
        f"{case.name}, {f'beam {num_beams}' if num_beams > 1 else 'greedy'}: {len(case.folders)} assemblies "
        f"({', '.join(case.folders)}) x {len(case.sources)} inputs, outputs of {min(lengths)} to {max(lengths)} tokens "
        f"(mean {sum(lengths) / count:.1f}), {len(texts)} distinct. transformers alone and in batches of {HF_BATCH} "
        f"agree on {count - len(others) + len(wrong)} of {count}; ours differs on {len(wrong)} of these. Others: "
        f"{len(others) - len(wrong)} ({(len(others) - len(wrong)) / count:.2%}), largest score gap {largest:.1e}.",
        flush=True,
    )
    for each in others:
        print(
            f"  {each.assembly}, input {each.example}: {'OURS DIFFERS' if each.agrees else 'tied'}, gap {each.gap:.1e}"
        )
    if wrong or len(others) > MAX_OTHERS * count or largest > MAX_GAP:
        raise ValueError(
            f"outputs differ by more than ties: 0 may where transformers agrees with itself, {MAX_OTHERS:.1%} of all "
            f"with a gap under {MAX_GAP:g} where it does not"
        )


def together(case: Case, num_beams: int) -> dict[str, list[list[int]]]:
    """Ours: all assemblies at once, in the batches that an evaluation makes."""
    pool = load_pool(case.teacher, CPU, case.library)
    rules = rules_of(pool.model, case.max_new_tokens, num_beams)
    parsed = {text: Assembly.parse(text) for text in case.folders}
    members = [Member(text, each.encoder.spans, each.decoder.spans) for text, each in parsed.items()]
    found: dict[str, list[list[int]]] = {text: [[] for _ in case.sources] for text in case.folders}
    for places in batches_of([len(source) for source in case.sources], case.tokens_per_batch):
        sources, references = ([side[i] for i in places] for side in (case.sources, case.references))
        for name, outputs in decode_together(pool, members, sources, references, rules).items():
            for place, tokens in zip(places, outputs.tokens, strict=True):
                found[name][place] = tokens
    return found


@torch.inference_mode()
def by_transformers(
    model: Any, sources: Sequence[list[int]], batch: int, max_new_tokens: int, num_beams: int
) -> list[list[int]]:
    """transformers' own outputs, in batches of like length."""
    outputs: list[list[int]] = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for first in range(0, len(order), batch):
        places = order[first : first + batch]
        source_BS, mask_BS = padded_sources(model, [sources[i] for i in places])
        ids_BT = model.generate(
            input_ids=source_BS, attention_mask=mask_BS, max_new_tokens=max_new_tokens, num_beams=num_beams,
            do_sample=False,
        )[:, 1:].tolist()  # fmt: skip
        for place, ids in zip(places, ids_BT, strict=True):
            outputs[place] = up_to_end(ids, {model.generation_config.eos_token_id})
    return outputs


def max_gap(model: Any, source: list[int], outputs: Sequence[list[int]], num_beams: int) -> float:
    """Largest score gap between any two of some outputs of one source, in nats (of beams: a token)."""
    scores = [log_probs(model, source, output) for output in outputs]
    if num_beams > 1:
        penalty = model.generation_config.length_penalty
        totals = [sum(each) / len(each) ** (1.0 if penalty is None else penalty) for each in scores]
        return max(totals) - min(totals)
    gaps = [0.0]
    for a, x in zip(outputs, scores, strict=True):
        for b, y in zip(outputs, scores, strict=True):
            if a != b:
                first = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
                gaps.append(abs(x[first] - y[first]) if first is not None else float("inf"))
    return max(gaps)


@torch.inference_mode()
def log_probs(model: Any, source: list[int], output: list[int]) -> list[float]:
    """Log probability of each token of an output, in float64."""
    labels_1T = torch.tensor([output])
    logits_1TV = model.double()(input_ids=torch.tensor([source]), labels=labels_1T, use_cache=False).logits
    found = logits_1TV.log_softmax(-1).gather(-1, labels_1T[:, :, None])[0, :, 0].tolist()
    model.float()
    return found
