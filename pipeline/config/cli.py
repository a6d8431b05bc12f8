"""The command line of every program: a recipe, overrides, and mistakes in one line.

`--config` takes a YAML file or the name of one in pipeline/recipes/; any field is overridden as `--a.b value`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from data_prep.config import check_limits
from data_prep.processes import may_pass
from pipeline.config.recipe import Recipe
from pipeline.exits import EXIT_MISTAKE

TYPES = {"tuple": "a list, such as [{value}]", "int": "a whole number", "float": "a number", "bool": "true or false"}
"""What the parser's types are called to people."""
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


class _Parser(ArgumentParser):
    settings: type[Any] = Recipe

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(_one_line(str(ex or message), self.settings))

    def dump(self, cfg: Namespace, **kwargs: Any) -> str:
        """Settings as a recipe, which every other command takes, too: without the options of this command alone."""
        own = vars(cfg).keys() - {field.name for field in dataclasses.fields(self.settings)}
        recipe = cfg.clone()
        for name in own:
            del recipe[name]
        return super().dump(recipe, **kwargs)


def recipe_parser(program: str, description: str, arguments: Sequence[str] = ()) -> ArgumentParser:
    """A parser with every recipe field, `--config`, `--print_config` and `--verbose`.

    Args:
        arguments: those that it will parse. Help on the fields, which is read from their source and takes three times
            as long as all else, is there when they ask for it.
    """
    return settings_parser(program, description, Recipe, arguments)


def settings_parser(
    program: str, description: str, settings: type[Any], arguments: Sequence[str] = ()
) -> ArgumentParser:
    """The same with the fields of any settings dataclass."""
    set_parsing_settings(docstring_parse_attribute_docstrings=not {"-h", "--help"}.isdisjoint(arguments))
    usage = f"{program} --config RECIPE [--any.field value ...]"
    parser = _Parser(prog=program, usage=usage, description=description, allow_abbrev=False)
    parser.settings = settings
    parser.add_argument("--config", action="config", help="A YAML file, or a name in pipeline/recipes/; repeatable.")
    parser.add_argument("--verbose", action="store_true", help="Show the traceback of an error.")
    parser.add_class_arguments(settings, as_group=False)
    return parser


def parse_recipe(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Recipe, Namespace]:
    """(recipe, all parsed arguments).

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range, a missing file.
    """
    parsed = parser.parse_args(with_recipe_paths(arguments))
    check_limits(Recipe, parsed)  # here with full names, before a section by itself says "num_steps"
    if not parsed.name or "/" in parsed.name:
        raise ValueError(f"name is {parsed.name!r}: give a name without a slash, and the folder as run_dir")
    values = parser.instantiate(parsed)
    return Recipe(**{field.name: values[field.name] for field in dataclasses.fields(Recipe)}), values


def run_program(program: Callable[[], None], *, verbose: bool) -> None:
    """Run a program; a user's mistake becomes one line on standard error and exit code 2, what may pass by itself one
    line and exit code 1."""
    try:
        program()
    except BrokenPipeError:  # as where `| head` has read enough
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        if verbose:
            traceback.print_exc()
        told, code = ("failed", 1) if may_pass(error) else ("error", EXIT_MISTAKE)
        print(f"{told}: {error}", file=sys.stderr)
        raise SystemExit(code) from None


def recipe_path(name: str) -> Path:
    """The file of a recipe given by path or by its name in pipeline/recipes/."""
    for candidate in (Path(name), RECIPES / f"{name}.yaml"):
        if candidate.is_file():
            _check_yaml(candidate)
            return candidate
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise ValueError(f"no recipe {name!r}: give the path of a YAML file or one of {', '.join(known)}")


def _check_yaml(path: Path) -> None:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a recipe: it must hold fields and their values, such as `name: summaries`")
    sections = {name[: match.start()] for name in field_names(Recipe) for match in re.finditer(r"\.", name)}
    for name in sorted(sections):
        place: Any = content
        for part in name.split("."):
            place = place.get(part, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict):
            raise ValueError(f"{path}: section {name} holds no fields but {place!r}: give it some, or leave it out")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"{twice[0]!r} is there twice in the section that begins at line {line}: remove one")
        return super().construct_mapping(node, deep)


def field_names(config_class: type[Any], prefix: str = "") -> list[str]:
    """Dotted names of all fields of a settings dataclass."""
    names: list[str] = []
    for name, value in vars(config_class()).items():
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        names += field_names(type(value), f"{prefix}{name}.") if nested else [prefix + name]
    return names


def with_recipe_paths(arguments: Sequence[str]) -> list[str]:
    """Names of recipes after --config become paths."""
    resolved = list(arguments)
    for index, argument in enumerate(resolved):
        if argument == "--config" and index + 1 < len(resolved):
            resolved[index + 1] = str(recipe_path(resolved[index + 1]))
        elif argument.startswith("--config="):
            resolved[index] = f"--config={recipe_path(argument.removeprefix('--config='))}"
    return resolved


def _one_line(message: str, settings: type[Any]) -> str:
    """A parser's message in one line, with the nearest field where a key is unknown."""
    line = " ".join(message.split())
    wrong = re.fullmatch(
        r"Parser key \"(?P<key>[\w.]+)\": Expected an? <class '(?P<type>\w+)'>. Got value: (?P<value>.*)", line
    )
    if wrong and wrong["type"] in TYPES:
        value = wrong["value"]
        return f"{wrong['key']} is {value}: it must be {TYPES[wrong['type']].format(value=value.strip('[]'))}"
    unknown = re.search(r"(?:[Kk]ey|Option) [\"']?-*(?P<key>[\w.]+)[\"']? is not (?:expected|accepted)", line)
    unknown = unknown or re.search(r"[Uu]nrecognized arguments: -*(?P<key>[\w.]+)", line)
    unknown = unknown or re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", line)
    if unknown:
        key = ".".join(filter(None, (unknown.groupdict().get("group"), unknown["key"])))
        near = difflib.get_close_matches(key, [*field_names(settings), "config", "extend", "verbose"], n=1)
        line = f"unknown field {key!r}" + (f": did you mean {near[0]}?" if near else ": see --help")
    return line


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe with every field, as a file that `--config` takes."""
    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False)


def _plain(value: Any) -> Any:
    """Settings as YAML knows them."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
