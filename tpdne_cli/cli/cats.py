"""`tpdne cats`: the bundled cats."""

from __future__ import annotations

from typing import Any

import click

from tpdne_cli.cli import options
from tpdne_cli.cli.generate import run


@click.command(short_help="Write photographs of cats that do not exist.")
@options.generation_options
def cats(**given: Any) -> int:
    """Write photographs of cats that do not exist.

    \b
    tpdne cats --count 100 --out cats/
    tpdne cats --out - > cat.png
    tpdne cats --seeds 0-99,205 --format webp --json
    """
    return run("cats", **given)
