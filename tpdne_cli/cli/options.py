"""Options that several commands share, each group one decorator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tpdne_cli.errors import SeedError
from tpdne_cli.seeds import Seed, flatten, fresh, parse_lines, parse_ranges, parse_seed, successors

if TYPE_CHECKING:
    from tpdne_cli.sampler import Settings

F = TypeVar("F", bound=Callable[..., Any])


def group(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in --help in the order given."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class BatchSize(click.ParamType):  # type: ignore[type-arg]
    """A number of images, or 'auto'."""

    name = "batch size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "auto":
            return None
        if not re.fullmatch(r"0*[1-9]\d{0,5}", str(value), re.ASCII):
            self.fail(f"{value!r} is not a batch size: give a number from 1 to 999999, or auto.", param, ctx)
        return int(value)


class Whole(click.IntRange):
    """A range of integers whose complaints call what is none of them by a name that people use."""

    name = "whole number"


seed_options = group(
    click.option("-n", "--count", type=Whole(1, 2**32), metavar="N", help="How many images (default 1)."),
    click.option(
        "--seed",
        "seed",
        multiple=True,
        metavar="S",
        help="A number, or any text such as an e-mail address: the first seed. Repeatable.",
    ),
    click.option("--seeds", metavar="RANGES", help="Several at once: 0-99,205,300-310."),
    click.option(
        "--seeds-from", metavar="FILE", type=click.Path(allow_dash=True), help="One seed per line; - is stdin."
    ),
)

latent_options = group(
    click.option(
        "--truncation",
        "--psi",
        type=float,
        metavar="PSI",
        help="1: as varied as the photographs, 0: the average (default: the model's own).",
    ),
    click.option("--truncation-cutoff", type=Whole(min=0), metavar="K", help="Truncate the first K layers only."),
    click.option(
        "--noise",
        type=click.Choice(["const", "random", "none"]),
        default="const",
        show_default=True,
        help="Fine detail: the model's own, drawn from the seed, or none.",
    ),
    click.option("--class", "class_index", type=Whole(min=0), metavar="N", help="Class, for models that have any."),
    click.option(
        "--attr",
        "attributes",
        multiple=True,
        metavar="NAME=AMOUNT",
        help="Move along a direction that the model's file names: age=1.5, smile=-1. Repeatable.",
    ),
)

movement_options = group(
    click.option("--rotate", type=float, default=0.0, metavar="DEG", help="Turn the scene (StyleGAN3 only)."),
    click.option(
        "--translate",
        type=float,
        nargs=2,
        default=(0.0, 0.0),
        metavar="X Y",
        help="Move the scene, in image widths (StyleGAN3 only).",
    ),
)

critic_options = group(
    click.option(
        "--min-realism",
        type=click.FloatRange(0, 100, max_open=True),
        metavar="P",
        help="Keep only images above the P-th percentile of realism, as the critic sees it; go on to further seeds.",
    ),
)

resume_option = click.option(
    "--skip-existing", is_flag=True, help="Leave finished files alone: a run with given seeds goes on where it stopped."
)

file_options = group(
    click.option(
        "-o",
        "--out",
        default=".",
        metavar="DIR|FILE|-",
        help="Directory, one file, or - for bytes on stdout (several images: a tar stream).",
    ),
    click.option(
        "--format", "format", type=click.Choice(["png", "jpg", "webp"]), help="Default png, or what FILE ends with."
    ),
    click.option("--quality", type=Whole(1, 100), metavar="Q", help="For jpg and webp; webp at 100 is lossless."),
    click.option("--size", type=Whole(1, 16383), metavar="PX", help="Resize to this many pixels."),
    click.option(
        "--name", metavar="TEMPLATE", help="File names from {model}, {seed} and {index} (default {model}-{seed})."
    ),
    resume_option,
    click.option("--force", is_flag=True, help="Replace files that exist."),
    click.option("--no-metadata", is_flag=True, help="Leave out the recipe and the mark of a synthetic image."),
)

_batch_size = click.option(
    "--batch-size", type=BatchSize(), default="auto", metavar="N|auto", help="Images per pass of the network."
)
_precision = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Of the convolutions; auto is float32 on a CPU.",
)
_DEVICE = "auto, cpu, cuda, cuda:1 or mps."

device_options = group(_batch_size, click.option("--device", default="auto", metavar="NAME", help=_DEVICE), _precision)
fleet_options = group(
    _batch_size,
    click.option("--device", default="auto", metavar="NAME", help=f"{_DEVICE} Several: cuda:0,cuda:1."),
    _precision,
)

report_options = group(
    click.option(
        "--manifest", type=click.Path(dir_okay=False), metavar="FILE", help="Write one JSON line per image to FILE."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image instead of its path."),
    click.option("-q", "--quiet", is_flag=True, help="Print results and errors only."),
    click.option("--no-progress", is_flag=True, help="Print no progress bar."),
)

script_options = group(
    click.option("-0", "--print0", is_flag=True, help="End each path with a null byte, for xargs -0."),
    click.option(
        "--shard",
        metavar="I/N|auto",
        help="Make the I-th of N parts only; auto asks Slurm, Kubernetes, torchrun or GNU parallel.",
    ),
    click.option(
        "--engine", type=click.Choice(["local", "ray"]), default="local", help="Draw here, or on a Ray cluster."
    ),
    click.option("--ray-address", metavar="ADDRESS", help="Of a cluster that runs; else one of this machine alone."),
)

generation_options = group(
    seed_options, latent_options, critic_options, file_options, fleet_options, report_options, script_options
)


def settings_of(given: Mapping[str, Any]) -> Settings:
    """What latent_options and movement_options say. Raises SettingsError."""
    from tpdne_cli import directions
    from tpdne_cli.sampler import Settings

    return Settings(
        given["truncation"],
        given["truncation_cutoff"],
        given["noise"],
        given["class_index"],
        given.get("rotate", 0.0),
        given.get("translate", (0.0, 0.0)),
        directions.parse(given["attributes"]),
    )


def read_seeds(
    count: int | None, seed: Sequence[str], seeds: str | None, seeds_from: str | None
) -> Sequence[Seed] | None:
    """The seeds that the options name, in order; None where they name none. Raises SeedError."""
    parts: list[Sequence[Seed]] = [[parse_seed(text)] for text in seed]
    if seeds is not None:
        parts += parse_ranges(seeds)
    if seeds_from is not None:
        name = "standard input" if seeds_from == "-" else seeds_from
        try:
            with click.open_file(seeds_from, encoding="utf-8") as file:
                parts.append(list(parse_lines(file, name)))
        except OSError as error:
            raise SeedError(f"{name} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise SeedError(f"{name} is not UTF-8 text.") from None
        if not parts[-1]:
            raise SeedError(f"{name} holds no seeds.")
    if not parts:
        return None
    if len(seed) == 1 and len(parts) == 1:
        return successors(parts[0][0], count or 1)
    given = flatten(parts)
    if count is not None and count != len(given):
        raise SeedError(f"{len(given)} seeds are given and --count asks for {count}: leave one of the two out.")
    return given


def going_on(note: str, skip: bool) -> str:
    """The note on fresh seeds, where it is not empty; with --skip-existing it says what they are no use for."""
    hint = "To go on with an earlier run give its seeds: each run without any draws new ones."
    return f"{note} {hint}" if note and skip else note


def seeds_or_fresh(given: Sequence[Seed] | None, count: int | None) -> Sequence[Seed]:
    return fresh(count or 1) if given is None else given
