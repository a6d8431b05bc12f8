"""Families at the full size of public models, random weights: modular model, folders and decoding against transformers.

Of each model the all-teacher assembly and a pure one for each of three granularities, whose modular layers are not the
teacher's: written as folders and read by plain transformers. A model that fills the memory is held in bf16, or in its
coarsest assembly alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

from data_prep.publish import sha256_of
from pipeline.assemble.write import Parts, write_checkpoint
from pipeline.bench import hardware
from pipeline.data import IGNORED_LABEL, MicroBatch, padded_rows
from pipeline.decoding import Member, decode_together, generate, load_pool, rules_of
from pipeline.families import decoder_inputs, family_of
from pipeline.footprint.estimate import GIB
from pipeline.model.modular import ModularModel
from pipeline.ordinary import read_model, save_ordinary
from pipeline.planning.public_models import public_config
from pipeline.rundir import RunDir
from pipeline.spans.spans import STACKS, Assembly

MODELS = (
    "opus-mt-en-de", "t5gemma-2-270m-270m", "nllb-200-distilled-600M", "pegasus-large", "bart-large",
    "mbart-large-50-many-to-many-mmt", "flan-t5-large", "mt5-base", "umt5-base",
)  # fmt: skip
GRANULARITIES = (2, 3, 6, 4, 8)
"""The first three of them that divide the depth are taken."""
NUM_INPUTS = 16
LONGEST_INPUT = 12
NUM_NEW_TOKENS = 8
WORDS = (10, 60)
"""Ids of inputs and targets, from and below: of no special token in any family."""
NUM_BEAMS = 4
STRENGTH = 2.0
"""Of the matrices in layers, over what their models start training with: what is written depends on what is read."""
HEADER = """\
| model | dtype | parameters | assemblies | logits apart (largest) | greedy | beam 4 | distinct | s | peak, floor GiB |
| :-- | :-- | --: | :-- | --: | --: | --: | --: | --: | --: |"""


@dataclass(frozen=True)
class Agreement:
    """What was found of one model, over all its assemblies."""

    model: str
    dtype: str
    parameters: int
    assemblies: list[str]
    logits_apart: float
    """Largest difference between logits of the modular model and of the folders."""
    largest_logit: float
    greedy_equal: int
    """Outputs of the batched decoder that are those of `generate`, token for token."""
    beam_equal: int
    outputs: int
    """Of each search."""
    distinct: int
    """Among the greedy ones."""
    seconds: float
    peak_gib: float
    """Resident memory of the process at its fullest, files that are mapped among it."""
    weights_gib: float
    """Teacher and modular layers: the floor of that."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"a public model known offline ({', '.join(MODELS)})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all weights")
    parser.add_argument("--coarsest", action="store_true", help="the coarsest assembly alone")


def main(arguments: argparse.Namespace) -> None:
    configs = {name: public_config(name) for name in arguments.names or MODELS}
    print(f"families on {hardware()}, torch {torch.__version__}, transformers {transformers.__version__}\n\n{HEADER}")
    found = []
    # a process each: what one model leaves behind is in no other's memory
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for each in processes.map(partial(measured, arguments.dtype, arguments.coarsest), configs, configs.values()):
            print(row_of(each), flush=True)
            found.append(each)
    for each in found:
        print(json.dumps({"bench": "families", **asdict(each)}))


def measured(dtype: str, coarsest: bool, name: str, settings: Mapping[str, Any]) -> Agreement:
    """`agreement` in a folder that is removed at the end."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        return agreement(name, settings, RunDir(Path(folder)), getattr(torch, dtype), coarsest=coarsest)


def row_of(found: Agreement) -> str:
    cells = [
        found.model, found.dtype, f"{found.parameters / 1e6:.1f} M", ", ".join(found.assemblies),
        f"{found.logits_apart:.1e} ({found.largest_logit:.1f})", f"{found.greedy_equal} of {found.outputs}",
        f"{found.beam_equal} of {found.outputs}", str(found.distinct), f"{found.seconds:.0f}",
        f"{found.peak_gib:.2f}, {found.weights_gib:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


@torch.no_grad()
def agreement(
    name: str, settings: Mapping[str, Any], run: RunDir, dtype: torch.dtype = torch.float32, *, coarsest: bool = False
) -> Agreement:
    """Hold the assemblies of one model against transformers.

    Args:
        settings: its config.json.
        run: an empty run directory, which gets the teacher, the module library and one folder at a time.
        dtype: of weights, states and logits.
        coarsest: of the assemblies only the coarsest one is made.
    """
    started_at = time.monotonic()
    teacher = random_model(settings, dtype)
    num_parameters, pad_id = sum(each.numel() for each in teacher.parameters()), teacher.config.pad_token_id
    save_ordinary(teacher, run.teacher_model)
    family = family_of(teacher.config.model_type)
    granularities = granularities_of([len(family.layers(teacher, stack)) for stack in STACKS])
    if coarsest:
        granularities = [max(granularities)]
    modular = modular_model(teacher, granularities)
    save_library(modular, run)
    stacks = modular.stacks
    pure = [stacks.pure((each, each)) for each in granularities]
    assemblies = {str(each): each for each in (pure if coarsest else [stacks.teacher(), *pure])}
    sources, targets = random_texts(0), random_texts(1)
    batch = MicroBatch(0, np.arange(NUM_INPUTS), *padded_rows(sources, pad_id), padded_rows(targets, IGNORED_LABEL)[0])
    logits_NV = {text: modular(batch, (each,)).student_logits_NV for text, each in assemblies.items()}
    del teacher, modular
    outputs = {num_beams: decoded(run, assemblies, sources, num_beams) for num_beams in (1, NUM_BEAMS)}

    parts = Parts.of(run, dtype=dtype)
    apart, equal = 0.0, {1: 0, NUM_BEAMS: 0}
    for text, assembly in assemblies.items():
        folder = run.root / text
        write_checkpoint(parts, assembly, folder)
        model, _ = read_model(folder)
        apart = max(apart, (plain_logits(model, batch) - logits_NV[text]).abs().max().item())
        for num_beams in equal:
            theirs = generate(model, sources, NUM_NEW_TOKENS, num_beams)
            equal[num_beams] += sum(a == b for a, b in zip(outputs[num_beams][text], theirs, strict=True))
        del model
        shutil.rmtree(folder)
    greedy = [tuple(output) for each in outputs[1].values() for output in each]
    return Agreement(
        model=name,
        dtype=str(dtype).removeprefix("torch."),
        parameters=num_parameters,
        assemblies=[*assemblies],
        logits_apart=apart,
        largest_logit=max(each.abs().max().item() for each in logits_NV.values()),
        greedy_equal=equal[1],
        beam_equal=equal[NUM_BEAMS],
        outputs=len(greedy),
        distinct=len({*greedy}),
        seconds=time.monotonic() - started_at,
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        weights_gib=sum(path.stat().st_size for path in run.root.rglob("*.safetensors")) / GIB,
    )


def random_model(settings: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A model of transformers as a config.json has it, always the same random weights."""
    told = dict(settings)
    config: Any = CONFIG_MAPPING[told.pop("model_type")](**told)
    torch.manual_seed(0)
    model: Any = AutoModelForSeq2SeqLM.from_config(config, dtype=dtype).eval()
    if told.get("tie_word_embeddings") is False:  # which UMT5Config overrules
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * config.d_model**-0.5)
    family = family_of(config.model_type)
    for stack in STACKS:
        for parameter in family.layers(model, stack).parameters():
            if parameter.dim() > 1:
                parameter.mul_(STRENGTH)
            else:  # norms and biases away from their constant start
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def granularities_of(num_layers: Sequence[int]) -> list[int]:
    """Those of the bench for the depths of both stacks."""
    return [each for each in GRANULARITIES if not any(depth % each for depth in num_layers)][:3]


def modular_model(teacher: Any, granularities: Sequence[int]) -> ModularModel:
    """A teacher, taken apart, with modular layers that differ from its own in every weight."""
    family = family_of(teacher.config.model_type)
    modular = ModularModel(teacher, family, (granularities, granularities), "last")
    torch.manual_seed(1)
    for parameter in modular.modular.parameters():
        parameter += 0.1 * parameter.square().mean().sqrt() * torch.randn_like(parameter)
    return modular


def weights_of(modular: ModularModel) -> dict[str, torch.Tensor]:
    """Weights of the modular layers by their names in a module library."""
    return {
        f"{stack}.{span}.{name}": weight.contiguous()
        for stack, leaves in modular.modular.items()
        for span, leaf in leaves.items()
        for name, weight in leaf.layer.state_dict().items()
    }


def save_library(modular: ModularModel, run: RunDir) -> None:
    """Write the modular layers over a run's teacher as the distill stage publishes them."""
    run.library.mkdir(parents=True)
    save_file(weights_of(modular), run.library / "modular.safetensors")
    manifest = {
        "teacher_sha256": sha256_of(run.teacher_model / "model.safetensors"),
        "modular_sha256": sha256_of(run.library / "modular.safetensors"),
        "spans": {stack: [str(span) for span in spans] for stack, _, spans in modular.stacks},
    }
    (run.library / "library.json").write_text(json.dumps(manifest))


def random_texts(seed: int) -> list[list[int]]:
    """Token ids of NUM_INPUTS texts of different lengths."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, LONGEST_INPUT, NUM_INPUTS, endpoint=True)
    return [generator.integers(*WORDS, length).tolist() for length in lengths]


def decoded(
    run: RunDir, assemblies: Mapping[str, Assembly], sources: Sequence[Sequence[int]], num_beams: int
) -> dict[str, list[list[int]]]:
    """Output ids of every assembly, by the decoder that takes all of them together."""
    pool = load_pool(run.teacher_model, torch.device("cpu"), run.library)
    members = [Member(text, each.encoder.spans, each.decoder.spans) for text, each in assemblies.items()]
    found = decode_together(pool, members, sources, None, rules_of(pool.model, NUM_NEW_TOKENS, num_beams))
    return {text: outputs.tokens for text, outputs in found.items()}


def plain_logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Logits [N, V] of a model of transformers at the labels of a batch."""
    mask_BT = batch.labels_BT != IGNORED_LABEL
    return model(
        input_ids=batch.source_BS,
        attention_mask=batch.source_mask_BS,
        decoder_input_ids=decoder_inputs(model.config, batch.labels_BT),
        decoder_attention_mask=mask_BT,
    ).logits[mask_BT]
