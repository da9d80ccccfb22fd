"""A recipe out of a file -> its image again, for `inspection.verify`. It may say anything: nothing is believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tpdne_cli import devices, models
from tpdne_cli.errors import ModelNotFoundError, SettingsError
from tpdne_cli.models import Model
from tpdne_cli.sampler import NOISE_MODES, Pixels, Sampler, Settings
from tpdne_cli.seeds import parse_seed

# Levels of 255 by which the same image may differ between devices, by precision. A processor's float32 alone is exact.
# Seen on processors: float16 against float32 1, bfloat16 3; the rest is room for deeper networks and other devices.
TOLERANCE = {"float32": 2, "float16": 8, "bfloat16": 24}

# What a recipe of a single image may hold, and what its value must be.
CHECKS: dict[str, Callable[[Any], bool]] = {
    "truncation": lambda v: _is_number(v),
    "truncation_cutoff": lambda v: v is None or type(v) is int,
    "noise": lambda v: isinstance(v, str) and v in NOISE_MODES,
    "class_index": lambda v: v is None or type(v) is int,
    "precision": lambda v: isinstance(v, str) and v in TOLERANCE,
}
# What it may hold besides.
MOVES: dict[str, Callable[[Any], bool]] = {
    "rotate": lambda v: _is_number(v),
    "translate": lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_number, v)),
    "attributes": lambda v: isinstance(v, dict) and all(map(_is_number, v.values())),
}
# realism is what a critic said of the image; nothing is made of it.
NAMES = {"model", "weights", "seed", "device", "version", "latent", "realism", *CHECKS, *MOVES}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e9 < value < 1e9  # NaN is not


def check(recipe: Mapping[str, Any]) -> None:
    """Raises SettingsError for a recipe that does not describe one image, or holds what this version does not know."""
    if recipe.get("latent") == {"kind": "collection"}:
        raise SettingsError("It holds many images, and tpdne makes only single ones again.")
    if unknown := sorted(recipe.keys() - NAMES):
        raise SettingsError(f"Its recipe asks for {unknown[0]!r}, which this tpdne does not know: upgrade it.")
    for name, possible in (CHECKS | MOVES).items():
        if not (possible(recipe[name]) if name in recipe else name in MOVES):
            raise SettingsError(f"Its recipe has no possible {name}: it was changed, or is of another version.")
    if "latent" not in recipe:
        seed = recipe.get("seed")
        if isinstance(seed, bool) or not isinstance(seed, (int, str)):
            raise SettingsError("Its recipe has no possible seed: it was changed, or is of another version.")
        parse_seed(seed)


class Remaker:
    """Makes images again, each with its own model and settings; the last of both stay loaded.

    source: name or file of the only model to use; None: the installed model that a recipe names, never a path.
    Raises DeviceError for a device that is not there.
    """

    def __init__(self, source: str | None = None, device: str = "auto") -> None:
        self.source, self.device = source, devices.choose(device)
        self.models: dict[str, Model] = {}
        self.last: tuple[Any, Sampler] | None = None

    def __call__(self, recipe: Mapping[str, Any]) -> Pixels:
        """uint8 [H, W, C]. Raises SettingsError, SeedError and ModelNotFoundError for what cannot be made here."""
        check(recipe)
        sampler = self.sampler(recipe)
        if "latent" in recipe:
            from tpdne_cli.styles import remade

            return remade(sampler, recipe)
        (sample,) = sampler([recipe["seed"]])
        return sample.pixels

    def tolerance(self, recipe: Mapping[str, Any]) -> int:
        """Levels of 255 that this device may differ by from the one that made the image."""
        precision = recipe.get("precision")
        if not CHECKS["precision"](precision) or (
            recipe.get("device") == "cpu" == self.device.type and precision == "float32"
        ):
            return 0
        return TOLERANCE[str(precision)]

    def sampler(self, recipe: Mapping[str, Any]) -> Sampler:
        model, cutoff = self.model(recipe), recipe["truncation_cutoff"]
        if cutoff is None and model.truncation_cutoff is not None:
            cutoff = model.generator.num_ws  # in a recipe none means all layers, not the model's choice
        values = [recipe["truncation"], cutoff, recipe["noise"], recipe["class_index"]]
        values += [recipe.get("rotate", 0.0), tuple(recipe.get("translate", (0.0, 0.0)))]
        values += [tuple(recipe.get("attributes", {}).items())]
        key = (model.sha256, *values, recipe["precision"])
        if self.last is None or self.last[0] != key:
            self.last = key, Sampler(model, Settings(*values), str(self.device), recipe["precision"], batch_size=1)
        return self.last[1]

    def model(self, recipe: Mapping[str, Any]) -> Model:
        """The model of a recipe, by the hash of its weights."""
        name = self.source if self.source is not None else recipe.get("model")
        if not isinstance(name, str) or (self.source is None and name not in models.names()):
            raise ModelNotFoundError(f"There is no generator called {name!r} here: name its file with --model.")
        if name not in self.models:
            self.models = {name: models.load(name)}
        model = self.models[name]
        if model.sha256 != recipe.get("weights"):
            raise ModelNotFoundError(
                f"The generator {name!r} here has other weights than the one that made it: name that file with --model."
            )
        return model
