"""The generators that their makers publish: where each lies, what it shows, and under which licence.

None of them may be passed on with this program, and none is fetched before its licence has been shown. The addresses
and licences are those of the makers' own pages. Faces come first, then cats, then the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpdne_cli.errors import ModelNotFoundError


@dataclass(frozen=True)
class Entry:
    """A published generator.

    name: what `tpdne models pull` calls it; resolution: pixels of the longer side; shows: what its images are of.
    terms: the licence in a sentence, which does not replace its text; bytes and sha256: of the file, None where they
    are not known: the makers publish neither, so that a first download records them.
    """

    name: str
    url: str
    resolution: int
    shows: str
    licence: str
    licence_url: str
    terms: str
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class _Family:
    base: str
    licence: str
    licence_url: str


_TERMS = "For research or evaluation only, not for commercial use; whatever derives from it stays under these terms."

_TF2 = _Family(
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2/networks/",
    "NVIDIA Source Code License-NC (StyleGAN2)",
    "https://nvlabs.github.io/stylegan2/license.html",
)
_ADA = _Family(
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/",
    "NVIDIA Source Code License (StyleGAN2-ADA)",
    "https://nvlabs.github.io/stylegan2-ada-pytorch/license.html",
)
# The StyleGAN3 project's page lists these StyleGAN2 networks beside its own, under its own licence.
_SG2 = _Family(
    "https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan2/versions/1/files/",
    "NVIDIA Source Code License (StyleGAN3)",
    "https://github.com/NVlabs/stylegan3/blob/main/LICENSE.txt",
)
_SG3 = _Family(
    "https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/files/",
    "NVIDIA Source Code License (StyleGAN3)",
    "https://github.com/NVlabs/stylegan3/blob/main/LICENSE.txt",
)

_UNALIGNED = "faces, not aligned"
_ARTWORKS = "faces in paintings and sculptures"
_ANIMALS = "cats, dogs and wild animals"
_CARS = "cars, 512x384 between black bars"
_SOURCES = "transfer-learning-source-nets/"
_PAIRS = [f"G{g}-D{d}" for g in ("orig", "resnet", "skip") for d in ("orig", "resnet", "skip")]

# (family, file without .pkl, resolution, what it shows); a name is the file's, with 'ada-' where that tells too little.
# StyleGAN2's configurations A to D are the paper's steps on the way from StyleGAN to E and F; A is StyleGAN itself.
# Those of table 2 are E with other architectures of the two networks.
_FILES: list[tuple[_Family, str, int, str]] = [
    (_SG3, "stylegan3-t-ffhq-1024x1024", 1024, "faces"),
    (_SG3, "stylegan3-r-ffhq-1024x1024", 1024, "faces"),
    (_SG3, "stylegan3-t-ffhqu-1024x1024", 1024, _UNALIGNED),
    (_SG3, "stylegan3-r-ffhqu-1024x1024", 1024, _UNALIGNED),
    (_SG3, "stylegan3-t-ffhqu-256x256", 256, _UNALIGNED),
    (_SG3, "stylegan3-r-ffhqu-256x256", 256, _UNALIGNED),
    (_SG2, "stylegan2-ffhq-1024x1024", 1024, "faces"),
    (_SG2, "stylegan2-ffhq-512x512", 512, "faces"),
    (_SG2, "stylegan2-ffhq-256x256", 256, "faces"),
    (_SG2, "stylegan2-ffhqu-1024x1024", 1024, _UNALIGNED),
    (_SG2, "stylegan2-ffhqu-256x256", 256, _UNALIGNED),
    (_SG2, "stylegan2-celebahq-256x256", 256, "faces of celebrities"),
    (_ADA, "ffhq", 1024, "faces"),
    (_TF2, "stylegan2-ffhq-config-f", 1024, "faces"),
    *((_TF2, f"stylegan2-ffhq-config-{step}", 1024, "faces") for step in "edcba"),
    *((_TF2, f"table2/stylegan2-ffhq-config-e-{pair}", 1024, "faces") for pair in _PAIRS),
    (_ADA, f"{_SOURCES}ffhq-res1024-mirror-stylegan2-noaug", 1024, "faces"),
    (_ADA, f"{_SOURCES}ffhq-res512-mirror-stylegan2-noaug", 512, "faces"),
    (_ADA, f"{_SOURCES}ffhq-res256-mirror-paper256-noaug", 256, "faces"),
    (_ADA, "paper-fig7c-training-set-sweeps/ffhq70k-paper256-ada", 256, "faces"),
    (_ADA, f"{_SOURCES}celebahq-res256-mirror-paper256-kimg100000-ada-target0.5", 256, "faces of celebrities"),
    (_SG3, "stylegan3-t-metfaces-1024x1024", 1024, _ARTWORKS),
    (_SG3, "stylegan3-r-metfaces-1024x1024", 1024, _ARTWORKS),
    (_SG3, "stylegan3-t-metfacesu-1024x1024", 1024, f"{_ARTWORKS}, not aligned"),
    (_SG3, "stylegan3-r-metfacesu-1024x1024", 1024, f"{_ARTWORKS}, not aligned"),
    (_SG2, "stylegan2-metfaces-1024x1024", 1024, _ARTWORKS),
    (_SG2, "stylegan2-metfacesu-1024x1024", 1024, f"{_ARTWORKS}, not aligned"),
    (_ADA, "metfaces", 1024, _ARTWORKS),
    (_SG2, "stylegan2-afhqcat-512x512", 512, "cats"),
    (_ADA, "afhqcat", 512, "cats"),
    (_ADA, "paper-fig11a-small-datasets/afhqcat-mirror-paper512-ada", 512, "cats"),
    (_TF2, "stylegan2-cat-config-f", 256, "cats"),
    (_TF2, "stylegan2-cat-config-a", 256, "cats"),
    (_SG3, "stylegan3-t-afhqv2-512x512", 512, _ANIMALS),
    (_SG3, "stylegan3-r-afhqv2-512x512", 512, _ANIMALS),
    (_SG2, "stylegan2-afhqv2-512x512", 512, _ANIMALS),
    (_SG2, "stylegan2-afhqdog-512x512", 512, "dogs"),
    (_ADA, "afhqdog", 512, "dogs"),
    (_SG2, "stylegan2-lsundog-256x256", 256, "dogs"),
    (_ADA, f"{_SOURCES}lsundog-res256-paper256-kimg100000-noaug", 256, "dogs"),
    (_SG2, "stylegan2-afhqwild-512x512", 512, "wild animals"),
    (_ADA, "afhqwild", 512, "wild animals"),
    (_TF2, "stylegan2-horse-config-f", 256, "horses"),
    (_TF2, "stylegan2-horse-config-a", 256, "horses"),
    (_TF2, "stylegan2-church-config-f", 256, "churches"),
    (_TF2, "stylegan2-church-config-a", 256, "churches"),
    *((_TF2, f"stylegan2-car-config-{step}", 512, _CARS) for step in "fedcba"),
    *((_TF2, f"table2/stylegan2-car-config-e-{pair}", 512, _CARS) for pair in _PAIRS),
    (_SG2, "stylegan2-brecahad-512x512", 512, "breast cancer tissue under the microscope"),
    (_ADA, "brecahad", 512, "breast cancer tissue under the microscope"),
    (_SG2, "stylegan2-cifar10-32x32", 32, "ten classes of small pictures"),
    (_ADA, "cifar10", 32, "ten classes of small pictures"),
]

# (bytes, sha256) as others have recorded them of NVIDIA's files: sizes of the LSUN ones to 0.1 MB; a sha256 only where
# independent records agree, since a wrong one would keep everybody from the file.
_KNOWN: dict[str, tuple[int] | tuple[int, str]] = {
    "ada-ffhq": (381_624_121, "a205a346e86a9ddaae702e118097d014b7b8bd719491396a162cca438f2f524c"),
    "stylegan3-t-ffhq-1024x1024": (294_775_112,),
    "stylegan2-ffhq-config-f": (381_673_535, "adf127ea7bb8a7788c8bdeda3c9937f7310b669b09ecf799ca53a631ff46948d"),
    "stylegan2-cat-config-f": (357_500_000,),
    "stylegan2-church-config-f": (357_500_000,),
    "stylegan2-horse-config-f": (357_500_000,),
    "stylegan2-car-config-f": (364_100_000,),
}


def _entry(family: _Family, stem: str, resolution: int, shows: str) -> Entry:
    title = stem.rpartition("/")[2].lower()
    name = f"ada-{title}" if family is _ADA else title
    url = f"{family.base}{stem}.pkl"
    return Entry(name, url, resolution, shows, family.licence, family.licence_url, _TERMS, *_KNOWN.get(name, ()))


ENTRIES: tuple[Entry, ...] = tuple(_entry(*row) for row in _FILES)


def find(name: str) -> Entry:
    """The published generator of that name. Raises ModelNotFoundError, with the nearest names."""
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    from difflib import get_close_matches

    names = [entry.name for entry in ENTRIES]
    near = [n for n in names if name and name in n][:3] or get_close_matches(name, names, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "'tpdne models pull' without a name lists them all."
    raise ModelNotFoundError(f"There is no published generator called {name!r}: {hint}")
