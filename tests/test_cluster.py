"""cluster.py: a Ray cluster of this machine draws the very files that one process draws."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from running import files, start

from tpdne_cli import cluster, models
from tpdne_cli.cli import run
from tpdne_cli.errors import DeviceError, SeedError, SettingsError
from tpdne_cli.sampler import Settings, sample

try:
    import ray
except ImportError:
    ray = None
pytestmark = pytest.mark.cluster
needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: pip install ray")


@pytest.fixture(scope="module")
def here():
    """A cluster of two cores, whatever this machine has."""
    if ray is None:
        pytest.skip("Ray is not installed: pip install ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield context.address_info["address"]
    ray.shutdown()


def test_the_cluster_draws_the_same_files(here, tiny_model, tmp_path, capsys):
    words = ["generate", str(tiny_model), "--seeds", "0-29,40", "--seed", "bob", "--truncation", "0.6"]
    assert run([*words, "-o", str(tmp_path / "one")]) == 0
    assert run([*words, "-o", str(tmp_path / "many"), "--engine", "ray", "--batch-size", "8", "-q"]) == 0
    assert files(tmp_path / "many") == files(tmp_path / "one") and len(files(tmp_path / "one")) == 32
    for name in files(tmp_path / "one"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    (tmp_path / "many" / files(tmp_path / "many")[3]).unlink()
    capsys.readouterr()
    assert run([*words, "-o", str(tmp_path / "many"), "--engine", "ray", "--skip-existing", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 and json.loads(out[0])["sha256"], "only the one that was missing"


def test_the_critic_travels_along(here):
    model = models.load("faces")
    fleet = cluster.assemble(model, Settings(), batch_size=2, images=4, judged=True)
    drawn = list(fleet([1, 2, 3]))
    assert [image.seed for image in drawn] == [1, 2, 3] and all(0 <= i.recipe["realism"] <= 100 for i in drawn)
    assert drawn[0].recipe["model"] == "faces" and fleet.recipe(1)["weights"] == model.sha256
    (alone,) = sample(model, [2], device="cpu")
    assert (drawn[1].pixels == alone.pixels).all()


def test_a_sampler_that_is_killed_is_started_again(here, tiny_model):
    model = models.load(tiny_model)
    fleet = cluster.assemble(model, batch_size=4, images=8)
    expected = [image.pixels.tobytes() for image in sample(model, range(40), device="cpu")]
    drawn = []
    for image in fleet(range(40)):
        drawn.append(image.pixels.tobytes())
        if len(drawn) == 4:
            ray.kill(fleet.samplers[0].actor, no_restart=False)
    assert drawn == expected


def test_errors_come_back_as_they_were(here, tiny_model):
    model = models.load(tiny_model)
    fleet = cluster.assemble(model, images=1)
    with pytest.raises(SeedError, match="is outside") as caught:
        list(fleet([2**40]))
    assert type(caught.value) is SeedError, "the library's, not one of Ray's that looks like it"
    with pytest.raises(SettingsError, match="no classes") as caught:
        cluster.assemble(model, Settings(class_index=3))
    assert type(caught.value) is SettingsError
    with pytest.raises(DeviceError, match="has no GPU"):
        cluster.assemble(model, device="cuda")
    with pytest.raises(SettingsError, match="hands its devices out"):
        cluster.assemble(model, device="cuda:0,cuda:1")


def test_a_cluster_without_a_free_core(here, tiny_model, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 3)

    class Busy:
        pass

    busy = ray.remote(num_cpus=2)(Busy).remote()  # an actor that holds what there is
    ray.get(busy.__ray_ready__.remote())
    try:
        with pytest.raises(DeviceError, match="No sampler of the cluster was ready after 3 s"):
            cluster.assemble(models.load(tiny_model))
    finally:
        ray.kill(busy)


@needs_ray
def test_an_interruption_says_how_to_go_on(tiny_model, tmp_path):
    """And the cluster that it began for itself is gone with it."""
    child = start("generate", tiny_model, "--seeds", "0-99999", "-o", "d", "--engine", "ray", cwd=tmp_path)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130 and b"--skip-existing" in err and err.count(b"\n") == 2, "nothing of Ray's own"
    assert len(files(tmp_path / "d")) == 1 + len(out.splitlines())
    ended = time.monotonic() + 30
    while mine(child.pid) and time.monotonic() < ended:
        time.sleep(0.1)
    assert not mine(child.pid)


def mine(driver: int) -> list[str]:
    """Processes that say that they belong to the cluster which that process began."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace")
            if "raylet" in words and f"_{driver}/" in words:
                found.append(words)
    return found


def test_what_is_no_cluster(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert run(["generate", str(tiny_model), "--seed", "1", "--engine", "ray"]) == 2
    assert "pip install ray" in capsys.readouterr().err
    assert run(["generate", str(tiny_model), "--seed", "1", "--ray-address", "auto"]) == 2
    assert "--engine ray" in capsys.readouterr().err


@needs_ray
def test_a_cluster_that_does_not_answer(tiny_model, tmp_path):
    child = start(
        "generate", tiny_model, "--seed", "1", "--engine", "ray", "--ray-address", "127.0.0.1:9", cwd=tmp_path
    )
    _, err = child.communicate(timeout=120)
    assert child.returncode == 1 and b"No Ray cluster can be used at 127.0.0.1:9" in err and err.count(b"\n") == 1, err
