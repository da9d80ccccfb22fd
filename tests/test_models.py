"""models.py and installing.py: from a name or any published file to images, without the code that wrote it."""

from __future__ import annotations

import json
import multiprocessing
import sys

import numpy as np
import pytest
import torch
from checkpoint_writers import dumps, golden_module, nvidia, rosinality, tensorflow
from conftest import golden, load_tensors

from tpdne_cli import catalogue, download, installing, models, seeds, store
from tpdne_cli.cli import run
from tpdne_cli.errors import CheckpointError, ModelNotFoundError, OutputError, SettingsError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TPDNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def images(model, io, psi=1):
    with torch.inference_mode():
        ws = model.generator.mapping(io["z"], io.get("c"), psi)
        return model.generator.synthesis(ws)


@pytest.mark.parametrize(
    "name", ["sg2_skip", "sg2_resnet_clamp", "sg2_cond", "sg2_from_sg3repo", "sg3_t", "sg3_r_small"]
)
def test_published_pickles_give_the_published_images(tmp_path, name):
    (tmp_path / "x.bin").write_bytes(nvidia(golden(name)))
    model = models.load(tmp_path / "x.bin")
    io = load_tensors(golden(name) / "io.safetensors")
    torch.testing.assert_close(images(model, io), io["img_psi1_const"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["tf_sg2_skip", "tf_sg2_resnet", "tf_sg1_32"])
def test_tensorflow_pickles_give_the_published_images(tmp_path, name):
    (tmp_path / "x.pkl").write_bytes(tensorflow(golden(name)))
    model = models.load(tmp_path / "x.pkl")
    io = load_tensors(golden(name) / "io.safetensors")
    key = next(k for k in sorted(io) if k.startswith("img_psi1") and "none" not in k)
    torch.testing.assert_close(images(model, io), io[key], atol=1e-4, rtol=0)


def test_rosinality_without_a_mean_gets_the_mean_of_fixed_seeds(tmp_path):
    path = tmp_path / "train.pt"
    path.write_bytes(rosinality(golden("rosinality_tiny")))
    model = models.load(path)
    with torch.inference_mode():
        w = model.generator.mapping(torch.from_numpy(np.random.RandomState(1).randn(4000, model.config.z_dim)))[:, 0]
    assert (w.mean(0) - model.generator.mapping.w_avg).abs().max() < 6 * w.std() / 4000**0.5


@pytest.mark.parametrize("threads", [1, 2])
def test_a_conditional_pickle_without_a_mean_gets_that_of_all_classes(tmp_path, monkeypatch, threads):
    """In one thread, whatever the number: its bits are those of the truncated images."""
    seen, draw = set(), seeds.latents
    monkeypatch.setattr(seeds, "latents", lambda *args: seen.add(torch.get_num_threads()) or draw(*args))
    root = golden_module(golden("sg2_cond"))
    del root.mapping._buffers["w_avg"]
    (tmp_path / "x.pkl").write_bytes(dumps({"G_ema": root}, 4))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model = models.load(tmp_path / "x.pkl")
    assert torch.get_num_threads() == threads and seen == {1}
    torch.set_num_threads(before)
    classes = model.config.c_dim
    z = torch.from_numpy(np.random.RandomState(1).randn(4000, model.config.z_dim))
    with torch.inference_mode():
        w = model.generator.mapping(z, torch.eye(classes)[torch.arange(4000) % classes])[:, 0]
    assert (w.mean(0) - model.generator.mapping.w_avg).abs().max() < 6 * w.std() / 4000**0.5


def test_import_keeps_the_images_and_notes_where_they_came_from(tmp_path):
    source = tmp_path / "Some Cats (v2).PKL"
    source.write_bytes(nvidia(golden("sg2_skip"), golden("disc_resnet")))
    path = installing.install(source, licence="non-commercial")
    assert path.name == "some-cats-v2.safetensors"
    assert "some-cats-v2" in models.names()
    io = load_tensors(golden("sg2_skip") / "io.safetensors")
    torch.testing.assert_close(images(models.load("some-cats-v2"), io), io["img_psi1_const"], atol=1e-4, rtol=0)
    about = models.describe("some-cats-v2")
    assert about["licence"] == "non-commercial" and about["origin"] == str(source)
    assert about["source_sha256"] == store.file_sha256(source)
    critic = path.with_name("some-cats-v2-critic.safetensors")
    assert critic.exists() and "some-cats-v2-critic" not in models.names()
    assert installing.verify("some-cats-v2")["recorded"]
    assert installing.remove("some-cats-v2") and not path.exists() and not critic.exists()
    with pytest.raises(ModelNotFoundError):
        models.load("some-cats-v2")


def test_importing_again_is_the_same_model(tmp_path, tiny_model):
    first = installing.install(tiny_model, "a").read_bytes()
    assert installing.install(store.models_dir() / "a.safetensors", "b").read_bytes() == first


def test_taken_and_impossible_names(tmp_path, tiny_model):
    installing.install(tiny_model, "mine")
    with pytest.raises(OutputError, match="--force"):
        installing.install(tiny_model, "mine")
    installing.install(tiny_model, "mine", replace=True)
    for name in ("faces", "../x", "A B", "x-critic", "", "con", "a/b", "a\0b", "."):
        with pytest.raises(SettingsError):
            installing.install(tiny_model, name)


def test_a_changed_file_does_not_verify(tmp_path, tiny_model):
    path = installing.install(tiny_model, "mine")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed"):
        installing.verify("mine")


def test_nothing_is_installed_of_what_is_no_generator(tmp_path, home):
    bad = tmp_path / "bad.pkl"
    for content in (b"", b"\x80\x04N.", b"<html>", b"\x80\x02cos\nsystem\n(S'x'\ntR."):
        bad.write_bytes(content)
        with pytest.raises(CheckpointError):
            installing.install(bad)
    assert not list(home.rglob("*.safetensors"))


def test_bundled_generators_stay():
    for name in ("faces", "cats"):
        assert installing.verify(name)["recorded"]
        with pytest.raises(SettingsError, match="bundled"):
            installing.remove(name)


def test_the_list_of_hashes_is_that_of_the_weights():
    listed = {file.name: store.file_sha256(file) for file in models.weights_dir().glob("*.safetensors")}
    assert installing.published() == listed, "cd weights && sha256sum *.safetensors > SHA256SUMS"


@pytest.mark.parametrize(
    ("name", "fault"), [("faces", "changed"), ("faces-critic", "changed"), ("faces-critic", "gone")]
)
def test_bundled_files_that_are_not_those_of_the_release(tmp_path, monkeypatch, capsys, name, fault):
    """A bit of a weight in the wrong place draws other people, and nothing else tells."""
    for file in models.weights_dir().glob("*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(models, "weights_dir", lambda: tmp_path)
    damaged = tmp_path / f"{name}.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.unlink() if fault == "gone" else damaged.write_bytes(data)
    assert run(["models", "verify", "cats"]) == 0
    assert run(["models", "verify", "faces"]) == 1
    assert f"{damaged} has changed or gone since it was installed: install tpdne again." in capsys.readouterr().err


def _install(home, source):
    import os

    os.environ["TPDNE_HOME"] = str(home)
    installing.install(source, "both", replace=True)


def test_two_processes_at_once_leave_one_whole_model(home, tiny_model):
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_install, args=(home, tiny_model)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
        assert child.exitcode == 0
    assert installing.verify("both")["recorded"]


def _install_as(home, source, replace, answers):
    import os

    os.environ["TPDNE_HOME"] = str(home)
    try:
        installing.install(source, "both", replace=replace)
        answers.put("installed")
    except OutputError as error:
        answers.put(str(error))


def test_of_two_processes_one_finds_the_name_taken(home, tiny_model):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with store.locked(store.make_dir(store.models_dir()) / ".both.lock"):  # both are past the first look at the name
        children = [context.Process(target=_install_as, args=(home, tiny_model, False, answers)) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join(8)
    said = sorted(answers.get(timeout=600) for _ in children)
    assert said[0].startswith("A generator called both is installed") and said[1] == "installed"


def test_generator_critic_and_record_are_of_one_making(tmp_path, home):
    sources = {"a": nvidia(golden("sg2_skip"), golden("disc_resnet")), "b": nvidia(golden("sg2_from_sg3repo"))}
    for name, data in sources.items():
        (tmp_path / f"{name}.pkl").write_bytes(data)
    for name in ("a", "b", "a"):
        path = installing.install(tmp_path / f"{name}.pkl", "x", replace=True)
        record = store.read_json(store.record_path(path))
        assert record["origin"].endswith(f"{name}.pkl")
        assert set(record["files"]) == {file.name for file in path.parent.glob("x*.safetensors")}
        assert ("x-critic.safetensors" in record["files"]) == (name == "a")


def test_a_critic_of_another_size_is_left_out(tmp_path):
    (tmp_path / "x.pkl").write_bytes(nvidia(golden("sg3_t"), golden("disc_resnet")))
    path = installing.install(tmp_path / "x.pkl")
    assert "its resolution is not the generator's" in models.describe(path)["discriminator"]
    assert not path.with_name("x-critic.safetensors").exists()


def test_a_critic_that_is_no_numbers_is_left_out(tmp_path, capsys):
    generator, critic = golden_module(golden("sg2_skip")), golden_module(golden("disc_resnet"))
    critic.b4.out.weight.data.fill_(float("nan"))
    (tmp_path / "x.pkl").write_bytes(dumps({"G_ema": generator, "D": critic}, 4))
    assert run(["models", "import", str(tmp_path / "x.pkl")]) == 0
    out, err = capsys.readouterr()
    assert "critic is left out" in err and "b4.out.weight" in err and out.strip().endswith("x.safetensors")
    assert installing.verify("x")["recorded"]


def test_a_damaged_critic_does_not_verify(tmp_path):
    (tmp_path / "x.pkl").write_bytes(nvidia(golden("sg2_skip"), golden("disc_resnet")))
    path = installing.install(tmp_path / "x.pkl")
    assert installing.verify("x")["recorded"]
    store.record_path(path).unlink()  # no hash tells
    critic = path.with_name("x-critic.safetensors")
    critic.write_bytes(critic.read_bytes()[:-4] + np.float32("nan").tobytes())
    with pytest.raises(CheckpointError, match="x-critic"):
        installing.verify("x")


def test_what_is_changed_on_purpose_verifies_again(tmp_path):
    from tpdne_cli.training.calibrate import calibrate

    (tmp_path / "x.pkl").write_bytes(nvidia(golden("sg2_skip"), golden("disc_resnet")))
    installing.install(tmp_path / "x.pkl")
    calibrate("x", images=20)
    assert installing.verify("x")["recorded"]


def test_a_file_cannot_hide_what_it_is(tmp_path, tiny_model, capsys):
    from tpdne_cli.checkpoints import safetensors

    checkpoint = safetensors.read(tiny_model)
    path = tmp_path / "x.safetensors"
    lies = {"sha256": "0" * 64, "path": "elsewhere", "licence": "free\n\x1b]0;owned\x07"}
    safetensors.write(path, "stylegan2", checkpoint.config, checkpoint.tensors, lies)
    about = models.describe(path)
    assert about["sha256"] == store.file_sha256(path) and about["path"] == str(path)
    assert run(["models", "info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "free\\n\\x1b]0;owned" in shown


@pytest.mark.parametrize(
    "about", [{"truncation": "x"}, {"truncation": None}, {"truncation": 1e9}, {"truncation_cutoff": 2.5}]
)
def test_a_truncation_that_is_none(tmp_path, tiny_model, about):
    from tpdne_cli.checkpoints import safetensors

    checkpoint = safetensors.read(tiny_model)
    safetensors.write(tmp_path / "x.safetensors", "stylegan2", checkpoint.config, checkpoint.tensors, about)
    with pytest.raises(CheckpointError, match="truncation that it asks for is no number"):
        models.load(tmp_path / "x.safetensors")


def test_one_damaged_file_hides_no_other(tmp_path, tiny_model, capsys):
    for name in ("a", "b", "c"):
        installing.install(tiny_model, name)
    damaged = store.models_dir() / "b.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (store.models_dir() / "d.safetensors").mkdir()
    assert run(["models", "list", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["name"] for line in out.splitlines()][-2:] == ["a", "c"] and "b.safetensors" in err
    assert run(["models", "verify"]) == 1
    out, err = capsys.readouterr()
    assert "c: as it was installed" in out and "b.safetensors has changed" in err
    assert run(["models", "remove", "b"]) == 0


def test_shapes_are_checked_before_anything_is_built(tmp_path, tiny_model):
    from tpdne_cli.checkpoints import safetensors

    checkpoint = safetensors.read(tiny_model)
    for change, sentence in [
        ({"resolution": 64}, "incomplete|shape"),
        ({"resolution": 2**40}, "a resolution that no generator has"),
        ({"mapping_layers": 10**9}, "a mapping_layers that no generator has"),
        ({"mapping_layers": -1}, "cannot be built"),
        ({"w_dim": 33}, "shape"),
        ({"colour": 1}, "does not know"),
        ({"channels": [1]}, "cannot be built"),
        ({"conv_clamp": "x"}, "a conv_clamp that no generator has"),
        ({"conv_clamp": True}, "a conv_clamp that no generator has"),
        ({"use_noise": 1}, "a use_noise that no generator has"),
        ({"architecture": None}, "an? architecture that no generator has"),
        ({"resample_filter": 1.0}, "a resample_filter that no generator has"),
    ]:
        path = tmp_path / "x.safetensors"
        safetensors.write(path, "stylegan2", {**checkpoint.config, **change}, checkpoint.tensors, {})
        with pytest.raises(CheckpointError, match=sentence):
            models.load(path)


def test_the_models_commands(capsys, tmp_path, tiny_model, monkeypatch):
    def call(*arguments):
        code = run(["models", *map(str, arguments)])
        return code, *capsys.readouterr()

    code, out, _ = call("import", tiny_model, "--name", "mine", "--licence", "MIT")
    assert code == 0 and out.strip().endswith("mine.safetensors")
    code, out, _ = call("list", "--json")
    names = [json.loads(line)["name"] for line in out.splitlines()]
    assert code == 0 and names[-1] == "mine" and {"faces", "cats"} <= set(names)
    assert call("list")[1].splitlines()[0].startswith("NAME")
    assert call("path", "mine")[1].strip().endswith("mine.safetensors")
    assert json.loads(call("info", "mine", "--json")[1])["licence"] == "MIT"
    unreachable = "http://127.0.0.1:9/g.pkl"
    code, _, err = call("import", unreachable, "--name", "mine")
    assert code == 1 and "is installed" in err and "Fetching" not in err, "before anything is downloaded"
    assert "bundled" in call("import", unreachable, "--name", "faces", "--force")[2]
    assert call("verify")[0] == 0
    assert call("remove", "faces")[0] == 2
    assert call("remove", "mine")[0] == 0
    code, _, err = call("remove", "mine")
    assert code == 2 and err.count("\n") == 1
    assert call("import", "nowhere.pkl")[0] == 2
    assert call("clear-cache")[0] == 0
    code, out, _ = call("pull", "--json")
    assert code == 0 and {"name", "url", "licence"} <= json.loads(out.splitlines()[0]).keys()
    code, _, err = call("pull", json.loads(out.splitlines()[0])["name"])
    assert code == 2 and "--accept-licence" in err, "nobody can be asked here"
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr("click.confirm", lambda *_, **__: False)
    code, _, err = call("pull", json.loads(out.splitlines()[0])["name"])
    assert code == 2 and err.splitlines()[-1].endswith("is not fetched: its licence is not accepted.")


def test_generate_moves_the_scene_of_stylegan3(tmp_path, capsys, monkeypatch):
    """The published transforms, through file and command line, and made again from the picture's own recipe."""
    from tpdne_cli.images import read_pixels

    monkeypatch.chdir(tmp_path)
    folder = golden("sg3_r_small")
    described = json.loads((folder / "config.json").read_text())
    (tmp_path / "three.pkl").write_bytes(nvidia(folder))
    seed, io = described["seeds"][0], load_tensors(folder / "io.safetensors")
    move = described["transforms"]["both"]
    arguments = ["--rotate", str(move["rotate"]), "--translate", *map(str, move["translate"])]
    assert run(["generate", "three.pkl", "--seed", str(seed), "--psi", "1", "-o", "moved.png", *arguments]) == 0
    expected = (io["img_psi1_const_both"][0] * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    assert np.abs(read_pixels("moved.png").astype(int) - expected.numpy()).max() <= 1
    assert run(["inspect", "moved.png", "--verify", "--model", "three.pkl"]) == 0
    assert run(["faces", "--rotate", "3"]) == 2
    assert run(["generate", "faces", "--rotate", "3", "-o", "x.png"]) == 2
    assert "StyleGAN3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ada-ffhq", "stylegan3-r-ffhq-1024x1024"])
def test_what_is_pulled_is_held_to_its_sha256_and_keeps_its_licence(cli, monkeypatch, tiny_model, name):
    entry, asked = catalogue.find(name), []

    def fetch(url, on_progress, expected_sha256=None, **_):
        asked.append((url, expected_sha256))
        return tiny_model, "0" * 64

    monkeypatch.setattr(download, "fetch", fetch)
    code, out, err = cli("models", "pull", name, "--accept-licence", "--json")
    assert code == 0, err
    assert asked == [(entry.url, entry.sha256)] and entry.licence in err
    about = models.describe(name)
    assert (about["licence"], about["origin"]) == (entry.licence, entry.url)
    assert json.loads(out[0]) == {"name": name, "path": about["path"]}


def test_nothing_is_left_of_what_was_removed(tiny_model):
    path = installing.install(tiny_model, "mine", licence="secret")
    installing.remove("mine")
    assert [p.name for p in path.parent.iterdir()] == [".mine.lock"]


def test_a_download_in_progress_is_not_cleared_away():
    path = store.make_cache_dir() / f"{store.url_key('https://h.example/a')}-a.pkl"
    part, whole = path.with_name(f"{path.name}.part"), store.cache_dir() / "whole.pkl"
    for file in (part, whole):
        file.write_bytes(b"x" * 100)
    with store.locked(path.with_name(f"{path.name}.lock")):
        assert installing.clear_cache() == (1, 100)
        assert part.exists() and not whole.exists()
    installing.clear_cache()
    assert not part.exists()


def test_a_file_of_a_newer_format_asks_for_an_upgrade(tiny_model, tmp_path, monkeypatch):
    from tpdne_cli.checkpoints import safetensors

    checkpoint = safetensors.read(tiny_model)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "VERSION", 2)
        safetensors.write(tmp_path / "new.safetensors", checkpoint.arch, checkpoint.config, checkpoint.tensors, {})
    with pytest.raises(CheckpointError, match=r"newer tpdne \(format 2\): upgrade"):
        models.load(tmp_path / "new.safetensors")
