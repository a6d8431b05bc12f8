"""What can be known to be wrong before any work starts: each mistake in one line, with the value and what to do.

Mistakes in the data itself are found by the data stage, which comes first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from data_prep.config import DataConfig
from data_prep.hub import local_folder, refuse_pointer
from data_prep.publish import sha256_of
from data_prep.reader import SplitReader
from data_prep.shards import read_manifest
from pipeline.assemble import assembly_to_recover, baselines_of, requested_assemblies
from pipeline.beside import GENERATION, check_ids, read
from pipeline.config import Recipe
from pipeline.decoding import generation_settings, refuse_unknown
from pipeline.engines import ENGINES, refuse_kind
from pipeline.evaluation import check_metricx, read_peers
from pipeline.families import family_of, refuse_uncarried
from pipeline.footprint import AUTO, read_ds_config
from pipeline.model import check_lengths, check_losses
from pipeline.planning.disk import check_disk
from pipeline.planning.planned import Planned, check_fit
from pipeline.pretrained import config_of, settings_of
from pipeline.rundir import RunDir, Stage, left_out
from pipeline.scoring import check_bleu_tokenizer
from pipeline.search import check_budgets
from pipeline.spans import Budget, Cost, Stacks, costs_of_sizes, shape_of
from pipeline.tokenizer import check_tokenizer, language_ids, load_tokenizer, tokenizer_files
from pipeline.weights import names_of_index

CHECKED_STAGES = ("teacher", "distill", "baseline", "assemble")
NAMES_ALONE = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}  # no vocabulary in them
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def preflight(recipe: Recipe, run: RunDir, *, extend: bool = False) -> None:
    """Check a recipe against itself, this machine, the teacher's folder and the run directory.

    Raises:
        ValueError, FileNotFoundError, PermissionError: the first mistake found.
    """
    transformers.utils.logging.set_verbosity_error()  # what it says of settings that are refused below
    _check_ranks(recipe)
    _check_run_directory(run)
    _check_parts(recipe)
    check_named_files(recipe)
    if recipe.teacher.folder:
        check_teacher(recipe, local_folder(recipe.teacher.folder, "teacher.folder"))
    planned = Planned.of(recipe)
    kind = planned.settings["model_type"]
    check_losses(kind, recipe.distill.losses)
    if recipe.assemble.ctranslate2:
        refuse_kind("ctranslate2", kind)
    _check_granularities(recipe, planned.stacks)
    requested_assemblies(recipe, planned.stacks)
    baselines_of(recipe, planned.stacks)
    if recipe.recover.assembly:
        assembly_to_recover(recipe, planned.stacks)
    _check_budgets(planned)
    _check_stages(recipe, run, extend)
    check_disk(planned, run)


def _check_ranks(recipe: Recipe) -> None:
    num_ranks = recipe.launch.num_ranks
    teacher, distill = recipe.teacher, recipe.distill
    for name, batch, loop in (("teacher", teacher.batch, teacher.loop), ("distill", distill.batch, distill.loop)):
        if loop.ds_config != AUTO:
            read_ds_config(loop.ds_config)
        if batch.micro_batches_per_step % num_ranks:
            raise ValueError(
                f"{name}.batch.micro_batches_per_step is {batch.micro_batches_per_step}, which launch.num_ranks "
                f"{num_ranks} does not divide: make it a multiple of {num_ranks}; {batch.shared_by(num_ranks)}"
            )
    if torch.cuda.is_available() and not dist.is_nccl_available():
        raise ValueError("this torch has CUDA but not NCCL: install a build of torch with NCCL")


def _check_run_directory(run: RunDir) -> None:
    folder = run.root
    if folder.parts[:1] and folder.parts[0].startswith("~"):
        raise ValueError(f"run_dir {folder}: ~ is not expanded here: write the whole path")
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"run_dir {run.root} cannot be made: {folder} is a file")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PermissionError(f"cannot write to {folder} ({error.strerror}): choose another run_dir") from error


def _check_parts(recipe: Recipe) -> None:
    """Training is validated on one part of the data, and all systems are scored on another."""
    for part in ("validation", "test"):
        if not any(getattr(each, part) for each in recipe.data.all_sets):
            raise ValueError(f"data.{part} is empty: name at least one file for it")


def check_micro_batches(recipe: Recipe, run: RunDir) -> None:
    """Hold the micro-batches of every training against the examples, once there are some.

    Raises:
        ValueError: the longest example does not fit into a micro-batch.
    """
    manifest = read_manifest(run.data)
    longest = max(int(SplitReader(run.data, manifest, part).index["longest_pair"].max()) for part in manifest.splits)
    for name, batch in (("teacher", recipe.teacher.batch), ("distill", recipe.distill.batch)):
        if batch.tokens_per_micro_batch < longest and (name != "teacher" or recipe.teacher.optim.num_steps):
            raise ValueError(
                f"{name}.batch.tokens_per_micro_batch is {batch.tokens_per_micro_batch}, but the longest example has "
                f"{longest} tokens (source and target): choose at least {longest}"
            )


def check_named_files(recipe: Recipe) -> None:
    """Refuse what a recipe names beside the teacher and cannot be used: DeepSpeed configurations, scorers, test
    files, peers.

    Raises:
        ValueError: the first of them, and why.
    """
    for name in {recipe.teacher.loop.ds_config, recipe.distill.loop.ds_config}:
        if name.endswith(".json"):
            from pipeline.training import check_ds_config  # late: importing DeepSpeed takes a while

            check_ds_config(name)
    if recipe.assemble.ctranslate2:
        ENGINES["ctranslate2"].refuse_missing("assemble.ctranslate2")
    check_bleu_tokenizer(recipe.evaluate.bleu_tokenizer)
    if recipe.evaluate.metricx:
        check_metricx(Path(recipe.evaluate.metricx))
    if recipe.evaluate.test:
        from data_prep.testpart import plan_of_other_test_part  # late: what reads texts takes a while

        plan_of_other_test_part(recipe.data, recipe.evaluate.test)
    for refusal in read_peers(recipe.evaluate.folders)[1]:
        raise ValueError(refusal)


def check_teacher(recipe: Recipe, folder: Path, *, whole: bool = True) -> None:
    """Check the folder that a recipe names as its teacher, and the tokenizer beside it.

    Args:
        whole: False where weights and tokenizer may not be there yet; those that are there are checked.

    Raises:
        ValueError, FileNotFoundError: the first mistake, with its file.
    """
    config = _read_model_config(folder)
    if whole or any((folder / name).is_file() for name in WEIGHTS):
        _check_weights(folder)
        check_fit(Planned.of(recipe), folder)
    if whole or _has_tokenizer(recipe):
        _check_tokenizer(folder, recipe.data, config)
    check_lengths(config, recipe)
    refuse_unknown(generation_settings(folder), folder)
    check_ids(folder, config.to_dict(), read(folder / GENERATION))


def _has_tokenizer(recipe: Recipe) -> bool:
    try:
        return bool(tokenizer_files(local_folder(recipe.data.tokenizer)))
    except FileNotFoundError:
        return False


def _read_model_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"teacher.folder {folder} is not a Hugging Face model folder: it has no config.json")
    settings = settings_of(folder)
    family = family_of(settings["model_type"])
    if missing := [name for name in family.size_keys if name not in settings]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: take the model's whole config.json")
    refuse_uncarried(settings, path)
    config: Any = config_of(folder)
    if getattr(config, family.start_key) is None:
        raise ValueError(f"{path} names no {family.start_key}: add the token that outputs begin with")
    return config


def _check_weights(folder: Path) -> None:
    found = [name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"teacher.folder {folder} holds no weights: it needs {WEIGHTS[0]} or {WEIGHTS[2]}")
    refuse_pointer(folder / found[0])
    if found[0].endswith(".index.json"):
        missing = [name for name in names_of_index(folder / found[0]) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"teacher.folder {folder} lacks {', '.join(missing)}, which {found[0]} names")


def _check_tokenizer(teacher: Path, data: DataConfig, config: Any) -> None:
    tokenizer = local_folder(data.tokenizer, "data.tokenizer")
    own = check_tokenizer(tokenizer)
    if len(own) > config.vocab_size:
        raise ValueError(
            f"data.tokenizer {tokenizer} has {len(own)} tokens, the teacher's embedding only "
            f"{config.vocab_size}: give the teacher's own tokenizer"
        )
    if language_ids(own):
        for each in data.all_sets:
            each.refuse_unsaid_languages()
    for name in ("pad_token_id", "eos_token_id"):
        ours, theirs = getattr(own, name), getattr(config, name)
        if ours != theirs and not (isinstance(theirs, list) and ours in theirs):
            raise ValueError(
                f"data.tokenizer {tokenizer} has {name} {ours}, but the teacher's config.json {theirs}: make them agree"
            )
    if not set(tokenizer_files(teacher)) - NAMES_ALONE or teacher.resolve() == tokenizer.resolve():
        return
    for name in ("spiece.model", "tokenizer.json"):
        ours, theirs = tokenizer / name, teacher / name
        if ours.is_file() and theirs.is_file():
            if sha256_of(ours) != sha256_of(theirs):
                raise ValueError(f"{ours} is not the teacher's {theirs}: data.tokenizer must be the teacher's own")
            break
    vocabulary = own.get_vocab()
    for token, number in load_tokenizer(teacher).get_vocab().items():
        # A folder that tells less may lack the sentinels that the class adds by itself.
        if vocabulary.get(token) != number and not token.startswith("<extra_id_"):
            raise ValueError(
                f"data.tokenizer {tokenizer} has no token {token!r} of id {number} as the teacher's in {teacher} does: "
                f"it must be the teacher's own"
            )


def _check_granularities(recipe: Recipe, stacks: Stacks) -> None:
    own = (recipe.distill.encoder_granularities, recipe.distill.decoder_granularities)
    longest, layers = max(stacks.num_layers), "+".join(map(str, stacks.num_layers))
    for (stack, total, _), of_stack in zip(stacks, own, strict=True):
        name, limit = (f"{stack}_granularities", total) if of_stack is not None else ("granularities", longest)
        for granularity in recipe.distill.granularities_of(stack):
            if granularity > limit:
                raise ValueError(
                    f"distill.{name} has {granularity}, but the teacher has {layers} layers: no span is that long"
                )
    if not any(stacks.spans):
        raise ValueError(
            f"the granularities leave all of {layers} layers as they are: name one of 2 or more for a stack of 2 or "
            "more layers"
        )


def _check_budgets(planned: Planned) -> None:
    """Those of search.budgets that arithmetic can answer; milliseconds are measured."""
    sizes = planned.checkpoint_sizes()
    parameters = Cost(sizes.embeddings + sizes.rest, sizes.encoder_layer, sizes.decoder_layer)
    costs = costs_of_sizes(parameters, sizes.bytes_per_parameter)
    budgets = [each for each in map(Budget.parse, planned.recipe.search.budgets) if each.cost in costs]
    check_budgets(budgets, costs, shape_of(planned.stacks.coarsest()))


def _check_stages(recipe: Recipe, run: RunDir, extend: bool) -> None:
    """Refuse a stage that was begun with other settings, as far as the stages before it stand."""
    unused = left_out(recipe)
    for name in (each for each in CHECKED_STAGES if each not in unused):
        try:
            stage = Stage.of(recipe, run, name)
        except FileNotFoundError:
            return
        stage.check(extend=extend)
