"""What a study is told."""

from __future__ import annotations

import dataclasses
import shlex

from data_prep.config import Settings, identity, operational


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantConfig(Settings):
    """The modular run with something changed."""

    name: str = identity("")
    """Of its runs and its row."""
    change: str = identity("")
    """What it changes of the recipe, as on the command line of `run`: "--distill.init last". distill.local_steps is
    that of the recipe's own number of steps, and is scaled with it."""

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(shlex.split(self.change))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(Settings):
    """One modular run for every ratio of a recipe, against a run for each ratio.

    The rules hold for all sides alike. Cost is counted FLOPs of student, teacher and heads. Every side's learning rate
    is chosen among the same factors, and the better rival, on validation data. The test part is scored once.
    """

    name: str = identity("study")
    """Also the folder that everything goes to, runs/NAME, unless out says another."""
    out: str = operational("")
    """The folder that everything goes to."""
    recipes: tuple[str, ...] = identity(())
    """Recipes as `run --config` takes them, the later over the earlier: data, teacher, method, batches, evaluation. The
    sizes are their assemble.ratios, with the preset size-first."""
    seeds: tuple[int, ...] = identity((0, 1))
    """Of training; data and teacher are those of the first."""
    budgets: tuple[int, ...] = identity((600,), low=1)
    """Steps of a modular run, its local phase in proportion to the recipe's. Each makes a table of its own."""
    rates: tuple[float, ...] = identity((1.0,), above=0)
    """Factors on the recipe's learning rates, tried with the first seed and budget. The others take the best."""
    rivals: tuple[str, ...] = identity(("finetune", "logit"), choices=("finetune", "logit"))
    """How a rival is trained, as in baseline.methods. Without any, variants alone are compared, and nothing scored."""
    full_ratios: tuple[float, ...] = identity((), above=1)
    """Ratios at which the better rival gets the whole cost of the modular run as well, with the first seed."""
    recover_ratios: tuple[float, ...] = identity((), above=1)
    """Ratios at which the modular run's checkpoint is trained further by itself, as the recipe's recover says."""
    variants: tuple[VariantConfig, ...] = identity(())
    """Changes of the modular run. Each is trained for as many FLOPs as the run as it is, with every seed and budget,
    and held against it on validation data."""

    def check(self) -> None:
        """Refuse what no study can be made of.

        Raises:
            ValueError: names the field.
        """
        for field in ("recipes", "seeds", "budgets", "rates"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty: name at least one")
        if not self.rivals and not self.variants:
            raise ValueError("rivals and variants are empty: name at least one of either")
        names = [each.name for each in self.variants]
        wrong = next((name for name in names if not name or "/" in name or names.count(name) > 1), None)
        if wrong is not None:
            raise ValueError(f"variants has the name {wrong!r}: give each a name of its own, without a slash")
        if not self.name or "/" in self.name:
            raise ValueError(f"name is {self.name!r}: give a name without a slash, and the folder as out")
