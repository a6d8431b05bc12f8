"""All systems of a run in one batch that shares, against a loop of transformers' generate over the exported folders."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers

from pipeline.bench import Measure, report
from pipeline.bench.engines import load_ctranslate2, written
from pipeline.config.cli import parse_recipe, recipe_parser
from pipeline.config.recipe import SEARCHED
from pipeline.decoding.plain import batches_of, generate, load, losses_of
from pipeline.decoding.rules import rules_of
from pipeline.decoding.together import LayerCalls, Member, decode_together, parts_of
from pipeline.decoding.views import load_pool
from pipeline.engines import to_ctranslate2
from pipeline.evaluation.slices import tokenize
from pipeline.evaluation.subject import VIEWS, Subject
from pipeline.library.export import check_library
from pipeline.rundir.run_dir import RunDir
from pipeline.spans.prefixes import count_layers, count_prefixes
from pipeline.spans.spans import PRESETS, STACKS, Assembly, Span, Tiling, tilings
from pipeline.tokenizer import load_tokenizer

NUM_UNIFORM = 50
GEMM_SIZE = 768
ENGINES = ("float32", "int8")


@dataclass
class Result:
    """What one side made, and how long it took."""

    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    seconds: float = 0.0
    process_seconds: float = 0.0
    """Of all threads: what other work on the machine hardly changes."""
    losses: tuple[float, float] = (0.0, 0.0)
    """Of these, seconds and process seconds of the references' losses, as far as they are made apart from outputs."""
    calls: LayerCalls = field(default_factory=LayerCalls)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run directory with exported models")
    parser.add_argument("--examples", type=int, default=500, help="test examples, from the start of the test part")
    parser.add_argument("--num-beams", type=int, default=1, help="1 is greedy")
    parser.add_argument("--every", type=int, default=1, help="take every n-th system (the teacher always)")
    parser.add_argument("--repeats", type=int, default=1, help="times both sides take turns; medians are reported")
    parser.add_argument("--no-dropped", action="store_true", help="without the layer-dropping baselines")
    parser.add_argument("--engines", action="store_true", help="CTranslate2, too: fp32 and int8, folder by folder")
    parser.add_argument("--write", type=Path, default=None, help="folder for a Markdown file of the results")


def main(arguments: argparse.Namespace) -> None:
    for library in ("sacrebleu", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    subject = load_subject(arguments.run, arguments.examples, arguments.num_beams)
    kept = [each for each in subject.systems if not (arguments.no_dropped and each.kind == "dropped")]
    chosen = [each for i, each in enumerate(kept) if each.kind == "teacher" or i % arguments.every == 0]
    subject = replace(subject, systems=chosen)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides: dict[str, Callable[[Subject, torch.device], Result]] = {
        "outputs": partial(_together, with_losses=False),
        "losses too": _together,
        "baseline": _one_by_one,
    }
    scratch = tempfile.TemporaryDirectory()
    for quantization in ENGINES if arguments.engines else ():
        sides[quantization] = partial(_by_engine, converted(subject, quantization, Path(scratch.name)))
    load(subject.folder_of(subject.teacher), device)  # what a process does once is neither side's
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, side in sides.items():
            results[name].append(_timed(side, subject, device))
    middle = {name: sorted(each, key=lambda each: each.seconds)[len(each) // 2] for name, each in results.items()}
    ours, whole, theirs = (middle.pop(name) for name in ("outputs", "losses too", "baseline"))
    views = [subject.member(system) for system in subject.systems if system.kind in VIEWS]
    encoders = [member.encoder for member in views]
    num_parts, floor_s = _num_parts(subject, device), _floor_s(subject, ours, device)
    measures = [
        Measure(
            "evaluate", "wall time", ours.seconds, theirs.seconds - theirs.losses[0],
            "transformers generate, folder by folder", "s", floor_s,
        ),
        Measure(
            "evaluate", "process time", ours.process_seconds, theirs.process_seconds - theirs.losses[1],
            "transformers generate, folder by folder", "s", floor_s,
        ),
        Measure(
            "evaluate", "wall time, losses on both sides", whole.seconds, theirs.seconds,
            "generate and the references' losses", "s", floor_s,
        ),
        Measure(
            "evaluate", "process time, losses on both sides", whole.process_seconds, theirs.process_seconds,
            "generate and the references' losses", "s", floor_s,
        ),
        Measure(
            "evaluate", "encoder layer calls", whole.calls.encoder,
            num_parts * sum(len(path) for path in encoders), "each system by itself", "calls",
            num_parts * count_prefixes(encoders),
        ),
    ]  # fmt: skip
    measures += [
        Measure(
            "evaluate", f"process time, outputs alone, against {name}", ours.process_seconds, each.process_seconds,
            f"CTranslate2 {name}, folder by folder", "s", floor_s,
        )
        for name, each in middle.items()
    ]  # fmt: skip
    report("evaluate", measures, _notes(subject, (ours, whole), theirs, middle), arguments.write)
    scratch.cleanup()


def load_subject(root: Path, num_examples: int, num_beams: int) -> Subject:
    """What a finished run evaluates, with other settings.

    Raises:
        FileNotFoundError: no run there.
    """
    run = RunDir(root)
    if not run.recipe.is_file():
        raise FileNotFoundError(f"{run.recipe} is missing: give a finished run with --run")
    recipe, _ = parse_recipe(recipe_parser("bench", ""), ["--config", str(run.recipe), "--run_dir", str(root)])
    settings = replace(recipe.evaluate, max_examples=num_examples, num_beams=num_beams)
    return Subject.load(replace(recipe, evaluate=settings), run)


def _slices(subject: Subject) -> list[list[int]]:
    """The same batches for both sides."""
    lengths = [len(ids) for ids in tokenize(load_tokenizer(subject.run.teacher_model), subject, "source")]
    return batches_of(lengths, subject.recipe.evaluate.tokens_per_batch)


def _num_parts(subject: Subject, device: torch.device) -> int:
    """In how many parts the examples go through the encoders."""
    sources = tokenize(load_tokenizer(subject.run.teacher_model), subject, "source")
    return sum(len(parts_of([sources[i] for i in places], device)) for places in _slices(subject))


def _timed(side: Callable[[Subject, torch.device], Result], subject: Subject, device: torch.device) -> Result:
    started_at, process_s = time.perf_counter(), time.process_time()
    result = side(subject, device)
    result.seconds, result.process_seconds = time.perf_counter() - started_at, time.process_time() - process_s
    return result


def _together(subject: Subject, device: torch.device, with_losses: bool = True) -> Result:
    """Ours: weights loaded once, the references' losses beside the outputs or not."""
    result, settings = Result(), subject.recipe.evaluate
    check_library(subject.run.teacher_model, subject.run.library)  # an evaluation does, too
    views = [system for system in subject.systems if system.kind in VIEWS]
    groups = [views, *([system] for system in subject.systems if system.kind not in VIEWS)]
    for systems in groups:
        is_library = systems is views
        folder = subject.run.teacher_model if is_library else subject.folder_of(systems[0])
        pool = load_pool(folder, device, subject.run.library if is_library else None)
        rules = rules_of(pool.model, settings.max_new_tokens, settings.num_beams)
        whole = {stack: tuple(pool.layers[stack]) for stack in STACKS}
        members = [
            subject.member(each) if is_library else Member(each.name, whole["encoder"], whole["decoder"])
            for each in systems
        ]
        sources, references = (tokenize(pool.tokenizer, subject, side) for side in ("source", "target"))
        calls = LayerCalls()
        for places in _slices(subject):
            own_sources, own_references = ([side[i] for i in places] for side in (sources, references))
            found = decode_together(pool, members, own_sources, own_references if with_losses else None, rules, calls)
            for name, outputs in found.items():
                _put(result, name, places, outputs.tokens, len(sources))
        if is_library:
            result.calls = calls
        del pool
        gc.collect()
    return result


def _one_by_one(subject: Subject, device: torch.device) -> Result:
    """The baseline: from_pretrained (sdpa) and generate for each folder, in the same batches, sorted by length; then
    the losses of the references, which ours makes as well, timed apart."""
    result, settings = Result(), subject.recipe.evaluate
    for system in subject.systems:
        model, tokenizer = load(subject.folder_of(system), device)
        assert model.config._attn_implementation == "sdpa"
        sources, references = (tokenize(tokenizer, subject, side) for side in ("source", "target"))
        for places in _slices(subject):
            own_sources, own_references = ([side[i] for i in places] for side in (sources, references))
            _put(
                result,
                system.name,
                places,
                generate(model, own_sources, settings.max_new_tokens, settings.num_beams),
                len(sources),
            )
            begin = time.perf_counter(), time.process_time()
            losses_of(model, own_sources, own_references)
            result.losses = (
                result.losses[0] + time.perf_counter() - begin[0],
                result.losses[1] + time.process_time() - begin[1],
            )
        del model
        gc.collect()
    return result


def converted(subject: Subject, quantization: str, scratch: Path) -> dict[str, Path]:
    """Every system's folder as CTranslate2 takes it; neither side's time counts this."""
    folders = {}
    for system in subject.systems:
        folders[system.name] = scratch / quantization / system.name
        folders[system.name].mkdir(parents=True)
        to_ctranslate2(subject.folder_of(system), folders[system.name], quantization)
    return folders


def _by_engine(folders: Mapping[str, Path], subject: Subject, device: torch.device) -> Result:
    """CTranslate2, folder by folder, in batches of like length."""
    result, settings = Result(), subject.recipe.evaluate
    sources = [example["source"] for example in subject.examples]
    for name, folder in folders.items():
        outputs = written(load_ctranslate2, folder, sources, settings.num_beams, settings.max_new_tokens)
        result.tokens[name] = outputs.ids
    return result


def _put(result: Result, name: str, places: list[int], tokens: list[list[int]], count: int) -> None:
    outputs = result.tokens.setdefault(name, [[] for _ in range(count)])
    for place, ids in zip(places, tokens, strict=True):
        outputs[place] = ids


def _floor_s(subject: Subject, result: Result, device: torch.device) -> float:
    """Seconds of the matrix products alone: every weight once for each token it must see, at the speed of a large
    product measured now. Encoder layers count once for each distinct prefix, decoder layers and head once for each
    output token."""
    sources = tokenize(load_tokenizer(subject.run.teacher_model), subject, "source")
    num_source, flops = sum(map(len, sources)), 0.0
    pool = load_pool(subject.run.teacher_model, device, subject.run.library)
    members = [subject.member(system) for system in subject.systems if system.kind in VIEWS]
    prefixes = {member.encoder[: i + 1] for member in members for i in range(len(member.encoder))}
    for prefix in prefixes:
        flops += 2.0 * num_source * _weights(pool.layers["encoder"][prefix[-1]])
    head = pool.shared.head.weight.numel()
    for member in members:
        num_tokens = sum(map(len, result.tokens[member.name]))
        flops += 2.0 * num_tokens * (head + sum(_weights(layer) for layer in pool.path("decoder", member.decoder)))
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device) for _ in range(2))
    times = []
    for _ in range(10):
        started_at = time.perf_counter()
        (left @ right).sum().item()
        times.append(time.perf_counter() - started_at)
    return flops / (2.0 * GEMM_SIZE**3 / min(times))


def _weights(layer: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)


def _notes(subject: Subject, ours: Sequence[Result], theirs: Result, engines: Mapping[str, Result]) -> str:
    different, count = Counter[str](), 0
    for name, outputs in ((name, outputs) for each in ours for name, outputs in each.tokens.items()):
        different[name] += sum(a != b for a, b in zip(outputs, theirs.tokens[name], strict=True))
        count += len(outputs)
    settings, eos = subject.recipe.evaluate, load_tokenizer(subject.run.teacher_model).eos_token_id
    pairs = {
        name: [(ids, other) for system in each.tokens for ids, other in
               zip(each.tokens[system], theirs.tokens[system], strict=True)]
        for name, each in engines.items()
    }  # fmt: skip
    lines = [
        f"{len(subject.systems)} systems of {subject.run.root.name} x {len(subject.examples)} examples, "
        f"{settings.num_beams} beam(s), at most {settings.max_new_tokens} new tokens, batches of "
        f"{settings.tokens_per_batch} source tokens, {torch.get_num_threads()} thread(s); loading is counted on both "
        "sides.",
        f"Outputs that differ, with and without losses: {different.total()} of {count}; by system "
        f"{json.dumps({name: each for name, each in different.items() if each})}.",
        *(
            f"Outputs of CTranslate2 {name} that differ from generate's: "
            f"{sum(ids != [token for token in other if token != eos] for ids, other in found)} of {len(found)}."
            for name, found in pairs.items()
        ),
        *_shares(subject),
    ]
    return "\n\n".join(lines)


def _shares(subject: Subject) -> list[str]:
    """Distinct prefixes as a share of the encoder layers of all systems, counted by arithmetic."""

    def asked_by(*presets: str) -> list[Tiling]:
        asked = [each.assembly for each in subject.systems if any(preset in presets for preset, _ in each.requests)]
        return [Assembly.parse(text).encoder for text in asked]

    manifest = json.loads((subject.run.library / "library.json").read_text(encoding="utf-8"))
    num_layers = manifest["num_layers"]["encoder"]
    spans = [Span(*map(int, text.split("-"))) for text in manifest["spans"]["encoder"]]
    every = list(tilings(num_layers, spans))
    drawn = random.Random(0).choices(every, k=NUM_UNIFORM)
    found = []
    groups = {"presets": asked_by(*PRESETS), SEARCHED: asked_by(SEARCHED), f"{NUM_UNIFORM} drawn uniformly": drawn}
    for name, group in groups.items():
        if group:
            distinct, naive = count_prefixes(t.spans for t in group), sum(t.num_layers for t in group)
            unlike = count_layers(t.spans for t in group)
            found.append(
                f"Encoder layer calls of {name}: {distinct} distinct prefixes, {distinct / naive:.0%} of the {naive} "
                f"layers of all systems, {distinct / unlike:.0%} of the {unlike} of distinct encoders."
            )
    return found
