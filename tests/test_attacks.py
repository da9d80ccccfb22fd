"""Files that attack their reader (tests/attacks): each ends in a sentence, in seconds, in little memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fuzz_checkpoints
import pytest
from attacks import CANARY, code, containers, descriptions, exhaustion, reader
from conftest import ROOT

SECONDS = 5.0  # of processor time, for one file


def read_all(lines: list[str], folder: Path, *arguments: str) -> list[dict]:
    """What the reader said of each file, from a process of its own."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, reader.__file__, *arguments], input="\n".join(lines) + "\n", cwd=folder, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"the reader died ({done.returncode}): {done.stderr[-2000:]}"
    assert not (folder / CANARY).exists(), "code from a file was run"
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_refused(results: list[dict], names: dict[str, str]) -> None:
    problems = []
    for result in results:
        name = names[result["path"]]
        message = result["message"].removeprefix(result["path"] + ": ")
        if result["error"] != "CheckpointError":
            problems.append(f"{name} {result['percent']}: {result['error']} {message}")
        elif result["seconds"] > SECONDS:
            problems.append(f"{name}: {result['seconds']:.1f} s")
        elif len(message) > 600 or not message.isprintable() or not message.endswith((".", "(.)", ")")):
            problems.append(f"{name}: no sentence: {message[:300]!r}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("group", [code, exhaustion, containers], ids=lambda group: group.__name__)
def test_attacks_end_in_a_sentence(group, tmp_path):
    names = written(group.ATTACKS, tmp_path)
    results = read_all(list(names), tmp_path)
    assert len(results) == len(names)
    assert_refused(results, names)


def test_described_networks_end_in_a_sentence(tmp_path):
    names = written(descriptions.ATTACKS, tmp_path)
    results = read_all(list(names), tmp_path, "--load")
    assert len(results) == len(names)
    assert_refused(results, names)


def written(attacks: dict[str, Callable[[], bytes]], folder: Path) -> dict[str, str]:
    """Path -> name of each attack, which lies there."""
    names = {}
    for i, (name, build) in enumerate(attacks.items()):
        path = folder / f"{i}.pkl"
        path.write_bytes(build())
        names[str(path)] = name
    return names


@pytest.mark.parametrize(
    ("attack", "sentence"),
    [
        ("os.system inside", "refused: the file asks for posix.system; "),
        ("eval", "refused: the file asks for builtins.eval; "),
        ("by memo", "refused: the file asks for posix.system; "),
        ("dotted collections.'OrderedDict.__init__.__globals__'", "OrderedDict.__init__.__globals__"),
        ("nn.Linear", "torch.nn.modules.linear.Linear"),
        ("EXT2", "the opcode EXT2"),
        ("NEWOBJ_EX", "the opcode NEWOBJ_EX"),
    ],
)
def test_what_is_refused_is_named(attack, sentence):
    from tpdne_cli.checkpoints.sniff import read_view
    from tpdne_cli.errors import CheckpointError

    with pytest.raises(CheckpointError) as caught:
        read_view(memoryview(code.ATTACKS[attack]()))
    assert sentence in str(caught.value)


def whole_files() -> dict[str, bytes]:
    formats = [
        "nvidia 3",
        "nvidia 4",
        "with classes",
        "stylegan3",
        "tensorflow 4",
        "tensorflow 5",
        "stylegan1",
        "zip",
        "no zip",
        "tensorflow that grew",
    ]
    return dict(zip(formats, fuzz_checkpoints.seeds()[: len(formats)], strict=True))


def test_files_cut_short_at_every_percent(tmp_path):
    lines, names = [], {}
    for i, (name, data) in enumerate(whole_files().items()):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(data)
        names[str(path)] = name
        lines.append("\t".join([str(path), *map(str, range(100))]))
    results = read_all(lines, tmp_path)
    assert len(results) == 100 * len(names)
    assert_refused(results, names)


def test_the_whole_files_themselves_are_read(tmp_path):
    """Otherwise the test above would pass for a reader that refuses everything."""
    paths = []
    for i, data in enumerate(whole_files().values()):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(data)
        paths.append(str(path))
    assert [result["error"] for result in read_all(paths, tmp_path)] == ["none"] * len(paths)


def test_safetensors_cut_short_at_every_percent(tmp_path):
    from tpdne_cli.checkpoints import safetensors, sniff

    checkpoint = sniff.read_view(memoryview(whole_files()["zip"]))
    path = tmp_path / "0.safetensors"
    safetensors.write(path, checkpoint.arch, checkpoint.config, checkpoint.tensors, {})
    assert sniff.read(path).tensors.keys() == checkpoint.tensors.keys()
    results = read_all(["\t".join([str(path), *map(str, range(100))])], tmp_path)
    assert len(results) == 100
    assert_refused(results, {str(path): "safetensors"})


@pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="the fuzzer's alarm needs a Unix")
def test_a_little_fuzzing():
    outcomes = fuzz_checkpoints.run(seconds=120, seed=0, count=1500)
    assert sum(outcomes.values()) == 1500
    assert {"read as stylegan1", "read as stylegan2", "read as stylegan3"} <= outcomes.keys()
