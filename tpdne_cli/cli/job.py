"""The main job: seeds to files, each reported as it is finished, and an end that says how to go on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from tpdne_cli import models
from tpdne_cli.cli.interruption import Interrupted, Interruption
from tpdne_cli.cli.manifest import Manifest, open_manifest
from tpdne_cli.cli.output import Output, ReaderGone, Stdout
from tpdne_cli.cli.target import Target
from tpdne_cli.errors import OutputError
from tpdne_cli.seeds import Seed

if TYPE_CHECKING:
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
    there: int = 0  # images that exist by now

    def run(self, work: Work, note: str = "") -> int:
        """Exit code: 0 all written, 130 interrupted. Raises the library's errors."""
        from tpdne_cli.fleet import assemble
        from tpdne_cli.pipeline import Encoding
        from tpdne_cli.sampler import Settings

        given = self.settings
        encoding = Encoding(self.target.format, given["quality"], given["size"], not given["no_metadata"])
        settings = Settings(given["truncation"], given["truncation_cutoff"], given["noise"], given["class_index"])
        model = models.load(self.model)
        sampler = assemble(model, settings, given["device"], given["precision"], given["batch_size"], len(work))
        if note:
            self.output.note(note)
        finished = self.finished(work, sampler, encoding, model.resolution) if self.skip else frozenset()
        self.there = len(finished)
        try:
            with Interruption(self.output) as interruption, open_manifest(self.manifest) as manifest:
                todo = [item for item in work if item[1] not in finished]
                results = self.write(todo, sampler, encoding, interruption)
                self.output.start(len(todo))
                for seed, name in work:
                    if name not in finished:
                        self.report(next(results), manifest)
                    elif self.manifest is not None:
                        manifest.add(self.described(seed, name, sampler, encoding, model.resolution))
                next(results, None)  # the end of an archive
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

    def write(
        self, work: Work, sampler: Sampler | Fleet, encoding: Encoding, interruption: Interruption
    ) -> Iterator[Written]:
        """The images of the work, in order, as each is written."""
        from tpdne_cli.pipeline import write_files, write_stream

        def placed() -> Iterator[tuple[Sample, str]]:
            samples = sampler(interruption.until(seed for seed, _ in work))
            for (seed, name), sample in zip(work, samples, strict=True):
                assert sample.seed == seed, "an image would get the name of another"
                yield sample, name

        if self.target.is_stdout:
            return write_stream(placed(), encoding, cast(BinaryIO, Stdout()), tar=self.archive)
        paths = ((sample, self.target.path(name)) for sample, name in placed())
        return write_files(paths, encoding, replace=self.force)

    def report(self, written: Written, manifest: Manifest) -> None:
        self.there += 1
        record = written.record()
        manifest.add(record)
        if not self.target.is_stdout:
            self.output.result(written.name or "", record)
        self.output.advance()

    def finished(self, work: Work, sampler: Sampler | Fleet, encoding: Encoding, resolution: int) -> Collection[str]:
        """Names of the images that are there. Raises OutputError where something else has such a name."""
        from tpdne_cli.resume import INCIDENTAL, objection

        ignored = INCIDENTAL | {"precision"} if self.settings["precision"] == "auto" else INCIDENTAL
        names = set()
        for seed, name in work:
            path = self.target.path(name)
            if not path.exists():
                continue
            if reason := objection(path, sampler.recipe(seed), encoding, resolution, ignored):
                raise OutputError(f"{path} {reason}: move it away, or give --force in place of --skip-existing.")
            names.add(name)
        if names:
            self.output.note(f"{len(names)} of {len(work)} images are there already.")
        return names

    def described(
        self, seed: Seed, name: str, sampler: Sampler | Fleet, encoding: Encoding, resolution: int
    ) -> dict[str, Any]:
        """The manifest's record of an image that an earlier run made."""
        from tpdne_cli.resume import describe

        return describe(self.target.path(name), sampler.recipe(seed), encoding, resolution).record()

    def progress(self, total: int) -> str:
        if self.target.is_stdout:
            return f"{self.there} of {total} images were written"
        return f"{self.there} of {total} images are there; {self.again}"
