"""The search stage: find the assemblies that lose least under any budget.

Spans are scored one at a time on validation data (loss with that modular layer alone in the teacher), the best
assemblies under the sum of the scores are found exactly (spans.solve), and these candidates are scored end to end,
because scores taken one at a time mislead when many layers go at once. Each further round fits the scores to all losses
measured so far and looks again. Losses of candidates share their common prefixes (losses.py).
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from safetensors.torch import load_file
from tqdm import tqdm

from pipeline.assemble import check_granularities
from pipeline.config import DistillConfig, Recipe, SearchConfig
from pipeline.data import IGNORED_LABEL, evaluation_batches, on_device
from pipeline.families import family_of
from pipeline.library import check_library
from pipeline.model import ModularModel, load_model
from pipeline.rundir import RunDir, Stage, digest_of, publish_sealed, read_sealed, write_atomic
from pipeline.search.costs import ShapeTimer, costs_of
from pipeline.search.losses import assembly_losses
from pipeline.search.picture import Point, front_picture
from pipeline.spans import (
    PRESETS,
    STACKS,
    Assembly,
    Budget,
    Cost,
    Shape,
    Span,
    Stacks,
    Tiling,
    best_assemblies,
    best_of,
    pareto_front,
    shape_of,
)
from pipeline.world import World

Scores = dict[str, dict[Span, float]]  # by stack and modular span: nats per token


def search(recipe: Recipe, run: RunDir) -> None:
    """Make RUN/search: candidates.csv, front.png, and choices.json, which stage assemble reads.

    Raises:
        ValueError: a budget or a ratio that not even the coarsest assembly meets; a library that is damaged or of other
            granularities.
    """
    started_at = time.time()
    stage = Stage.of(recipe, run, "search")
    if stage.stamp() is not None:
        print("search is up to date")
        return
    check_granularities(recipe, run)
    check_library(run.teacher_model, run.library)
    stage.reopen()
    world = World.from_environment()
    found = find(recipe, run, stage, world)
    outputs: dict[str, str | bytes] = {
        "candidates.csv": candidates_csv(found),
        "choices.json": json.dumps({"ratios": found.by_ratio, "budgets": found.by_budget}, indent=1),
        "front.png": front_picture(f"{recipe.name}: search", panels(found)),
    }
    for name, content in outputs.items():
        write_atomic(stage.folder / name, content)
    stage.publish([stage.folder / name for name in outputs], started_at=started_at)
    for text, name in {**{f"ratio {r}": name for r, name in found.by_ratio.items()}, **found.by_budget}.items():
        print(f"{text:<18} {name}  loss {found.losses[Assembly.parse(name)]:.4f}")
    print(f"search: {len(found.losses)} assemblies measured: {stage.folder / 'candidates.csv'}")


@dataclass(frozen=True)
class Found:
    """What a search has found; assemblies by their text form where they are for people and files."""

    losses: dict[Assembly, float]
    """Measured end to end: nats per target token of the validation part."""
    predicted: dict[Assembly, float]
    """What the sum of the last round's scores says."""
    costs: dict[str, Cost]
    asked: dict[Assembly, list[str]]
    """Preset and ratio of the presets' assemblies."""
    fronts: dict[str, list[Assembly]]
    by_ratio: dict[str, str]
    by_budget: dict[str, str]


def find(recipe: Recipe, run: RunDir, stage: Stage, world: World) -> Found:
    """Search as the recipe says; what was measured before a kill is read from the stage's folder.

    Raises:
        ValueError: a budget or a ratio that not even the coarsest assembly meets.
    """
    settings = recipe.search
    model = load_library(run, recipe.distill).to(world.device)
    timer = ShapeTimer(recipe, run, stage, world.device)
    costs = costs_of(run, model, timer if settings.latency_examples else None)
    budgets = [Budget.parse(text) for text in settings.budgets]
    check_budgets(budgets, costs, shape_of(model.stacks.coarsest()))
    asked = asked_by_presets(recipe, model.stacks)
    meter = LossMeter(recipe, run, stage, model, world)
    losses, scores = measure_in_rounds(settings, model.stacks, asked, meter, costs, budgets)
    teacher = model.stacks.teacher()
    return Found(
        losses=losses,
        predicted={each: losses[teacher] + score_of(each, scores) for each in losses},
        costs=costs,
        asked=asked,
        fronts={
            name: pareto_front({each: (cost.of(shape_of(each)), losses[each]) for each in losses})
            for name, cost in costs.items()
        },
        by_ratio={f"{ratio:g}": str(best_of_ratio(losses, ratio)) for ratio in recipe.assemble.ratios},
        by_budget={budget.text: str(best_of_budget(losses, budget, costs, timer)) for budget in budgets},
    )


def asked_by_presets(recipe: Recipe, stacks: Stacks) -> dict[Assembly, list[str]]:
    """The presets' assemblies, with the preset and the ratio of each request."""
    asked: dict[Assembly, list[str]] = {}
    for preset in PRESETS:
        for ratio in recipe.assemble.ratios:
            asked.setdefault(stacks.preset(preset, ratio), []).append(f"{preset} {ratio:g}")
    return asked


def measure_in_rounds(
    settings: SearchConfig,
    stacks: Stacks,
    asked: Iterable[Assembly],
    meter: LossMeter,
    costs: Mapping[str, Cost],
    budgets: Sequence[Budget],
) -> tuple[dict[Assembly, float], Scores]:
    """(losses of all assemblies measured, the last round's scores): first every span by itself and what is asked, then
    in each round the assemblies that the scores so far find best."""
    teacher = stacks.teacher()
    singles = {(stack, span): single(stack, span, teacher) for stack, _, spans in stacks for span in spans}
    losses = meter.measure(list(dict.fromkeys([teacher, *asked, *singles.values()])), "spans")
    scores = first = {
        stack: {span: losses[singles[stack, span]] - losses[teacher] for span in spans} for stack, _, spans in stacks
    }
    for round_ in range(settings.rounds):
        if round_:
            scores = fitted_scores(first, losses, losses[teacher])
        wanted = best_by_size(settings.candidates_per_size, stacks, scores, costs, budgets)
        losses |= meter.measure([each for each in wanted if each not in losses], f"round{round_ + 1}")
    return losses, scores


def best_by_size(
    num_best: int, stacks: Stacks, scores: Scores, costs: Mapping[str, Cost], budgets: Sequence[Budget]
) -> list[Assembly]:
    """The assemblies of lowest summed score for every number of layers and within every budget, each once."""
    by_shape = best_assemblies(stacks.num_layers, (scores["encoder"], scores["decoder"]), num_best)
    sizes = shapes_by_size(by_shape, sum(stacks.num_layers))
    sizes += [{shape for shape in by_shape if costs[each.cost].of(shape) <= each.limit} for each in budgets]
    return list(dict.fromkeys(each for allowed in sizes for _, each in best_of(by_shape, allowed, num_best)))


def shapes_by_size(shapes: Iterable[Shape], num_layers: int) -> list[set[Shape]]:
    """The shapes of 2 layers, of 3, and so on up to one less than the teacher has."""
    shapes = list(shapes)
    return [{shape for shape in shapes if sum(shape) == size} for size in range(2, num_layers)]


def load_library(run: RunDir, settings: DistillConfig) -> ModularModel:
    """The teacher and the trained modular layers as one module."""
    teacher = load_model(run.teacher_model)
    model = ModularModel(teacher, family_of(teacher.config.model_type), settings.by_stack, "first")
    weights = load_file(run.library / "modular.safetensors")
    for stack, _, spans in model.stacks:
        for span in spans:
            prefix = f"{stack}.{span}."
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            model.modular[stack][str(span)].layer.load_state_dict(own)
    return model


def single(stack: str, span: Span, teacher: Assembly) -> Assembly:
    """The teacher with one modular layer in it."""
    total = teacher.tiling(stack).num_teacher_layers
    tiling = Tiling((1,) * span.first + (span.num_layers,) + (1,) * (total - 1 - span.last))
    return Assembly(tiling, teacher.decoder) if stack == "encoder" else Assembly(teacher.encoder, tiling)


def score_of(assembly: Assembly, scores: Scores) -> float:
    """Sum of the scores of an assembly's modular spans."""
    return sum(scores[stack][s] for stack in STACKS for s in assembly.tiling(stack).spans if s.num_layers > 1)


def fitted_scores(first: Scores, losses: Mapping[Assembly, float], teacher_loss: float) -> Scores:
    """Scores that explain all measured losses best: least squares with a pull towards those taken one at a time.

    Errors count relative to the loss, as small differences matter among good assemblies.
    """
    names = [(stack, span) for stack in STACKS for span in first[stack]]
    index = {name: i for i, name in enumerate(names)}
    before_P = np.array([first[stack][span] for stack, span in names])
    used_MP = np.zeros((len(losses), len(names)))
    for row, assembly in enumerate(losses):
        for stack in STACKS:
            for span in assembly.tiling(stack).spans:
                if span.num_layers > 1:
                    used_MP[row, index[stack, span]] = 1
    loss_M = np.array(list(losses.values()))
    weight_M = 1 / loss_M
    error_M = (loss_M - teacher_loss - used_MP @ before_P) * weight_M
    pull = np.eye(len(names)) * weight_M.mean()
    matrix = np.vstack([used_MP * weight_M[:, None], pull])
    change_P, *_ = np.linalg.lstsq(matrix, np.concatenate([error_M, np.zeros(len(names))]), rcond=None)
    scores: Scores = {stack: {} for stack in STACKS}
    for (stack, span), score in zip(names, before_P + change_P, strict=True):
        scores[stack][span] = float(score)
    return scores


class LossMeter:
    """Measures losses on validation data; every micro-batch is published when it is done, so a kill costs one."""

    def __init__(self, recipe: Recipe, run: RunDir, stage: Stage, model: ModularModel, world: World) -> None:
        batch = recipe.distill.batch
        self._batches = evaluation_batches(
            run.data, "validation", batch.tokens_per_micro_batch, recipe.search.num_examples
        )
        self._num_tokens = sum(int((each.labels_BT != IGNORED_LABEL).sum()) for each in self._batches)
        made_of = [run.output_hash(name) for name in ("data", "teacher", "distill")]
        self._inputs = [made_of, batch.tokens_per_micro_batch, recipe.search.num_examples]
        self._folder, self._model, self._world = stage.folder / "losses", model, world
        self._family = family_of(json.loads((run.teacher_model / "config.json").read_text())["model_type"])

    def measure(self, assemblies: Sequence[Assembly], name: str) -> dict[Assembly, float]:
        """Nats per target token of each assembly; `name` is for the progress bar."""
        if not assemblies:
            return {}
        key = digest_of([self._inputs, [str(each) for each in assemblies]])
        sums = np.zeros(len(assemblies))
        for index, batch in enumerate(tqdm(self._batches, desc=f"search {name}", unit="batch", disable=None)):
            path = self._folder / f"{key[:12]}-{index:05d}.json"
            record = read_sealed(path)
            if record is None:
                losses_A = assembly_losses(self._model, self._family, on_device(batch, self._world), assemblies)
                record = {"losses": losses_A.double().cpu().tolist()}
                publish_sealed(path, record)
            sums += np.array(record["losses"])
        return dict(zip(assemblies, (sums / self._num_tokens).tolist(), strict=True))


def best_of_ratio(losses: Mapping[Assembly, float], ratio: float) -> Assembly:
    """The measured assembly of lowest loss with at most round(layers / ratio) layers."""
    num_layers = round(next(iter(losses)).num_teacher_layers / ratio)
    return ranked(losses, lambda each: each.num_layers <= num_layers)[0]


def best_of_budget(
    losses: Mapping[Assembly, float], budget: Budget, costs: Mapping[str, Cost], timer: ShapeTimer
) -> Assembly:
    """The measured assembly of lowest loss within a budget.

    Times of parts do not add up exactly: what the fitted cost lets through, and a little more, is timed end to end.
    """
    if budget.cost != "ms":
        return ranked(losses, lambda each: costs[budget.cost].of(shape_of(each)) <= budget.limit)[0]
    for assembly in ranked(losses, lambda each: costs["ms"].of(shape_of(each)) <= 1.1 * budget.limit):
        shape = shape_of(assembly)
        if timer.milliseconds([shape])[shape] <= budget.limit:
            return assembly
    raise ValueError(f"no assembly keeps within {budget.text} when it is timed: give more, or remove this budget")


def check_budgets(budgets: Sequence[Budget], costs: Mapping[str, Cost], coarsest: Shape) -> None:
    """Refuse, before any long work, a budget that not even the coarsest assembly meets."""
    for budget in budgets:
        least = costs[budget.cost].of(coarsest)
        if least > budget.limit:
            raise ValueError(f"search.budgets: {budget.text} is beyond the coarsest assembly, which takes {least:.6g}")


def ranked(losses: Mapping[Assembly, float], allowed: Callable[[Assembly], bool]) -> list[Assembly]:
    """Allowed assemblies, the lowest loss first, the fewest layers first among equals."""
    return sorted(filter(allowed, losses), key=lambda each: (losses[each], each.num_layers, str(each)))


def candidates_csv(found: Found) -> str:
    """Every measured assembly with its costs, smallest first; `fronts` names the costs on whose front it lies."""
    buffer = io.StringIO()
    names = [name for name in found.costs if name != "layers"]
    header = ["assembly", "encoder_layers", "decoder_layers", "ratio_layers", *names, "predicted_loss", "loss"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*header, "fronts", "presets"])
    for each in sorted(found.losses, key=lambda each: (each.num_layers, found.losses[each])):
        shape = shape_of(each)
        row = [str(each), *shape, f"{each.ratio_of_layers:.4f}", *(f"{found.costs[n].of(shape):.6g}" for n in names)]
        fronts = " ".join(name for name, front in found.fronts.items() if each in front)
        row += [
            f"{found.predicted[each]:.6f}",
            f"{found.losses[each]:.6f}",
            fronts,
            "; ".join(found.asked.get(each, ())),
        ]
        writer.writerow(row)
    return buffer.getvalue()


def panels(found: Found) -> dict[str, list[Point]]:
    """Points of the picture by the label of the cost."""
    labels = {"parameters": "parameters", "ms": "latency at batch 1 (ms, fitted)"}
    result: dict[str, list[Point]] = {}
    for name, label in labels.items():
        if name not in found.costs:
            continue
        points = result.setdefault(label, [])
        for each, loss in found.losses.items():
            groups = {text.split()[0] for text in found.asked.get(each, ())} or {"candidate"}
            groups |= {"front"} & {"front" if each in found.fronts[name] else ""}
            points += [Point(found.costs[name].of(shape_of(each)), loss, group) for group in groups]
    return result
