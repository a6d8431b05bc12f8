"""python -m data_prep plan | build | verify | repair | stats | cat

mpiexec -n 8 python -m data_prep build --config RECIPE.yaml --out DIR [--data.FIELD VALUE ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import NonNegativeInt, PositiveInt

from data_prep.config import DataConfig
from data_prep.processes import die_with_mpiexec, may_pass

COMMANDS = {
    "plan": "Fix inputs, tokenizer and units, and make nothing else.",
    "build": "Make a data directory; run it again to finish a killed build.",
    "verify": "Check every sha256 and CRC; the exit code is the verdict.",
    "repair": "Make damaged or missing shards again, to the recorded sha256.",
    "stats": "Lengths, unknown tokens, duplicates, leakage between splits, padding.",
    "cat": "Decode examples, and say where they came from.",
}
WITH_RECIPE = ("plan", "build")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def data_section(recipe: Path) -> dict[str, Any]:
    """The `data:` section of a recipe. Unknown keys are refused with the nearest known name."""
    if not recipe.is_file():
        raise FileNotFoundError(f"{recipe}: no such file; give that of a recipe, such as pipeline/recipes/demo.yaml")
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        raise ValueError(f"{recipe}: not valid YAML: {' '.join(str(err).split())}") from err
    section = content.get("data") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{recipe}: no data: section; add one, even if it is empty braces ({{}})")
    known = [field.name for field in dataclasses.fields(DataConfig)]
    for name in section:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{recipe}: data has no setting {name!r}; {hint}")
    return section


def make_parser() -> ArgumentParser:
    """The command line of all commands."""
    parser = ArgumentParser(prog="python -m data_prep", description=__doc__, exit_on_error=False)
    commands = parser.add_subcommands()
    parsers = {name: ArgumentParser(description=text, exit_on_error=False) for name, text in COMMANDS.items()}
    for name, command in parsers.items():
        if name in WITH_RECIPE:
            command.add_argument("--config", type=Path, required=True, help="Recipe; only its data: section is read.")
            command.add_argument("--data", type=DataConfig, default=DataConfig())
        else:
            command.add_argument("folder", type=Path, help="A finished data directory.")
        if name in ("plan", "build"):
            command.add_argument("--out", type=Path, required=True, help="The data directory.")
        command.add_argument("--verbose", action="store_true", help="Show the traceback of an error.")
        commands.add_subcommand(name, command)
    parsers["verify"].add_argument("--workers", type=PositiveInt, default=os.cpu_count() or 1, help="Threads.")
    parsers["stats"].add_argument("--micro_batch", type=PositiveInt, default=32, help="Examples of a micro-batch.")
    parsers["stats"].add_argument("--window", type=PositiveInt, default=25_600, help="Examples bucketed together.")
    parsers["cat"].add_argument("--split", default="train", help="train, validation or test.")
    parsers["cat"].add_argument("--first", type=NonNegativeInt, default=0, help="Place of the first example.")
    parsers["cat"].add_argument("--num", type=PositiveInt, default=5, help="How many examples.")
    return parser


def with_recipe(arguments: list[str]) -> list[str]:
    """The arguments with the recipe's data section put before the user's own options, which so win over it.

    One way in for both: every value is checked by the same parser against the types of DataConfig.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    recipe = finder.parse_known_args(arguments)[0].config
    if recipe is None or arguments[0] not in WITH_RECIPE:
        return arguments
    texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in data_section(recipe).items()}
    return [arguments[0], *(f"--data.{name}={text}" for name, text in texts.items()), *arguments[1:]]


def _run(options: Namespace, parser: ArgumentParser) -> int:
    name = options.subcommand
    own = parser.instantiate(options)[name]
    if name in ("plan", "build"):
        die_with_mpiexec()
        from data_prep.build import build  # starts MPI, which the other commands do without

        build(own.out, own.data, plan_only=name == "plan")
        return 0
    if name == "verify":
        from data_prep.verify import find_damage

        problems = find_damage(own.folder, own.workers)
        print("\n".join(problems) if problems else f"{own.folder}: whole")
        return 1 if problems else 0
    elif name == "repair":
        from data_prep.verify import repair

        print("\n".join(repair(own.folder)) or f"{own.folder}: whole, nothing to repair")
    elif name == "stats":
        from data_prep.stats import stats_report

        print(stats_report(own.folder, own.micro_batch, own.window))
    else:
        from data_prep.stats import decoded_examples

        for place, source, target in decoded_examples(own.folder, own.split, own.first, own.num):
            print(f"{place}\n    {source}\n    {target}")
    return 0


def _is_first_rank() -> bool:
    from data_prep.build import is_first_rank

    return is_first_rank()


def main(arguments: list[str]) -> int:
    """Run one command; users' mistakes become one line on stderr and exit code 2, what may pass by itself one line and
    exit code 1."""
    arguments = arguments or ["--help"]
    verbose = "--verbose" in arguments
    try:
        parser = make_parser()
        return _run(parser.parse_args(with_recipe(arguments)), parser)
    except (ValueError, OSError, argparse.ArgumentError) as err:
        if verbose:
            raise
        told, code = ("failed", 1) if may_pass(err) else ("data_prep", 2)
        if arguments[0] not in ("plan", "build") or _is_first_rank() or isinstance(err, OSError):
            text = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
            if isinstance(err, argparse.ArgumentError):  # which names an option as it is parsed, not as it is typed
                for parsed, typed in (("config", "--config"), ("out", "--out"), ("folder", "FOLDER")):
                    text = text.replace(f"{arguments[0]}.{parsed}", typed)
            print(f"{told}: {' '.join(text.split())}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
