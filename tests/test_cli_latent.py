"""interpolate, mix, vary and sheet as users see them: files, streams, exit codes, sentences."""

from __future__ import annotations

import io
import json
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import files, shell, start

from tpdne_cli import animation, images, metadata, models
from tpdne_cli.cli import COMMANDS, latent, run
from tpdne_cli.cli.manifest import open_manifest
from tpdne_cli.cli.sheet import runs
from tpdne_cli.errors import SeedError
from tpdne_cli.montage import Layout
from tpdne_cli.sampler import Sampler, sample


@pytest.fixture
def cli(capsys, tmp_path, tiny_model, monkeypatch):
    """Call a command with the tiny model in an empty directory -> (exit code, lines on stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, *arguments: object):
        code = run([command, "--model", str(tiny_model), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.fixture(scope="module")
def own(tiny_model):
    """The image that a seed gives by itself."""
    model = models.load(tiny_model)
    return lambda seed, **settings: next(sample(model, [seed], **settings)).pixels


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def moving(path):
    with Image.open(path) as image:
        frames = []
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")))
        return np.stack(frames)


def test_walk_as_numbered_frames(cli, own, tmp_path):
    code, out, err = cli("interpolate", "--seeds", "1,bob,3", "--frames", 9, "-o", "w")
    assert (code, err) == (0, "")
    assert out == [f"w/frame-{k:04d}.png" for k in range(9)] == files(tmp_path)
    for frame, seed in ((0, 1), (4, "bob"), (8, 3)):
        assert np.array_equal(opened(out[frame]), own(seed)), f"frame {frame} is the image of {seed}"


def test_key_frames_are_what_generate_writes(cli, tmp_path, tiny_model, capsys):
    options = ["--truncation", "0.6", "--truncation-cutoff", "4", "--noise", "random"]
    cli("interpolate", "--seed", "7", "--seed", "a,b", "--loop", "--frames", 6, "-o", "w", *options)
    run(["generate", str(tiny_model), "--seed", "7", "--seed", "a,b", "-o", "own", *options])
    paths = capsys.readouterr().out.split()
    assert np.array_equal(opened("w/frame-0000.png"), opened(paths[0]))
    assert np.array_equal(opened("w/frame-0003.png"), opened(paths[1]))


def test_frames_do_not_depend_on_the_batch_size(cli, tmp_path):
    for size in (1, 3):
        cli("interpolate", "--seeds", "1-3", "--loop", "--frames", 7, "-o", f"{size}", "--batch-size", size)
    assert files(tmp_path / "1") == files(tmp_path / "3")
    for name in files(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


@pytest.mark.parametrize("name", ["w.gif", "w.webp", "w.png", "w.apng", "d/w.WEBP"])
def test_walk_as_one_moving_picture(cli, own, tmp_path, name):
    code, out, err = cli("interpolate", "--seeds", "1,2", "--loop", "--frames", 6, "-o", name, "--quality", 100)
    if name.endswith(("gif", "png")):
        assert (code, out) == (2, []) and "no quality" in err and files(tmp_path) == []
        code, out, err = cli("interpolate", "--seeds", "1,2", "--loop", "--frames", 6, "-o", name)
    assert (code, out, err) == (0, [name], "") and files(tmp_path) == [name]
    frames = moving(name)
    assert len(frames) == 6
    difference = np.abs(frames[[0, 3]].astype(int) - np.stack([own(1), own(2)]))
    assert difference.mean() < 12 if name.endswith("gif") else difference.max() == 0


def test_mp4(cli, tmp_path):
    av = pytest.importorskip("av", reason="PyAV, of the extra 'video', is not installed")
    assert cli("interpolate", "--seeds", "1,2", "--frames", 5, "-o", "w.mp4", "--fps", 12.5)[0] == 0
    with av.open("w.mp4") as container:
        assert container.streams.video[0].frames == 5 and float(container.streams.video[0].average_rate) == 12.5


def test_mp4_without_pyav_says_so_before_any_work(cli, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(animation, "import_module", missing)
    code, out, err = cli("interpolate", "--seeds", "1,2", "-o", "w.mp4")
    assert (code, out) == (2, []) and "pip install av" in err and err.count("\n") == 1 and files(tmp_path) == []


def test_walk_described_as_json(cli, tmp_path):
    _, out, _ = cli("interpolate", "--seeds", "1,2", "--frames", 4, "--json", "--manifest", "m", "-o", "w.webp")
    record = json.loads(out[0])
    assert [json.loads(line) for line in Path("m").read_text().splitlines()] == [record]
    assert record["seed"] == [1, 2] and record["frames"] == 4 and record["fps"] == 25 and record["format"] == "webp"
    assert record["bytes"] == Path("w.webp").stat().st_size
    assert record["sha256"] == models.file_sha256(Path("w.webp"))
    recipe = images.read_recipe("w.webp")
    assert recipe["latent"]["kind"] == "walk" and recipe.items() <= record.items()
    _, out, _ = cli("interpolate", "--seeds", "1,2", "--frames", 4, "--json", "-o", "d", "--format", "jpg")
    assert [json.loads(line)["latent"]["frame"] for line in out] == [0, 1, 2, 3]


def test_no_metadata(cli, tmp_path):
    cli("interpolate", "--seeds", "1,2", "--frames", 3, "--no-metadata", "-o", "w.webp")
    cli("sheet", "--seeds", "1-4", "--no-metadata", "-o", "s.png")
    cli("mix", "--rows", "1", "--cols", "2", "--no-metadata", "-o", "m.png")
    for name in files(tmp_path):
        assert images.read_recipe(name) is None and b"xpacket" not in Path(name).read_bytes()


def test_walk_to_stdout(tmp_path, tiny_model):
    words = f"interpolate --model {tiny_model} --seeds 1,2 --frames 4"
    done = shell(f"tpdne {words} -o - > a; tpdne {words} -o b.webp; tpdne {words} -o - --format gif > c.gif", tmp_path)
    assert done.returncode == 0 and done.stdout == b"b.webp\n"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b.webp").read_bytes()
    assert moving(tmp_path / "c.gif").shape == (4, 32, 32, 3)


def test_a_reader_that_goes_away(tmp_path, tiny_model):
    done = shell(f"tpdne interpolate --model {tiny_model} --seeds 1,2 --frames 600 -o d | head -n 1", tmp_path)
    assert done.stdout == b"d/frame-0000.png\n" and done.stderr == b""


def test_fresh_keys_are_shown_and_make_the_same_walk_again(cli, tmp_path):
    code, _, err = cli("interpolate", "--frames", 4, "-o", "a.webp")
    assert code == 0
    again = err.split("--seeds ")[1].split()[0]
    cli("interpolate", "--frames", 4, "-o", "b.webp", "--seeds", again)
    assert Path("a.webp").read_bytes() == Path("b.webp").read_bytes()


def test_frames_that_are_there_are_left_alone(cli, tmp_path):
    words = ["interpolate", "--seeds", "1,2", "--frames", 5, "-o", "w"]
    cli(*words)
    Path("w/frame-0002.png").unlink()
    before = {name: Path(name).stat().st_mtime_ns for name in files(tmp_path)}
    code, out, err = cli(*words)
    assert code == 1 and "exists" in err and out == []
    code, out, err = cli(*words, "--skip-existing")
    assert code == 0 and out == ["w/frame-0002.png"] and "4 of 5" in err
    assert all(Path(name).stat().st_mtime_ns == time for name, time in before.items())
    code, out, err = cli("interpolate", "--seeds", "1,3", "--frames", 5, "-o", "w", "--skip-existing")
    assert code == 1 and "was made with" in err and len(err.splitlines()) == 1
    assert cli(*words, "--force")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_animation_leaves_nothing(tmp_path, tiny_model, number):
    words = ("interpolate", "--model", tiny_model, "--seeds", "1,2", "--frames", 200000, "-o", "w.gif")
    child = start(*words, "--manifest", "m", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not files(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and out == b"" and b"w.gif is not written" in err and b"Traceback" not in err
    assert files(tmp_path) == []


def test_interrupted_frames_say_how_to_go_on(tmp_path, tiny_model):
    words = ("interpolate", "--model", tiny_model, "--seeds", "1,2", "--frames", 9000, "-o", "w")
    child = start(*words, cwd=tmp_path)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and b"--skip-existing" in err
    assert len(files(tmp_path)) == 1 + len(out.splitlines())


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["vary", "-n", "9000"], "--seed"),
        (["interpolate", "--frames", "9000"], "--seeds"),
        (["mix", "--cols", "0-8999", "--single"], "--rows"),
    ],
)
def test_interrupted_with_fresh_seeds(tmp_path, tiny_model, words, option):
    """The same command again would make pictures of somebody else."""
    child = start(*words, "--model", tiny_model, "-q", "-o", "d", cwd=tmp_path)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    there = files(tmp_path / "d")
    again = err.decode().splitlines()[-1].split("; ")[1].removesuffix(" goes on.").split()
    assert child.returncode == 130 and again[0] == option and again[-1] == "--skip-existing"
    if words[0] == "vary":
        done = shell(f"tpdne vary --model {tiny_model} -n {len(there) + 2} -q -o d {' '.join(again)}", tmp_path)
        assert done.returncode == 0 and len(files(tmp_path / "d")) == len(there) + 2, done.stderr


def test_mixing_table(cli, own, tmp_path):
    code, out, err = cli("mix", "--rows", "1,bob", "--cols", "3-5", "--styles", "0-1")
    assert (code, out, err) == (0, ["mix.png"], "")
    table, layout = opened("mix.png"), Layout(4, 3, 32, head=True)

    def cell(row, column):
        return table[layout.top(row) :, layout.left(column) :][:32, :32]

    assert table.shape == (layout.height, layout.width, 3) and (cell(0, 0) == 255).all()
    for column, seed in enumerate((3, 4, 5), 1):
        assert np.array_equal(cell(0, column), own(seed))
    for row, seed in enumerate((1, "bob"), 1):
        assert np.array_equal(cell(row, 0), own(seed))
    cli("mix", "--rows", "1,bob", "--cols", "3-5", "--styles", "0-1", "--single", "-o", "m")
    assert files(tmp_path / "m") == [f"tiny-{r}-00000{c}.png" for r in ("000001", "bob") for c in (3, 4, 5)]
    for row, r in enumerate(("000001", "bob"), 1):
        for column in (1, 2, 3):
            assert np.array_equal(cell(row, column), opened(f"m/tiny-{r}-00000{column + 2}.png"))


def test_neighbours(cli, own, tmp_path):
    code, out, err = cli("vary", "--seed", "bob", "-n", 3, "-o", "v")
    assert (code, err) == (0, "") and out == [f"v/tiny-bob-near-00{k}.png" for k in (1, 2, 3)]
    cli("vary", "--seed", "bob", "-n", 1, "-o", "one.png")
    assert np.array_equal(opened("one.png"), opened(out[0])) and not np.array_equal(opened(out[0]), opened(out[1]))
    cli("vary", "--seed", "bob", "-n", 1, "--strength", 0, "-o", "same.png")
    assert np.array_equal(opened("same.png"), own("bob"))


def test_neighbours_as_an_archive(tmp_path, tiny_model):
    done = shell(f"tpdne vary --model {tiny_model} --seed 1 -n 2 -o -", tmp_path)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert archive.getnames() == ["tiny-000001-near-001.png", "tiny-000001-near-002.png"]


def test_sheet(cli, own, tmp_path):
    code, out, err = cli("sheet", "--seed", 5, "--grid", "3x2", "--labels", "-o", "s.webp", "--quality", 100)
    assert (code, out, err) == (0, ["s.webp"], "")
    picture, layout = opened("s.webp"), Layout(3, 2, 32, labels=True)
    for index in range(6):
        top, left = layout.top(index // 3), layout.left(index % 3)
        assert np.array_equal(picture[top : top + 32, left : left + 32], own(5 + index)), index
    assert images.read_recipe("s.webp")["seed"] == [[5, 10]]


@pytest.mark.parametrize(
    ("words", "grid"),
    [(["--seeds", "0-11"], (4, 3)), (["-n", "2"], (2, 1)), (["--seeds", "0-2", "--grid", "2x2"], (2, 2)), ([], (8, 5))],
)
def test_grids_that_fit(cli, tmp_path, words, grid):
    assert cli("sheet", *words, "--size", 8)[0] == 0
    layout = Layout(*grid, 8)
    assert opened("sheet.png").shape[1::-1] == (layout.width, layout.height)


def test_fresh_sheets_can_be_made_again(cli, tmp_path):
    _, _, err = cli("sheet", "--grid", "2x2", "-o", "a.png")
    cli("sheet", *err.split(": ")[1].split(" makes")[0].split(), "-o", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    _, _, err = cli("sheet", "-n", 7, "-o", "c.png")
    cli("sheet", *err.split(": ")[1].split(" makes")[0].split(), "-o", "d.png")
    assert Path("c.png").read_bytes() == Path("d.png").read_bytes(), "seven of nine cells"


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("1,2", [1, 2]), ("5-8", [5, 6, 7, 8]), ("alice@example.com, Zoë ,3", ["alice@example.com", "Zoë", 3])],
)
def test_lists_of_seeds(text, seeds):
    assert latent.seed_list(text) == seeds


@pytest.mark.parametrize("text", ["", "1,,2", "1,", "9-2", "4294967296"])
def test_lists_that_are_none(text):
    with pytest.raises(SeedError):
        latent.seed_list(text)


def test_runs_of_seeds_are_short():
    assert runs([1, 2, 3, "a", 9, 10, 4]) == [[1, 3], "a", [9, 10], [4, 4]]


WALK = ["interpolate", "--frames", "4"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["interpolate", "--seeds", "1"], "at least two seeds"),
        (["interpolate", "--seeds", "1,1"], "from 1 to 1 itself"),
        (["interpolate", "--seeds", "1,2,1", "--loop"], "a loop returns"),
        (["interpolate", "--seeds", "1,2", "--frames", "0"], "cannot visit 2 keys"),
        (["interpolate", "--seeds", "1,,2"], "A seed is missing"),
        ([*WALK, "--seeds", "1,2", "--method", "slerp", "--space", "w"], "sphere of Z"),
        ([*WALK, "--seeds", "1,2", "--fps", "0"], "0 frames a second"),
        ([*WALK, "--seeds", "1,2", "-o", "w.gif", "--fps", "60"], "0.1..50"),
        ([*WALK, "--seeds", "1,2", "-o", "w.jpg"], "A walk is no .jpg"),
        ([*WALK, "--seeds", "1,2", "-o", "w.avi"], "A walk is no .avi"),
        ([*WALK, "--seeds", "1,2", "-o", "w.gif", "--format", "webp"], "contradicts"),
        ([*WALK, "--seeds", "1,2", "-o", "d", "--format", "gif"], "--out walk.gif"),
        ([*WALK, "--seeds", "1,2", "-o", "w.gif", "--skip-existing"], "--out DIR"),
        ([*WALK, "--seeds", "1,2", "-o", "d", "--skip-existing", "--force"], "contradict"),
        ([*WALK, "--seeds", "1,2", "-o", "-", "--json"], "both want stdout"),
        (["mix", "--rows", "1", "--cols", "2", "--styles", "rough"], "names no style layers"),
        (["mix", "--rows", "1", "--cols", "2", "--styles", "fine"], "no style layers fine"),
        (["mix", "--rows", "1", "--cols", "2", "-o", "m.gif"], "tpdne does not write"),
        (["mix", "--rows", "1", "--cols", "2,3", "--single", "-o", "m.png"], "do not fit in the one file"),
        (["mix", "--rows", "1,1", "--cols", "2", "--single"], "given twice"),
        (["vary", "--seed", "1", "--strength", "-1"], "strength -1.0 is outside"),
        (["vary", "--seed", "1", "--fine"], "no style layers fine"),
        (["vary", "--seed", "1", "--fine", "--strength", "1"], "leave one of them out"),
        (["vary", "--seed", "1", "-n", "0"], "0"),
        (["sheet", "--grid", "0x5"], "is not a grid"),
        (["sheet", "--grid", "2x2", "--seeds", "0-9"], "does not suit 10 images"),
        (["sheet", "--grid", "2000x1000", "--seed", "a"], "2,000,000 images is too large: ask for 1,000,000"),
        (["sheet", "-n", "1000001"], "A sheet of 1,000,001 images"),
        (["sheet", "-n", "1", "--quality", "50"], "png is lossless"),
        (["mix", "--quality", "50"], "png is lossless"),
        ([*WALK, "--seeds", "1,2", "--format", "jpg"], "--out walk/"),
        (["sheet", "--grid", "2000x2", "--seed", "1", "-o", "s.jpg"], "write a .png"),
        (["sheet", "--seed", "1", "--truncation", "nan"], "not a number"),
    ],
)
def test_one_sentence_for_what_cannot_be(cli, tmp_path, words, sentence):
    code, out, err = cli(*words)
    assert code == 2 and out == [] and sentence in err and "Traceback" not in err
    assert len(err.splitlines()) == 1 and files(tmp_path) == []


@pytest.mark.parametrize("command", ["interpolate", "mix", "vary", "sheet"])
def test_commands_exist_everywhere_alike(command, cli, capsys, tmp_path):
    assert command in COMMANDS
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--model" in text and "--device" in text and f"tpdne {command}" in text
    assert run([command, "--model", "nobody"]) == 2
    assert "There is no generator called 'nobody'" in capsys.readouterr().err
    assert files(tmp_path) == []


def test_existing_files_are_refused(cli, tmp_path):
    for name, words in (("w.gif", WALK), ("m.png", ["mix"]), ("s.png", ["sheet", "-n", "1"])):
        Path(name).write_bytes(b"mine")
        code, _, err = cli(*words, "-o", name)
        assert code == 1 and "exists" in err and Path(name).read_bytes() == b"mine"
        assert "--force" in err and "--skip-existing" not in err, "which these commands do not have"
        code, _, err = cli(*words, "-o", f"new-{name}", "--manifest", name)
        assert code == 1 and "manifest" in err and "--force" in err and "--skip-existing" not in err
        assert cli(*words, "-o", name, "--force")[0] == 0 and Path(name).read_bytes() != b"mine"


ONE_FILE = [["sheet", "--seeds", "1,2"], ["mix", "--rows", "1", "--cols", "2"], [*WALK, "--seeds", "1,2"]]


@pytest.mark.parametrize("words", ONE_FILE, ids=lambda words: words[0])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_manifest_that_cannot_be_written_is_an_error(cli, words):
    code, (path,), err = cli(*words, "--manifest", "/dev/full")
    assert code == 1 and Path(path).exists(), "the picture is whole, and told"
    assert err == "Error: The manifest /dev/full cannot be written: No space left on device.\n"


@pytest.mark.parametrize(
    ("words", "format", "name"),
    [(ONE_FILE[0], "jpg", "sheet.jpg"), (ONE_FILE[1], "webp", "mix.webp"), (ONE_FILE[2], "gif", "walk.gif"),
     (ONE_FILE[2], "png", "walk.png")],
)  # fmt: skip
def test_a_format_names_the_file_where_nobody_does(cli, words, format, name):
    assert cli(*words, "--format", format)[:2] == (0, [name])
    assert Image.open(name).format == {"jpg": "JPEG"}.get(format, format.upper())


@pytest.mark.parametrize("words", [["sheet"], ["interpolate", "--frames", 12000, "--method", "linear"]])
def test_more_seeds_than_a_file_can_name_are_refused_before_anything_is_drawn(cli, tmp_path, monkeypatch, words):
    def render(*_):
        raise AssertionError("drawn")

    monkeypatch.setattr(Sampler, "render", render)
    seeds = ",".join(map(str, range(0, 36000, 3)))
    code, out, err = cli(*words, "--seeds", seeds)
    assert (code, out) == (1, []) and "fewer" in err and "--no-metadata" in err and len(err.splitlines()) == 1
    assert files(tmp_path) == []


FILES = [
    ["vary", "--seed", "1", "-n", "1"],
    ["mix", "--rows", "1", "--cols", "2", "--single"],
    ["interpolate", "--seeds", "1,2", "--frames", "2"],
]


@pytest.mark.parametrize("words", FILES, ids=lambda words: words[0])
def test_files_are_written_as_they_are_asked_for(cli, words):
    options = ["--format", "jpg", "--quality", "40", "--size", "20"]
    code, (path, *_), err = cli(*words, *options, "-o", "a")
    assert code == 0, err
    marks = metadata.read_marks(path)
    assert {"format": "jpg", "quality": 40, "width": 20, "height": 20}.items() <= marks.image.items()
    code, (path, *_), err = cli(*words, *options, "-o", "b", "--no-metadata")
    assert code == 0 and metadata.read_marks(path) == metadata.Marks() and Image.open(path).size == (20, 20)


def test_a_walk_is_the_one_that_was_asked_for(cli):
    way = {"frames": 5, "loop": True, "method": "linear", "space": "z", "easing": "in-out"}
    options = [w for name, value in way.items() for w in ([f"--{name}"] if value is True else [f"--{name}", value])]
    code, (path,), err = cli("interpolate", "--seeds", "1,2", *options, "-o", "w.webp")
    assert code == 0, err
    assert images.read_recipe(path)["latent"] == {"kind": "walk", **way}


def test_a_manifest_that_another_run_began_meanwhile_is_left_to_it(cli, monkeypatch):
    """Both had looked before: the picture is whole and told, its line would have cost the other run's lines."""
    monkeypatch.setattr(latent, "check_manifest", lambda *_: None)
    with open_manifest("m") as manifest:
        code, out, err = cli("sheet", "--seeds", "1,2", "--manifest", "m")
        manifest.add({"path": "a.png"})
    assert (code, out) == (1, ["sheet.png"]) and "Another run is writing the manifest m" in err
    assert Path("m").read_bytes() == b'{"path": "a.png"}\n' and Path("sheet.png").exists()


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(
    "words",
    [
        ["sheet", "--seeds", "0-3", "--grid", "2x2", "-o", "a.png"],
        ["interpolate", "--seeds", "1,2", "--frames", "3", "-o", "./a.png"],
        ["mix", "--rows", "1", "--cols", "2", "-o", "a.png"],
        ["vary", "--seed", "1", "-n", "1", "-o", "a.png"],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_manifest_is_not_the_image(cli, words, force):
    code, out, err = cli(*words, "--manifest", "a.png", *force)
    assert (code, out) == (1, []) and "would be the image itself" in err
    assert not Path("a.png").exists()
