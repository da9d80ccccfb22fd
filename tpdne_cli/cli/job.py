"""The main job: seeds to files, each reported as it is finished, and an end that says how to go on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from tpdne_cli import models
from tpdne_cli.cli import options
from tpdne_cli.cli.interruption import Interrupted, Interruption
from tpdne_cli.cli.manifest import Manifest, open_manifest
from tpdne_cli.cli.output import Output, ReaderGone, Stdout
from tpdne_cli.cli.target import Target
from tpdne_cli.errors import OutputError
from tpdne_cli.seeds import Seed

if TYPE_CHECKING:
    from pathlib import Path

    from tpdne_cli.critic import Judged
    from tpdne_cli.fleet import Fleet
    from tpdne_cli.pipeline import Encoding, Written
    from tpdne_cli.sampler import Sample, Sampler

Work = Sequence[tuple[Seed, str]]  # seeds, and the names of their images


@dataclass
class Job:
    """What to make and where. settings: of the options for latents, devices and encoding, by their names."""

    model: str
    target: Target
    output: Output
    settings: Mapping[str, Any]
    manifest: str | None = None
    skip: bool = False
    force: bool = False
    archive: bool = False  # on standard output: a tar archive, not the bytes of one image
    again: str = "the same command with --skip-existing goes on"
    there: int = field(default=0, init=False)  # images that exist by now
    sampler: Sampler | Judged | Fleet = field(init=False)
    encoding: Encoding = field(init=False)
    resolution: int = field(init=False)

    def run(self, work: Work, note: str = "") -> int:
        """Exit code: 0 all written, 130 interrupted. Raises the library's errors."""
        self.load(len(work))
        if note:
            self.output.note(note)
        finished = self.finished(work) if self.skip else frozenset()
        self.there = len(finished)
        try:
            self.deliver(work, finished)
        except (Interrupted, KeyboardInterrupt):
            self.output.finish()
            self.output.warning(f"Interrupted: {self.progress(len(work))}.")
            return 130
        except ReaderGone:
            raise
        except Exception:
            self.output.finish()
            if self.there:
                self.output.warning(f"Stopped: {self.progress(len(work))}.")
            raise
        finally:
            self.output.finish()
        return 0

    def load(self, count: int) -> None:
        """Everything that can fail before the first image is made."""
        given, model = self.settings, models.load(self.model)  # first: it finds out whether there is room for imports
        from tpdne_cli.pipeline import Encoding

        settings = options.settings_of(given)
        self.encoding = Encoding(self.target.format, given["quality"], given["size"], not given["no_metadata"])
        self.resolution = model.resolution
        how = given["device"], given["precision"], given["batch_size"]
        judged = given.get("min_realism") is not None
        if given.get("engine") == "ray":
            from tpdne_cli import cluster

            self.sampler = cluster.assemble(model, settings, *how, count, judged, given["ray_address"])
        else:
            from tpdne_cli import fleet

            self.sampler = fleet.assemble(model, settings, *how, count, judged)

    def finished(self, work: Work) -> Collection[str]:
        """Names of the images that are there. Raises OutputError where something else has such a name."""
        names = set()
        for seed, name in work:
            path = self.target.path(name)
            if not path.exists():
                continue
            self.recognise(path, self.sampler.recipe(seed))
            names.add(name)
        if names:
            self.output.note(f"{len(names)} of {len(work)} images are there already.")
        return names

    def recognise(self, path: Path, recipe: Mapping[str, Any]) -> None:
        """Raises OutputError where the file at path is not the finished image of this recipe."""
        from tpdne_cli.resume import INCIDENTAL, objection

        ignored = INCIDENTAL | {"precision"} if self.settings["precision"] == "auto" else INCIDENTAL
        if reason := objection(path, recipe, self.encoding, self.resolution, ignored):
            raise OutputError(f"{path} {reason}: move it away, or give --force in place of --skip-existing.")

    def deliver(self, work: Work, finished: Collection[str]) -> None:
        """Write what is not there yet, and report all in the order of the work. Raises Interrupted."""
        with Interruption(self.output) as interruption, open_manifest(self.manifest, self.skip, self.force) as manifest:
            todo = [item for item in work if item[1] not in finished]
            results = self.write(todo, interruption)
            self.output.start(len(todo))
            try:
                for seed, name in work:
                    if name not in finished:
                        self.report(next(results), manifest)
                    elif self.manifest is not None:
                        manifest.add(self.described(seed, name))
                    if manifest.failure is not None:
                        interruption.stop()
                next(results, None)  # the end of an archive
            except Interrupted:
                if manifest.failure is None:
                    raise
            if manifest.failure is not None:
                raise manifest.failure

    def write(self, work: Work, interruption: Interruption) -> Iterator[Written]:
        """The images of the work, in order, as each is written."""
        from tpdne_cli.pipeline import write_files, write_stream

        def placed() -> Iterator[tuple[Sample, str]]:
            samples = self.sampler(interruption.until(seed for seed, _ in work))
            for (seed, name), sample in zip(work, samples, strict=True):
                assert sample.seed == seed, "an image would get the name of another"
                yield sample, name

        if self.target.is_stdout:
            return write_stream(placed(), self.encoding, cast(BinaryIO, Stdout()), tar=self.archive)
        paths = ((sample, self.target.path(name)) for sample, name in placed())
        return write_files(paths, self.encoding, replace=self.force)

    def report(self, written: Written, manifest: Manifest) -> None:
        self.there += 1
        record = written.record()
        manifest.add(record)
        if not self.target.is_stdout and written.seconds is not None:  # None: what an earlier run has told already
            self.output.result(written.name or "", record)
        self.output.advance()

    def described(self, seed: Seed, name: str) -> dict[str, Any]:
        """The manifest's record of an image that an earlier run made."""
        from tpdne_cli.resume import describe

        return describe(self.target.path(name), self.sampler.recipe(seed), self.encoding, self.resolution).record()

    def progress(self, total: int) -> str:
        if self.target.is_stdout:
            return f"{self.there} of {total} images were written"
        return f"{self.there} of {total} images are there; {self.again}"
