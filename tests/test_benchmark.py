"""`tpdne bench` measures what it says: the right arithmetic, each stage by itself, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from torch.overrides import TorchFunctionMode

from tpdne_cli import benchmark, devices, fleet, models
from tpdne_cli.benchmark import Convolution, convolution_rate, convolutions, largest, repeat, timed
from tpdne_cli.cli import run
from tpdne_cli.errors import DeviceError
from tpdne_cli.networks import stylegan1
from tpdne_cli.pipeline import Encoding
from tpdne_cli.sampler import Sampler

sys.path.insert(0, str(ROOT / "bench"))
from oracle import Oracle
from rows import ROWS, random_state
from test_oracle import SHAPES

STAGES = ["mapping", "synthesis", "copy", "encode", "write"]


class Arithmetic(TorchFunctionMode):
    """Counts the multiplications and additions of dense convolutions while they run; filters have groups."""

    flop = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in ("conv2d", "conv_transpose2d") and (kwargs or {}).get("groups", 1) == 1:
            plane = result if name == "conv2d" else args[0]  # what a transposed kernel is multiplied with is its input
            self.flop += 2 * args[1].numel() * plane.shape[2] * plane.shape[3]
        return result


@pytest.mark.parametrize("name", SHAPES)
def test_the_arithmetic_is_what_runs(name):
    arch, config = SHAPES[name]
    with Arithmetic() as counted:
        Oracle(arch, config, random_state(arch, config))(torch.randn(1, config.z_dim))
    assert counted.flop == sum(c.flop for c in convolutions(arch, config))


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_the_arithmetic_of_every_architecture(architecture):
    arch, config = SHAPES["StyleGAN2"]
    config = type(config)(resolution=32, channel_base=512, architecture=architecture)
    with Arithmetic() as counted:
        Oracle(arch, config, random_state(arch, config))(torch.randn(1, config.z_dim))
    assert counted.flop == sum(c.flop for c in convolutions(arch, config))


def test_the_arithmetic_of_stylegan1():
    config = stylegan1.Config(resolution=32, channel_base=512, channel_max=48, z_dim=16, w_dim=16)
    with Arithmetic() as counted, torch.enable_grad():
        stylegan1.Generator(config)(torch.randn(1, 16))
    assert counted.flop == sum(c.flop for c in convolutions("stylegan1", config))


@pytest.mark.parametrize(
    "row, gflop", [("sg2-256-b1", 29.8), ("sg2-1024-b1", 148.5), ("sg3t-512-b1", 544), ("sg3r-512-b1", 236)]
)
def test_the_arithmetic_of_the_official_shapes(row, gflop):
    found = convolutions(ROWS[row].arch, ROWS[row].config)
    assert sum(c.flop for c in found) / 1e9 == pytest.approx(gflop, rel=2e-3)


def test_the_largest_shapes_are_most_of_it():
    found = [Convolution(64, 64, 3, 32), Convolution(8, 8, 3, 32), Convolution(64, 64, 3, 32), Convolution(3, 3, 1, 4)]
    assert dict(largest(found)) == {Convolution(64, 64, 3, 32): 2}
    assert set(largest([Convolution(4, 4, 3, n) for n in (8, 8, 9, 10)])) == {
        Convolution(4, 4, 3, n) for n in (8, 9, 10)
    }


def test_the_rate_is_that_of_the_convolutions(monkeypatch):
    """Each call takes 10 ms for one image and 20 ms for four, so the best is 5 ms an image."""
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def conv2d(x, *_, **__):
        clock[0] += 0.01 if len(x) == 1 else 0.02

    monkeypatch.setattr(torch, "conv2d", conv2d)
    found = [Convolution(4, 4, 3, 8)] * 3
    rate = convolution_rate(found, torch.device("cpu"), torch.float32, 4, seconds=0)
    assert rate == pytest.approx(found[0].flop / 0.005)


def test_repeating_keeps_to_its_time():
    taken = repeat(timed(lambda: time.sleep(0.01), torch.device("cpu")), 0.1)
    assert 1 <= len(taken) <= 11 and min(taken) >= 0.01
    assert len(repeat(lambda: 1.0, 0, least=3)) == 3


def test_the_time_of_a_gpu_is_over_when_it_has_finished(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(str(device)))
    timed(lambda: order.append("work"), torch.device("cuda:1"))()
    assert order == ["work", "cuda:1"]


def slowed(function, seconds=0.3):
    def call(*arguments, **named):
        time.sleep(seconds)
        return function(*arguments, **named)

    return call


class SlowEncoding(Encoding):
    def __call__(self, sample):
        time.sleep(0.3)
        return super().__call__(sample)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_slow_shows_in_its_own_stage(stage, tiny_model, monkeypatch):
    sampler, encoding = Sampler(models.load(tiny_model), device="cpu", batch_size=2), Encoding("png")
    if stage == "mapping":
        monkeypatch.setattr(sampler, "map", slowed(sampler.map))
    elif stage == "synthesis":
        monkeypatch.setattr(sampler.generator.synthesis, "forward", slowed(sampler.generator.synthesis.forward))
    elif stage == "copy":
        monkeypatch.setattr(benchmark, "to_uint8", slowed(benchmark.to_uint8))
    elif stage == "encode":
        encoding = SlowEncoding("png")
    else:
        monkeypatch.setattr(benchmark, "write_atomic", slowed(benchmark.write_atomic))
    found = benchmark.benchmark(sampler, encoding, 0.1)
    assert list(found.stages) == STAGES
    images = 1 if stage in ("encode", "write") else 2
    assert found.stages[stage] >= 0.3 / images, "the stage does not say what it took"
    assert max(found.stages, key=found.stages.__getitem__) == stage, "the time went to another stage"


def test_together_encodes_beside_the_network(tiny_model, monkeypatch):
    """Four images that take the network 0.3 s each and an encoder 0.3 s each are there long before 2.4 s."""
    sampler = Sampler(models.load(tiny_model), device="cpu", batch_size=1)
    monkeypatch.setattr(sampler.generator.synthesis, "forward", slowed(sampler.generator.synthesis.forward))
    monkeypatch.setattr(benchmark, "SHARES", dict.fromkeys(benchmark.SHARES, 0.0) | {"together": 1.0})
    found = benchmark.benchmark(sampler, SlowEncoding("png"), 1.2)
    assert 0.3 <= found.together < 0.5 < 0.6 <= found.network + found.stages["encode"]


def test_together_takes_the_processes_that_generating_takes(tiny_model, tmp_path, monkeypatch):
    """Each is warm when the clock starts."""
    spread, drawn = [], []

    class Watched(Sampler):
        def __call__(self, seeds):
            seeds = list(seeds)
            drawn.append(len(seeds))
            return super().__call__(seeds)

    def watch(maker, sampler, images):
        spread.append((maker, images, sampler))
        return others

    monkeypatch.setattr(devices, "cores", lambda: 2)
    monkeypatch.setattr(devices, "memory", lambda: 8 << 30)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(fleet, "spread", watch)
    monkeypatch.setattr(benchmark, "round", lambda batches: 3, raising=False)
    sampler = Sampler(models.load(tiny_model), device="cpu", batch_size=2)
    others = Watched(sampler.model, device="cpu", batch_size=2)
    found = benchmark.measure_together(sampler, Encoding(), tmp_path, 1, 1)
    assert spread == [(sampler, 6, sampler)] and drawn == [4, 6] and found > 0


def test_numbers_agree_with_each_other(tiny_model):
    sampler = Sampler(models.load(tiny_model), device="cpu", batch_size=3)
    found = benchmark.benchmark(sampler, Encoding("webp"), 0.2)
    record = found.record()
    assert (record["model"], record["arch"], record["resolution"]) == ("tiny", "stylegan2", 32)
    assert (record["device"], record["precision"], record["batch_size"]) == ("cpu", "float32", 3)
    assert (record["format"], record["threads"]) == ("webp", torch.get_num_threads())
    seconds = record["seconds"]
    assert set(seconds) == {*STAGES, "network", "together", "bound"} == set(record["images_per_second"])
    assert seconds["network"] == pytest.approx(seconds["mapping"] + seconds["synthesis"] + seconds["copy"], rel=1e-3)
    assert record["ratio"] == pytest.approx(seconds["synthesis"] / seconds["bound"], rel=1e-2)
    assert record["bound_gflop_per_second"] * seconds["bound"] == pytest.approx(found.flop / 1e9, rel=1e-2)
    for name, value in seconds.items():
        assert record["images_per_second"][name] * value == pytest.approx(1, rel=1e-2), name


def out_of_memory(*_, **__):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")


def test_a_batch_that_does_not_fit_is_halved(tiny_model, monkeypatch):
    sampler = Sampler(models.load(tiny_model), device="cpu", batch_size=4)
    whole = sampler.generator.synthesis.forward
    monkeypatch.setattr(
        sampler.generator.synthesis, "forward", lambda ws, noise: (out_of_memory if len(ws) > 2 else whole)(ws, noise)
    )
    assert benchmark.benchmark(sampler, seconds=0.1).batch_size == 2


def test_memory_that_runs_out_later_is_a_sentence(tiny_model, monkeypatch):
    monkeypatch.setattr(torch, "conv2d", out_of_memory)
    monkeypatch.setattr(devices, "release_memory", lambda device: None)
    sampler = Sampler(models.load(tiny_model), device="cpu", batch_size=2)
    monkeypatch.setattr(sampler.generator.synthesis, "forward", lambda ws, noise: torch.zeros(len(ws), 3, 32, 32))
    with pytest.raises(DeviceError, match="smaller --batch-size"):
        benchmark.benchmark(sampler, seconds=0.1)


# The command


def test_the_command_for_people(tiny_model, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(["bench", str(tiny_model), "--seconds", "0.1", "--batch-size", "2", "--format", "jpg"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "float32, batches of 2" in out.splitlines()[0]
    assert [text.split()[0] for text in out.splitlines()] == ["tiny", *STAGES, "together", "bound", "The"]
    assert list(tmp_path.iterdir()) == [], "files were left behind"


def test_the_command_for_programs(tiny_model, capsys):
    assert run(["bench", str(tiny_model), "--seconds", "0.1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and json.loads(out)["model"] == "tiny" and out.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["nobody"], 2, "There is no generator called 'nobody'"),
        (["faces", "--device", "abacus"], 1, "'abacus' is not a device"),
        (["faces", "--batch-size", "0"], 2, "'0' is not a batch size"),
        (["faces", "--seconds", "0"], 2, "--seconds"),
        (["faces", "--format", "gif"], 2, "--format"),
    ],
)
def test_mistakes(arguments, code, words, capsys):
    assert run(["bench", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and words in err and "Traceback" not in err


# The comparison with the published formulation


@pytest.mark.slow
def test_comparing():
    command = [sys.executable, ROOT / "bench" / "compare.py", "sg2-256-b1", "--seconds", "0", "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert found["largest_difference"] <= 1 and found["differing_values"] < 1e-3 < found["spread"]
    assert found["ratios"][0] <= found["ratio"] <= found["ratios"][-1] and found["rounds"] >= 2
    assert found["bound_seconds"] * found["gflop_per_second"] == pytest.approx(found["gflop"])
    assert min(found["oracle_peak_bytes"], found["ours_peak_bytes"]) > 100 << 20
