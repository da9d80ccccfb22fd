"""tpdne: photographs of people who were never born.

    import tpdne_cli as tpdne

    model = tpdne.load("faces")
    for image in tpdne.sample(model, seeds=range(100)):
        image.pixels  # uint8 [H, W, 3]
        image.save(f"{image.seed}.png")

Importing this package imports neither torch nor numpy; they come with the first call.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the room it lives in
_ROOMS = {
    "load": "models",
    "Model": "models",
    "sample": "sampler",
    "Sample": "sampler",
    "Sampler": "sampler",
    "Settings": "sampler",
    "interpolate": "interpolation",
    "mix": "styles",
    "vary": "styles",
    "save_animation": "animation",
    "save_sheet": "montage",
    "read_recipe": "images",
    "TpdneError": "errors",
}
__all__ = ["__version__", *_ROOMS]

if TYPE_CHECKING:
    from tpdne_cli.animation import save_animation as save_animation
    from tpdne_cli.errors import TpdneError as TpdneError
    from tpdne_cli.images import read_recipe as read_recipe
    from tpdne_cli.interpolation import interpolate as interpolate
    from tpdne_cli.models import Model as Model
    from tpdne_cli.models import load as load
    from tpdne_cli.montage import save_sheet as save_sheet
    from tpdne_cli.sampler import Sample as Sample
    from tpdne_cli.sampler import Sampler as Sampler
    from tpdne_cli.sampler import Settings as Settings
    from tpdne_cli.sampler import sample as sample
    from tpdne_cli.styles import mix as mix
    from tpdne_cli.styles import vary as vary


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
