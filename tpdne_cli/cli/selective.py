"""The main job with a critic at the door: seeds to images, and on to further seeds until enough have passed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, cast

from tpdne_cli.cli.interruption import Interruption
from tpdne_cli.cli.job import Job, Work
from tpdne_cli.cli.manifest import Manifest
from tpdne_cli.critic import Selection, candidates
from tpdne_cli.files import remove_leftovers
from tpdne_cli.seeds import Seed

if TYPE_CHECKING:
    from pathlib import Path

    from tpdne_cli.pipeline import Written
    from tpdne_cli.sampler import Sample


@dataclass
class SelectiveJob(Job):
    """A Job whose work says how many images there are to be, and from which seeds on; names are given to those kept."""

    namer: Callable[[int, Seed], str] = str  # type: ignore[assignment]
    minimum: float = 0
    found: int = field(default=0, init=False)  # images that an earlier run has kept

    def run(self, work: Work, note: str = "") -> int:
        """Exit code: 0 all written, 130 interrupted. Raises the library's errors."""
        self.selection = Selection(self.minimum, len(work))
        try:
            return super().run(work, note)
        finally:
            if self.selection.tried:
                there = f" {self.found} of them are there already." if self.found else ""
                self.output.note(f"{self.selection.kept} of {self.selection.tried} images passed the critic.{there}")

    def finished(self, _work: Work) -> Collection[str]:
        """None: who passes is known when it is drawn."""
        return frozenset()

    def write(self, work: Work, interruption: Interruption) -> Iterator[Written]:
        """The images that pass, in order, as each is written."""
        from tpdne_cli.cli.output import Stdout
        from tpdne_cli.pipeline import write_files, write_stream

        def named() -> Iterator[tuple[Sample, str]]:
            samples = self.sampler(interruption.until(candidates([seed for seed, _ in work])))
            for index, sample in enumerate(self.selection(samples)):
                yield sample, self.namer(index, sample.seed)

        def placed() -> Iterator[tuple[Sample, Path]]:
            cleared = set()
            for sample, name in named():
                path = self.target.path(name)
                if path.parent not in cleared:  # Target.prepare knows nothing of the seeds that are gone on to
                    remove_leftovers(path.parent)
                    cleared.add(path.parent)
                yield sample, path

        if self.target.is_stdout:
            return write_stream(named(), self.encoding, cast(BinaryIO, Stdout()), tar=self.archive)
        return write_files(placed(), self.encoding, self.force, earlier=self.earlier)

    def earlier(self, sample: Sample, path: Path) -> Written | None:
        """The finished image at path that --skip-existing leaves. Raises OutputError where something else is there."""
        from tpdne_cli.resume import describe

        if not (self.skip and path.exists()):
            return None
        self.recognise(path, sample.recipe)
        return describe(path, sample.recipe, self.encoding, self.resolution)

    def report(self, written: Written, manifest: Manifest) -> None:
        self.found += written.seconds is None
        super().report(written, manifest)
