"""`tpdne faces`: the bundled faces."""

from __future__ import annotations

from typing import Any

import click

from tpdne_cli.cli import options
from tpdne_cli.cli.generate import run


@click.command(short_help="Write photographs of people who were never born.")
@options.generation_options
def faces(**given: Any) -> int:
    """Write photographs of people who were never born.

    \b
    tpdne faces --count 100 --out faces/
    tpdne faces --seed alice@example.com --out alice.png
    tpdne faces --seeds 0-99,205 --format webp --json
    """
    return run("faces", **given)
