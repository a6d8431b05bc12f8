"""The command line: every field documented and overridable, every mistake one line and exit code 2."""

from __future__ import annotations

import errno
import re

import pytest
import yaml

import pipeline.__main__
from data_prep import verify
from data_prep.__main__ import main as data_prep_main
from pipeline.__main__ import STAGES, TOOLS, main
from pipeline.bench.__main__ import BENCHES
from pipeline.config.cli import RECIPES, field_names, parse_recipe, recipe_parser, run_program
from pipeline.config.kinds import fields_of_kind
from pipeline.config.recipe import Recipe
from slurm.__main__ import main as slurm_main


def parse(*arguments):
    return parse_recipe(recipe_parser("test", ""), arguments)[0]


def test_help_documents_every_field():
    text = re.sub(r"\s+", " ", recipe_parser("test", "", ["--help"]).format_help().split("options:")[1])
    for name in field_names(Recipe):
        match = re.search(rf"--{re.escape(name)} (?:\S+ )?(.*?)\(type:", text)
        assert match, name
        assert len(match[1].split()) >= 2, f"{name} has no description"


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_parse_and_print_as_what_they_are(name, capsys):
    recipe = parse("--config", name)
    assert recipe.name == name
    with pytest.raises(SystemExit):
        parse("--config", name, "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    printed.pop("verbose", None)
    assert printed["distill"]["granularities"] == list(recipe.distill.granularities)


@pytest.mark.parametrize("command", ["run", "estimate"])
def test_a_printed_recipe_is_the_same_recipe_to_every_command(command, tmp_path, capsys):
    given = ["--config", "mt5_large", "--config", "translation", "--distill.losses.hidden", "[[0, 1.0], [9, 0.5]]"]
    given += ["--data.prefix", "to {tgt}: ", "--teacher.loop.keep_best", "false"]
    with pytest.raises(SystemExit, match="0"):
        main([command, *given, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    recipe, again = parse(*given), parse("--config", str(printed))
    assert again == recipe
    assert {field for kind in ("identity", "schedule", "operational") for field in fields_of_kind(again, kind)} == set(
        field_names(Recipe)
    )
    with pytest.raises(SystemExit, match="2"):  # understood, and refused for what lacks here
        main(["report", "--config", str(printed), "--run_dir", str(tmp_path)])
    assert "stage evaluate" in capsys.readouterr().err


DEEPER = ["checkpoint", *(f"checkpoint {name}" for name in ("list", "verify", "export"))]
DEEPER += ["bench", *(f"bench {name}" for name in BENCHES)]


@pytest.mark.parametrize("command", [*STAGES, *TOOLS, *DEEPER])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as raised:
        main([*command.split(), "--help"])
    assert not raised.value.code
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: python -m pipeline{'.' if 'bench' in command else ' '}{command.split()[0]} ")
    assert not shown.err
    assert command.split()[0] in (pipeline.__main__.__doc__ or "")


def test_help_of_a_stage_begins_with_what_the_stage_does(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["distill", "--help"])
    usage, about, _ = capsys.readouterr().out.split("\n\n", 2)
    assert usage == "usage: python -m pipeline distill --config RECIPE [--any.field value ...]"
    assert about.startswith("train the modular layers")


@pytest.mark.parametrize("command", [[], ["plan"], ["build"], ["verify"], ["repair"], ["stats"], ["cat"]])
def test_every_command_of_data_preparation_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        data_prep_main([*command, "--help"])
    assert "usage: " in capsys.readouterr().out


SLURM = [[name] for name in ("clusters", "doctor", "submit", "sweep", "status", "logs", "cancel", "render")]


@pytest.mark.parametrize("command", [[], *SLURM, ["clusters", "init"]])
def test_every_command_of_slurm_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        slurm_main([*command, "--help"])
    assert "usage: python -m slurm" in capsys.readouterr().out


def test_the_command_line_overrides_the_recipe():
    recipe = parse("--config", "demo", "--distill.optim.num_steps", "5000", "--assemble.ratios", "[2, 3]")
    assert recipe.distill.optim.num_steps == 5000
    assert recipe.assemble.ratios == (2.0, 3.0)
    assert recipe.distill.batch.tokens_per_micro_batch == 1200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distil"], "unknown stage 'distil'"),
        (["distill", "--config", "nosuch"], "no recipe 'nosuch'"),
        (["distill", "--distill.lossses.hidden", "3"], "did you mean distill.losses.hidden?"),
        (["distill", "--distill.optim.num_step", "3"], "did you mean distill.optim.num_steps?"),
        (["distill", "--distill.init", "best"], "distill.init is 'best': choose one of first"),
        (["distill", "--distill.optim.num_steps", "many"], "num_steps"),
        (["distill", "--distill.granularities", "[1, 2]"], "distill.granularities is 1: choose at least 2"),
        (["distill", "--distill.local_steps", "5000"], "local_steps is 5000: choose at most distill.optim.num_steps"),
        (["distill", "--assemble.presets", "[fast]"], "assemble.presets is 'fast': choose one of"),
        (["distill", "--teacher.folder", "models/t5"], "data.tokenizer is empty"),
        (["assemble", "--run_dir", "/nonexistent/run"], "needs the output of stage teacher"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    error = capsys.readouterr().err
    assert raised.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("number", "told", "code"), [(errno.ESTALE, "failed", 1), (errno.ENOSPC, "failed", 1), (errno.EROFS, "error", 2)]
)
def test_what_may_pass_by_itself_is_no_mistake(number, told, code, capsys):
    """A job in a queue begins again after the one, and never after the other."""

    def program():
        raise OSError(number, "it says")

    with pytest.raises(SystemExit) as raised:
        run_program(program, verbose=False)
    assert raised.value.code == code
    assert capsys.readouterr().err == f"{told}: [Errno {number}] it says\n"


def test_a_reader_that_has_read_enough_is_no_error(capsys):
    def program():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(SystemExit) as raised:
        run_program(program, verbose=False)
    assert raised.value.code == 1
    assert capsys.readouterr().err == ""


def test_the_same_holds_for_data_preparation(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.EIO, "it says")

    monkeypatch.setattr(verify, "find_damage", fail)
    assert data_prep_main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "failed: it says\n"


def test_an_unknown_key_in_a_recipe_names_the_nearest(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("name: x\ndistill:\n  optim:\n    num_step: 1\n")
    with pytest.raises(SystemExit):
        main(["report", "--config", str(tmp_path / "recipe.yaml")])
    assert "did you mean distill.optim.num_steps?" in capsys.readouterr().err
