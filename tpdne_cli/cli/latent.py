"""What the commands share that leave the seeds' own images: walks, mixes, sheets and neighbours."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import click

from tpdne_cli import models
from tpdne_cli.cli import generate, options
from tpdne_cli.cli.interruption import Interrupted, Interruption
from tpdne_cli.cli.job import Job, Work
from tpdne_cli.cli.manifest import check_manifest, open_manifest
from tpdne_cli.cli.output import Output, Stdout
from tpdne_cli.cli.target import Target
from tpdne_cli.errors import SeedError
from tpdne_cli.files import as_argument
from tpdne_cli.seeds import Seed, parse_ranges, parse_seed

if TYPE_CHECKING:
    from tpdne_cli.pipeline import Written
    from tpdne_cli.sampler import Sampler

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

model_option = click.option(
    "--model",
    default="faces",
    show_default=True,
    metavar="NAME|FILE",
    shell_complete=generate.complete_model,
    help="The generator: an installed name or a file.",
)


def output_options(metavar: str, help: str, formats: Sequence[str] = ("png", "jpg", "webp")) -> Callable[[F], F]:
    """Where and how to write."""
    return options.group(
        click.option("-o", "--out", metavar=metavar, help=help),
        click.option("--format", "format", type=click.Choice(formats), help="Default: what the file's name ends with."),
        click.option("--quality", type=click.IntRange(1, 100), metavar="Q", help="Of formats that have one."),
        click.option("--size", type=click.IntRange(1, 16383), metavar="PX", help="Resize each image to this side."),
        click.option("--force", is_flag=True, help="Replace files that exist."),
        click.option("--no-metadata", is_flag=True, help="Leave out the recipe and the mark of a synthetic image."),
    )


def seed_list(text: str) -> list[Seed]:
    """'1,5-9,alice@example.com' -> seeds in order. Raises SeedError."""
    seeds: list[Seed] = []
    for part in text.split(","):
        if not part.strip():
            raise SeedError(f"A seed is missing in {text!r}: write seeds such as 1,2,5-9 or names, without a gap.")
        if re.fullmatch(r"\s*\d+\s*-\s*\d+\s*", part, re.ASCII):
            seeds += (seed for seeds_of_range in parse_ranges(part) for seed in seeds_of_range)
        else:
            seeds.append(parse_seed(part.strip()))
    return seeds


def listed(seeds: Sequence[Seed]) -> str:
    """Seeds as seed_list takes them."""
    if isinstance(seeds, range):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def title(model: str) -> str:
    """The model's name as file names have it."""
    return re.sub(r"[^\w.-]", "_", generate.title(model))


def sheet_target(name: str, given: Mapping[str, Any]) -> Target:
    """The one file, or standard output, that a sheet goes to. name: what it is called where nothing else is said."""
    from tpdne_cli.images import check_quality

    out = given["out"] or f"{name}.{given['format'] or 'png'}"
    target = Target.of(out, given["format"])
    if target.folder is not None:
        raise click.UsageError(f"{out} does not end with .png, .jpg or .webp: its name says how to write it")
    check_quality(target.format, given["quality"])
    return target


def save_sheet(
    samples: Iterator[Any], destination: Any, grid: tuple[int, int], format: str, recipe: Mapping[str, Any],
    given: Mapping[str, Any], **layout: Any,
) -> dict[str, Any]:  # fmt: skip
    """montage.save_sheet with a command's options; returns what a record says of the sheet."""
    from tpdne_cli import montage

    width, height = montage.save_sheet(
        samples, destination, grid, size=given["size"], format=format, quality=given["quality"], recipe=recipe,
        metadata=not given["no_metadata"], replace=given["force"], **layout,
    )  # fmt: skip
    return {"width": width, "height": height}


def begin(target: Target, names: Iterable[str], given: Mapping[str, Any], resumable: bool = True) -> Output:
    """Everything that can be checked before a model is loaded. Raises the library's errors and click's.

    resumable: whether --skip-existing would go on with what is there.
    """
    skip = given.get("skip_existing", False)
    if skip and given["force"]:
        raise click.UsageError("--skip-existing and --force contradict each other: leave one of the two out")
    output = Output(given["as_json"], given["quiet"], not given["no_progress"])
    if target.is_stdout:
        target.check_stdout(given["as_json"], skip)
    models.find(given["model"])
    names = list(names)
    outputs = () if target.is_stdout else map(target.path, names)
    check_manifest(given["manifest"], outputs, given["force"], skip, resumable and not target.is_stdout)
    if not target.is_stdout:
        target.prepare(names)
        if not (skip or given["force"]):
            target.refuse_existing(names, resumable)
    return output


def load_sampler(given: Mapping[str, Any]) -> Sampler:
    """The model on its device with the settings of latent_options. Raises as loading and Sampler do."""
    from tpdne_cli.sampler import Sampler

    settings = options.settings_of(given)
    model = models.load(given["model"])
    return Sampler(model, settings, given["device"], given["precision"], given["batch_size"])


@dataclass
class FilesJob(Job):
    """Items of any kind, each in a file of its own. maker: a sampler -> what makes Samples of the items."""

    maker: Callable[[Sampler], Any] = field(kw_only=True)

    def make(self, work: Sequence[tuple[Any, str]], note: str = "") -> int:
        """Exit code: 0 all written, 130 interrupted. Raises the library's errors."""
        self.archive = len(work) > 1
        return self.run(cast(Work, work), note)

    def load(self, count: int) -> None:
        given, sampler = self.settings, load_sampler(self.settings)
        from tpdne_cli.fleet import spread
        from tpdne_cli.pipeline import Encoding

        self.encoding = Encoding(self.target.format, given["quality"], given["size"], not given["no_metadata"])
        self.resolution = sampler.model.resolution
        self.sampler = spread(self.maker(sampler), sampler, count)

    def write(self, work: Sequence[tuple[Any, str]], interruption: Interruption) -> Iterator[Written]:
        from tpdne_cli.pipeline import write_files, write_stream

        samples = self.sampler(interruption.until(item for item, _ in work))
        named = ((sample, name) for sample, (_, name) in zip(samples, work, strict=True))
        if self.target.is_stdout:
            return write_stream(named, self.encoding, cast(BinaryIO, Stdout()), tar=self.archive)
        return write_files(((sample, self.target.path(name)) for sample, name in named), self.encoding, self.force)


def files_job(
    target: Target, output: Output, given: Mapping[str, Any], maker: Callable[[Sampler], Any], again: str = ""
) -> FilesJob:
    """A job with a command's options. again: those that name the seeds, where they were drawn."""
    job = FilesJob(
        given["model"], target, output, given, given["manifest"], given["skip_existing"], given["force"], maker=maker
    )
    if again:
        job.again = f"{again} --skip-existing goes on"
    return job


@dataclass
class OneFile:
    """One file that is made of many images: an animation, a table or a sheet."""

    path: Path | None  # None: standard output
    format: str
    output: Output
    manifest: str | None
    force: bool

    def make(
        self, items: Sequence[T], samples: Callable[[Iterable[T]], Iterator[Any]],
        save: Callable[[Iterator[Any], Any], Mapping[str, Any]], recipe: Mapping[str, Any],
    ) -> int:  # fmt: skip
        """Exit code: 0 written, 130 interrupted. `save` writes samples to a destination, and tells about the file."""
        start = time.perf_counter()
        stream, name = Counted(), None if self.path is None else as_argument(self.path)

        def counted(samples: Iterator[Any]) -> Iterator[Any]:
            for sample in samples:
                self.output.advance()
                yield sample

        try:
            with Interruption(self.output) as interruption:
                self.output.start(len(items))
                about = save(counted(samples(interruption.until(items))), self.path or stream)
                self.output.finish()
                record = {
                    "path": name, **recipe, "format": self.format, **about,
                    "bytes": stream.bytes if self.path is None else self.path.stat().st_size,
                    "sha256": stream.digest.hexdigest() if self.path is None else models.file_sha256(self.path),
                    "seconds": round(time.perf_counter() - start, 6),
                }  # fmt: skip
            try:
                with open_manifest(self.manifest, force=self.force) as manifest:  # not before: a file may fail
                    manifest.add(record)
            finally:  # the file is there, whatever becomes of its line
                if name is not None:
                    self.output.result(name, record)
            if manifest.failure is not None:
                raise manifest.failure
        except (Interrupted, KeyboardInterrupt):
            self.output.finish()
            self.output.warning(f"Interrupted: {self.path or 'the file'} is not written.")
            return 130
        finally:
            self.output.finish()
        return 0


class Counted:
    """Standard output that knows what went through."""

    def __init__(self) -> None:
        self.stdout, self.bytes, self.digest = Stdout(), 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        self.stdout.write(data)
        self.stdout.flush()
        return len(data)
