"""The registry: name or file -> generator, checked and ready.

A model is looked for among the bundled generators (weights/), then as a file. Opening a file never runs code from it,
and nothing larger than its header is read before its shapes are known to be those of the network it describes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpdne_cli.errors import CheckpointError, ModelNotFoundError

if TYPE_CHECKING:
    from torch import nn

CRITIC_SUFFIX = "-critic"


@dataclass
class Model:
    """A generator, ready to use.

    generator: a frozen network with .mapping(z, c, psi, cutoff) -> ws and .synthesis(ws, noise) -> [N, C, R, R].
    info: what the file says of itself: truncation, licence, data, images seen, metrics.
    sha256: of the file, the "weights hash" of a recipe.
    """

    name: str
    path: Path
    arch: str
    generator: Any
    info: dict[str, Any]
    sha256: str

    @property
    def config(self) -> Any:
        return self.generator.config

    @property
    def resolution(self) -> int:
        return int(self.config.resolution)

    @property
    def truncation(self) -> float:
        """The psi that its makers chose for it."""
        return float(self.info.get("truncation", 1.0))


@dataclass
class Entry:
    """A model as the registry lists it, not yet loaded."""

    name: str
    path: Path
    origin: str  # 'bundled', or where it came from
    header: dict[str, Any] = field(default_factory=dict)


def weights_dir() -> Path:
    """Where the bundled generators lie: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "weights"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "weights"


def names() -> list[str]:
    """Names of all installed generators, bundled ones first."""
    return [p.stem for p in sorted(weights_dir().glob("*.safetensors")) if not p.stem.endswith(CRITIC_SUFFIX)]


def find(name: str | os.PathLike[str]) -> Path:
    """The file of an installed name, or of a path. Raises ModelNotFoundError."""
    text = os.fspath(name)
    if text in names():
        return weights_dir() / f"{text}.safetensors"
    path = Path(text)
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelNotFoundError(f"{text} is a directory: name the generator's file.")
    raise ModelNotFoundError(
        f"There is no generator called {text!r} and no such file: 'tpdne models list' shows what is installed."
    )


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def load(name: str | os.PathLike[str] = "faces") -> Model:
    """A generator by installed name or by file.

    Raises ModelNotFoundError where there is none, CheckpointError where the file is damaged or not a generator.
    """
    path = find(name)
    text = os.fspath(name)
    arch, config, tensors, info = _open(path)
    generator = _build(arch, config, tensors, os.fspath(path))
    return Model(text if text in names() else path.stem, path, arch, generator, info, file_sha256(path))


def describe(name: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of itself, without reading its tensors. Raises as load does."""
    from tpdne_cli.checkpoints.safetensors import read_header

    path = find(name)
    header = read_header(path)
    return {
        "name": path.stem,
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "arch": header.arch,
        "config": header.config,
        "parameters": sum(_product(shape) for shape in header.shapes.values()),
        **header.meta,
    }


def _product(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def _open(path: Path) -> tuple[str, dict[str, Any], Mapping[str, Any], dict[str, Any]]:
    """(arch, config, tensors, info) of a file, its shapes checked against the network before they are read."""
    from tpdne_cli.checkpoints import safetensors

    header = safetensors.read_header(path)
    if header.arch in safetensors.CRITICS:
        raise CheckpointError(f"{path} holds a critic, not a generator: name the file without {CRITIC_SUFFIX!r}.")
    check_shapes(blueprint(header.arch, header.config, str(path)), header.shapes, str(path))
    return header.arch, header.config, safetensors.read_tensors(path), header.meta


def blueprint(arch: str, config: Mapping[str, Any], source: str) -> nn.Module:
    """The network that a description asks for, without memory for its tensors."""
    import torch

    generator, config_type = _network(arch, source)
    known = {f.name for f in dataclasses.fields(config_type)}
    if unknown := sorted(set(config) - known):
        raise CheckpointError(f"{source} asks for {', '.join(unknown)}, which this tpdne does not know: upgrade it.")
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        with torch.device("meta"):
            network: nn.Module = generator(config_type(**values))
    except Exception as error:  # a hostile or damaged description can fail anywhere in the constructor
        raise CheckpointError(f"{source} describes a network that cannot be built ({error}).") from None
    return network


def _network(arch: str, source: str) -> tuple[Any, Any]:
    from tpdne_cli.networks import stylegan2

    networks = {"stylegan2": stylegan2, "stylegan2-discriminator": stylegan2}
    if arch not in networks:
        raise CheckpointError(f"{source} holds a {arch!r} network; tpdne knows {', '.join(networks)}.")
    if arch == "stylegan2-discriminator":
        return stylegan2.Discriminator, stylegan2.DiscriminatorConfig
    return networks[arch].Generator, networks[arch].Config


def check_shapes(network: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises CheckpointError where a file's tensors are not exactly the network's."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in expected.keys() | shapes.keys():
        if name not in shapes:
            raise CheckpointError(f"{source} is incomplete: it lacks the tensor {name}.")
        if name not in expected:
            raise CheckpointError(f"{source} holds the tensor {name}, which its network has no place for.")
        if expected[name] != shapes[name]:
            raise CheckpointError(
                f"{source} is damaged: {name} has shape {list(shapes[name])} where {list(expected[name])} belongs."
            )


def _build(arch: str, config: Mapping[str, Any], tensors: Mapping[str, Any], source: str) -> nn.Module:
    """The network with its tensors, float32, frozen."""
    import numpy as np
    import torch

    from tpdne_cli.networks.ops import prepare

    network = blueprint(arch, config, source)
    state = {}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{source} holds values that are not numbers (NaN or infinity) in {name}.")
        state[name] = torch.from_numpy(np.asarray(array, dtype=np.float32))
    network.load_state_dict(state, strict=True, assign=True)
    return prepare(network)


def save(
    path: str | os.PathLike[str],
    arch: str,
    config: Any,
    tensors: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write a generator (or a critic) as our safetensors file.

    config: the network's Config; tensors: state dict, torch or numpy, written in the precision they come in;
    info: what load() gives back as Model.info. Raises OutputError.
    """
    from tpdne_cli.checkpoints.safetensors import write

    arrays = {k: v.detach().cpu().numpy() if hasattr(v, "detach") else v for k, v in tensors.items()}
    write(path, arch, dataclasses.asdict(config), arrays, info or {})
