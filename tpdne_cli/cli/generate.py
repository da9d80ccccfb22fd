"""`tpdne generate MODEL`, and what faces and cats share with it: seeds in, files out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tpdne_cli import models, sharding
from tpdne_cli.cli import options
from tpdne_cli.cli.job import Job
from tpdne_cli.cli.manifest import check_manifest
from tpdne_cli.cli.output import Output
from tpdne_cli.cli.target import Target
from tpdne_cli.images import FORMATS
from tpdne_cli.naming import Namer, plan
from tpdne_cli.seeds import Seed


def complete_model(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    known = [CompletionItem(name) for name in models.names() if name.startswith(incomplete)]
    return [*known, CompletionItem(incomplete, type="file")]


@click.command(short_help="Write images of any other generator: an installed name or a file.")
@click.argument("model", shell_complete=complete_model)
@options.generation_options
@options.movement_options
def generate(model: str, **given: Any) -> int:
    """Write images of any other generator: an installed name or a file.

    \b
    tpdne generate dishes.safetensors --count 20 --out dishes/
    """
    return run(model, **given)


def run(
    model: str,
    *,
    count: int | None,
    seed: Sequence[str],
    seeds: str | None,
    seeds_from: str | None,
    shard: str | None,
    out: str,
    format: str | None,
    name: str | None,
    skip_existing: bool,
    force: bool,
    manifest: str | None,
    as_json: bool,
    print0: bool,
    quiet: bool,
    no_progress: bool,
    **settings: Any,
) -> int:
    """The whole job: check everything that can be checked, then load, generate and write."""
    if skip_existing and force:
        raise click.UsageError("--skip-existing and --force contradict each other: leave one of the two out")
    if as_json and print0:
        raise click.UsageError("--json and --print0 contradict each other: lines of JSON hold no line breaks")
    if settings["ray_address"] is not None and settings["engine"] != "ray":
        raise click.UsageError("--ray-address names a Ray cluster: add --engine ray")
    output = Output(as_json, quiet, not no_progress, "\0" if print0 else "\n")
    given = options.read_seeds(count, seed, seeds, seeds_from)
    wanted = options.seeds_or_fresh(given, count)
    target = Target.of(out, format)
    if target.is_stdout:
        target.check_stdout(as_json, skip_existing)
    if target.file is not None and len(wanted) > 1:
        raise click.UsageError(f"{len(wanted)} images do not fit in the one file {target.file}: give a directory")
    namer = Namer(name, title(model), FORMATS[target.format].suffix)
    work = list(plan(namer, wanted))
    if shard is not None:
        work, manifest = part(work, manifest, shard, given is None)
    minimum = settings["min_realism"]
    if minimum is not None and shard is not None:
        raise click.UsageError("--shard and --min-realism contradict each other: parts would go on to the same seeds")
    models.find(model)
    outputs = () if target.is_stdout else (target.path(name) for _, name in work)
    check_manifest(manifest, outputs, force, skip_existing, resumable=not target.is_stdout)
    if not target.is_stdout:
        target.prepare(name for _, name in work)
        foreseen = minimum is None or target.file is not None  # else the names are those of whoever passes
        if foreseen and not (force or skip_existing):
            target.refuse_existing(name for _, name in work)
    job = Job(model, target, output, settings, manifest, skip_existing, force, archive=len(wanted) > 1)
    if minimum is not None:
        job = selective(job, namer, minimum)
    if given is not None:
        return job.run(work)
    job.again = f"{again(wanted)} --skip-existing goes on"
    return job.run(work, options.going_on(fresh_note(wanted), skip_existing))


def selective(job: Job, namer: Namer, minimum: float) -> Job:
    """The same job with a critic at its door."""
    from tpdne_cli.cli.selective import SelectiveJob  # with numpy, which --help can do without

    given = {field.name: getattr(job, field.name) for field in dataclasses.fields(job) if field.init}
    return SelectiveJob(**given, namer=namer, minimum=minimum)


def title(model: str) -> str:
    """A model's name as file names have it: of a file what stands before its suffix, of an installed one all."""
    return Path(model).stem if Path(model).suffix and model not in models.names() else model


def again(wanted: Sequence[Seed]) -> str:
    """The options that name these consecutive seeds."""
    return f"--seed {wanted[0]}" if len(wanted) == 1 else f"--seed {wanted[0]} --count {len(wanted)}"


def fresh_note(wanted: Sequence[Seed]) -> str:
    """How to make freshly drawn images again."""
    if len(wanted) == 1:
        return f"Fresh seed {wanted[0]}: {again(wanted)} makes it again."
    return f"Fresh seeds {wanted[0]} to {wanted[-1]}: {again(wanted)} makes them again."


def part(
    work: list[tuple[Seed, str]], manifest: str | None, shard: str, fresh: bool
) -> tuple[list[tuple[Seed, str]], str | None]:
    """What of the whole run is this process's; names are given before, so that {index} counts through all parts.

    With auto all parts have one command line, so the manifest's name gets the part too.
    """
    if fresh:
        raise click.UsageError("--shard divides seeds that are given, fresh ones differ in every part: add --seeds")
    own = sharding.parse(shard)
    path = Path(manifest or "")
    is_device = path.exists() and not path.is_file()  # or a pipe
    if manifest is not None and shard.startswith("auto") and not is_device:
        manifest = str(path.with_name(f"{path.stem}.{own.index}-of-{own.count}{path.suffix}"))
    return list(own.of(work)), manifest
