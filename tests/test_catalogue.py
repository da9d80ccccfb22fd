"""The catalogue of published generators: whole, named well, licences told."""

from __future__ import annotations

import re
import sys
from urllib.parse import urlsplit

import pytest

from tpdne_cli import catalogue, store
from tpdne_cli.download import file_name
from tpdne_cli.errors import ModelNotFoundError


@pytest.mark.parametrize("entry", catalogue.ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_can_be_pulled(entry: catalogue.Entry) -> None:
    assert store.is_name(entry.name)
    assert catalogue.find(entry.name) is entry
    assert urlsplit(entry.url).scheme == "https" and urlsplit(entry.url).hostname.endswith(".nvidia.com")
    assert file_name(entry.url).endswith(".pkl") and entry.url.count("//") == 1
    assert entry.resolution in (32, 256, 512, 1024)
    if "x" in entry.name.rsplit("-", 1)[-1]:
        assert entry.name.endswith(f"-{entry.resolution}x{entry.resolution}")


@pytest.mark.parametrize("entry", catalogue.ENTRIES, ids=lambda entry: entry.name)
def test_every_licence_is_told(entry: catalogue.Entry) -> None:
    assert "NVIDIA Source Code License" in entry.licence
    assert entry.licence_url.startswith("https://") and "not for commercial use" in entry.terms


def test_what_is_pinned_is_a_sha256_and_a_size() -> None:
    pinned = [entry for entry in catalogue.ENTRIES if entry.sha256]
    assert {entry.name for entry in pinned} == {"ada-ffhq", "stylegan2-ffhq-config-f"}
    assert all(re.fullmatch("[0-9a-f]{64}", entry.sha256) for entry in pinned)
    sized = [entry for entry in catalogue.ENTRIES if entry.bytes]
    assert len(sized) == len(catalogue._KNOWN) and all(2.5e8 < entry.bytes < 4e8 for entry in sized)


def test_names_and_addresses_are_used_once() -> None:
    for values in ([e.name for e in catalogue.ENTRIES], [e.url for e in catalogue.ENTRIES]):
        assert len(values) == len(set(values))


def test_no_name_hides_a_bundled_generator() -> None:
    assert not {"faces", "cats"} & {entry.name for entry in catalogue.ENTRIES}


def test_faces_come_first_then_cats() -> None:
    kinds = [0 if "faces" in e.shows else 1 if "cats" in e.shows else 2 for e in catalogue.ENTRIES]
    assert kinds == sorted(kinds) and set(kinds) == {0, 1, 2}


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    for name, near in {"afhqcat": "ada-afhqcat", "stylegan3-r-fhq-1024x1024": "stylegan3-r-ffhq-1024x1024"}.items():
        with pytest.raises(ModelNotFoundError, match=near):
            catalogue.find(name)
    for name in ("", "zzzzzz"):
        with pytest.raises(ModelNotFoundError, match="tpdne models pull"):
            catalogue.find(name)


def test_whoever_is_asked_to_agree_sees_to_what(cli, monkeypatch) -> None:
    entry = catalogue.ENTRIES[0]
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr("click.confirm", lambda *_, **__: False)
    code, _, err = cli("models", "pull", entry.name, "--quiet")
    assert code == 2 and entry.licence in err and entry.licence_url in err and entry.terms in err
