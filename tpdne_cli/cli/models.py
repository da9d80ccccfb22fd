"""`tpdne models`: what is installed, and how to bring in more."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpdne_cli import models as registry
from tpdne_cli.cli.generate import complete_model
from tpdne_cli.cli.output import Output, complain, one_line
from tpdne_cli.errors import CheckpointError, SettingsError

if TYPE_CHECKING:
    from tpdne_cli.catalogue import Entry

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
name_option = click.option("--name", metavar="N", help="What to call it (default: what its file is called).")
force_option = click.option("--force", is_flag=True, help="Replace an installed generator of that name.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print results and errors only.")
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
        try:
            about = registry.describe(name)
        except CheckpointError as error:  # one damaged file must not hide the others
            output.warning(str(error))
            continue
        if as_json:
            output.result(name, summary(about))
        size = about["config"].get("resolution", "?")
        rows.append((name, f"{size}x{size}", megabytes(about["bytes"]), text(about.get("licence", "not known"))))
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


@models.command("import")
@click.argument("source", metavar="FILE|URL")
@name_option
@click.option("--licence", metavar="TEXT", help="Note under which licence it was published.")
@force_option
@quiet_option
def import_model(source: str, name: str | None, licence: str | None, force: bool, quiet: bool) -> None:
    """Install a generator from a file of any known format; none of its code is run.

    \b
    tpdne models import ~/Downloads/afhqcat.pkl --name afhqcat --licence non-commercial
    """
    from tpdne_cli import download, installing, store

    output = Output(quiet=quiet)
    if "://" in source:
        title = store.check_name(name) if name is not None else store.name_for(download.file_name(source))
        announce(install_from(source, title, download.shown(source), licence, force, output), output)
        return
    if not Path(source).is_file():
        raise SettingsError(f"There is no file {source}: name the generator's file, or its address.")
    announce(installing.install(source, name, None, licence, force), output)


@models.command("pull")
@click.argument("name", required=False)
@click.option("--accept-licence", is_flag=True, help="Agree to the licence shown, for scripts.")
@force_option
@json_option
@quiet_option
def pull(name: str | None, accept_licence: bool, force: bool, as_json: bool, quiet: bool) -> None:
    """Download and install a published generator; without NAME, list what there is."""
    from tpdne_cli import catalogue

    output = Output(as_json, quiet)
    if name is None:
        rows = [("NAME", "PIXELS", "SIZE", "SHOWS", "LICENCE")]
        for entry in catalogue.ENTRIES:
            if as_json:
                output.result(entry.name, dataclasses.asdict(entry))
            size = f"{entry.resolution}x{entry.resolution}"
            rows.append((entry.name, size, megabytes(entry.bytes), entry.shows, entry.licence))
        if not as_json:
            output.table(rows)
        return
    entry = catalogue.find(name)
    agree(output, entry, accept_licence)
    path = install_from(entry.url, entry.name, entry.url, entry.licence, force, output, entry.sha256)
    announce(path, output)


def announce(path: Path, output: Output) -> None:
    """The new file; and why it has no critic, where its source had one."""
    if reason := registry.describe(path).get("discriminator"):
        output.note(f"The critic is {text(reason)}")
    output.result(str(path), {"name": path.stem, "path": str(path)})


def agree(output: Output, entry: Entry, accepted: bool) -> None:
    """Show the licence; go on only if the user agrees. Raises SettingsError where nobody can be asked."""
    loud = output if accepted else Output()  # whoever is asked to agree sees to what, also when quiet
    loud.note(f"{entry.name} is published under: {entry.licence} ({entry.licence_url}). {entry.terms}")
    if accepted:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise SettingsError(f"{entry.name} has a licence of its own ({entry.licence}): --accept-licence agrees to it.")
    if not click.confirm("Do you accept this licence?", err=True):
        raise SettingsError(f"{entry.name} is not fetched: its licence is not accepted.")


def install_from(
    url: str, name: str, origin: str, licence: str | None, force: bool, output: Output, sha256: str | None = None
) -> Path:
    """Download a generator and install it; what is none is thrown away, so that the next attempt begins anew."""
    from tpdne_cli import download, installing

    installing.check_free(name, force)
    file = fetch(url, output, sha256)
    try:
        return installing.install(file, name, origin, licence, force)
    except CheckpointError as error:
        download.forget(url)
        reason = str(error).replace(str(file), download.shown(url))
        raise CheckpointError(f"The download is thrown away: {reason}") from None


def fetch(url: str, output: Output, sha256: str | None = None) -> Path:
    """The file behind an address, with a bar while it comes."""
    from tpdne_cli import download

    output.note(f"Fetching {download.shown(url)}")
    started = False

    def progress(done: int, total: int | None) -> None:
        nonlocal started
        if not started:
            output.start(total or 0, unit="B")
            started = True
        if output.bar is not None:
            output.bar.update(done - output.bar.n)

    def waiting(reason: str, seconds: float) -> None:
        output.note(f"{reason[:1].upper()}{reason[1:]}: trying again in {seconds:.0f} s")

    try:
        file, _ = download.fetch(url, progress, sha256, on_wait=waiting)
    except KeyboardInterrupt:
        output.finish()
        output.warning("What has come so far is kept: the same command goes on from there.")
        raise
    finally:
        output.finish()
    return file


@models.command("verify")
@click.argument("model", required=False, shell_complete=complete_model)
@json_option
def verify(model: str | None, as_json: bool) -> int:
    """Check a generator's file and its critic's, or all that are installed: hashes, shapes, numbers."""
    from tpdne_cli import installing

    output = Output(as_json)
    damaged = 0
    for name in [model] if model is not None else registry.names():
        try:
            found = installing.verify(name)
        except CheckpointError as error:
            complain(str(error))
            damaged = 1
            continue
        known = "as it was installed" if found["recorded"] else "whole"
        output.result(f"{name}: {known}, sha256 {found['sha256']}", found)
    return damaged


@models.command("remove")
@click.argument("model", shell_complete=complete_model)
@quiet_option
def remove(model: str, quiet: bool) -> None:
    """Delete an installed generator; bundled ones stay."""
    from tpdne_cli import installing

    installing.remove(model)
    Output(quiet=quiet).note(f"{model} is removed.")


@models.command("cache")
@json_option
def cache(as_json: bool) -> None:
    """List what was downloaded and is kept; clear-cache deletes it."""
    from tpdne_cli import installing

    output = Output(as_json)
    rows = []
    for record in installing.cached():
        if as_json:
            output.result("", record)
        part = "" if record["complete"] else " (a part)"
        rows.append((record["file"], megabytes(record["bytes"]), text(record["url"] or "?") + part))
    if rows and not as_json:
        output.table([("FILE", "SIZE", "FROM"), *rows])


@models.command("clear-cache")
@quiet_option
def clear_cache(quiet: bool) -> None:
    """Delete what was downloaded; installed generators stay."""
    from tpdne_cli import installing

    count, size = installing.clear_cache()
    Output(quiet=quiet).note(f"{count} files of {size / 1e6:.1f} MB are gone.")


def summary(about: dict[str, Any]) -> dict[str, Any]:
    """What a list says of one model."""
    return {
        "name": about["name"],
        "path": about["path"],
        "resolution": about["config"].get("resolution"),
        "bytes": about["bytes"],
        "sha256": about["sha256"],
        "licence": about.get("licence"),
        "origin": about.get("origin", "bundled"),
    }


def megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f} MB"


def text(value: Any) -> str:
    """For a terminal: what a file says of itself may have been written by anybody."""
    return one_line(value if isinstance(value, str) else json.dumps(value))
