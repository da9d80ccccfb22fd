"""Shards: nothing twice, nothing missing, and every scheduler's numbering read as its manual says."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import files, shell, start

from tpdne_cli.errors import SettingsError
from tpdne_cli.sharding import Shard, auto, parse


@given(st.integers(0, 300), st.integers(1, 40))
def test_every_item_is_in_exactly_one_part_and_the_parts_are_even(length, count):
    parts = [Shard(index, count).of(range(length)) for index in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def array(task: int, low: int, high: int, step: int, count: int) -> dict[str, str]:
    names = {"ID": task, "MIN": low, "MAX": high, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/8", {"RANK": "5", "WORLD_SIZE": "9"}, (2, 8)),
        ("1/1", {}, (1, 1)),
        ("auto", array(0, 0, 9, 1, 10), (1, 10)),  # --array=0-9
        ("auto", array(9, 0, 9, 1, 10), (10, 10)),
        ("auto", array(1, 1, 10, 1, 10), (1, 10)),  # --array=1-10
        ("auto", array(130, 100, 190, 10, 10), (4, 10)),  # --array=100-190:10
        ("auto", array(7, 7, 7, 1, 1), (1, 1)),  # a failed task alone, sent again: it finishes everything
        ("auto", {k: v for k, v in array(4, 0, 9, 1, 10).items() if k[-4:] not in ("STEP", "OUNT")}, (5, 10)),
        ("auto/10", array(3, 0, 9, 1, 10), (4, 10)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "4"}, (1, 4)),  # torchrun
        ("auto", {"RANK": "3", "WORLD_SIZE": "4"}, (4, 4)),
        ("auto/5", {"JOB_COMPLETION_INDEX": "0"}, (1, 5)),  # Kubernetes
        ("auto/5", {"JOB_COMPLETION_INDEX": "4"}, (5, 5)),
        ("auto/3", {"PARALLEL_SEQ": "3"}, (3, 3)),  # GNU parallel counts from 1
    ],
)
def test_what_schedulers_say(text, environment, expected):
    assert parse(text, environment) == Shard(*expected)


@pytest.mark.parametrize(
    ("text", "environment", "sentence"),
    [
        ("", {}, "not a shard"),
        ("3", {}, "not a shard"),
        ("1/2/3", {}, "not a shard"),
        ("-1/2", {}, "not a shard"),
        ("0/4", {}, "counted from 1"),
        ("5/4", {}, "counted from 1"),
        ("1/0", {}, "counted from 1"),
        ("auto", {}, "finds none of"),
        ("auto", {"RANK": ""}, "finds none of"),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2", "JOB_COMPLETION_INDEX": "1"}, "finds both"),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, "auto/N"),
        ("auto", {"PARALLEL_SEQ": "1"}, "auto/N"),
        ("auto", {"RANK": "1"}, "WORLD_SIZE"),
        ("auto", {"RANK": "one", "WORLD_SIZE": "2"}, "'one'"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "counted from 1"),
        ("auto/3", {"RANK": "0", "WORLD_SIZE": "2"}, "contradicts"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN"),
        ("auto", array(1, 1, 9, 1, 3), "gaps"),  # --array=1,5,9
        ("auto", array(5, 0, 9, 10, 1), "gaps"),
        ("auto/3", {"PARALLEL_SEQ": "4"}, "counted from 1"),
    ],
)
def test_what_is_no_shard(text, environment, sentence):
    with pytest.raises(SettingsError, match=sentence):
        parse(text, environment)


def test_the_real_environment_is_asked(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert parse("auto") == auto({"RANK": "1", "WORLD_SIZE": "3"}) == Shard(2, 3)


SEEDS = ("--seeds", "0-9,40", "--seed", "bob", "--name", "{index:02d}/{seed}")


def tree(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert start("generate", tiny_model, *SEEDS, "-o", ".", cwd=folder).wait(60) == 0
    return folder


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_union_of_the_shards_is_the_single_run_byte_for_byte(tiny_model, whole, tmp_path, count):
    """Processes at the same time, into one directory, each with a manifest of its own."""
    children = [
        start("generate", tiny_model, *SEEDS, "-o", "d", "--manifest", f"{i}.jsonl", "--shard", f"{i}/{count}",
              cwd=tmp_path)
        for i in range(1, count + 1)
    ]  # fmt: skip
    for child in children:
        _, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
    assert tree(tmp_path / "d") == tree(whole)
    lines = [json.loads(line) for path in sorted(tmp_path.glob("*.jsonl")) for line in path.open()]
    assert sorted(line["path"] for line in lines) == [f"d/{name}" for name in files(whole)]


def test_more_shards_than_images(tiny_model, tmp_path):
    done = shell(f"tpdne generate {tiny_model} --seeds 1-2 --shard 5/9", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_fresh_seeds_cannot_be_divided(tiny_model, tmp_path):
    done = shell(f"tpdne generate {tiny_model} -n 9 --shard 1/3", tmp_path)
    assert done.returncode == 2 and b"--seeds" in done.stderr


def test_a_slurm_array_a_kubernetes_job_and_torchrun(tiny_model, whole, tmp_path):
    call = shlex.join(["tpdne", "generate", str(tiny_model), *SEEDS])
    for name, script in {
        "slurm": "export SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_MAX=1 SLURM_ARRAY_TASK_STEP=1\n"
        f"for SLURM_ARRAY_TASK_ID in 0 1; do export SLURM_ARRAY_TASK_ID; {call} -o slurm --shard auto; done",
        "pods": f"for i in 0 1 2; do JOB_COMPLETION_INDEX=$i {call} -o pods --shard auto/3; done",
        "ranks": f"for i in 0 1; do RANK=$i WORLD_SIZE=2 {call} -o ranks --shard auto; done",
    }.items():
        done = shell(f"set -e\n{script}", tmp_path)
        assert done.returncode == 0, done.stderr
        assert tree(tmp_path / name) == tree(whole)


def test_one_command_line_for_all_parts_keeps_a_manifest_of_each(tiny_model, whole, tmp_path):
    call = shlex.join(["tpdne", "generate", str(tiny_model), *SEEDS, "--manifest", "m.jsonl", "-o", "d"])
    done = shell(f"set -e; for i in 0 1; do RANK=$i WORLD_SIZE=2 {call} --shard auto; done", tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path)[-2:] == ["m.1-of-2.jsonl", "m.2-of-2.jsonl"]
    lines = [json.loads(line) for path in sorted(tmp_path.glob("*.jsonl")) for line in path.open()]
    assert sorted(line["path"] for line in lines) == [f"d/{name}" for name in files(whole)]


def test_parts_that_are_given_one_manifest_lose_no_line_of_it(tiny_model, tmp_path):
    """At the same time: one writes, the others are told, and have made nothing that it does not name."""
    call = ("generate", tiny_model, "--seeds", "0-99", "--manifest", "m", "-o", "d", "-q")
    children = [start(*call, "--shard", f"{i}/3", cwd=tmp_path) for i in (1, 2, 3)]
    told = [(child.communicate(timeout=300)[1], child.returncode) for child in children]
    assert sorted(code for _, code in told) == [0, 1, 1], told
    assert all(b"The manifest m exists" in err or b"writing the manifest m" in err for err, code in told if code)
    lines = [json.loads(line)["path"] for line in (tmp_path / "m").read_text().splitlines()]
    assert sorted(lines) == [f"d/{name}" for name in files(tmp_path / "d")] and len(lines) >= 33


@pytest.mark.skipif(not shutil.which("parallel"), reason="GNU parallel is not installed")
def test_gnu_parallel(tiny_model, whole, tmp_path):
    call = shlex.join(["tpdne", "generate", str(tiny_model), *SEEDS])
    done = shell(f"export -f tpdne; parallel -q -j2 {call} --shard {{}}/3 -o d ::: 1 2 3", tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "d") == tree(whole)
