"""tpdne among other tools, in a real shell: the lines of the README, closed pipes, strange names, strange locales."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from running import files, shell

from tpdne_cli.cli.output import Output, ReaderGone, writing_stdout
from tpdne_cli.errors import OutputError

jq = pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")


@pytest.fixture
def sh(tmp_path, tiny_model):
    """Run a script in an empty directory, with $MODEL in it -> (stdout, stderr); it must succeed."""

    def run(script: str, code: int = 0, **settings) -> tuple[str, str]:
        done = shell(f"set -o pipefail; MODEL='{tiny_model}'; {script}", tmp_path, **settings)
        assert done.returncode == code, done.stderr
        return done.stdout.decode(), done.stderr.decode()

    return run


@jq
def test_jq_and_xargs(sh, tmp_path):
    out, err = sh("tpdne generate $MODEL --seeds 0-4 -o d --json | jq -r .path | xargs ls -l")
    assert err == "" and [line.split()[-1] for line in out.splitlines()] == [f"d/{n}" for n in files(tmp_path / "d")]
    out, _ = sh("tpdne generate $MODEL --seed bob -n 2 --json | jq -c '[.seed, .truncation, .width, .format]'")
    assert out == '["bob",0.8,32,"png"]\n["bob#1",0.8,32,"png"]\n'


@jq
def test_every_line_of_json_describes_its_file(sh, tmp_path, tiny_model):
    """Each line tells what the standard tools say of the file."""
    out, _ = sh(
        "tpdne generate $MODEL --seeds 0-2 --format jpg --json | tee log |"
        "jq -r '[.path, .bytes, .sha256] | @tsv' | while IFS=$'\\t' read -r path bytes sha; do"
        ' test "$(stat -c %s "$path")" = "$bytes" && echo "$sha  $path" | sha256sum --check --quiet && echo ok; done'
    )
    assert out == "ok\n" * 3
    keys = {
        "path", "model", "weights", "seed", "truncation", "truncation_cutoff", "noise", "class_index", "precision",
        "device", "version", "format", "quality", "width", "height", "bytes", "sha256", "seconds",
    }  # fmt: skip
    for line in (tmp_path / "log").read_text().splitlines():
        record = json.loads(line)
        assert set(record) == keys
        assert record["weights"] == hashlib.sha256(tiny_model.read_bytes()).hexdigest()
        assert record["seconds"] > 0


def test_lines_come_as_the_images_are_finished(sh):
    """The loop sees the first path while later images are not made yet."""
    out, _ = sh("tpdne generate $MODEL --seeds 0-3000 -q | while read -r path; do ls | wc -l; break; done; ls | wc -l")
    assert int(out.split()[0]) < 3000


def test_tar_is_read_by_tar(sh, tmp_path):
    sh("mkdir d; tpdne generate $MODEL --seeds 0-4 --name '{seed}/x' --out - | tar x -C d; "
       "tpdne generate $MODEL --seeds 0-4 --name '{seed}/x' --out f")  # fmt: skip
    assert files(tmp_path / "d") == files(tmp_path / "f") == [f"00000{i}/x.png" for i in range(5)]
    for name in files(tmp_path / "d"):
        assert (tmp_path / "d" / name).read_bytes() == (tmp_path / "f" / name).read_bytes()
    out, err = sh("tpdne generate $MODEL --seeds 0-4 --out - --manifest m | tar t && wc -l < m")
    assert err == "" and out.split() == [*(f"tiny-00000{i}.png" for i in range(5)), "5"]
    names = [json.loads(line)["path"] for line in (tmp_path / "m").read_text().splitlines()]
    assert names == out.split()[:5], "a manifest beside an archive names its members"


@pytest.mark.parametrize(
    "script",
    [
        "tpdne generate $MODEL --seeds 0-9999 | head -1",
        "tpdne generate $MODEL --seeds 0-9999 --json | head -1",
        "tpdne generate $MODEL --seeds 0-9999 --out - | head -c 1000 | wc -c",
        "tpdne generate $MODEL --seeds 0-9999 | true; echo x",
        "tpdne generate $MODEL --seed 1 -o - | true; echo x",
    ],
)
def test_a_closed_pipe_ends_the_run_quietly_and_at_once(sh, tmp_path, script):
    start = time.monotonic()
    out, err = sh(script)
    assert err == "" and out.count("\n") == 1
    assert time.monotonic() - start < 60 and len(files(tmp_path)) < 5000


def test_a_closed_pipe_on_windows(monkeypatch):
    for platform, expected in (("win32", ReaderGone), ("linux", OutputError)):
        monkeypatch.setattr(sys, "platform", platform)
        with pytest.raises(expected), writing_stdout():
            raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("script", ["tpdne generate $MODEL --seed 1", "tpdne generate $MODEL --seeds 1-2 -o -"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_stdout_is_an_error(sh, script):
    _, err = sh(f"{script} > /dev/full", code=1)
    assert err.splitlines()[-1] == "Error: Standard output cannot be written: No space left on device."


class Full(io.StringIO):
    """A log on a disk that is full."""

    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_stderr_that_cannot_be_written_costs_no_image_and_changes_no_exit_code(cli, tiny_model, monkeypatch):
    """With 2>log it is another disk that is full, not the images'."""
    monkeypatch.setattr(sys, "stderr", Full())
    code, out, _ = cli("generate", tiny_model, "-n", 3, "-o", "d")
    assert code == 0 and len(out) == 3 and files(Path()) == out
    assert cli("generate", tiny_model, "--count", 0)[0] == 2
    assert cli("generate", tiny_model, "--seed", 1, "-o", "/dev/null/x")[0] == 1
    assert cli()[0] == 2


@pytest.mark.parametrize(
    "script", ["tpdne generate $MODEL -n 3 2>&1 >paths | true", "tpdne generate $MODEL -n 3 2>/dev/full >paths"]
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_log_that_nobody_reads_or_that_fills_its_disk(sh, tmp_path, script):
    sh(script)
    assert files(tmp_path) == ["paths", *(tmp_path / "paths").read_text().split()]


def test_a_result_is_with_its_reader_at_once(monkeypatch):
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(pipe)))
    Output().result("a.png")
    assert pipe.getvalue() == b"a.png\n"


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_streams_that_the_caller_closed(sh, tmp_path, closed):
    sh(f"tpdne generate $MODEL --seeds 1-2 -o d --manifest m {closed}", cold=True)
    assert files(tmp_path) == ["d/tiny-000001.png", "d/tiny-000002.png", "m"]
    for name in files(tmp_path / "d"):
        Image.open(tmp_path / "d" / name).load()
    assert (tmp_path / "m").read_text().count("\n") == 2


NASTY = ["a b", "new\nline", "Zoë 面 🐈", "-n", 'it\'s "quoted" $HOME `x` \\', "%s*?[", "\x1b[31mred"]


def test_directories_of_any_name(sh, tmp_path):
    for name in NASTY:
        (tmp_path / name).mkdir()
        (tmp_path / "name").write_text(name)
        sh('D="./$(cat name)"; tpdne generate $MODEL --seeds 0-1 -o "$D" --print0 | xargs -0 -n1 mv -t .')
        assert files(tmp_path) == ["name", "tiny-000000.png", "tiny-000001.png"], name
        _, err = sh('D="./$(cat name)"; tpdne generate $MODEL --seed 0; tpdne generate $MODEL --seed 0 -o "$D/x/"; '
                    'tpdne generate $MODEL --seed 0 -o "$D/x/"', code=1)  # fmt: skip
        lines = err.splitlines()
        assert len(lines) == 2 and all(line.startswith("Error: ") and line.isprintable() for line in lines), lines
        sh("rm -rf tiny* ./*/")


def test_a_path_that_looks_like_an_option(sh):
    """`xargs rm` must not take a file for a flag."""
    for call in ["-o ./-rf", "--name '-{seed}'"]:
        out, _ = sh(f"tpdne generate $MODEL --seed 1 {call} --manifest m; rm m", 0)
        assert out.startswith("./-")
        out, _ = sh(f"tpdne generate $MODEL --seed 2 {call} --json")
        assert json.loads(out)["path"].startswith("./-")


@pytest.mark.parametrize(
    "call", ["sheet --seeds 1,2 -o ./-x.png", "mix --rows 1 --cols 2 -o ./-x.jpg", "interpolate --frames 4 -o ./-x.gif"]
)
def test_a_path_that_looks_like_an_option_to_one_file(cli, tiny_model, call):
    command, *words = call.split()
    path = words[-1]
    code, out, _ = cli(command, "--model", tiny_model, *words)
    assert (code, out) == (0, [path]) and Path(path).exists()
    _, (line,), _ = cli(command, "--model", tiny_model, *words, "--force", "--json", "--manifest", "m")
    assert json.loads(line)["path"] == json.loads(Path("m").read_text())["path"] == path


def test_names_that_are_not_unicode(sh, tmp_path):
    """A file name on Linux is bytes; these are Latin-1."""
    sh("mkdir $'caf\\xe9'; cp $MODEL $'caf\\xe9/mod\\xe8le.safetensors'")
    out, _ = sh(
        "tpdne generate $'caf\\xe9/mod\\xe8le.safetensors' --seed 1 -o $'caf\\xe9' --name 'x-{seed}' |"
        'while IFS= read -r path; do test -f "$path" && echo found; done'
    )
    assert out == "found\n"
    out, _ = sh("tpdne generate $MODEL --seed 2 -o $'caf\\xe9' --json")
    assert json.loads(out)["path"].startswith("caf\udce9/"), "as Python's surrogateescape writes it"


LOCALES = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX", "LANG": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"},
]


@pytest.mark.parametrize("locale", LOCALES, ids=lambda locale: " ".join(f"{k}={v}" for k, v in locale.items()))
def test_locales_without_utf8(sh, tmp_path, locale):
    """Seeds come in UTF-8 by pipe, paths go out as the bytes they are."""
    out, err = sh(
        "printf 'Zoë\\n' | tpdne generate $MODEL --seeds-from - -o 'Zoë 面' --manifest m |"
        'while IFS= read -r path; do test -f "$path" && echo found; done',
        cold=True,
        **locale,
    )
    assert (out, err) == ("found\n", "")
    assert json.loads((tmp_path / "m").read_text())["seed"] == "Zoë"
    _, err = sh("tpdne generate 'kein Modell: 面'", code=2, cold=True, **locale)
    assert err.startswith("Error: ") and err.count("\n") == 1
