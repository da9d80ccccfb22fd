"""The pages, their style sheet and scripts: plain files of this package, no build step, nothing from elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from tpdne_cli.sampler import Settings
from tpdne_cli.seeds import Seed
from tpdne_cli.web import addresses

HERE = Path(__file__).parent
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# what a model's pictures show: one of them, and the sentence below it
SUBJECTS = {
    "faces": ("face", "This person does not exist."),
    "cats": ("cat", "This cat does not exist."),
}
ARCHITECTURES = {"stylegan1": "StyleGAN", "stylegan2": "StyleGAN2", "stylegan3": "StyleGAN3"}
ANYTHING = ("picture", "This does not exist.")


@dataclass(frozen=True)
class Asset:
    """A static file under a name that changes with its content, so that it may be cached for ever."""

    name: str
    data: bytes
    media_type: str


@cache
def assets() -> dict[str, Asset]:
    """All static files by their public names: page.css -> page.1a2b3c4d5e6f.css."""
    found = {}
    for path in sorted((HERE / "static").iterdir()):
        if path.suffix in TYPES:
            data = path.read_bytes()
            name = f"{path.stem}.{hashlib.sha256(data).hexdigest()[:12]}{path.suffix}"
            found[path.name] = Asset(name, data, TYPES[path.suffix])
    return found


def asset_url(name: str) -> str:
    return f"/static/{assets()[name].name}"


@cache
def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["asset"] = asset_url
    return made


def render(template: str, **values: Any) -> str:
    return environment().get_template(template).render(**values)


def subject(model: str) -> tuple[str, str]:
    return SUBJECTS.get(model, ANYTHING)


def address(model: str, seed: Seed | None = None, format: str | None = None, **parameters: Any) -> str:
    """The address of a model's page, or of a seed's page or image; parameters that are None are left out."""
    path = "/" + quote(model, safe="")
    if seed is not None:
        path += "/" + quote(str(seed), safe="@") + (f".{format}" if format else "")
    given = {name: value for name, value in parameters.items() if value is not None}
    return path + (f"?{urlencode(given)}" if given else "")


def parameters(settings: Settings, own_truncation: float) -> dict[str, Any]:
    """What an address must say of checked settings."""
    psi = settings.truncation
    return {
        "truncation": None if psi is None or psi == own_truncation else addresses.plain(psi),
        "class": settings.class_index or None,
        "attr": addresses.attributes(settings),
    }
