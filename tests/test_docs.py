"""The documentation is tested: what the README names exists, and what exists is in the README."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

import click
import pytest
from conftest import ROOT

from tpdne_cli.cli import COMMANDS, app

README = (ROOT / "README.md").read_text(encoding="utf-8")


def leaves(command: click.Command, path: str):
    """(name, command) of every command, subcommands included."""
    if isinstance(command, click.Group) and path != "tpdne":
        for name in command.commands:
            yield from leaves(command.commands[name], f"{path} {name}")
    else:
        yield path, command


def all_commands():
    for name, (module, _) in COMMANDS.items():
        yield from leaves(getattr(import_module(f"tpdne_cli.cli.{module}"), name), f"tpdne {name}")


def options(command: click.Command) -> set[str]:
    shown = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    return {name for option in shown for name in [*option.opts, *option.secondary_opts]}


@pytest.mark.parametrize(("path", "command"), list(all_commands()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_command_is_in_the_readme(path, command):
    assert f"{path}" in README, f"the README shows no example of {path}"
    assert command.help, f"{path} has no help"
    for name in sorted(o for o in options(command) if o.startswith("--")):
        assert re.search(rf"{re.escape(name)}\b", README), f"{path}: {name} is not in the README"


def calls(line: str):
    """The words behind each `tpdne` in a line of shell: behind a pipe, torchrun or parallel, or in quotation marks."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] | None = None
    for token in [*lexer, ";"]:
        if " " in token and " tpdne " in f" {token}":
            yield from calls(token)
        elif token.rpartition("/")[2] == "tpdne":
            words = []
        elif words is not None and (token == ":::" or set(token) <= set("|&;<>")):
            yield words
            words = None
        elif words is not None:
            words.append(token)


SHOWN = [
    pytest.param(words, id=" ".join(words))
    for text in [
        *re.findall(r"```(?:sh|console)\n(.*?)```", README, re.DOTALL),
        *re.findall(r"`(tpdne [^`]*)`", README),
    ]
    for line in re.sub(r"\\\n", " ", text).splitlines()
    for words in calls(line)
]


@pytest.mark.parametrize("words", SHOWN)
def test_every_call_in_the_readme_is_one_that_its_own_command_understands(words):
    """As click reads it when it is made, up to the point where the command would run."""
    command, path, rest = app, "tpdne", words
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        path, found = f"{path} {rest[0]}", command.get_command(click.Context(command), rest[0])
        assert found is not None, f"no such command: {path}"
        command, rest = found, rest[1:]
    try:
        if rest and not {"-h", "--help", "-V", "--version"} & set(rest):
            command.make_context(path, list(rest))
    except click.MissingParameter:
        pass  # sentences name a flag without the files it works on
    except click.UsageError as error:  # a flag of another command, a value that is none, an argument too many
        pytest.fail(f"'tpdne {shlex.join(words)}': {error.format_message()}")


def test_the_readme_shows_calls():
    assert len(SHOWN) > 50, "the test above would not notice"


def test_the_first_lines_of_help_are_those_of_the_commands():
    for name, (module, line) in COMMANDS.items():
        command = getattr(import_module(f"tpdne_cli.cli.{module}"), name)
        assert command.help.strip().startswith(line.rstrip(".")), f"{name}: the group's line differs from its own help"


def test_links_and_pictures_of_the_readme_exist():
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (ROOT / target).exists(), f"the README points to {target}, which is not there"


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block.replace("range(100)", "range(2)"), "README", "exec"), {})


def test_ci_finds_the_readmes_commands():
    for marker in re.findall(r"readme (\w+)", (ROOT / ".ci" / "run").read_text()):
        assert re.search(rf"<!-- ci: {marker} -->\n```sh\n", README), f"the README has no block marked {marker}"


def test_the_group_is_complete():
    assert list(app.list_commands(None)) == list(COMMANDS)


def test_the_tolerance_in_the_readme_is_the_one_that_verify_allows():
    from tpdne_cli.remaking import TOLERANCE

    stated = re.search(r"within (\d+)\s+levels of 255 in float32, (\d+) in float16 and (\d+) in bfloat16", README)
    assert stated and [int(n) for n in stated.groups()] == [TOLERANCE[p] for p in ("float32", "float16", "bfloat16")]
