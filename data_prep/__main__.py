"""python -m data_prep build | verify | stats | cat

mpiexec -n 8 python -m data_prep build --config RECIPE.yaml --out DIR [--data.FIELD VALUE ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt

from data_prep.config import DataConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def data_section(recipe: Path) -> dict[str, Any]:
    """The `data:` section of a recipe. Unknown keys are refused with the nearest known name."""
    if not recipe.is_file():
        raise FileNotFoundError(f"{recipe}: no such recipe; give a YAML file with a data: section")
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as err:
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
    build = ArgumentParser(
        description="Make a data directory; run it again to finish a killed build.", exit_on_error=False
    )
    build.add_argument("--config", type=Path, required=True, help="Recipe; only its data: section is read.")
    build.add_argument("--out", type=Path, required=True, help="The data directory.")
    build.add_argument("--data", type=DataConfig, default=DataConfig())
    commands.add_subcommand("build", build)
    verify = ArgumentParser(
        description="Check every sha256 and CRC; the exit code is the verdict.", exit_on_error=False
    )
    stats = ArgumentParser(description="Counts, lengths, tokens.", exit_on_error=False)
    cat = ArgumentParser(description="Decode a few examples.", exit_on_error=False)
    for name, command in (("verify", verify), ("stats", stats), ("cat", cat)):
        command.add_argument("folder", type=Path, help="A finished data directory.")
        commands.add_subcommand(name, command)
    cat.add_argument("--split", default="train", help="train, validation or test.")
    cat.add_argument("--num", type=PositiveInt, default=5, help="How many examples.")
    for command in (build, verify, stats, cat):
        command.add_argument("--verbose", action="store_true", help="Show the traceback of an error.")
    return parser


def with_recipe(arguments: list[str]) -> list[str]:
    """The arguments with the recipe's data section put before the user's own options, which so win over it.

    One way in for both: every value is checked by the same parser against the types of DataConfig.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    recipe = finder.parse_known_args(arguments)[0].config
    if recipe is None or arguments[0] != "build":
        return arguments
    texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in data_section(recipe).items()}
    return ["build", *(f"--data.{name}={text}" for name, text in texts.items()), *arguments[1:]]


def _run(options: Namespace, parser: ArgumentParser) -> int:
    if options.subcommand == "build":
        from data_prep.build import build  # starts MPI, which the other commands do without

        return 0 if build(options.build.out, parser.instantiate(options).build.data) else 2
    from data_prep import verify

    folder = options[options.subcommand].folder
    if options.subcommand == "stats":
        print(verify.stats_table(folder))
    elif options.subcommand == "cat":
        for source, target in verify.decoded_examples(folder, options.cat.split, options.cat.num):
            print(f"{source}\n    {target}")
    else:
        problems = verify.find_damage(folder)
        print("\n".join(problems) if problems else f"{folder}: whole")
        return 1 if problems else 0
    return 0


def _is_first_rank() -> bool:
    from data_prep.build import is_first_rank

    return is_first_rank()


def main(arguments: list[str]) -> int:
    """Run one command; users' mistakes become one line on stderr and exit code 2."""
    verbose = "--verbose" in arguments
    try:
        parser = make_parser()
        return _run(parser.parse_args(with_recipe(arguments)), parser)
    except (ValueError, FileNotFoundError, argparse.ArgumentError) as err:
        if verbose:
            raise
        if arguments[:1] != ["build"] or _is_first_rank():
            print(f"data_prep: {' '.join(str(err).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
