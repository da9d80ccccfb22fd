"""What an address shows, and the styles that the network needs to draw it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpdne_cli import directions
from tpdne_cli.interpolation import METHODS, Path
from tpdne_cli.sampler import Sample, Sampler, Settings
from tpdne_cli.seeds import Seed
from tpdne_cli.styles import Mixer, Mixture, parse_styles

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Look:
    """One image before it is encoded: a seed, a frame of a walk that begins there, or a mixture with another's styles.

    settings: as Settings.check returns them, so that equal images are equal keys.
    """

    model: str
    seed: Seed
    settings: Settings
    walk: Path | None = None
    frame: int = 0
    mix: Seed | None = None  # whose layers `styles` it has
    styles: str = "coarse"

    @property
    def seeds(self) -> tuple[Seed, ...]:
        """All seeds that it is made from."""
        if self.walk is not None:
            return self.walk.seeds
        return (self.seed,) if self.mix is None else (self.seed, self.mix)


def draw(sampler: Sampler, looks: list[Look]) -> list[Sample]:
    """The images of any looks of one model, made together; each the same bits as alone (on a CPU in float32)."""

    def run(batch: list[Look]) -> list[Sample]:
        pixels, seconds = sampler.render(batch, lambda looks: styles(sampler, looks), _no_noise)
        return [
            Sample(look.seed, image, recipe(sampler, look), seconds) for look, image in zip(batch, pixels, strict=True)
        ]

    return list(sampler.in_batches(looks, run))


def styles(sampler: Sampler, looks: list[Look]) -> torch.Tensor:
    """ws [N, num_ws, w_dim]. A seed that several looks share is mapped once."""
    import torch

    wanted: dict[Settings, dict[Seed, Any]] = {}
    for look in looks:
        wanted.setdefault(look.settings, {}).update(dict.fromkeys(look.seeds))
    for settings, mapped in wanted.items():
        mapped.update(zip(mapped, _with(sampler, settings).map(list(mapped)), strict=True))
    ws = [_blend(look, [wanted[look.settings][seed] for seed in look.seeds]) for look in looks]
    for i, look in enumerate(looks):  # each its own, where a Sampler adds one to all
        if (step := directions.step(sampler.model.directions, look.settings.attributes)) is not None:
            ws[i] = ws[i] + torch.from_numpy(step).to(ws[i].device)
    return torch.stack(ws)


def _blend(look: Look, ws: list[torch.Tensor]) -> torch.Tensor:
    """[num_ws, w_dim] of one look from those of its seeds."""
    import numpy as np
    import torch

    if look.walk is not None:  # in float64, as interpolation.walk does
        keys = torch.stack(ws).cpu().numpy().astype(np.float64)
        point = METHODS[look.walk.method](keys, look.walk.loop)(*look.walk.place(look.frame))
        return torch.from_numpy(point.astype(np.float32)).to(ws[0].device)
    if look.mix is not None:
        layers = parse_styles(look.styles, len(ws[0]))
        mixed = ws[0].clone()
        mixed[layers] = ws[1][layers]
        return mixed
    return ws[0]


def recipe(sampler: Sampler, look: Look) -> dict[str, Any]:
    """All that names this image; for a plain seed exactly what `tpdne generate` writes."""
    same = _with(sampler, look.settings)
    if look.walk is not None:
        return {**same.recipe(look.seed), "seed": list(look.walk.seeds), "latent": look.walk.describe(look.frame)}
    if look.mix is not None:
        return Mixer(same, look.styles).recipe(Mixture(look.mix, look.seed))
    return same.recipe(look.seed)


def _with(sampler: Sampler, settings: Settings) -> Sampler:
    """The same network with other settings; they are checked already."""
    variant = copy.copy(sampler)
    variant.settings = settings
    return variant


def _no_noise(_looks: Iterable[Look]) -> None:
    raise AssertionError("the HTTP interface offers no random noise")
