"""`tpdne inspect`: the recipe in an image, and the proof by making it again."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from tpdne_cli import devices
from tpdne_cli.cli.output import Output, complain, one_line
from tpdne_cli.errors import ImageError, ModelNotFoundError, SeedError, SettingsError
from tpdne_cli.files import is_temporary
from tpdne_cli.images import format_for


@click.command(short_help="Tell how an image was made, and make it again to be sure.")
@click.argument("images", nargs=-1, required=True, metavar="FILE|DIR...", type=click.Path())
@click.option("--verify", is_flag=True, help="Make each image again and compare the pixels.")
@click.option("--model", metavar="NAME|FILE", help="The generator to make them with, where it is not installed.")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
@click.option("-q", "--quiet", is_flag=True, help="Print a sentence per image and no command.")
def inspect(images: tuple[str, ...], verify: bool, model: str | None, device: str, as_json: bool, quiet: bool) -> int:
    """Tell how an image was made, and make it again to be sure.

    Exit code 0 if every image carries the recipe of this program, or with --verify if every image is proven to be made
    from its recipe; 1 otherwise.

    \b
    tpdne inspect face.png
    tpdne inspect --verify faces/ --json | jq -r 'select(.verdict != "verified").path'
    """
    if not verify and model is not None:
        raise click.UsageError("--model says what to make images again with: add --verify")
    output = Output(as_json, quiet)
    devices.rehearse_import("torch" if verify else "numpy")
    examine = prover(model, device) if verify else claims
    proven = True
    for path in expand(images):
        try:
            if path.is_dir():
                raise ImageError(f"There is no image in {path}: give a directory that holds images.")
            record = examine(path)
        except ImageError as error:
            complain(str(error))
            record = {"path": str(path), "verdict": "unreadable", "sentence": str(error), "recipe": None}
            if not as_json:
                proven = False
                continue
        proven &= record["verdict"] == "verified" if verify else record["recipe"] is not None
        record["command"] = command(record["recipe"])
        output.result(one_line(f"{path}: {record['sentence']}"), record)
        if record["command"] and not (as_json or quiet):
            output.result(f"  {record['command']}")
    return 0 if proven else 1


def claims(path: Path) -> dict[str, Any]:
    """What an image says of itself."""
    from tpdne_cli.inspection import inspect

    return dataclasses.asdict(inspect(path))


def prover(model: str | None, device: str) -> Any:
    """A function that makes the image at a path again and reports."""
    from tpdne_cli.inspection import unverifiable, verify
    from tpdne_cli.metadata import read_marks
    from tpdne_cli.remaking import Remaker

    remaker = Remaker(model, device)

    def examine(path: Path) -> dict[str, Any]:
        tolerance = remaker.tolerance(read_marks(path).recipe or {})
        try:
            return dataclasses.asdict(verify(path, remaker, tolerance))
        except (SettingsError, SeedError, ModelNotFoundError) as error:
            return dataclasses.asdict(unverifiable(path, error))

    return examine


def expand(names: Iterable[str]) -> Iterator[Path]:
    """The files, and every image below the directories; a directory without any as it is."""
    for path in map(Path, names):
        if not path.is_dir():
            yield path
            continue
        found = [p for p in sorted(path.rglob("*")) if _is_ours(p) and p.is_file() and not is_temporary(p)]
        yield from found or [path]


def _is_ours(path: Path) -> bool:
    """Whether its name is one that tpdne gives to images and animations."""
    return format_for(path) is not None or path.suffix.lower() in (".gif", ".apng", ".mp4")


@functools.cache
def _weights(model: str) -> str | None:
    """SHA-256 of an installed generator; None where there is none of that name."""
    from tpdne_cli import installing, models

    if model not in models.names():
        return None
    path = models.find(model)
    return installing.recorded(path)[0].get(path.name) or models.file_sha256(path)  # large files are not read for it


def command(recipe: Mapping[str, Any] | None) -> str | None:
    """The command that makes an image of this recipe; None where no single seed does, or it would draw another one."""
    from tpdne_cli.remaking import check

    if recipe is None or "latent" in recipe:
        return None
    try:
        check(recipe)
    except (SettingsError, SeedError):
        return None
    model = str(recipe.get("model"))
    if _weights(model) not in (None, recipe.get("weights")):  # a file of that name, or of another version
        return None
    words = ["tpdne", model] if model in ("faces", "cats") else ["tpdne", "generate", model]
    words += ["--seed", str(recipe["seed"]), "--truncation", str(recipe["truncation"])]
    words += [] if recipe["truncation_cutoff"] is None else ["--truncation-cutoff", str(recipe["truncation_cutoff"])]
    words += [] if recipe["noise"] == "const" else ["--noise", recipe["noise"]]
    words += [] if recipe["precision"] == "float32" else ["--precision", str(recipe["precision"])]
    words += [] if recipe["class_index"] is None else ["--class", str(recipe["class_index"])]
    words += ["--rotate", str(recipe["rotate"])] if "rotate" in recipe else []
    words += ["--translate", *map(str, recipe["translate"])] if "translate" in recipe else []
    for name, amount in recipe.get("attributes", {}).items():
        words += ["--attr", f"{name}={amount}"]
    line = shlex.join(words)
    return line if line.isprintable() else None
