"""`tpdne models`: what is installed."""

from __future__ import annotations

import json
from typing import Any

import click

from tpdne_cli import models as registry
from tpdne_cli.cli.generate import complete_model
from tpdne_cli.cli.output import Output

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
model_argument = click.argument("model", shell_complete=complete_model)


@click.group()
def models() -> None:
    """List the installed generators and tell about them."""


@models.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the installed generators."""
    output = Output(as_json)
    rows = []
    for name in registry.names():
        info = registry.describe(name)
        size = info["config"]["resolution"]
        if as_json:
            output.result(name, summary(info))
        rows.append((name, f"{size}x{size}", f"{info['bytes'] / 1e6:.1f} MB", str(info.get("licence", "-"))))
    if not as_json:
        output.table([("NAME", "PIXELS", "SIZE", "LICENCE"), *rows])


@models.command("info")
@model_argument
@json_option
def info(model: str, as_json: bool) -> None:
    """Tell everything that a generator's file says of itself."""
    output = Output(as_json)
    about = registry.describe(model)
    if as_json:
        output.result("", about)
        return
    output.table([(key, text(value)) for key, value in about.items()])


@models.command("path")
@model_argument
def path(model: str) -> None:
    """Print where a generator's file lies."""
    Output().result(str(registry.find(model).resolve()))


def summary(info: dict[str, Any]) -> dict[str, Any]:
    """What a list says of one model."""
    return {
        "name": info["name"],
        "path": info["path"],
        "resolution": info["config"]["resolution"],
        "bytes": info["bytes"],
        "sha256": info["sha256"],
        "licence": info.get("licence"),
    }


def text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
