"""`tpdne generate MODEL`, and what faces and cats share with it: seeds in, files out."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import click

from tpdne_cli import models
from tpdne_cli.cli import options
from tpdne_cli.cli.output import Output, ReaderGone
from tpdne_cli.errors import OutputError
from tpdne_cli.files import remove_leftovers
from tpdne_cli.images import FORMATS, format_for
from tpdne_cli.naming import Namer, plan
from tpdne_cli.seeds import Seed


def complete_model(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    known = [CompletionItem(name) for name in models.names() if name.startswith(incomplete)]
    return [*known, CompletionItem(incomplete, type="file")]


@click.command(short_help="Write images of any other generator: an installed name or a file.")
@click.argument("model", shell_complete=complete_model)
@options.generation_options
def generate(model: str, **given: Any) -> int:
    """Write images of any generator: an installed name ('tpdne models list') or a file.

    \b
    tpdne generate dishes.safetensors --count 20 --out dishes/
    """
    return run(model, **given)


@dataclass(frozen=True)
class Target:
    """Where a run writes: a folder, one file, or standard output."""

    folder: Path | None
    file: Path | None
    format: str

    @classmethod
    def of(cls, out: str, format: str | None) -> Target:
        if out == "-":
            return cls(None, None, format or "png")
        path = Path(out)
        suffix = format_for(path)
        if suffix is None or path.is_dir() or out.endswith("/"):
            return cls(path, None, format or "png")
        if format is not None and format != suffix:
            raise click.UsageError(f"--format {format} contradicts the name {out}: leave one of the two out")
        return cls(None, path, suffix)

    @property
    def is_stdout(self) -> bool:
        return self.folder is None and self.file is None

    def paths(self, names: Iterable[tuple[Seed, str]]) -> list[tuple[Seed, Path]]:
        if self.folder is None:
            return [(seed, self.file or Path(name)) for seed, name in names]
        return [(seed, self.folder / name) for seed, name in names]


def run(
    model: str,
    *,
    count: int | None,
    seed: Sequence[str],
    seeds: str | None,
    seeds_from: str | None,
    out: str,
    format: str | None,
    name: str | None,
    skip_existing: bool,
    force: bool,
    manifest: str | None,
    as_json: bool,
    quiet: bool,
    no_progress: bool,
    **settings: Any,
) -> int:
    """The whole job: check everything that can be checked, then load, generate and write."""
    output = Output(as_json, quiet, not no_progress)
    given = options.read_seeds(count, seed, seeds, seeds_from)
    wanted = options.seeds_or_fresh(given, count)
    target = Target.of(out, format)
    check_combination(target, len(wanted), skip_existing, force, as_json)
    title = Path(model).stem if Path(model).suffix else model
    work = target.paths(plan(Namer(name, title, FORMATS[target.format].suffix), wanted))
    models.find(model)
    if not target.is_stdout:
        prepare_folder(target)
        if not (force or skip_existing):
            refuse_existing(path for _, path in work)
    with ExitStack() as stack:
        lines = stack.enter_context(open_manifest(manifest, force or skip_existing))
        job = Job(model, target, output, lines, skip_existing, force, settings)
        return job.run(work, "" if given is not None else fresh_note(wanted))


def check_combination(target: Target, count: int, skip_existing: bool, force: bool, as_json: bool) -> None:
    """Refuse options that contradict each other."""
    if skip_existing and force:
        raise click.UsageError("--skip-existing and --force contradict each other: leave one of the two out")
    if target.file is not None and count > 1:
        raise click.UsageError(f"{count} images do not fit in the one file {target.file}: give a directory")
    if target.is_stdout:
        if as_json:
            raise click.UsageError("--json and --out - both want stdout: write the lines to a file with --manifest")
        if sys.stdout.isatty():
            raise click.UsageError("stdout is a terminal, which shows no image bytes: redirect it, or give --out DIR")


def prepare_folder(target: Target) -> None:
    """Make the output directory, or say why not, before any work is done."""
    folder = target.folder if target.folder is not None else target.file.parent if target.file else None
    assert folder is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OutputError(f"{folder} is a file, not a directory: choose another --out.") from None
    except OSError as error:
        raise OutputError(f"The directory {folder} cannot be made: {error.strerror}.") from None
    remove_leftovers(folder)
    from tempfile import TemporaryFile

    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"The directory {folder} cannot be written: {error.strerror}.") from None


def refuse_existing(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists():
            raise OutputError(f"{path} exists: --skip-existing leaves it and goes on, --force replaces it.")


def fresh_note(wanted: Sequence[Seed]) -> str:
    """How to make freshly drawn images again."""
    first, count = wanted[0], len(wanted)
    if count == 1:
        return f"Fresh seed {first}: --seed {first} makes it again."
    return f"Fresh seeds {first} to {wanted[-1]}: --seed {first} --count {count} makes them again."


@contextmanager
def open_manifest(path: str | None, replace: bool) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    try:
        file = Path(path).open("w" if replace else "x", encoding="utf-8")  # noqa: SIM115 (errors of opening only)
    except FileExistsError:
        raise OutputError(f"The manifest {path} exists: --force replaces it.") from None
    except OSError as error:
        raise OutputError(f"The manifest {path} cannot be written: {error.strerror}.") from None
    with file:
        yield file


class Interruption:
    """The first Ctrl-C (or SIGTERM) lets the images in flight finish; the second stops at once."""

    def __init__(self, output: Output) -> None:
        self.output, self.asked = output, False

    def __enter__(self) -> Interruption:
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.output.note("Finishing the images in flight; once more stops at once.")

    def until(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if self.asked:
                return
            yield item


class Job:
    """Loads the model and drives sampler and pipeline; reports each image as it is finished."""

    def __init__(
        self,
        model: str,
        target: Target,
        output: Output,
        manifest: TextIO | None,
        skip: bool,
        force: bool,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.target, self.output, self.manifest = model, target, output, manifest
        self.skip, self.force, self.settings = skip, force, settings

    def run(self, work: list[tuple[Seed, Path]], note: str = "") -> int:
        """Exit code: 0 all written, 130 interrupted."""
        from tpdne_cli import pipeline
        from tpdne_cli.sampler import Sampler, Settings

        given = self.settings
        encoding = pipeline.Encoding(self.target.format, given["quality"], given["size"], not given["no_metadata"])
        chosen = Settings(given["truncation"], given["truncation_cutoff"], given["noise"], given["class_index"])
        sampler = Sampler(models.load(self.model), chosen, given["device"], given["precision"], given["batch_size"])
        if note:
            self.output.note(note)
        total = len(work)
        if self.skip:
            work = self.remaining(work, sampler, encoding)
        written = 0
        with Interruption(self.output) as interruption:
            seeds = interruption.until(seed for seed, _ in work)
            placed = ((sample, path) for sample, (_, path) in zip(sampler(seeds), work, strict=False))
            self.output.start(len(work))
            try:
                if self.target.is_stdout:
                    named = ((sample, path.as_posix()) for sample, path in placed)
                    results = pipeline.write_stream(named, encoding, sys.stdout.buffer, tar=total > 1)
                else:
                    results = pipeline.write_files(placed, encoding, replace=self.force)
                for done in results:
                    self.report(done)
                    written += 1
            except BrokenPipeError:
                raise ReaderGone from None
            finally:
                self.output.finish()
        if written < len(work):
            self.output.warning(
                f"Interrupted: {total - len(work) + written} of {total} images are there; "
                "the same seeds with --skip-existing go on."
            )
            return 130
        return 0

    def report(self, done: Any) -> None:
        record = done.record()
        if self.manifest is not None:
            self.manifest.write(json.dumps(record) + "\n")
            self.manifest.flush()
        if done.path is not None:
            self.output.result(str(done.path), record)
        self.output.advance()

    def remaining(self, work: list[tuple[Seed, Path]], sampler: Any, encoding: Any) -> list[tuple[Seed, Path]]:
        """What is not there yet. Raises OutputError where another image has the name."""
        from tpdne_cli.resume import is_finished

        rest = []
        for seed, path in work:
            if not path.exists():
                rest.append((seed, path))
            elif not is_finished(path, sampler.recipe(seed), encoding):
                raise OutputError(f"{path} holds another image than asked for: --force replaces it.")
        if len(rest) < len(work):
            self.output.note(f"{len(work) - len(rest)} of {len(work)} images are there already.")
        return rest
