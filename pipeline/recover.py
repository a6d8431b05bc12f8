"""The recover stage: a short fine-tuning of one assembly, published only where it does not make it worse.

It starts from the assembly's own checkpoint and trains all of that model on the references. What decides are the task
metric and the loss on the validation part, and neither may get worse: losses of compressed models were seen to fall
while their scores fell too, and scores near zero move by chance.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.publish import discard, replace_folder
from pipeline.assemble import Parts, assembly_to_recover, check_granularities, stacks_of, write_checkpoint
from pipeline.config import Recipe
from pipeline.data import IGNORED_LABEL, evaluation_batches
from pipeline.decoding import generate, load, losses_of
from pipeline.model import load_model
from pipeline.rundir import RunDir, Stage
from pipeline.scoring import bleu
from pipeline.tokenizer import Wording, forced_bos_ids
from pipeline.training import Trainer, Watchdog, begin_stage, full_model_task, save_trained
from pipeline.world import World, release_memory


def recover(recipe: Recipe, stage: Stage, world: World, watchdog: Watchdog, *, extend: bool = False) -> None:
    """Make RUN/recover/model, or say that tuning made the assembly worse and publish none. Collective over all ranks.

    Raises:
        ValueError: no assembly is named, or one that the library cannot make.
    """
    started_at, run = time.time(), stage.run
    settings = recipe.recover
    assembly = assembly_to_recover(recipe, stacks_of(recipe, run))
    check_granularities(recipe, run)
    if begin_stage(stage, world, extend=extend):
        return
    start, tuned = stage.folder / "start", stage.folder / "tuned"
    if world.is_main:
        discard(run.recovered_model)
        write_checkpoint(Parts.of(run), assembly, start)
    world.barrier()
    Trainer(
        full_model_task(load_model(start)),
        stage, world, watchdog, optim=settings.optim, batch=recipe.distill.batch, loop=recipe.distill.loop,
    ).train()  # fmt: skip
    release_memory(world.device)
    if world.is_main:
        save_trained(load_model(start), stage, tuned, run.teacher_model)
        before, after = (validate(folder, recipe, run, world) for folder in (start, tuned))
        scores = {"before": asdict(before), "after": asdict(after)}
        line = (
            f"recover: {settings.assembly} on the validation part: BLEU {before.bleu:.2f} -> {after.bleu:.2f}, "
            f"loss {before.loss:.3f} -> {after.loss:.3f}"
        )
        if after.is_worse_than(before):
            discard(tuned)
            stage.publish([], started_at=started_at, extra=scores)
            print(f"{line}: worse, so nothing is published")
            return
        replace_folder(tuned, run.recovered_model)
        stage.publish([run.recovered_model], started_at=started_at, extra=scores)
        print(f"{line}: {run.recovered_model}")


@dataclass(frozen=True)
class Score:
    """How well a model does on the validation part."""

    bleu: float
    loss: float
    """Cross entropy with the references per token, in nats."""

    def is_worse_than(self, other: Score) -> bool:
        """In one of the two: near zero BLEU is chance. A loss that is no number is worse than any."""
        return self.bleu < other.bleu or not self.loss <= other.loss


def validate(folder: Path, recipe: Recipe, run: RunDir, world: World) -> Score:
    """Score of a checkpoint folder on validation examples, decoded as stage evaluate decodes."""
    model, tokenizer = load(folder, world.device)
    wording = Wording(tokenizer)
    outputs: list[str] = []
    references: list[str] = []
    loss, num_tokens = 0.0, 0
    for batch in evaluation_batches(
        run.data, "validation", recipe.distill.batch.tokens_per_micro_batch, recipe.recover.validation_examples
    ):
        sources = [ids[mask].tolist() for ids, mask in zip(batch.source_BS, batch.source_mask_BS, strict=True)]
        targets = [labels[labels != IGNORED_LABEL].tolist() for labels in batch.labels_BT]
        loss, num_tokens = loss + sum(losses_of(model, sources, targets)), num_tokens + sum(map(len, targets))
        settings, forced = recipe.evaluate, forced_bos_ids(tokenizer, targets)
        outputs += wording(generate(model, sources, settings.max_new_tokens, settings.num_beams, forced))
        references += wording(targets)
    return Score(bleu(outputs, references, recipe.evaluate.bleu_tokenizer), loss / num_tokens)
