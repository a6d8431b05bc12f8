"""python -m pipeline study --config STUDY: is one run for all sizes as good as a run for each, at equal cost?

Every training is a run directory of its own below runs/NAME, and what is done is not done again: a study goes on where
it was stopped. Started several times at once, on one machine or as a job array, its processes share the trainings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pipeline.assemble import stacks_of
from pipeline.config import Recipe, settings_parser, with_recipe_paths
from pipeline.planning import preflight, ranks_here
from pipeline.run import lock, run_stage, stop_file, write_recipe
from pipeline.rundir import RunDir, Stage
from pipeline.study.cells import AS_IT_IS, BASE, Cell, Cells
from pipeline.study.forecast import forecast
from pipeline.study.lines import EQUAL, FULL, RECOVERED
from pipeline.study.settings import StudyConfig, VariantConfig
from pipeline.study.table import Entry, write_results


def study_command(arguments: Sequence[str]) -> None:
    """Parse the command line and do what of the study is not done yet.

    Raises:
        ValueError: a mistake in the study or in its recipes.
        SystemExit: a training failed, or was asked to stop (85).
    """
    config, is_dry_run = study_config(arguments)
    out = Path(config.out or f"runs/{config.name}")
    study = Study(config, Cells(config.recipes, out), out)
    study.check()
    if is_dry_run:
        print(forecast(config, study.cells, out))
    else:
        study.run()


def study_config(arguments: Sequence[str]) -> tuple[StudyConfig, bool]:
    """What a command line says, and whether it asks for a dry run.

    Raises:
        ValueError: a mistake in it.
    """
    parser = settings_parser("python -m pipeline study", __doc__ or "", StudyConfig, arguments)
    parser.add_argument("--dry-run", action="store_true", help="Check everything and say what would be trained.")
    values = parser.instantiate(parser.parse_args(with_recipe_paths(arguments)))
    config = StudyConfig(**{each.name: values[each.name] for each in fields(StudyConfig)})
    config.check()
    return config, values["dry_run"]


@dataclass(frozen=True)
class Study:
    """Trains in order. What another process is at is None here, and so is all that builds on it."""

    config: StudyConfig
    cells: Cells
    out: Path

    def check(self) -> None:
        """Refuse what the recipes or this machine cannot do.

        Raises:
            ValueError: names the field.
        """
        run, recipe = self._base()
        for name in ("full_ratios", "recover_ratios"):
            unknown = set(getattr(self.config, name)) - set(recipe.assemble.ratios)
            if unknown:
                raise ValueError(f"{name} has {min(unknown):g}, which is none of the recipes' assemble.ratios")
        for variant in self.config.variants:  # a mistake in the last one is told before the first training
            self.cells.recipe(BASE, {}, variant.arguments)
        preflight(replace(recipe, launch=ranks_here(recipe)), run)

    def run(self) -> None:
        """Train, score and write the tables."""
        self._make_base()
        entries, variants = list(self._entries()), self._variants()
        scored = [entry for entry in entries if entry is not None]
        trained = {budget: done for budget, cells in variants.items() if (done := [each for each in cells if each])}
        if scored or trained:
            print(write_results(self.config.name, scored, trained, self.out))
        missing = len(entries) - len(scored) + sum(each is None for cells in variants.values() for each in cells)
        if missing:
            print(
                f"{missing} modular runs are not all done by other processes yet, with what they need: run this again"
            )

    def _base(self) -> tuple[RunDir, Recipe]:
        """Of data and teacher."""
        return RunDir(self.out / BASE), self.cells.recipe(BASE, {"seed": self.config.seeds[0]})

    def _make_base(self) -> None:
        run, recipe = self._base()
        run.root.mkdir(parents=True, exist_ok=True)
        if not _has_base(recipe, run):
            with lock(run, wait=True):
                if not _has_base(recipe, run):
                    _run(recipe, run, ("data", "teacher"))

    def _entries(self) -> Iterator[Entry | None]:
        """Seed by seed and budget by budget what is trained and scored."""
        if self.config.rivals:
            for seed in self.config.seeds:
                for budget in self.config.budgets:
                    yield self._entry(budget, seed)

    def _variants(self) -> dict[int, list[Cell | None]]:
        """By budget, the modular run as it is and its variants, which are held against it."""
        variants = (AS_IT_IS, *self.config.variants) if self.config.variants else ()
        return {
            budget: [self._modular(budget, seed, each) for seed in self.config.seeds for each in variants]
            for budget in self.config.budgets
        }

    def _entry(self, budget: int, seed: int) -> Entry | None:
        modular = self._modular(budget, seed)
        if modular is None:
            return None
        stacks, ratios = stacks_of(modular.recipe, modular.run), modular.recipe.assemble.ratios
        assemblies = {ratio: str(stacks.preset("size-first", ratio)) for ratio in ratios}
        rivals: dict[str, dict[float, Cell | None]] = {EQUAL: {}, FULL: {}, RECOVERED: {}}
        rivals[EQUAL] = {ratio: self._rival(ratio, budget, seed) for ratio in ratios}
        for ratio in self.config.full_ratios if seed == self.config.seeds[0] else ():
            equal = rivals[EQUAL][ratio]
            rivals[FULL][ratio] = equal and self._train(
                self.cells.rival(equal.method, ratio, modular.flops, equal.rate, seed, f"{FULL}-{budget}")
            )
        for ratio in self.config.recover_ratios:
            rivals[RECOVERED][ratio] = self._train(self.cells.recovered(modular, ratio, assemblies[ratio]))
        done = {side: {r: cell for r, cell in of.items() if cell is not None} for side, of in rivals.items()}
        if done != rivals or not self._score(modular, done):
            return None
        return Entry(budget, modular, str(stacks.teacher()), assemblies, done)

    def _modular(self, budget: int, seed: int, variant: VariantConfig = AS_IT_IS) -> Cell | None:
        """With the learning rate that was best for the first seed and budget."""
        first = self.config.budgets[0], self.config.seeds[0]
        best = _best([self._train(self.cells.modular(first[0], rate, first[1])) for rate in self.config.rates])
        return best and self._train(self.cells.modular(budget, best.rate, seed, variant))

    def _rival(self, ratio: float, budget: int, seed: int) -> Cell | None:
        """The better of the rivals that cost a ratio's part of the modular run, each with the learning rate that was
        best for the first seed and budget."""
        found = []
        for method in self.config.rivals:
            first = self.config.budgets[0], self.config.seeds[0]
            best = _best(
                [self._train(self.cells.equal_rival(method, ratio, rate, *first)) for rate in self.config.rates]
            )
            found.append(best and self._train(self.cells.equal_rival(method, ratio, best.rate, budget, seed)))
        return _best(found)

    def _train(self, cell: Cell) -> Cell | None:
        cell.run.root.mkdir(exist_ok=True)
        if not cell.is_done:
            try:
                held = lock(cell.run)
            except ValueError:
                return None
            with held:
                base = RunDir(self.out / BASE)
                for name, run in {"data": base, "teacher": base, **cell.uses}.items():
                    link = cell.run.root / name
                    if not link.is_symlink():
                        link.symlink_to(Path("..") / run.root.name / name, target_is_directory=True)
                if not cell.is_done:
                    print(f"study: {cell.run.root.name}", flush=True)
                    _run(cell.recipe, cell.run, (cell.stage,))
        return cell

    def _score(self, modular: Cell, rivals: dict[str, dict[float, Cell]]) -> bool:
        """Have the modular run's evaluation score its assemblies and all rivals; False where another process does."""
        folders = [
            f"{side}-{ratio:g}x={cell.model}"
            for side, of in rivals.items() for ratio, cell in of.items() if cell.model is not None
        ]  # fmt: skip
        recipe = replace(modular.recipe, evaluate=replace(modular.recipe.evaluate, folders=tuple(folders)))
        try:
            held = lock(modular.run)
        except ValueError:
            return False
        with held:
            if Stage.of(recipe, modular.run, "assemble").stamp() is None:
                _run(recipe, modular.run, ("assemble",))
            if Stage.of(recipe, modular.run, "evaluate").stamp() is None:
                _run(recipe, modular.run, ("evaluate",))
        return True


def _has_base(recipe: Recipe, run: RunDir) -> bool:
    return run.output_hash("data") is not None and Stage.of(recipe, run, "teacher").stamp() is not None


def _run(recipe: Recipe, run: RunDir, stages: Sequence[str]) -> None:
    recipe = replace(recipe, launch=ranks_here(recipe))
    stop_file(run).unlink(missing_ok=True)
    write_recipe(recipe, run)
    for name in stages:
        run_stage(name, recipe, run, [])


def _best(cells: Sequence[Cell | None]) -> Cell | None:
    """The one of the least validation loss, once all are done."""
    done = [cell for cell in cells if cell is not None]
    return min(done, key=lambda cell: cell.validation_loss) if len(done) == len(cells) else None
