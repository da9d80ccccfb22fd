"""cluster.py: a Ray cluster of this machine draws the very files that one process draws."""

from __future__ import annotations

import json
import os
import signal

import pytest
from running import files, start

from tpdne_cli import cluster, models
from tpdne_cli.cli import run
from tpdne_cli.errors import DeviceError, SettingsError
from tpdne_cli.sampler import Settings, sample

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tpdne[ray]'")


@pytest.fixture(scope="module")
def here():
    """A cluster of two cores, whatever this machine has."""
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
    with pytest.raises(ValueError, match=r"must be between 0 and 2\*\*32 - 1"):  # numpy's, not one of Ray's
        list(fleet([2**40]))
    with pytest.raises(SettingsError, match="no classes"):
        cluster.assemble(model, Settings(class_index=3))
    with pytest.raises(DeviceError, match="has no GPU"):
        cluster.assemble(model, device="cuda")
    with pytest.raises(SettingsError, match="hands its devices out"):
        cluster.assemble(model, device="cuda:0,cuda:1")


def test_an_interruption_says_how_to_go_on(tiny_model, tmp_path):
    """And the cluster that it began for itself is gone with it."""
    child = start("generate", tiny_model, "--seeds", "0-99999", "-o", "d", "--engine", "ray", cwd=tmp_path)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130 and b"--skip-existing" in err and b"Traceback" not in err, err
    assert len(files(tmp_path / "d")) == 1 + len(out.splitlines())


def test_what_is_no_cluster(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert run(["generate", str(tiny_model), "--seed", "1", "--engine", "ray"]) == 2
    assert "pip install 'tpdne[ray]'" in capsys.readouterr().err
    assert run(["generate", str(tiny_model), "--seed", "1", "--ray-address", "auto"]) == 2
    assert "--engine ray" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer(tiny_model, tmp_path):
    child = start(
        "generate", tiny_model, "--seed", "1", "--engine", "ray", "--ray-address", "127.0.0.1:9", cwd=tmp_path
    )
    _, err = child.communicate(timeout=120)
    assert child.returncode == 1 and b"There is no Ray cluster at 127.0.0.1:9" in err and err.count(b"\n") == 1, err
