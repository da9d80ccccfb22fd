"""`tpdne interpolate`: a walk through latent space, as frames or as a moving picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpdne_cli.cli import latent, options
from tpdne_cli.cli.target import Target
from tpdne_cli.images import FORMATS
from tpdne_cli.naming import Namer
from tpdne_cli.seeds import Seed, fresh, parse_seed

if TYPE_CHECKING:
    from tpdne_cli import interpolation

KEYS = 4  # of a walk that is given none
NOT_OURS = re.compile(r".*\.(jpe?g|avi|avif|mov|m4v|mkv|webm|mpe?g|tiff?|bmp|pdf)", re.IGNORECASE)


@click.command(short_help="Walk from face to face, as frames or as a moving picture.")
@latent.model_option
@click.option(
    "--seed", "seed", multiple=True, metavar="S", help="A key of the walk: a number, or any text. Repeatable."
)
@click.option("--seeds", metavar="A,B,...", help="Several keys: 1,5-9,alice@example.com.")
@click.option("--frames", type=int, metavar="N", help="Images in all (default 60 from each key to the next one).")
@click.option("--loop", is_flag=True, help="Return to the first key, without a seam.")
@click.option(
    "--method",
    type=click.Choice(["spline", "linear", "slerp"]),
    default="spline",
    show_default=True,
    help="A smooth curve, straight lines, or great circles of Z.",
)
@click.option("--space", type=click.Choice(["w", "z"]), help="Default w; z for slerp.")
@click.option(
    "--easing",
    type=click.Choice(["none", "in", "out", "in-out"]),
    default="none",
    show_default=True,
    help="Leave (in) and reach (out) each key gently.",
)
@click.option("--fps", type=float, default=25, show_default=True, metavar="N", help="Frames a second.")
@options.latent_options
@latent.output_options(
    "DIR|FILE|-",
    "FILE.gif, .webp, .png (APNG) or .mp4, a directory for numbered frames, or - for stdout (default walk.webp).",
    ("png", "jpg", "webp", "gif", "mp4"),
)
@options.resume_option
@options.device_options
@options.report_options
def interpolate(seed: Sequence[str], seeds: str | None, **given: Any) -> int:
    """Walk from face to face, as frames or as a moving picture.

    At a key stands the very image that its seed gives elsewhere. With --noise random the noise of one key turns into
    that of the next one; the default keeps it still, so that nothing flickers.

    \b
    tpdne interpolate --seeds 1,2,3 --loop -o walk.webp
    tpdne interpolate --seed alice --seed bob --frames 50 --fps 25 -o walk.mp4
    tpdne interpolate --model cats --seeds 1-8 --loop --frames 480 -o frames/
    """
    from tpdne_cli import interpolation

    keys: Sequence[Seed] = [*map(parse_seed, seed), *(latent.seed_list(seeds) if seeds is not None else [])]
    again = ""
    if not keys:
        keys = fresh(KEYS)
        again = f"--seeds {latent.listed(keys)}"
    way = interpolation.Path(
        tuple(keys), given["frames"], given["loop"], given["method"], given["space"], given["easing"]
    )
    if given["out"] is None and given["format"] == "jpg":
        raise click.UsageError("A JPEG does not move: name a directory for numbered frames, such as --out walk/")
    target, moving = target_of(given["out"] or f"walk.{given['format'] or 'webp'}", given["format"])
    return (animate if moving else frames)(way, target, given, again)


def note_of(again: str) -> str:
    return f"Fresh seeds: {again} makes the same walk again." if again else ""


def target_of(out: str, format: str | None) -> tuple[Target, bool]:
    """Where to write, and whether as one moving picture."""
    from tpdne_cli.animation import format_for

    path = Path(out)
    suffix = format_for(path)
    if out == "-":
        if format == "jpg":
            raise click.UsageError("A JPEG does not move: choose --format gif, webp, png or mp4")
        return Target(None, None, format or "webp"), True
    if suffix is not None and not path.is_dir() and not out.endswith("/"):
        if format is not None and format != suffix:
            raise click.UsageError(f"--format {format} contradicts the name {out}: leave one of the two out")
        return Target(None, path, suffix), True
    if NOT_OURS.fullmatch(out) and not path.is_dir():
        raise click.UsageError(f"A walk is no {path.suffix}: name a .gif, .webp, .png or .mp4 file, or a directory")
    if format not in (None, *FORMATS):
        raise click.UsageError(f"--format {format} is one file: name it, such as --out walk.{format}")
    return Target(path, None, format or "png"), False


def frames(way: interpolation.Path, target: Target, given: Mapping[str, Any], again: str) -> int:
    """A directory of numbered frames. again: the option that names keys which were drawn."""
    from tpdne_cli.interpolation import Walker

    assert way.frames is not None
    namer = Namer(f"frame-{{index:0{max(4, len(str(way.frames - 1)))}d}}", "", FORMATS[target.format].suffix)
    work = [(index, namer(index, 0)) for index in range(way.frames)]
    output = latent.begin(target, [name for _, name in work], given)
    job = latent.files_job(target, output, given, lambda sampler: Walker(sampler, way), again)
    return job.make(work, options.going_on(note_of(again), given["skip_existing"]))


def animate(way: interpolation.Path, target: Target, given: Mapping[str, Any], again: str) -> int:
    """One moving picture."""
    from tpdne_cli import animation
    from tpdne_cli.fleet import spread
    from tpdne_cli.interpolation import Walker

    animation.check(target.format, given["fps"], given["quality"])
    if given["skip_existing"]:
        raise click.UsageError("--skip-existing goes on with numbered frames: give --out DIR")
    output = latent.begin(target, [""], given, resumable=False)
    sampler = latent.load_sampler(given)
    walker = Walker(sampler, way)
    if again:
        output.note(note_of(again))
    side = given["size"] or sampler.model.resolution

    def save(samples: Iterator[Any], destination: Any) -> Mapping[str, Any]:
        count = animation.save_animation(
            samples, destination, given["fps"], format=target.format, quality=given["quality"], size=given["size"],
            recipe=walker.recipe(), metadata=not given["no_metadata"], replace=given["force"],
        )  # fmt: skip
        return {"width": side, "height": side, "frames": count, "fps": given["fps"]}

    assert way.frames is not None
    one = latent.OneFile(target.file, target.format, output, given["manifest"], given["force"])
    return one.make(range(way.frames), spread(walker, sampler, way.frames), save, walker.recipe())
