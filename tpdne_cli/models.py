"""The registry: name or file -> generator, checked and ready.

A model is looked for among the bundled generators (weights/), then among those that the user has installed, then as
a file of any format that the readers know. Opening a file never runs code from it, and no memory is taken for a network
before the file's shapes are known to be those of the network that it describes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from tpdne_cli import devices, store
from tpdne_cli.errors import AGAIN, CheckpointError, ModelNotFoundError
from tpdne_cli.store import CRITIC_SUFFIX as CRITIC_SUFFIX
from tpdne_cli.store import file_sha256 as file_sha256

if TYPE_CHECKING:
    from torch import nn

    from tpdne_cli.checkpoints import Checkpoint
    from tpdne_cli.directions import Direction

LATENTS_FOR_MEAN = 10_000
MAX_TRUNCATION = 1000
SETTING_LIMITS = {"resolution": 8192, "mapping_layers": 64, "num_layers": 64, "filter_size": 64, "lrelu_upsampling": 8}


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

    @property
    def truncation_cutoff(self) -> int | None:
        """The number of layers that its makers truncated; None: all."""
        return self.info.get("truncation_cutoff")

    @functools.cached_property
    def directions(self) -> dict[str, Direction]:
        """The named directions that its file has. Raises CheckpointError."""
        from tpdne_cli import directions

        return directions.read(self.info, self.config.w_dim, str(self.path))


def weights_dir() -> Path:
    """Where the bundled generators lie: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "weights"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "weights"


def _in(folder: Path) -> list[str]:
    return [p.stem for p in sorted(folder.glob("*.safetensors")) if not p.stem.endswith(CRITIC_SUFFIX) and p.is_file()]


def bundled() -> list[str]:
    """Names of the generators that come with the package."""
    return _in(weights_dir())


def names() -> list[str]:
    """Names of all installed generators, bundled ones first."""
    mine = bundled()
    return [*mine, *(name for name in _in(store.models_dir()) if name not in mine)]


def find(name: str | os.PathLike[str]) -> Path:
    """The file of an installed name, or of a path. Raises ModelNotFoundError."""
    text = os.fspath(name)
    for folder in (weights_dir(), store.models_dir()):
        if store.is_name(text) and (folder / f"{text}.safetensors").is_file():
            return folder / f"{text}.safetensors"
    path = Path(text)
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelNotFoundError(f"{text} is a directory: name the generator's file.")
    from tpdne_cli import catalogue

    way = "'tpdne models list' shows what is installed"
    if any(entry.name == text for entry in catalogue.ENTRIES):
        way = f"'tpdne models pull {text}' fetches it"
    raise ModelNotFoundError(f"There is no generator called {text!r} and no such file: {way}.")


def load(name: str | os.PathLike[str] = "faces") -> Model:
    """A generator by installed name or by file.

    Raises ModelNotFoundError where there is none, CheckpointError where the file is damaged or not a generator,
    DeviceError where memory is limited to less than it needs.
    """
    path = find(name)
    devices.rehearse(lambda: _load(path))
    arch, generator, info = _load(path)
    text = os.fspath(name)
    return Model(text if text in names() else path.stem, path, arch, generator, info, file_sha256(path))


def _load(path: Path) -> tuple[str, nn.Module, dict[str, Any]]:
    """(arch, generator, info)"""
    arch, config, tensors, info = _open(path)
    _check_info(info, os.fspath(path))
    return arch, build(arch, config, tensors, os.fspath(path)), info


def describe(name: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of itself, without reading its tensors. Raises as load does."""
    path = find(name)
    arch, config, shapes, meta = _read_description(path)
    known = {
        "name": path.stem,
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "arch": arch,
        "config": config,
        "parameters": sum(_product(shape) for shape in shapes.values()),
    }
    if isinstance(stored := meta.get("directions"), dict):  # hundreds of numbers each
        meta = meta | {"directions": {name: d.get("about") for name, d in stored.items() if isinstance(d, dict)}}
    # What a file says of itself must not hide what it is.
    return known | {k: v for k, v in meta.items() if k not in known} | store.read_json(store.record_path(path))


def _check_info(info: Mapping[str, Any], source: str) -> None:
    """Refuse a truncation that cannot be one; whatever else a file says of itself is only shown."""
    psi, cutoff = info.get("truncation", 1.0), info.get("truncation_cutoff")
    if type(psi) not in (int, float) or not abs(psi) <= MAX_TRUNCATION or type(cutoff) not in (int, type(None)):
        raise CheckpointError(f"{source} is damaged: the truncation that it asks for is no number.")


def _read_description(path: Path) -> tuple[str, dict[str, Any], dict[str, tuple[int, ...]], dict[str, Any]]:
    """(arch, config, shapes, meta): of our own files the header alone, of others what their reader finds."""
    from tpdne_cli.checkpoints import safetensors, sniff

    if is_ours(path):
        header = safetensors.read_header(path)
        return header.arch, header.config, header.shapes, header.meta
    checkpoint = sniff.read(path)
    shapes = {name: array.shape for name, array in checkpoint.tensors.items()}
    return checkpoint.arch, checkpoint.config, shapes, checkpoint.meta


def is_ours(path: Path) -> bool:
    """Whether a file is safetensors, told by its first bytes."""
    from tpdne_cli.checkpoints.safetensors import is_safetensors

    try:
        with path.open("rb") as file:
            return is_safetensors(file.read(9))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def _product(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def _open(path: Path) -> tuple[str, dict[str, Any], Mapping[str, Any], dict[str, Any]]:
    """(arch, config, tensors, info) of a file, its shapes checked against the network it describes."""
    from tpdne_cli.checkpoints import safetensors, sniff

    if not is_ours(path):
        checkpoint = sniff.read(path)
        tensors = with_mean_w(checkpoint, str(path))
        shapes = {name: array.shape for name, array in tensors.items()}
        check_shapes(blueprint(checkpoint.arch, checkpoint.config, str(path)), shapes, str(path))
        return checkpoint.arch, checkpoint.config, tensors, checkpoint.meta
    header = safetensors.read_header(path)
    if header.arch in safetensors.CRITICS:
        raise CheckpointError(f"{path} holds a critic, not a generator: name the file without {CRITIC_SUFFIX!r}.")
    check_shapes(blueprint(header.arch, header.config, str(path)), header.shapes, str(path))
    return header.arch, header.config, safetensors.read_tensors(path), header.meta


def with_mean_w(checkpoint: Checkpoint, source: str) -> dict[str, Any]:
    """A checkpoint's tensors with a truncation centre: where it has none, the mean w of the seeds 0 to 9,999.

    Where there are classes, the seeds take them in turn.
    """
    import numpy as np

    tensors = checkpoint.tensors
    if "mapping.w_avg" in tensors or not tensors:
        return tensors
    tensors["mapping.w_avg"] = np.zeros(int(checkpoint.config.get("w_dim", 512)), np.float32)
    shapes = {name: array.shape for name, array in tensors.items()}
    check_shapes(blueprint(checkpoint.arch, checkpoint.config, source), shapes, source)
    tensors["mapping.w_avg"] = _mean_w(build(checkpoint.arch, checkpoint.config, tensors, source))
    return tensors


def _mean_w(generator: Any) -> Any:
    """float32 [w_dim], in matrix products instead of the row-by-row sums that generation needs."""
    import numpy as np
    import torch

    from tpdne_cli.seeds import latents

    z_dim, c_dim, step = generator.config.z_dim, generator.config.c_dim, LATENTS_FOR_MEAN // 10
    means, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # several may sum in another order
    try:
        with torch.enable_grad():
            for first in range(0, LATENTS_FOR_MEAN, step):
                z = torch.from_numpy(latents(range(first, first + step), z_dim).astype(np.float32))
                c = None
                if c_dim:
                    c = torch.zeros(step, c_dim)
                    c[torch.arange(step), torch.arange(first, first + step) % c_dim] = 1
                means.append(generator.mapping(z, c)[:, 0].detach().double().mean(0))
        return torch.stack(means).mean(0).float().numpy()
    finally:
        torch.set_num_threads(threads)


def blueprint(arch: str, config: Mapping[str, Any], source: str) -> nn.Module:
    """The network that a description asks for, without memory for its tensors."""
    import torch

    generator, config_type = _network(arch, source)
    kinds = get_type_hints(config_type)
    if unknown := sorted(set(config) - {f.name for f in dataclasses.fields(config_type)}):
        raise CheckpointError(f"{source} asks for {', '.join(unknown)}, which this tpdne does not know: upgrade it.")
    for key, value in config.items():
        _check_setting(key, value, kinds[key], source)
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        with torch.device("meta"):
            network: nn.Module = generator(config_type(**values))
    except Exception as error:  # a hostile or damaged description can fail anywhere in the constructor
        reason = (str(error).splitlines() or ["for no reason given"])[0][:200]
        raise CheckpointError(f"{source} describes a network that cannot be built ({reason}).") from None
    return network


def _check_setting(key: str, value: Any, kind: Any, source: str) -> None:
    """Refuse what fails at the first image, takes for ever to be built, or all memory: anybody can describe networks.

    kind: the type of the Config's field.
    """
    numbers = value if isinstance(value, list) else [value]
    limit = SETTING_LIMITS.get(key, 2**24)
    good = len(numbers) <= 64 and _is_of(value, kind)
    if not good or any(isinstance(n, int | float) and not abs(n) <= limit for n in numbers):
        raise CheckpointError(f"{source} describes a network with a {key} that no generator has.")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a type: lists serve for tuples, whole numbers for fractions."""
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is_of(item, get_args(kind)[0]) for item in value)
    if get_args(kind):
        return any(_is_of(value, part) for part in get_args(kind))
    return type(value) in ((int, float) if kind is float else (kind,))


def _network(arch: str, source: str) -> tuple[Any, Any]:
    """(network, its Config) by the name that files use."""
    from tpdne_cli.networks import discriminator, stylegan1, stylegan2, stylegan3

    known: dict[str, tuple[Any, Any]] = {
        "stylegan1": (stylegan1.Generator, stylegan1.Config),
        "stylegan2": (stylegan2.Generator, stylegan2.Config),
        "stylegan2-discriminator": (discriminator.Discriminator, discriminator.DiscriminatorConfig),
        "stylegan3": (stylegan3.Generator, stylegan3.Config),
    }
    if arch not in known:
        raise CheckpointError(f"{source} holds a {arch!r} network; tpdne knows {', '.join(known)}.")
    return known[arch]


def check_shapes(network: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises CheckpointError where a file's tensors are not exactly the network's."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in expected.keys() | shapes.keys():
        if name not in shapes:
            raise CheckpointError(f"{source} is incomplete: it lacks the tensor {name}; {AGAIN}.")
        if name not in expected:
            raise CheckpointError(f"{source} holds the tensor {name}, which its network has no place for; {AGAIN}.")
        if expected[name] != shapes[name]:
            raise CheckpointError(
                f"{source} is damaged: {name} has shape {list(shapes[name])} where {list(expected[name])} belongs; "
                f"{AGAIN}."
            )


def build(arch: str, config: Mapping[str, Any], tensors: Mapping[str, Any], source: str) -> nn.Module:
    """The network with its tensors, float32, frozen."""
    import numpy as np
    import torch

    from tpdne_cli.networks.ops import prepare

    network = blueprint(arch, config, source)
    state = {}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{source} holds values that are not numbers (NaN or infinity) in {name}; {AGAIN}.")
        # A copy where the array is a view of the file, which may change or go away.
        convert = np.asarray if array.flags.writeable else np.array
        state[name] = torch.from_numpy(convert(array, dtype=np.float32, order="C"))
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
