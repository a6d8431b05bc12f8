"""python -m pipeline draft: an assembly that writes ahead for the teacher, which then only checks.

The draft proposes tokens, the teacher looks at all of them in one pass and keeps those that it would have written
itself: the output is the teacher's own, sooner. An assembly of the run with a shallow decoder is such a draft.
Candidates are measured on validation examples, one at a time, as transformers' generate takes a draft, and the fastest
is written to RUN/draft/model for `teacher.generate(..., assistant_model=draft)`. What generate does is counted as it
is: it encodes a source once more for its draft.

Shapes: B examples, S source tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from data_prep.publish import publish_json, publishing_folder
from pipeline.assemble import Parts, card_of, loading_of, write_card, write_checkpoint
from pipeline.data import evaluation_batches
from pipeline.rundir import RunDir
from pipeline.spans import Assembly, Stacks, pure_tiling
from pipeline.tokenizer import language_ids, load_tokenizer

LOOKAHEADS = (3, 6, 12)  # tokens that a draft proposes at most
LOOKUPS = (3, 10)  # the same, of prompt lookup, which copies them from the output so far
WHOLE_BATCH = 10**9
ALONE = "teacher alone"
LOADING = """    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    teacher = AutoModelForSeq2SeqLM.from_pretrained("teacher")  # the folder of the teacher, RUN/teacher/model
    draft, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
    inputs = tokenizer("a text", return_tensors="pt")  # one text at a time; greedy
    outputs = teacher.generate(**inputs, assistant_model=draft, num_beams=1, do_sample=False, max_new_tokens=128)
    print(tokenizer.batch_decode(outputs, skip_special_tokens=True))
"""


@dataclass(frozen=True)
class Way:
    """One way to write what the teacher writes."""

    name: str
    assembly: str = ""
    num_assistant_tokens: int = 0
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    """Of generate."""


@dataclass
class Found:
    """What a way came to over all examples."""

    seconds: float = 0.0
    num_tokens: int = 0
    num_passes: int = 0
    """Of the teacher's decoder."""
    num_equal: int = 0
    """Examples whose output is the teacher's, token for token."""

    @property
    def ms_per_token(self) -> float:
        """Milliseconds a kept token; prompt lookup may write nothing where generation settings force a last token."""
        return 1e3 * self.seconds / self.num_tokens if self.num_tokens else float("inf")


def draft_command(arguments: Sequence[str]) -> None:
    """Parse the command line, measure, print a line a way, write the best draft.

    Raises:
        FileNotFoundError: the run has no library or no data.
        ValueError: it has no assembly that is shallower than the teacher, or no draft gives the teacher's outputs.
    """
    parser = argparse.ArgumentParser(prog="python -m pipeline draft", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run with a module library")
    parser.add_argument("--examples", type=int, default=64, help="validation examples (default 64)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an output (default 128)")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    run = RunDir(options.run)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    parts = Parts.of(run)
    examples = examples_of(run, options.examples)
    found = measure(parts, ways_of(parts), examples, options.max_new_tokens)
    print(table(found, len(examples)))
    folder = run.root / "draft" / "model"
    way = best(found, len(examples))
    write_draft(parts, way, found, folder)
    speed = found[alone(found)].ms_per_token / found[way].ms_per_token
    print(f"{folder}: {way.assembly}, with which the teacher writes {speed:.2f} times as fast as alone")
    if speed <= 1:
        print("no draft makes the teacher faster here: serve it alone")


def examples_of(run: RunDir, num_examples: int) -> list[dict[str, Any]]:
    """What generate takes of validation examples, evenly spaced over the split: source ids [1, S], and where texts
    begin with the token of a language that of the target."""
    has_languages = bool(language_ids(load_tokenizer(run.teacher_model)))
    return [
        {"input_ids": ids_S[mask_S][None], "attention_mask": mask_S[mask_S][None].long()}
        | ({"forced_bos_token_id": int(labels_T[0])} if has_languages else {})
        for batch in evaluation_batches(run.data, "validation", WHOLE_BATCH, num_examples)
        for ids_S, mask_S, labels_T in zip(batch.source_BS, batch.source_mask_BS, batch.labels_BT, strict=True)
    ]


def ways_of(parts: Parts) -> list[Way]:
    """The teacher alone, prompt lookup, and drafts of at most half the teacher's decoder layers, with the teacher's own
    encoder and with the shallowest.

    Raises:
        ValueError: the library has no such decoder.
    """
    ways = [Way(ALONE), *(Way(f"prompt lookup, {n}", options={"prompt_lookup_num_tokens": n}) for n in LOOKUPS)]
    for assembly in candidates(parts.models.stacks):
        for num_tokens in LOOKAHEADS:
            model = parts.models.assembly(assembly)
            for name, value in settings_of(num_tokens).items():
                setattr(model.generation_config, name, value)
            ways.append(Way(f"{assembly}, {num_tokens}", str(assembly), num_tokens, {"assistant_model": model}))
    return ways


def candidates(stacks: Stacks) -> list[Assembly]:
    """Assemblies that may draft, raises what `ways_of` does."""
    (_, num_encoder, encoder_spans), (_, num_decoder, decoder_spans) = stacks
    decoders = {pure_tiling(num_decoder, span.num_layers) for span in decoder_spans}
    shallow = [each for each in decoders if 2 * each.num_layers <= num_decoder]
    if not shallow:
        raise ValueError("the module library has no decoder of half the teacher's layers: it cannot write ahead")
    by_depth = sorted(shallow, key=lambda each: each.num_layers)
    granularities = {1, max((span.num_layers for span in encoder_spans), default=1)}
    return [Assembly(pure_tiling(num_encoder, each), decoder) for each in sorted(granularities) for decoder in by_depth]


def settings_of(num_assistant_tokens: int) -> dict[str, Any]:
    """What a draft's generation settings say of drafting."""
    return {"num_assistant_tokens": num_assistant_tokens, "num_assistant_tokens_schedule": "constant"}


@torch.no_grad()
def measure(
    parts: Parts, ways: Sequence[Way], examples: Sequence[dict[str, Any]], max_new_tokens: int
) -> dict[Way, Found]:
    """Write every target in every way; the ways take turns, so that what else the machine does slows all of them."""
    encoder, decoder = (pure_tiling(num_layers, 1) for _, num_layers, _ in parts.models.stacks)
    teacher: Any = parts.models.assembly(Assembly(encoder, decoder))
    found = {way: Found() for way in ways}
    passes = [0]
    teacher.get_decoder().register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    rounds = [examples[0], *examples]  # the first is not counted: it warms up
    for index, inputs in enumerate(tqdm(rounds, desc="draft", unit="example", disable=None)):
        own = None
        for way in ways:
            passes[0], started_at = 0, time.perf_counter()
            output = teacher.generate(
                **inputs, num_beams=1, do_sample=False, max_new_tokens=max_new_tokens, **way.options
            )
            seconds = time.perf_counter() - started_at
            own = output if own is None else own
            if index > 0:
                each = found[way]
                each.seconds += seconds
                each.num_tokens += output.shape[1] - 1
                each.num_passes += passes[0]
                each.num_equal += torch.equal(output, own)
    return found


def best(found: dict[Way, Found], num_examples: int) -> Way:
    """The draft with the fewest milliseconds a token among those whose outputs are all the teacher's.

    Raises:
        ValueError: there is none.
    """
    drafts = [way for way, each in found.items() if way.assembly and each.num_equal == num_examples]
    if not drafts:
        raise ValueError("no draft gave exactly the teacher's outputs: check the installation with doctor")
    return min(drafts, key=lambda way: found[way].ms_per_token)


def alone(found: dict[Way, Found]) -> Way:
    """The way without a draft."""
    return next(way for way in found if way.name == ALONE)


def table(found: dict[Way, Found], num_examples: int) -> str:
    """One line a way, as Markdown."""
    own = found[alone(found)].ms_per_token
    lines = [
        f"| {way.name} | {each.ms_per_token:.2f} | {own / each.ms_per_token:.2f} | "
        f"{each.num_tokens / max(1, each.num_passes):.2f} | {each.num_equal} of {num_examples} |"
        for way, each in found.items()
    ]
    head = "| way, tokens drafted at most | ms a token | speed | tokens a pass of the teacher | equal outputs |"
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def write_draft(parts: Parts, way: Way, found: dict[Way, Found], folder: Path) -> None:
    """Publish a draft, with what was measured and how it is used."""
    assembly = Assembly.parse(way.assembly)
    with publishing_folder(folder) as temporary:
        write_checkpoint(parts, assembly, temporary)
        path = temporary / "generation_config.json"
        told = json.loads(path.read_text(encoding="utf-8")) | settings_of(way.num_assistant_tokens)
        path.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        kind, num_examples = parts.config["model_type"], found[way].num_equal
        scores = [f"It writes ahead for its teacher. On {num_examples} validation examples, one at a time:", ""]
        scores += table(found, num_examples).splitlines()
        loading = loading_of(temporary, LOADING)
        card = card_of(assembly, kind=kind, dropped=False, library=parts.manifest, loading=loading, scores=scores)
        write_card(temporary, card)
        ways = [{"way": each.name, **asdict(figures)} for each, figures in found.items()]
        publish_json(temporary / "draft.json", {"of": parts.hashes, "chosen": way.name, "ways": ways})
