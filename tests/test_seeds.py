"""seeds.py: the addresses keep their meaning; golden values come from numpy's frozen generator."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from conftest import golden, load_tensors
from hypothesis import given
from hypothesis import strategies as st

from tpdne_cli import seeds
from tpdne_cli.errors import SeedError


def test_integer_seeds_are_numpys_frozen_stream():
    np.testing.assert_allclose(seeds.latent(0, 3), [1.76405235, 0.40015721, 0.97873798], atol=5e-9)


def test_integer_seeds_are_those_of_the_published_tools():
    z = load_tensors(golden("sg2_skip") / "io.safetensors")["z"].numpy()
    assert np.array_equal(seeds.latents([0, 1, 42], z.shape[1]), z)


def test_text_seeds_are_sha256_into_an_array_seed():
    """Written down at the first release: these numbers must never change."""
    np.testing.assert_allclose(seeds.latent("alice@example.com", 3), ALICE, atol=5e-9)
    words = [
        int.from_bytes(hashlib.sha256(b"alice@example.com").digest()[i : i + 4], "little") for i in range(0, 32, 4)
    ]
    assert np.array_equal(seeds.latent("alice@example.com", 8), np.random.RandomState(words).randn(8))


ALICE = [1.4004924238050906, -0.9457185480351399, 2.264117482613399]


def test_composed_and_decomposed_text_are_the_same_seed():
    assert seeds.parse_seed("Zo\u0065\u0308") == seeds.parse_seed("Zo\u00eb")
    assert np.array_equal(seeds.latent("Zo\u0065\u0308", 4), seeds.latent("Zo\u00eb", 4))


def test_a_purpose_gives_an_independent_stream():
    a, b = seeds.random_state(5).randn(1000), seeds.random_state(5, "noise").randn(1000)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("seed", "purpose", "first"),
    [
        (5, "noise", [-0.14199370611583667, 0.07051458052582074, 1.9215866365592749]),
        ("bob", "noise", [0.5601219527351061, -0.6165790461269126, 0.24969690373184844]),
        (5, "neighbour 1", [0.26608814204732456, -1.1418154677160128, -0.39395951225345066]),
    ],
)
def test_streams_of_a_purpose_stay_what_they_are(seed, purpose, first):
    """As they were when they first drew an image: --noise random and vary keep their promise by them."""
    np.testing.assert_allclose(seeds.random_state(seed, purpose).randn(3), first, atol=5e-9)


@pytest.mark.parametrize(
    ("text", "seed"), [("0", 0), ("42", 42), ("007", 7), ("4294967295", 2**32 - 1), ("a 1", "a 1")]
)
def test_parse(text, seed):
    assert seeds.parse_seed(text) == seed


@pytest.mark.parametrize("text", ["", "  ", "-1", "4294967296", "9" * 5000, "\udc80"])
def test_what_is_not_a_seed_is_said_to_be_none(text):
    with pytest.raises(SeedError):
        seeds.parse_seed(text)


def test_ranges():
    assert list(seeds.flatten(seeds.parse_ranges("0-3, 205,300-301"))) == [0, 1, 2, 3, 205, 300, 301]
    assert seeds.flatten(seeds.parse_ranges("0-4000000000")) == range(4_000_000_001)  # and takes no memory


@pytest.mark.parametrize("text", ["", "1-", "a-b", "5-1", "1,,2", "1..5", "0x10", "0-4294967296", "٣"])
def test_bad_ranges(text):
    with pytest.raises(SeedError):
        seeds.parse_ranges(text)


def test_lines_say_where_they_fail():
    assert list(seeds.parse_lines(["1\n", "\n", "bob\r\n"], "list")) == [1, "bob"]
    with pytest.raises(SeedError, match="list, line 2"):
        list(seeds.parse_lines(["1", "-5"], "list"))


def test_successors_are_seeds_of_their_own():
    assert list(seeds.successors(5, 3)) == [5, 6, 7]
    assert list(seeds.successors("bob", 3)) == ["bob", "bob#1", "bob#2"]
    with pytest.raises(SeedError):
        seeds.successors(2**32 - 2, 3)


def test_fresh_seeds_differ():
    assert len(seeds.fresh(10)) == 10
    assert seeds.fresh(10) != seeds.fresh(10)


@given(st.text(min_size=1))
def test_any_text_is_a_seed_or_a_sentence(text):
    try:
        seed = seeds.parse_seed(text)
    except SeedError as error:
        assert str(error)
    else:
        assert seeds.latent(seed, 4).shape == (4,)
        assert seeds.parse_seed(str(seed)) == seed, "a seed that is shown can be given again"


@pytest.mark.parametrize("text", [" bob", "bob ", "a  b", "Bob", "\ufb01nn", "x\u00b2", "\uff42\uff4f\uff42"])
def test_a_text_is_the_seed_as_it_was_typed(text):
    """In NFC and changed in no other way, or accounts would get other faces: not trimmed, no case, no NFKC."""
    words = np.frombuffer(hashlib.sha256(text.encode()).digest(), "<u4")
    assert seeds.parse_seed(text) == text
    assert np.array_equal(seeds.latent(seeds.parse_seed(text), 4), np.random.RandomState(words).randn(4))


def test_fresh_seeds_come_from_the_whole_range(monkeypatch):
    asked = []
    monkeypatch.setattr("secrets.randbelow", lambda n: asked.append(n) or n - 1)
    assert seeds.fresh(3) == range(2**32 - 3, 2**32)
    assert asked == [2**32 - 2], "every place is as likely"


def test_a_list_that_windows_wrote():
    assert list(seeds.parse_lines(["\ufeff7\r\n", "bob\r\n"], "list")) == [7, "bob"]


def test_a_number_of_any_length_is_refused_by_its_own_digits():
    for digits in ("1" * 43, "9" * 5000):
        with pytest.raises(SeedError, match=f"seed {digits[:12]}"):
            seeds.parse_seed(digits)
