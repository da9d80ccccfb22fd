"""The command line as users see it: streams, exit codes, sentences."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import ENVIRONMENT, files, shell, start

from tpdne_cli import metadata
from tpdne_cli.cli import COMMANDS, run


@pytest.fixture
def cli(capsys, tmp_path, tiny_model, monkeypatch):
    """Call `tpdne generate MODEL ...` in an empty directory -> (exit code, lines on stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, command: str = "generate"):
        model = [str(tiny_model)] if command == "generate" else []
        code = run([command, *model, *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def test_one_path_per_image_on_stdout(cli, tmp_path):
    code, out, err = cli("--seeds", "3-5", "--out", "d")
    assert code == 0
    assert out == ["d/tiny-000003.png", "d/tiny-000004.png", "d/tiny-000005.png"]
    assert files(tmp_path) == out
    assert err == ""


def test_fresh_seeds_are_shown_and_make_the_same_images_again(cli, tmp_path):
    code, out, err = cli("-n", "2", "-o", "a")
    assert code == 0 and "--seed" in err
    again = err.split("--seed ")[1].split()[0]
    cli("--seed", again, "-n", "2", "-o", "b")
    assert [Path(p).read_bytes() for p in out] == [(tmp_path / "b" / Path(p).name).read_bytes() for p in out]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_files_are_identical_at_any_batch_size_and_in_any_order(cli, tmp_path, batch):
    cli("--seeds", "0-6", "--seed", "bob", "-o", "a")
    cli("--seed", "bob", "--seeds", "6,5,4,3,2,1,0", "-o", "b", "--batch-size", batch)
    names = files(tmp_path / "a")
    assert names == files(tmp_path / "b") and len(names) == 8
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_json_describes_each_file(cli, tmp_path):
    code, out, _ = cli(
        "--seed", "bob", "-n", "2", "--json", "--format", "webp", "--size", "48", "--manifest", "m.jsonl"
    )
    assert code == 0
    records = [json.loads(line) for line in out]
    assert [r["seed"] for r in records] == ["bob", "bob#1"]
    for r in records:
        assert Image.open(r["path"]).size == (r["width"], r["height"]) == (48, 48)
        assert Path(r["path"]).stat().st_size == r["bytes"]
    assert [json.loads(line) for line in Path("m.jsonl").read_text().splitlines()] == records


def test_the_recipe_in_a_file_makes_it_again(cli, tmp_path):
    from tpdne_cli import read_recipe

    _, (path,), _ = cli("--seed", "Zoë <&>", "--truncation", "0.4", "--noise", "random")
    recipe = read_recipe(path)
    _, (again,), _ = cli("--seed", recipe["seed"], "--truncation", recipe["truncation"], "--noise", recipe["noise"],
                         "-o", "again")  # fmt: skip
    assert Path(path).read_bytes() == Path(again).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--truncation", "0.3"], {"truncation": 0.3}),
        (["--truncation-cutoff", "2"], {"truncation_cutoff": 2}),
        (["--noise", "random"], {"noise": "random"}),
        (["--noise", "none"], {"noise": "none"}),
        (["--precision", "float16"], {"precision": "float16"}),
        (["--attr", "smile=1"], {"attributes": {"smile": 1.0}}),
        (["--format", "jpg", "--quality", "40"], {"format": "jpg", "quality": 40}),
        (["--format", "webp", "--quality", "100", "--size", "20"], {"format": "webp", "quality": 100, "width": 20}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_option_is_in_the_file_that_it_made(cli, options, said):
    code, (path,), err = cli("--seed", "1", *options)
    assert code == 0, err
    marks = metadata.read_marks(path)
    assert said.items() <= {**marks.recipe, **marks.image}.items()


def test_no_metadata_leaves_nothing_behind(cli):
    from tpdne_cli import read_recipe

    _, (path,), _ = cli("--seed", "1", "--no-metadata")
    assert read_recipe(path) is None
    assert b"xmp" not in Path(path).read_bytes().lower()


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("deep/a.webp", "WEBP")])
def test_one_file_by_name(cli, name, kind):
    code, out, _ = cli("--seed", "1", "-o", name)
    assert (code, out) == (0, [name])
    assert Image.open(name).format == kind


@pytest.mark.parametrize("name", ["a.gif", "deep/a.BMP", "a.tiff"])
def test_a_file_of_another_format_is_not_taken_for_a_directory(cli, tmp_path, name):
    code, out, err = cli("--seed", "1", "-o", name)
    assert (code, out) == (2, []) and "name a .png, .jpg or .webp file" in err
    assert list(tmp_path.iterdir()) == []
    assert cli("--seed", "1", "-o", f"{name}/")[1] == [f"{name}/tiny-000001.png"], "so it is, if asked for"


def test_a_quality_that_the_format_lacks_is_refused_before_anything_is_said(cli, tmp_path):
    code, out, err = cli("--quality", "50")
    assert (code, out, err.count("\n")) == (2, [], 1) and "png is lossless" in err
    assert list(tmp_path.iterdir()) == []


def test_standard_output_by_its_path(tiny_model, tmp_path):
    done = shell(
        f"tpdne generate {tiny_model} --seed 1 -o /dev/stdout | cmp - <(tpdne generate {tiny_model} --seed 1 -o -)",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("group", [[], ["models"]])
def test_a_group_without_its_command_shows_help_for_people(group, capsys):
    assert run(group) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Usage: tpdne") and err.count("\n") > 8 and "Error" not in err


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--cout", "1"], "Did you mean one of: '--count', '--out', '--quiet'? See"),
        (["--count", "many"], "'many' is not a valid whole number. See"),
    ],
)
def test_typing_errors_are_told_in_plain_words(cli, option, sentence):
    code, _, err = cli(*option)
    assert code == 2 and sentence in err and err.count("\n") == 1


def test_existing_files_are_refused_before_anything_is_made(cli, tmp_path):
    Path("tiny-000002.png").write_bytes(b"mine")
    code, out, err = cli("--seeds", "0-2")
    assert (code, out) == (1, [])
    assert "tiny-000002.png exists" in err and "--skip-existing" in err
    assert files(tmp_path) == ["tiny-000002.png"]
    assert cli("--seeds", "0-2", "--force")[0] == 0
    assert Image.open("tiny-000002.png").size == (32, 32)


def test_skip_existing_goes_on_where_a_run_broke_off(cli):
    _, first, _ = cli("--seeds", "0-2")
    stamps = [Path(p).stat().st_mtime_ns for p in first]
    code, out, err = cli("--seeds", "0-4", "--skip-existing")
    assert code == 0
    assert out == ["tiny-000003.png", "tiny-000004.png"]
    assert "3 of 5" in err
    assert [Path(p).stat().st_mtime_ns for p in first] == stamps


def test_skip_existing_tells_another_image_of_the_same_name(cli):
    cli("--seeds", "0-2", "--truncation", "0.5")
    code, out, err = cli("--seeds", "0-2", "--skip-existing", "--truncation", "0.6")
    assert (code, out) == (1, [])
    assert "made with truncation 0.5, not 0.6" in err and "--force" in err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--count", "0"], 2, "not in the range"),
        (["--count", "many"], 2, "not a valid whole number"),
        (["--seed", "-5"], 2, "outside 0..4294967295"),
        (["--seed", ""], 2, "empty"),
        (["--seeds", "1-x"], 2, "not a number or a range"),
        (["--seeds", "9-1"], 2, "backwards"),
        (["--seeds-from", "nowhere.txt"], 2, "cannot be read"),
        (["--seeds", "1,2", "--count", "3"], 2, "leave one of the two out"),
        (["--seeds", "1,1"], 2, "given twice"),
        (["--seed", "4294967295", "-n", "2"], 2, "fewer than 2"),
        (["--name", "../{seed}"], 2, "leads out of the output directory"),
        (["--name", "x", "-n", "2"], 2, "would be called"),
        (["--name", "{nope}"], 2, "it knows"),
        (["--out", "x.png", "-n", "2"], 2, "one file"),
        (["--out", "x.png", "--format", "jpg"], 2, "contradicts"),
        (["--force", "--skip-existing"], 2, "contradict"),
        (["--out", "-", "--json"], 2, "stdout"),
        (["--out", "/proc/nope/x"], 1, "cannot be"),
        (["--out", "taken"], 1, "is a file"),
        (["--truncation", "nan"], 2, "not a number"),
        (["--truncation-cutoff", "99"], 2, "outside 0.."),
        (["--class", "1"], 2, "no classes"),
        (["--device", "cuda:9"], 1, "CUDA"),
        (["--device", "abacus"], 1, "not a device"),
        (["--batch-size", "0"], 2, "batch size"),
        (["--batch-size", "99999999999999999999"], 2, "a number from 1 to 999999, or auto"),
        (["--batch-size", "²"], 2, "not a batch size"),
        (["--quality", "101"], 2, "not in the range"),
        (["--unknown"], 2, "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_ends_in_one_sentence(cli, tmp_path, arguments, code, sentence):
    Path("taken").write_text("a file")
    got, out, err = cli(*arguments)
    assert (got, out) == (code, [])
    assert sentence in err and err.count("\n") == 1 and "Traceback" not in err
    assert files(tmp_path) == ["taken"], "nothing is left behind"


@pytest.mark.parametrize("name", ["no-such-model", ".", "nowhere/x.safetensors", ""])
def test_unknown_models(capsys, name):
    assert run(["generate", name]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and err.count("\n") == 1


def test_damaged_models(cli, tmp_path, tiny_model):
    data = tiny_model.read_bytes()
    for name, content in {
        "empty": b"", "text": b"hello world " * 100, "cut": data[: len(data) // 2],
        "header": (2**62).to_bytes(8, "little") + b"{",
        "flipped": data[:20] + b"\xff" * 20 + data[40:],
    }.items():  # fmt: skip
        Path(f"{name}.safetensors").write_bytes(content)
        assert run(["generate", f"{name}.safetensors", "-o", "out"]) == 1, name
        assert not list(tmp_path.glob("out/*"))


def test_nan_weights(tmp_path, capsys):
    import torch

    from tpdne_cli import models
    from tpdne_cli.networks.stylegan2 import Config, Generator

    config = Config(resolution=8, z_dim=8, w_dim=8, mapping_layers=1, channel_base=64, channel_max=8)
    state = Generator(config).state_dict()
    state["synthesis.b8.conv0.weight"][0, 0, 0, 0] = torch.nan
    models.save(tmp_path / "nan.safetensors", "stylegan2", config, state)
    assert run(["generate", str(tmp_path / "nan.safetensors"), "-o", str(tmp_path)]) == 1
    assert "NaN" in capsys.readouterr().err


def test_help_of_every_command_and_no_torch(tmp_path):
    script = (
        "import sys\nfrom tpdne_cli.cli import run\n"
        f"for c in {list(COMMANDS)}: assert run([c, '--help']) == 0, c\n"
        "assert run(['--help']) == 0 and run(['--version']) == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tqdm', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def test_debug_shows_the_traceback(tmp_path):
    done = shell("tpdne generate nope", tmp_path, TPDNE_DEBUG="1")
    assert b"Traceback" in done.stderr and done.returncode == 2, "what it ends with is the same"


def test_bytes_on_stdout(tmp_path, tiny_model):
    one = shell(f"tpdne generate {tiny_model} --seed 5 -o -", tmp_path)
    assert one.returncode == 0, one.stderr
    assert Image.open(io.BytesIO(one.stdout)).size == (32, 32)
    several = shell(f"tpdne generate {tiny_model} --seeds 5-7 -o -", tmp_path)
    with tarfile.open(fileobj=io.BytesIO(several.stdout)) as tar:
        assert tar.getnames() == [f"tiny-00000{i}.png" for i in (5, 6, 7)]
        assert tar.extractfile("tiny-000005.png").read() == one.stdout
    assert files(tmp_path) == []


def test_seeds_from_a_pipe(tmp_path, tiny_model):
    done = shell(f"printf 'bob\\n\\n7\\n' | tpdne generate {tiny_model} --seeds-from -", tmp_path)
    assert done.stdout.decode().split() == ["tiny-bob.png", "tiny-000007.png"]


def test_a_reader_that_goes_away_ends_the_run_quietly(tmp_path, tiny_model):
    start = time.monotonic()
    done = shell(f"set -o pipefail; tpdne generate {tiny_model} --seeds 0-99999 -q | head -1", tmp_path)
    assert done.stdout.decode().strip() == "tiny-000000.png"
    assert done.stderr == b"" and done.returncode == 0
    assert time.monotonic() - start < 60 and len(files(tmp_path)) < 5000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_finishes_what_is_in_flight_and_says_how_to_go_on(tmp_path, tiny_model, number):
    child = start("generate", tiny_model, "--seeds", "0-99999", cwd=tmp_path)
    child.stdout.readline()
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"--skip-existing" in err and b"Traceback" not in err
    assert len(files(tmp_path)) == 1 + len(out.splitlines()), "every file was reported, and every report is a file"


def test_completion_scripts(tmp_path):
    for name in ("bash", "zsh", "fish"):
        done = shell("tpdne", tmp_path, _TPDNE_COMPLETE=f"{name}_source")
        assert done.returncode == 0 and b"tpdne" in done.stdout, name
    words = shell("tpdne", tmp_path, _TPDNE_COMPLETE="bash_complete", COMP_WORDS="tpdne fa", COMP_CWORD="1")
    assert b"faces" in words.stdout
    models = shell("tpdne", tmp_path, _TPDNE_COMPLETE="bash_complete", COMP_WORDS="tpdne generate fa", COMP_CWORD="2")
    assert b"faces" in models.stdout


def test_bundled_generators(tmp_path):
    done = shell(
        "tpdne faces --seeds 1-2 && tpdne cats --seed 1 && tpdne models list && tpdne models path cats", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == ["cats-000001.png", "faces-000001.png", "faces-000002.png"]
    a, b = (np.asarray(Image.open(tmp_path / f"faces-00000{i}.png"), float) for i in (1, 2))
    assert np.abs(a - b).mean() > 2, "two seeds, two people"
    assert a.std() > 10, "not a grey picture"


def test_an_installed_name_with_a_dot_is_whole_in_file_names(cli, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("TPDNE_HOME", str(tmp_path / "home"))
    (tmp_path / "home/models").mkdir(parents=True)
    shutil.copy(tiny_model, tmp_path / "home/models/dish.v1.safetensors")
    assert cli("--model", "dish.v1", "--seed", "1", "-n", "1", command="vary")[1] == ["dish.v1-000001-near-001.png"]
    assert run(["generate", "dish.v1", "--seed", "1"]) == run(["generate", str(tiny_model), "--seed", "1"]) == 0
    assert files(tmp_path)[:2] == ["dish.v1-000001-near-001.png", "dish.v1-000001.png"]
    assert Path("tiny-000001.png").exists(), "of a file what stands before its suffix"


@pytest.mark.parametrize("command", ["generate", "vary"])
def test_without_seeds_there_is_nothing_to_go_on_with_and_that_is_said(cli, tiny_model, command):
    model = [] if command == "generate" else ["--model", tiny_model]
    code, _, err = cli(*model, "-n", "1", "--skip-existing", command=command)
    assert code == 0 and err.count("\n") == 1 and "give its seeds" in err
    assert "give its seeds" not in cli(*model, "-n", "1", command=command)[2]
    assert cli(*model, "-n", "1", "--seed", "1", "--skip-existing", command=command)[2] == ""


def test_nothing_asks_the_network(tmp_path, monkeypatch, capsys):
    """No account, no download: what is installed works where there is no way out."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    for words in (["faces", "--seed", "1"], ["cats", "--seed", "1"], ["inspect", "--verify", "."], ["models", "list"]):
        assert run(words) == 0, capsys.readouterr().err
    assert asked == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seen(monkeypatch, call, *arguments: object) -> str:
    """What a call says on stderr where that is a terminal."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        call(*arguments)
    return terminal.getvalue()


@pytest.mark.parametrize(("option", "shown"), [([], True), (["--no-progress"], False), (["--quiet"], False)])
def test_a_terminal_sees_a_bar_unless_it_is_told_not_to(cli, monkeypatch, option, shown):
    said = seen(monkeypatch, cli, "--seeds", "1-3", *option)
    assert ("3/3" in said) == shown and (shown or said == "")


def test_quiet_says_nothing_but_results_and_errors(cli):
    assert "Fresh seed" in cli("-n", "1")[2]
    assert cli("-n", "1", "--quiet")[2] == ""


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_is_for_terminals_that_want_it(monkeypatch, capsys, name, value):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert seen(monkeypatch, run, ["generate", "nobody"]).startswith("\x1b[")
    monkeypatch.setenv(name, value)
    assert seen(monkeypatch, run, ["generate", "nobody"]).startswith("Error: ")
    assert run(["generate", "nobody"]) == 2 and capsys.readouterr().err.startswith("Error: ")


@pytest.mark.parametrize("options", [["-o", "a.png"], ["--name", "a"], ["-o", "./a.png", "--force"]], ids=" ".join)
def test_a_manifest_is_not_the_image(cli, tmp_path, options):
    code, out, err = cli("--seed", "1", *options, "--manifest", tmp_path / "a.png")
    assert (code, out) == (1, []) and "would be the image itself" in err
    assert not (tmp_path / "a.png").exists()
