"""The command line: click lives here and nowhere else. Commands are imported when called, torch when used."""

from __future__ import annotations

import atexit
import os
import re
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

import click

from tpdne_cli import __version__
from tpdne_cli.cli.output import ReaderGone, complain, say
from tpdne_cli.errors import ModelNotFoundError, SeedError, SettingsError, TpdneError

# command -> (module, one line for --help); the line is here so that --help imports no command
COMMANDS = {
    "faces": ("faces", "Write photographs of people who were never born."),
    "cats": ("cats", "Write photographs of cats that do not exist."),
    "generate": ("generate", "Write images of any other generator: an installed name or a file."),
    "interpolate": ("interpolate", "Walk from face to face, as frames or as a moving picture."),
    "mix": ("mix", "Mix styles: the shape of one face with the colours of another."),
    "vary": ("vary", "Write neighbours of one face: the same person in another mood."),
    "sheet": ("sheet", "Lay many images out on one sheet."),
    "serve": ("serve", "Show a page where every reload is somebody new."),
    "inspect": ("inspect", "Tell how an image was made, and make it again to be sure."),
    "models": ("models", "List the installed generators and tell about them."),
    "bench": ("bench", "Measure images per second here, stage by stage."),
    "doctor": ("doctor", "Test the installation and tell what to paste in a bug report."),
    "train": ("train", "Train a generator of your own from a folder of images."),
}

USAGE_ERRORS = (SeedError, SettingsError, ModelNotFoundError)  # the caller's words are off: exit code 2, not 1


class LazyGroup(click.Group):
    """A group that imports a command's file only to run it."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"tpdne_cli.cli.{COMMANDS[name][0]}"), name)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="tpdne", message="%(prog)s %(version)s")
def app() -> None:
    """Photographs of people who do not exist, and of cats.

    \b
    tpdne faces                             one new face in this directory
    tpdne faces --count 100 --out faces/    a hundred of them
    tpdne faces --seed alice@example.com    same text, same face, for ever
    tpdne cats --out - > cat.png            the bytes of one image
    """


def main() -> NoReturn:
    """Entry point: runs a command and turns whatever goes wrong into one sentence and an exit code."""
    code = run(sys.argv[1:])
    if "torch" in sys.modules:
        leave(code)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End the process as it is: Python takes 0.4 s to take torch apart first, as long as sixty faces.

    What was registered to be done at the end is done.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """0 all written; 1 failed at run time; 2 usage; 130 interrupted. A reader that goes away is no failure."""
    try:
        result: Any = app.main(arguments, prog_name="tpdne", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        complain("Interrupted.")
        return 130
    except ReaderGone:
        # Python would complain of the closed stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("TPDNE_DEBUG") == "1":
            traceback.print_exception(error)
        return explain(error)


def explain(error: Exception) -> int:
    """One sentence on stderr; returns the exit code."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # of click 8.2: a group, no command
        say(error.format_message())  # type: ignore[attr-defined]
        return 2
    if isinstance(error, click.UsageError):
        where = f" See '{error.ctx.command_path} --help'." if error.ctx else ""
        message = re.sub(r"\((Did you mean .*\?)\)$", r"\1", error.format_message())
        complain((message if message.endswith("?") else message.rstrip(".") + ".") + where)
        return 2
    if isinstance(error, click.ClickException):
        complain(error.format_message())
        return error.exit_code
    if isinstance(error, TpdneError):
        complain(str(error))
        return 2 if isinstance(error, USAGE_ERRORS) else 1
    if _is_out_of_memory(error):
        complain("There is not enough memory: close other programs, raise the limit (ulimit -v), or ask for less.")
    elif isinstance(error, OSError):
        complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
    elif isinstance(error, ImportError):
        complain(f"{error}: the installation is incomplete, install tpdne again.")
    else:
        complain(f"Something unforeseen happened ({type(error).__name__}: {error}). TPDNE_DEBUG=1 shows where.")
    return 1


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):  # perhaps there is no room even for the module that knows the other ways
        return True
    from tpdne_cli.devices import is_out_of_memory

    return is_out_of_memory(error)
