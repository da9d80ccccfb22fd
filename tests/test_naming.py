"""naming.py: every seed has a file of its own, and none leaves the output directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpdne_cli.errors import SettingsError
from tpdne_cli.naming import Namer, plan, safe_text


@pytest.mark.parametrize(
    ("template", "seed", "name"),
    [
        (None, 42, "faces-000042.png"),
        (None, "bob", "faces-bob.png"),
        ("{seed}", 4294967295, "4294967295.png"),
        ("{index:03d}", 42, "007.png"),
        ("a/{seed:x}.png", 255, "a/ff.png"),
        ("{model}.{seed:d}", 1, "faces.1.png"),
        ("{seed!s}", 42, "000042.png"),
        ("{seed!r:>8}", "a/b", "a_b-c14cddc033f6.png"),
    ],
)
def test_templates(template, seed, name):
    assert Namer(template, "faces", ".png")(7, seed) == name


@pytest.mark.parametrize(
    "template",
    [
        "../{seed}",
        "/tmp/{seed}",
        "a/../../{seed}",
        "C:{seed}",
        "..\\{seed}",
        "{seed",
        "{nope}",
        "{seed!z}",
        "{index:q}",
        "",
        "{seed.__class__}",
        "{0}",
        "{}",
        "a\0{seed}",
        "{seed}/",
    ],
)
def test_templates_that_are_refused(template):
    with pytest.raises(SettingsError):
        Namer(template, "faces", ".png")(0, 1)


def test_a_hostile_seed_stays_inside():
    for text in ("../../etc/passwd", "/abs", "..", ".", "a\0b", "con", "x" * 5000, "‮txt.exe", " "):
        name = Namer("{seed}", "faces", ".png")(0, text)
        assert Path(name).name == name
        assert len(name.encode()) < 200


def test_two_images_never_share_a_name():
    with pytest.raises(SettingsError, match=r"add .seed. or .index."):
        list(plan(Namer("face", "faces", ".png"), [1, 2]))
    with pytest.raises(SettingsError, match="given twice"):
        list(plan(Namer(None, "faces", ".png"), [1, 2, 1]))


@given(st.text(min_size=1), st.text(min_size=1))
def test_different_texts_have_different_names_even_without_case(a, b):
    if a != b:
        assert safe_text(a).lower() != safe_text(b).lower()


@pytest.mark.parametrize("text", ["con", "nul", "com1", "aux.v2", ".bashrc", "Bob", "x" * 200])
def test_names_that_some_system_does_not_want(text):
    """Devices of Windows, hidden files, names that differ in case only, names that are too long."""
    name = safe_text(text)
    assert name != text and name[0] != "." and name.rpartition("-")[2].isalnum() and len(name) < 100
