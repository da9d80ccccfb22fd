"""A fuzzer for the checkpoint readers: tiny files of every format, damaged at random in ways that a reader would mind.

    python tests/fuzz_checkpoints.py --seconds 1200              mutations drawn from a seed
    python tests/fuzz_checkpoints.py --seconds 1200 --atheris    the same, led by coverage (pip install atheris)

Whatever is read must end in a Checkpoint that makes sense or in CheckpointError, within five seconds, in little memory.
Anything else is written to a file, named, and ends the run. test_attacks.py runs a few thousand mutations of it.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import math
import pickletools
import random
import re
import signal
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoint_writers as writers
import numpy as np
from attacks import code, containers, exhaustion, reader

from tpdne_cli.checkpoints import Checkpoint, nvidia, rosinality, storage, tensorflow
from tpdne_cli.checkpoints.pickles import Global
from tpdne_cli.checkpoints.sniff import load_tree, read_tree, read_view
from tpdne_cli.errors import CheckpointError

SECONDS = 5
MAX_SIZE = 1 << 16
WHOLE = 10  # of the seeds are whole files
NUMBERS = [0, 1, 2, 3, 4, 5, 7, 8, 16, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1]
OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes]


# -- what to damage


def tiny_networks() -> dict[str, dict[str, np.ndarray]]:
    from tpdne_cli.networks import discriminator, stylegan2, stylegan3

    made = {
        "generator": stylegan2.Generator(stylegan2.Config(8, channels=(2, 2), z_dim=3, w_dim=4, mapping_layers=2)),
        "conditional": stylegan2.Generator(
            stylegan2.Config(8, channels=(2, 2), z_dim=3, w_dim=4, c_dim=2, mapping_layers=1)
        ),
        "discriminator": discriminator.Discriminator(discriminator.DiscriminatorConfig(8, channels=(2, 2))),
        "stylegan3": stylegan3.Generator(
            stylegan3.Config(16, z_dim=3, w_dim=4, channel_base=32, channel_max=2, num_layers=3, margin_size=2)
        ),
    }
    return {name: {k: v.numpy() for k, v in network.state_dict().items()} for name, network in made.items()}


def tensorflow_variables() -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"lod": (), "dlatent_avg": (4,), "synthesis/4x4/Const/const": (1, 2, 4, 4)}
    shapes |= {"mapping/Dense0/weight": (3, 4), "mapping/Dense0/bias": (4,)}
    for layer, kernel in (("4x4/Conv", 3), ("4x4/ToRGB", 1), ("8x8/Conv0_up", 3), ("8x8/Conv1", 3), ("8x8/ToRGB", 1)):
        out = 3 if kernel == 1 else 2
        shapes |= {
            f"synthesis/{layer}/weight": (kernel, kernel, 2, out),
            f"synthesis/{layer}/bias": (out,),
            f"synthesis/{layer}/mod_weight": (4, 2),
            f"synthesis/{layer}/mod_bias": (2,),
        }
        if kernel == 3:
            shapes[f"synthesis/{layer}/noise_strength"] = ()
    shapes |= {"synthesis/noise0": (1, 1, 4, 4), "synthesis/noise1": (1, 1, 8, 8), "synthesis/noise2": (1, 1, 8, 8)}
    return {name: np.ones(shape, np.float32) if shape else np.zeros((), np.float32) for name, shape in shapes.items()}


def grown_variables() -> dict[str, np.ndarray]:
    """Of StyleGAN2's configurations B to D."""
    variables = tensorflow_variables() | {"synthesis/lod": np.zeros((), np.float32)}
    return {
        name.replace("8x8/ToRGB", "ToRGB_lod0").replace("4x4/ToRGB", "ToRGB_lod1"): value
        for name, value in variables.items()
    }


def stylegan1_variables() -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"lod": (), "dlatent_avg": (4,), "synthesis/4x4/Const/const": (1, 2, 4, 4)}
    shapes |= {"mapping/Dense0/weight": (3, 4), "mapping/Dense0/bias": (4,)}
    for i, layer in enumerate(("4x4/Const", "4x4/Conv", "8x8/Conv0_up", "8x8/Conv1")):
        name = f"synthesis/{layer}"
        shapes |= {
            f"{name}/bias": (2,),
            f"{name}/Noise/weight": (2,),
            f"synthesis/noise{i}": (1, 1, 4 << i // 2, 4 << i // 2),
        }
        shapes |= {f"{name}/StyleMod/weight": (4, 4), f"{name}/StyleMod/bias": (4,)}
        if i:
            shapes[f"{name}/weight"] = (3, 3, 2, 2)
    shapes |= {"synthesis/ToRGB_lod0/weight": (1, 1, 2, 3), "synthesis/ToRGB_lod0/bias": (3,)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def tensorflow_file(variables: dict[str, np.ndarray], protocol: int) -> bytes:
    settings = {"resolution": 8, "num_channels": 3, "mapping_lrmul": np.float32(0.01), "resample_kernel": [1, 3, 3, 1]}
    values = [(name, value if value.ndim else value[()]) for name, value in variables.items()]
    parts = {
        key: writers.Network(
            static_kwargs=settings,
            components={},
            variables=[(name.removeprefix(key + "/"), value) for name, value in values if name.startswith(key + "/")],
        )
        for key in ("synthesis", "mapping")
    }
    own = [(name, value) for name, value in values if "/" not in name]
    generator = writers.Network(version=4, static_kwargs=settings, components=parts, variables=own)
    return writers.dumps((generator, generator, generator), protocol, old_numpy=True)


def rosinality_file(zipped: bool) -> bytes:
    import torch

    shapes: dict[str, tuple[int, ...]] = {"style.1.weight": (4, 3), "style.1.bias": (4,), "input.input": (1, 2, 4, 4)}
    for layer, up in (("conv1", False), ("convs.0", True), ("convs.1", False)):
        shapes |= {
            f"{layer}.conv.weight": (1, 2, 2, 3, 3),
            f"{layer}.conv.modulation.weight": (2, 4),
            f"{layer}.conv.modulation.bias": (2,),
            f"{layer}.noise.weight": (1,),
            f"{layer}.activate.bias": (2,),
        }
        if up:
            shapes[f"{layer}.conv.blur.kernel"] = (4, 4)
    for layer in ("to_rgb1", "to_rgbs.0"):
        shapes |= {
            f"{layer}.bias": (1, 3, 1, 1),
            f"{layer}.conv.weight": (1, 3, 2, 1, 1),
            f"{layer}.conv.modulation.weight": (2, 4),
            f"{layer}.conv.modulation.bias": (2,),
        }
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    critic = writers.Discriminator(8, 2).state_dict()
    value = {"g_ema": state, "d": critic, "latent_avg": torch.zeros(4), "args": argparse.Namespace(size=8)}
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@functools.cache
def seeds() -> list[bytes]:
    """Whole tiny files of every format, and the attacks that are small."""
    networks = tiny_networks()
    common = {"lr_multiplier": 0.01, "conv_clamp": 256}
    writers.SOURCE = "import os"

    def nvidia(name: str, protocol: int, old_numpy: bool = False, **kwargs: object) -> bytes:
        settings = common | ({"output_scale": 0.25, "img_resolution": 16} if name == "stylegan3" else {})
        root = writers.module_tree(networks[name], kwargs, settings)
        critic = writers.module_tree(networks["discriminator"], {}, common)
        return writers.dumps({"G_ema": root, "D": critic}, protocol, old_numpy)

    sg3 = {"img_resolution": 16, "channel_base": 32, "channel_max": 2, "num_layers": 3, "margin_size": 2}
    files = [
        nvidia("generator", 3, old_numpy=True),
        nvidia("generator", 4),
        nvidia("conditional", 4),
        nvidia("stylegan3", 4, **sg3),
        tensorflow_file(tensorflow_variables(), 4),
        tensorflow_file(tensorflow_variables(), 5),
        tensorflow_file(stylegan1_variables(), 3),
        rosinality_file(zipped=True),
        rosinality_file(zipped=False),
        tensorflow_file(grown_variables(), 4),
    ]
    assert len(files) == WHOLE and all(read_view(memoryview(data)) for data in files)
    attacks = [build for group in (code, exhaustion) for build in group.ATTACKS.values()]
    attacks += [build for name, build in containers.ATTACKS.items() if name.startswith("zip") and "bomb" not in name]
    return files + [data for data in (build() for build in attacks) if len(data) < 4096]


# -- how to damage it


def operations(data: bytes) -> list[tuple[int, int]]:
    """Where the opcodes of the first pickle in the data begin and end, as far as it is one."""
    start = max(data.find(b"\x80\x02"), 0) if data[:2] == b"PK" else 0
    places: list[int] = []
    try:
        for _, _, pos in pickletools.genops(data[start:]):
            places.append(start + (pos or 0))
    except Exception:  # damaged already
        pass
    return list(itertools.pairwise(places))


def mutate(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A few random changes: bytes, numbers, operations, pieces of other files."""
    out = bytearray(data)
    places = operations(data) if draw.random() < 0.7 else []
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        if not out:
            break
        kind = draw.randrange(10)
        a = draw.randrange(len(out))
        b = min(len(out), a + draw.choice((1, 2, 4, 8, 16, 64, 256, 1024)))
        if places and kind < 7:
            a, b = draw.choice(places)
        if kind == 0:
            out[a : a + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            out[a : a + 1] = draw.choice(OPCODES)
        elif kind == 2:
            del out[a:b]
        elif kind == 3:
            out[a:a] = out[a:b] * draw.choice((1, 1, 2, 100))
        elif kind == 4:
            number = draw.choice(NUMBERS) + draw.choice((-1, 0, 0, 1))
            size = draw.choice((1, 2, 4, 8))
            at = a + (1 if places else 0)
            out[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == 5 and places:
            c, d = draw.choice(places)
            out[a:b] = data[c:d]
        elif kind == 6:
            other = draw.choice(others)
            c = draw.randrange(len(other))
            out[a:b] = other[c : c + draw.choice((4, 16, 64, 512, 4096))]
        elif kind == 7:
            out[a] ^= 1 << draw.randrange(8)
        elif kind == 8:
            del out[a:]
        else:
            out[a:a] = (
                draw.choice(OPCODES) + struct.pack("<I", draw.choice(NUMBERS) & 0xFFFFFFFF)[: draw.choice((0, 1, 4))]
            )
    return bytes(out[:MAX_SIZE])


def slots(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in a parsed tree where something else could be: (container, key)."""
    found: list[tuple[Any, Any]] = []
    todo, seen = [tree], set()
    while todo:
        value = todo.pop()
        if isinstance(value, nvidia.Module | tensorflow.Network):
            value = value.state
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            found += [(value, key) for key in keys]
            todo += [value[key] for key in keys]
        elif isinstance(value, tuple):
            todo += value
    return found


def odd_value(draw: random.Random, found: list[tuple[Any, Any]]) -> Any:
    """Anything that a pickle can come to, and preferably something that is elsewhere in the same one."""
    if draw.random() < 0.5:
        container, key = draw.choice(found)
        return container.get(key) if isinstance(container, dict) else container[key]
    shape = tuple(draw.choice((1, 1, 2, 3, 4, 8, 9)) for _ in range(draw.randrange(6)))
    count = math.prod(shape)
    dtype = draw.choice(("<f4", "<f4", "<f2", "<f8", "<i8", "?", ">f4"))
    held = storage.Storage(dtype, count)
    held.fill(memoryview(draw.choice((bytes, lambda n: b"\xff" * n))(count * held.dtype.itemsize)))
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    made = storage.Tensor(held, 0, shape, strides)
    numbers = (
        None,
        True,
        0,
        1,
        -1,
        2**70,
        0.0,
        -0.5,
        math.nan,
        math.inf,
        1e308,
        np.float32(3),
        np.int64(-1),
        np.bool_(True),
    )
    others = (
        "",
        "lrelu",
        "a/b",
        "../x",
        "x" * 5000,
        (),
        [],
        {},
        set(),
        (1, 2),
        [1, 3, 3, 1],
        [None],
        {"a": 1},
        memoryview(b"x"),
    )
    records = (made, made, made, storage.NumpyArray(made.array()), storage.NumpyArray(), storage.NumpyDtype("f4"), held)
    modules = (nvidia.Module("X", {}), tensorflow.Network(), rosinality.Namespace(), Global("numpy.ndarray", None))
    return draw.choice(draw.choice((numbers, others, records, records, modules)))


@contextmanager
def mutated(found: list[tuple[Any, Any]], draw: random.Random) -> Iterator[None]:
    """A few of a parsed file's values exchanged, deleted or called otherwise, and put back afterwards."""
    before: list[tuple[Any, Any]] = []
    for _ in range(draw.choice((1, 1, 2, 4))):
        container, key = draw.choice(found)
        before.append((container, container.copy()))
        kind = draw.randrange(4) if isinstance(container, dict) and key in container else 3
        if kind == 0:
            del container[key]
        elif kind == 1:
            other, name = draw.choice(found)
            name = name if isinstance(other, dict) else draw.choice(("x", "b16", "../x", "conv1", 7))
            container[name] = container.pop(key)
        else:
            container[key] = odd_value(draw, found)
    try:
        yield
    finally:
        for container, copy in reversed(before):
            container.clear()
            container.extend(copy) if isinstance(container, list) else container.update(copy)


# -- what must hold


def check(data: bytes) -> str:
    """Reads it; says what came of it. Raises whatever must not be."""
    return outcome_of(lambda: read_view(memoryview(data)), len(data))


def outcome_of(read: Callable[[], Checkpoint], size: int) -> str:
    try:
        checkpoint = read()
    except CheckpointError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 600, f"no sentence: {message!r}"
        return re.sub(r"\d+", "0", message)[:30]
    check_sense(checkpoint, size)
    return f"read as {checkpoint.arch}"


def check_sense(checkpoint: Checkpoint, size: int) -> None:
    """What the rest of the program may take for granted."""
    pairs = [(checkpoint.config, checkpoint.tensors)]
    if checkpoint.discriminator_config is not None:
        pairs.append((checkpoint.discriminator_config, checkpoint.discriminator_tensors or {}))
    for config, tensors in pairs:
        json.dumps(config, allow_nan=False)
        assert tensors and all(re.fullmatch(r"[\w.]+", name) for name in tensors)
        assert all(type(value) is np.ndarray and value.dtype.kind == "f" and value.size for value in tensors.values())
        assert config["resolution"] <= 4096
        largest = max(config.get("channels") or [config.get("channel_max", 512)])
        assert "channels" not in config or largest**2 * 4 <= 2 * size + 1024, "a network larger than its file"
        float(sum(float(np.nansum(value)) for value in tensors.values()))  # every byte can be reached
    json.dumps(checkpoint.meta, allow_nan=False)


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} seconds")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time: a machine that does something else is no fault
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run(seconds: float, seed: int, count: int | None = None, folder: Path | None = None) -> dict[str, int]:
    """Mutations until the time is over, or `count` of them; how often each thing came of them."""
    draw = random.Random(seed)
    pool = seeds()
    readable = list(pool) + pool[:WHOLE] * 8
    parsed = [(len(data), [load_tree(memoryview(data))]) for data in pool[:WHOLE]]
    places = [slots(root) for _, root in parsed]
    outcomes: dict[str, int] = {}
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end and (count is None or number < count):
        number += 1
        data = None
        try:
            with time_limit(), np.errstate(all="ignore"):
                if draw.random() < 0.5:
                    data = mutate(draw.choice(readable), draw, pool)
                    outcome = check(data)
                else:
                    i = draw.randrange(WHOLE)
                    size, root = parsed[i]
                    with mutated(places[i], draw):
                        outcome = outcome_of(lambda root=root, size=size: read_tree(root[0], size), size)  # type: ignore
        except BaseException as error:
            print(f"seed {seed}, mutation {number}: {type(error).__name__}: {error}", file=sys.stderr)
            if folder is not None and data is not None:
                (folder / f"fuzz-{seed}-{number}.bin").write_bytes(data)
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if data is not None and outcome.startswith("read") and draw.random() < 0.02:
            readable.append(data)  # go on from what the reader still takes
            if len(readable) > 2000:
                del readable[len(pool) + draw.randrange(1000)]
    return outcomes


def run_atheris(seconds: int, seed: int, folder: Path) -> None:
    import atheris

    pool = seeds()
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for i, data in enumerate(pool):
        (corpus / f"seed-{i}").write_bytes(data)
    prefix = "tpdne_cli.checkpoints"
    modules: list[types.ModuleType] = [module for name, module in sys.modules.items() if name.startswith(prefix)]
    for module in modules:
        for name, value in list(vars(module).items()):
            if getattr(value, "__module__", "").startswith(prefix) and isinstance(value, types.FunctionType):
                setattr(module, name, atheris.instrument_func(value))
            elif isinstance(value, type) and value.__module__ == module.__name__:
                for method, function in list(vars(value).items()):
                    if isinstance(function, types.FunctionType):
                        setattr(value, method, atheris.instrument_func(function))

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.3:
            return atheris.Mutate(data, max_size)  # type: ignore[no-any-return]
        return mutate(data, draw, pool)[:max_size]

    flags = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={MAX_SIZE}", f"-timeout={SECONDS}"]
    flags += ["-rss_limit_mb=1500", f"-artifact_prefix={folder}/", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *flags], lambda data: check(bytes(data)), custom_mutator=mutator)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(), help="where failing inputs are written")
    parser.add_argument("--only", type=Path, help="read this one input and say what comes of it")
    options = parser.parse_args()
    if options.only:
        print(check(options.only.read_bytes()))
    elif options.atheris:
        run_atheris(options.seconds, options.seed, options.out)
    else:
        seeds()  # torch is imported before the limit is set
        reader.limit_memory()
        outcomes = run(options.seconds, options.seed, folder=options.out)
        print(f"{sum(outcomes.values())} mutations within {reader.MEMORY >> 20} MiB")
        for outcome, number in sorted(outcomes.items(), key=lambda item: -item[1]):
            print(f"{number:9} {outcome}")


if __name__ == "__main__":
    main()
