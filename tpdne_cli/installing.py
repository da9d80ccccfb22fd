"""Generators of one's own in the user's data directory: brought in from any format, checked, and taken out again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from tpdne_cli import models, store
from tpdne_cli.checkpoints import Checkpoint
from tpdne_cli.errors import CheckpointError, ModelNotFoundError, OutputError, SettingsError

KINSHIP = ("resolution", "img_channels", "c_dim")  # in which a critic is like its generator


def install(
    path: str | os.PathLike[str],
    name: str | None = None,
    origin: str | None = None,
    licence: str | None = None,
    replace: bool = False,
) -> Path:
    """Convert a generator's file to our format, under a name in the user's data directory; returns the new file.

    The critic comes along where the file has one. origin: where the file came from, by default its path; licence: said
    by whoever published it. Raises CheckpointError for what is no generator, SettingsError for a name that cannot be,
    OutputError where the name is taken or nothing can be written.
    """
    from tpdne_cli.checkpoints import sniff

    source = Path(path)
    title = store.check_name(name) if name is not None else store.name_for(source.name)
    target = check_free(title, replace)
    store.make_dir(target.parent)
    checkpoint = sniff.read(source)
    if not checkpoint.tensors:
        raise CheckpointError(f"{source} holds a critic, not a generator.")
    complete(checkpoint, str(source))
    record = {
        "origin": origin or str(source.resolve()),
        "source_sha256": store.file_sha256(source),
        "imported": store.today(),
        **({"licence": licence} if licence else {}),
    }
    with _alone(target):
        if not replace:
            _refuse_taken(target)  # somebody may have been faster
        _write(target, checkpoint)
        store.write_json(store.record_path(target), {**record, **_hashes(target)})
    return target


def check_free(title: str, replace: bool = False) -> Path:
    """Where a generator of that name belongs. Raises SettingsError, and OutputError for a name that is taken."""
    if title in models.bundled():
        raise SettingsError(f"{title} is the name of a bundled generator: choose another with --name.")
    target = store.models_dir() / f"{title}.safetensors"
    if not replace:
        _refuse_taken(target)
    return target


def _refuse_taken(target: Path) -> None:
    if target.exists():
        raise OutputError(
            f"A generator called {target.stem} is installed: --force replaces it, --name gives another name."
        )


def _alone(target: Path) -> AbstractContextManager[None]:
    """A generator is two files and a record, which must be of one making."""
    return store.locked(target.with_name(f".{target.stem}.lock"))


def complete(checkpoint: Checkpoint, source: str) -> None:
    """Check a checkpoint by building its network; adds the mean w where its format does not store it."""
    tensors = models.with_mean_w(checkpoint, source)
    network = models.blueprint(checkpoint.arch, checkpoint.config, source)
    models.check_shapes(network, {name: array.shape for name, array in tensors.items()}, source)
    models.build(checkpoint.arch, checkpoint.config, tensors, source)  # refuses what is not a number
    try:
        _check_critic(checkpoint, source)
    except CheckpointError as error:  # the generator is none the worse for it
        checkpoint.meta["discriminator"] = f"left out: {error}"
        checkpoint.discriminator_config = checkpoint.discriminator_tensors = None


def _check_critic(checkpoint: Checkpoint, source: str) -> None:
    config, tensors, arch = checkpoint.discriminator_config, checkpoint.discriminator_tensors, "stylegan2-discriminator"
    if config is None or tensors is None:
        return
    if other := [key for key in KINSHIP if config.get(key) != checkpoint.config.get(key, config.get(key))]:
        raise CheckpointError(f"its {other[0]} is not the generator's.")
    shapes = {name: array.shape for name, array in tensors.items()}
    models.check_shapes(models.blueprint(arch, config, source), shapes, source)
    models.build(arch, config, tensors, source)


def _write(target: Path, checkpoint: Checkpoint) -> None:
    from tpdne_cli.checkpoints import safetensors

    critic = store.critic_path(target)
    if checkpoint.discriminator_tensors is not None and checkpoint.discriminator_config is not None:
        arch, config = "stylegan2-discriminator", checkpoint.discriminator_config
        safetensors.write(critic, arch, config, checkpoint.discriminator_tensors, {})
    else:
        critic.unlink(missing_ok=True)  # that of a generator which is replaced
    # The generator last: one that can be found is complete.
    safetensors.write(target, checkpoint.arch, checkpoint.config, checkpoint.tensors, checkpoint.meta)


def _files(target: Path) -> list[Path]:
    critic = store.critic_path(target)
    return [target, *([critic] if critic.exists() else [])]


def _hashes(target: Path) -> dict[str, Any]:
    return {"files": {path.name: store.file_sha256(path) for path in _files(target)}}


def record_anew(path: Path) -> None:
    """Note the hashes of an installed generator's files after one of them has been changed on purpose."""
    if "files" not in store.read_json(store.record_path(path)):
        return
    with _alone(path):
        store.write_json(store.record_path(path), {**store.read_json(store.record_path(path)), **_hashes(path)})


def installed(name: str) -> Path:
    """The file of a generator that the user installed. Raises ModelNotFoundError, SettingsError for a bundled one."""
    if name in models.bundled():
        raise SettingsError(f"{name} is bundled with tpdne and goes only with it.")
    path = store.models_dir() / f"{name}.safetensors"
    if not store.is_name(name) or not path.is_file():
        raise ModelNotFoundError(f"No generator called {name!r} is installed: 'tpdne models list' shows what is.")
    return path


def remove(name: str) -> list[Path]:
    """Delete an installed generator, its critic and its record; returns what was deleted. Raises as installed does."""
    path = installed(name)
    with _alone(path):
        gone = [*_files(path), store.record_path(path)]
        for file in gone:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(f"{file} cannot be removed: {error.strerror}.") from None
    return gone


def verify(name: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Check a generator's file and its critic's: hashes against those recorded when it came, shapes, numbers.

    Returns {"name", "path", "sha256", "recorded"}. Raises CheckpointError where anything is wrong.
    """
    from tpdne_cli.critic import Critic

    path = models.find(name)
    listed, way_out = recorded(path)
    for file in (path, store.critic_path(path)):
        if file.name in listed and not (file.is_file() and store.file_sha256(file) == listed[file.name]):
            raise CheckpointError(f"{file} has changed or gone since it was installed: {way_out} again.")
    model = models.load(path)
    if len(_files(path)) > 1:
        Critic.load(model)
    return {"name": path.stem, "path": str(path), "sha256": model.sha256, "recorded": path.name in listed}


def recorded(path: Path) -> tuple[Mapping[str, Any], str]:
    """The SHA-256 of a generator's files by their names, where they were recorded; how to get them again."""
    if path.resolve().parent == models.weights_dir().resolve():
        return published(), "install tpdne"
    files = store.read_json(store.record_path(path)).get("files")
    return files if isinstance(files, dict) else {}, "import it"


def published() -> dict[str, str]:
    """The SHA-256 of each bundled file by its name, which the release lists in sha256sum's format; empty without list.

    After a change of the weights: cd weights && sha256sum *.safetensors > SHA256SUMS
    """
    listed: dict[str, str] = {}
    with suppress(OSError):
        for line in (models.weights_dir() / "SHA256SUMS").read_text(errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            listed[name] = digest
    return listed


def cached() -> list[dict[str, Any]]:
    """What the download cache holds: {"file", "bytes", "url", "complete"} for each file, also for the part of one."""
    held = []
    for path in sorted(store.cache_dir().glob("*")):
        if path.is_file() and path.suffix not in (".lock", ".json", ".TAG"):
            notes = [store.data_dir() / "downloads" / f"{path.name[:16]}.json", path.with_name(f"{path.name}.json")]
            url = next((url for note in notes if (url := store.read_json(note).get("url"))), None)
            held.append(
                {"file": str(path), "bytes": path.stat().st_size, "url": url, "complete": path.suffix != ".part"}
            )
    return held


def clear_cache() -> tuple[int, int]:
    """Empty the download cache; returns how many files and bytes went."""
    cache = store.cache_dir()
    busy = tuple(p.name[:16] for p in cache.glob("*.lock") if store.is_locked(p))  # a download's files share a key
    files = [p for p in cache.glob("*") if p.is_file() and p.name != "CACHEDIR.TAG" and not p.name.startswith(busy)]
    size = sum(p.stat().st_size for p in files)
    for file in files:
        file.unlink(missing_ok=True)
    return len(files), size
