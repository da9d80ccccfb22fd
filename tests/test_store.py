"""Where files live: places, names, records and locks."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpdne_cli import store
from tpdne_cli.errors import OutputError, SettingsError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TPDNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_one_setting_holds_everything(home: Path) -> None:
    for place in (store.models_dir(), store.cache_dir(), store.seen_path("https://h.example/x")):
        assert home in place.parents and not place.exists()  # asking where makes nothing


def test_without_it_the_platform_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TPDNE_HOME", raising=False)
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert store.data_dir() == tmp_path / "data" / "tpdne"
        assert store.cache_dir() == tmp_path / "cache" / "tpdne"
    assert store.data_dir() != store.cache_dir()


def test_backups_leave_the_cache_out(home: Path) -> None:
    tag = store.make_cache_dir() / "CACHEDIR.TAG"
    assert tag.read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_a_place_that_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TPDNE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="TPDNE_HOME names another place"):
        store.make_cache_dir()


@pytest.mark.parametrize("name", ["faces", "stylegan3-r-ffhq-1024x1024", "a", "0.5_x", "console"])
def test_names(name: str) -> None:
    assert store.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Cat",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "a\0",
        "-x",
        "con",
        "nul.x",
        "com1",
        "x-critic",
        "x.",
        "ä",
        "a" * 101,
    ],
)
def test_no_names(name: str) -> None:
    with pytest.raises(SettingsError, match="is no name for a generator"):
        store.check_name(name)


@given(st.text())
def test_a_name_out_of_any_file_name_is_one(text: str) -> None:
    try:
        name = store.name_for(text)
    except SettingsError as error:
        assert "--name" in str(error)
    else:
        assert store.is_name(name)


def test_names_out_of_file_names() -> None:
    for text, name in {"Dishes (v2).PKL": "dishes-v2", "ffhq.pkl": "ffhq", "a.b.pt": "a.b", "_x_.pth": "x"}.items():
        assert store.name_for(text) == name


def test_records_come_back_and_lost_ones_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    store.write_json(path, {"a": [1, "ü"]})
    assert store.read_json(path) == {"a": [1, "ü"]}
    for damage in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(damage)
        assert store.read_json(path) == {}
    assert store.read_json(tmp_path) == {}


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * (2**20 + 1))
    assert store.file_sha256(tmp_path / "x") == hashlib.sha256(b"x" * (2**20 + 1)).hexdigest()


def test_a_lock_keeps_others_out_and_dies_with_its_owner(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "x.lock"
    script = (
        "import sys; from pathlib import Path; from tpdne_cli import store\n"
        "with store.locked(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "mine\n"
        assert store.is_locked(lock)
        threading.Timer(0.1, process.kill).start()
        with store.locked(lock):  # waits until the owner is gone
            assert store.is_locked(lock) and process.wait() != 0
    assert not store.is_locked(lock)
