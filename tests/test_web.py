"""web/: the page and its HTTP interface, asked as clients ask, friendly and otherwise."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import ENVIRONMENT, serving

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from tpdne_cli import devices, images, metadata, models
from tpdne_cli.cli import run
from tpdne_cli.critic import Critic
from tpdne_cli.errors import DeviceError, SettingsError
from tpdne_cli.interpolation import interpolate
from tpdne_cli.networks.stylegan2 import Config, Generator
from tpdne_cli.sampler import Sampler, Settings
from tpdne_cli.styles import Mixer, Mixture
from tpdne_cli.training import stages
from tpdne_cli.web import app as web
from tpdne_cli.web import crew, pages, ranking
from tpdne_cli.web import server as server_room
from tpdne_cli.web.batching import Batcher, QueueFullError
from tpdne_cli.web.cache import OVERHEAD, Cache, Encoded
from tpdne_cli.web.crew import Here, Picture
from tpdne_cli.web.guard import Buckets, Rules
from tpdne_cli.web.looks import Look
from tpdne_cli.web.metrics import Metrics, resident_bytes
from tpdne_cli.web.nursery import Nursery
from tpdne_cli.web.studio import Limits, Studio

ROOT = Path(__file__).resolve().parent.parent
NO_RULES, LIMITS = Rules(), Limits()


@pytest.fixture(scope="module")
def sampler(tiny_model):
    return Sampler(models.load(tiny_model), device="cpu")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)


class Client:
    """Calls the application as a server does, without a socket."""

    def __init__(self, site, studio):
        self.site, self.studio = site, studio

    async def __call__(self, address: str, method="GET", host="localhost", client="127.0.0.1", gone=None, **headers):
        path, _, query = address.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": re.sub("%([0-9a-fA-F]{2})", lambda m: chr(int(m[1], 16)), path),
            "raw_path": path.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "root_path": "",
            "headers": [
                (name.replace("_", "-").encode(), value.encode())
                for name, value in {"host": host, **headers}.items()
                if value is not None
            ],
            "client": (client, 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            await (gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        await self.site(scope, receive, send)
        start, body = sent[0], b"".join(m.get("body", b"") for m in sent[1:])
        said = [(name.decode(), value.decode()) for name, value in start["headers"]]
        assert len(dict(said)) == len(said), f"a header is sent twice: {said}"
        return Answer(start["status"], dict(said), body)


def studio_of(sampler, limits=LIMITS):
    """A studio that draws in this process."""
    here = Here({"tiny": "unused"}, ("cpu", "auto", None))
    studio = Studio(["tiny"], here, limits, Metrics())
    studio.samplers["tiny"] = here.samplers["tiny"] = sampler
    return studio


@pytest.fixture
def ask(sampler):
    """ask(addresses..., rules=, limits=) -> answers, from a fresh server; `visit` gives the client to a coroutine."""

    @asynccontextmanager
    async def opened(rules=NO_RULES, limits=LIMITS):
        studio = studio_of(sampler, limits)
        studio.start()
        try:
            yield Client(web.create(studio, rules), studio)
        finally:
            await studio.close()

    def visit(story, **options):
        async def main():
            async with opened(**options) as client:
                return await story(client)

        return asyncio.run(main())

    def once(address, rules=NO_RULES, limits=LIMITS, **request):
        return visit(lambda client: client(address, **request), rules=rules, limits=limits)

    once.visit = visit
    return once


# --- images


@pytest.mark.parametrize(
    ("address", "options"),
    [
        ("/tiny/7.png", ["--seed", "7"]),
        ("/tiny/alice%40example.com.png", ["--seed", "alice@example.com"]),
        ("/tiny/Zoe%CC%88.webp?truncation=0.3", ["--seed", "Zoë", "--truncation", "0.3"]),
        ("/tiny/a%2Fb%20c.jpg?size=48", ["--seed", "a/b c", "--size", "48"]),
        ("/tiny/7.png?attr=smile:-1.25", ["--seed", "7", "--attr", "smile=-1.25"]),
        ("/tiny/7.png?attr=smile:0", ["--seed", "7"]),
    ],
)
def test_an_address_gives_the_very_file_that_the_command_writes(ask, tiny_model, tmp_path, address, options):
    suffix = address.partition("?")[0][-4:].lstrip(".")
    file = tmp_path / f"image.{suffix}"
    assert run(["generate", str(tiny_model), *options, "--out", str(file)]) == 0
    answer = ask(address)
    assert answer.status == 200 and answer.headers["content-type"] == images.FORMATS[suffix].mime
    assert answer.body == file.read_bytes()
    assert images.is_marked(answer.body)


def test_a_model_that_cannot_be_loaded_hides_no_other(ask, tmp_path, monkeypatch):
    (tmp_path / "broken.safetensors").write_bytes(b"\x40" + bytes(7) + b"{nonsense")
    sources = {name: str(tmp_path / f"{name}.safetensors") for name in ("large", "removed", "broken")}
    load = crew.load

    def load_small(source, placement):
        if source == sources["large"]:
            raise DeviceError("There is not enough memory for it.")
        return load(source, placement)

    monkeypatch.setattr(crew, "load", load_small)

    async def story(client):
        client.studio.names = [*sources, *client.studio.names]
        client.studio.crew.names = sources
        addresses = ("/api/models", "/tiny/1.png", *(f"/{name}/1.png" for name in sources))
        return [await client(address) for address in addresses]

    listed, well, *refused = ask.visit(story)
    assert [model["name"] for model in listed.json()] == ["tiny"] and well.status == 200
    assert [answer.status for answer in refused] == [503, 404, 503]
    assert b"removed" in refused[1].body and b"damaged" in refused[2].body
    assert not any(str(tmp_path).encode() in answer.body for answer in refused)


def test_frames_of_a_walk_are_those_of_the_library(ask, sampler):
    frames = list(interpolate(sampler.model, (1, "bob"), 5, device="cpu"))

    async def story(client):
        return [await client(f"/tiny/1.png?to=bob&frames=5&frame={k}") for k in range(5)] + [
            await client("/tiny/1.png"),
            await client("/tiny/bob.png"),
        ]

    *walked, first, last = ask.visit(story)
    for frame, answer in zip(frames, walked, strict=True):
        assert (images.read_pixels(answer.body) == frame.pixels).all()
    assert images.read_recipe(walked[2].body) == frames[2].recipe, "its recipe makes it again"
    assert walked[0].body == first.body
    assert (images.read_pixels(walked[4].body) == images.read_pixels(last.body)).all()


def test_mixtures_are_those_of_the_library(ask, sampler):
    (sample,) = Mixer(sampler, "middle")([Mixture("bob", 1)])
    answer = ask("/tiny/1.png?mix=bob&styles=middle")
    assert (images.read_pixels(answer.body) == sample.pixels).all()
    assert images.read_recipe(answer.body) == sample.recipe


def test_requests_that_come_together_share_batches_and_change_nothing(ask):
    addresses = [f"/tiny/{k}.png?truncation={k % 3 / 2}&attr=smile:{k % 2}" for k in range(12)]

    async def story(client):
        together = await asyncio.gather(*map(client, addresses))
        return together, client.studio.metrics.values[("tpdne_batches_total", (("model", "tiny"),))]

    together, batches = ask.visit(story)
    assert batches <= 4
    for address, answer in zip(addresses, together, strict=True):
        assert ask(address).body == answer.body, address


def test_equal_requests_at_once_are_made_once(ask):
    async def story(client):
        answers = await asyncio.gather(*[client("/tiny/5.png") for _ in range(20)])
        return answers, client.studio.metrics.values[("tpdne_images_total", (("model", "tiny"),))]

    answers, made = ask.visit(story)
    assert made == 1 and len({a.body for a in answers}) == 1 and {a.status for a in answers} == {200}


def test_validators(ask):
    async def story(client):
        first = await client("/tiny/5.png")
        tag = first.headers["etag"]
        assert re.fullmatch(r'"[0-9a-f]{32}"', tag), "a strong validator"
        assert first.headers["cache-control"] == "public, no-cache", "a file may be replaced, and the address stays"
        again = await client("/tiny/5.png", if_none_match=f'"other", W/{tag}')
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
        assert again.headers["cache-control"] == "public, no-cache"
        assert (await client("/tiny/5.png?truncation=0.8")).headers["etag"] == tag, "0.8 is the model's own"
        for other in ("/tiny/6.png", "/tiny/5.jpg", "/tiny/5.png?size=16", "/tiny/5.png?truncation=0.5"):
            assert (await client(other)).headers["etag"] != tag, other

    ask.visit(story)


def test_images_of_a_bundled_generator_are_kept_for_ever(ask, tiny_model, monkeypatch):
    monkeypatch.setattr(models, "weights_dir", lambda: tiny_model.parent)
    first = ask("/tiny/5.png")
    again = ask("/tiny/5.png", if_none_match=first.headers["etag"])
    assert first.headers["cache-control"] == again.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert again.status == 304


@pytest.mark.parametrize("first", ["-0", "0"])
def test_there_is_one_zero(ask, first):
    async def story(client):
        return [await client(f"/tiny/77.png?truncation={zero}") for zero in (first, "0", "-0.0")]

    answers = ask.visit(story)
    assert len({(a.headers["etag"], a.body) for a in answers}) == 1
    assert b'"truncation":-0.0' not in answers[0].body


def test_who_has_an_image_already_costs_no_work(ask):
    tag = ask("/tiny/5.png").headers["etag"]

    async def story(client):
        answer = await client("/tiny/5.png", if_none_match=tag)
        return answer, client.studio.metrics.values[("tpdne_images_total", (("model", "tiny"),))]

    answer, made = ask.visit(story)
    assert answer.status == 304 and made == 0


def test_random_leads_to_a_permanent_address_and_is_never_kept(ask):
    async def story(client):
        return [await client("/tiny/random.jpg?size=16") for _ in range(3)]

    answers = ask.visit(story)
    places = {a.headers["location"] for a in answers}
    assert len(places) == 3 and {a.status for a in answers} == {303}
    assert all(re.fullmatch(r"/tiny/\d+\.jpg\?size=16", place) for place in places)
    assert {a.headers["cache-control"] for a in answers} == {"no-store"}


def test_head_says_what_get_says(ask):
    get, head = ask("/tiny/5.png"), ask("/tiny/5.png", method="HEAD")
    assert head.status == 200 and head.headers == get.headers


# --- what is refused


@pytest.mark.parametrize(
    "address",
    [
        "/tiny/../../etc/passwd",
        "/tiny/%2e%2e%2f%2e%2e%2fetc%2fpasswd.png",
        "/tiny/..%5c..%5cwindows.png",
        "/tiny/...png",
        "/tiny/..",
        "/tiny/.",
        "/tiny/%00.png",
        "/tiny/a%0d%0aSet-Cookie:%20x.png",
        "/tiny/%E2%80%AEgnp.exe.png",
        "/tiny/%ED%A0%80.png",
        "/tiny/%FF%FE.png",
        "/tiny/%C0%AF.png",
        "/tiny/%EF%BF%BF.png",
        "/tiny/%zz.png",
        "/tiny/%.png",
        "/tiny/%20.png",
        "/tiny/-1.png",
        "/tiny/4294967296.png",
        "/tiny/" + "9" * 200 + ".png",
        "/tiny/" + "x" * 257 + ".png",
        "/tiny/5.png?size=0",
        "/tiny/5.png?size=1025",
        "/tiny/5.png?size=-1",
        "/tiny/5.png?size=1e3",
        "/tiny/5.png?size=%D9%A3",
        "/tiny/5.png?size=16&size=16",
        "/tiny/5.png?truncation=nan",
        "/tiny/5.png?attr=",
        "/tiny/5.png?attr=smile",
        "/tiny/5.png?attr=smile:much",
        "/tiny/5.png?attr=smile:11",
        "/tiny/5.png?attr=smile:1,smile:2",
        "/tiny/5.png?attr=mood:1",
        "/tiny/5.png?attr=" + ",".join(f"a{k}:1" for k in range(9)),
        "/tiny/5.png?truncation=inf",
        "/tiny/5.png?truncation=0." + "1" * 21,
        "/tiny?truncation=9",
        "/tiny/5?size=16",
        "/?trucation=0.5",
        "/tiny/.png",
        "/tiny/.JPEG",
        "/tiny/a.gif",
        "/tiny/a.SVG",
        "/tiny/random.avif",
        "/tiny/5.png?truncation=9",
        "/tiny/5.png?truncation=",
        "/tiny/5.png?class=0",
        "/tiny/5.png?trucation=0.5",
        "/tiny/5.png?to=5",
        "/tiny/5.png?to=6&frames=1",
        "/tiny/5.png?to=6&frames=100000000",
        "/tiny/5.png?to=6&frame=25",
        "/tiny/5.png?to=6&mix=7",
        "/tiny/5.png?frame=1",
        "/tiny/5.png?mix=6&styles=fine",
        "/tiny/5.png?mix=6&styles=0-99999999",
        "/tiny/5.png?styles=coarse",
        "/tiny/5.png?mix=%FF",
        "/tiny/5.png?%FF=%FF",
        "/tiny/5?to=6&frame=3",
        "/tiny/5?" + "&".join(f"x{k}=1" for k in range(200)),
        "/tiny/a/b/c.png",
        "/nobody",
        "/nobody/5.png",
        "//",
        "/%2F",
        "/api/nobody",
        "/api/tiny/5/6",
        "/api/tiny/%FF",
        "/static/page.css",
        "/static/..%2f..%2fapp.py",
        "/how/nothing",
        "/" + "x" * 5000,
    ],
)
def test_hostile_and_mistaken_addresses_get_one_sentence(ask, address):
    answer = ask(address)
    assert 400 <= answer.status < 500, answer
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["status"] == answer.status and problem["detail"].endswith(".") and "\n" not in problem["detail"]
    assert answer.headers["cache-control"] == "no-store"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.text(st.characters(max_codepoint=0x10FFFF, exclude_categories=["Cs"]), max_size=40),
    raw=st.booleans(),
    query=st.text(st.sampled_from("sizetruncationframetomix=&%01.9-+;#\x00é"), max_size=30),
)
def test_no_address_at_all_breaks_the_server(ask, path, raw, query):
    address = "/tiny/" + (quote(path, safe="/%") if raw else quote(path, safe=""))
    answer = ask(f"{address}.png?{quote(query, safe='=&%+;')}")
    assert answer.status < 500, answer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_are_refused(ask, method):
    answer = ask("/tiny/5.png", method=method)
    assert answer.status == 405 and answer.headers["allow"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("faces.localhost", 200),
        ("Faces.Example.org:443", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
        ("[evil]", 421),
        (None, 400),
    ],
)
def test_a_page_that_rebinds_its_name_reaches_nothing(ask, host, status):
    assert ask("/healthz", rules=Rules(frozenset({"faces.example.org"})), host=host).status == status


def test_a_token_is_asked_for(ask):
    rules = Rules(token="Sésame")

    def basic(password):
        return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()

    def status(address="/tiny/5.png", **headers):
        return ask(address, rules=rules, **headers).status

    assert ask("/", rules=rules).headers["www-authenticate"].startswith("Bearer")
    assert status() == status("/metrics") == status("/") == 401
    assert status(authorization="Bearer wrong") == status(authorization=basic("wrong")) == 401
    assert status(authorization="Basic !!!") == status(authorization="Bearer") == 401
    assert status(authorization=basic("Sésame")) == 200
    assert ask("/tiny/5.png", rules=Rules(token="abc"), authorization="bearer abc").status == 200
    assert status("/healthz") == 200, "who watches over the server needs no token"
    kept = ask("/tiny/5.png", rules=rules, authorization=basic("Sésame")).headers["cache-control"]
    assert kept == "private, no-cache", "no shared cache hands it to others"


@pytest.mark.parametrize("address", ["/tiny/5.png", "/static/page.css"])
def test_who_guesses_tokens_is_slowed(ask, address):
    async def story(client):
        return [(await client(address, authorization=f"Bearer {guess}")).status for guess in range(70)]

    statuses = ask.visit(story, rules=Rules(token="abc", rate=0.5))
    assert statuses[:60] == [401] * 60 and statuses[-1] == 429


def test_the_rate_limit_slows_one_client_and_no_other(ask):
    async def story(client):
        mine = [(await client("/tiny/5.png", client="192.0.2.1")).status for _ in range(70)]
        late = await client("/tiny/5.png", client="192.0.2.1")
        return mine, late, (await client("/tiny/5.png", client="192.0.2.2")).status

    mine, late, other = ask.visit(story, rules=Rules(rate=0.5))
    assert mine[:60] == [200] * 60 and mine[-1] == 429 and other == 200
    assert 1 <= int(late.headers["retry-after"]) <= 2


def test_buckets_fill_again_and_forget_nobody_too_early():
    buckets = Buckets(2.0)
    assert all(buckets.take("a", 0.0) == 0 for _ in range(60))
    assert buckets.take("a", 0.0) == pytest.approx(0.5)
    assert buckets.take("a", 0.6) == 0 and buckets.take("a", 0.6) > 0
    assert all(buckets.take(f"2001:db8::{k:x}", 0.0) == 0 for k in range(60))
    assert buckets.take("2001:db8::ffff", 0.0) > 0, "one network of IPv6 is one client"
    assert all(buckets.take("::ffff:192.0.2.1", 0.0) == 0 for _ in range(60))
    assert buckets.take("192.0.2.1", 0.0) > 0, "one client, whichever kind of socket it came to"
    assert buckets.take("::ffff:192.0.2.2", 0.0) == 0, "another client"
    for k in range(20_000):
        buckets.take(f"client {k}", 1.0)
    assert len(buckets.levels) <= 10_000


# --- pages and text


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_every_reload_is_somebody_new(ask):
    async def story(client):
        return [await client("/") for _ in range(3)] + [await client("/tiny/") for _ in range(2)]

    answers = ask.visit(story)
    seeds = [re.search(rb'data-seed="(\d+)"', a.body)[1] for a in answers]
    assert len(set(seeds)) == 5
    assert {a.headers["cache-control"] for a in answers} == {"no-store"}


@pytest.mark.parametrize("address", ["/", "/tiny/%3Cscript%3Ealert(1)%3C%2Fscript%3E", "/how", "/nobody"])
def test_pages_hold_nothing_inline_and_nothing_from_elsewhere(ask, address):
    answer = ask(address, accept="text/html")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy
    text = answer.body.decode()
    assert "<script>alert" not in text
    for tag, attributes in Tags(text).tags:
        assert "style" not in attributes and not [a for a in attributes if a.startswith("on")], (tag, attributes)
        assert tag != "style" and (tag != "script" or attributes.get("src")), "inline"
        for name in ("src", "href", "action"):
            assert attributes.get(name, "/").startswith("/") and not attributes.get(name, "/").startswith("//")
        assert tag != "img" or "alt" in attributes


def test_static_files_name_no_other_host():
    for path in (ROOT / "tpdne_cli" / "web").rglob("*"):
        if path.suffix in (".css", ".js", ".html", ".svg"):
            found = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+", path.read_text(encoding="utf-8")))
            assert found <= {"http://www.w3.org"}, path


def test_pages_link_to_what_is_there(ask):
    async def story(client):
        for page in ("/", "/tiny/7", "/how"):
            for tag, attributes in Tags((await client(page)).body.decode()).tags:
                for name in ("src", "href", "action"):
                    if name in attributes:
                        assert (await client(attributes[name])).status == 200, (page, tag, attributes[name])

    ask.visit(story)


def test_a_permalink_shows_its_seed_and_setting(ask):
    text = ask("/tiny/alice@example.com?truncation=0.3").body.decode()
    assert 'data-seed="alice@example.com"' in text and 'data-truncation="0.3"' in text
    assert 'src="/tiny/alice@example.com.png?truncation=0.3"' in text
    assert "does not exist" in text and "marked as synthetic" in text


@pytest.mark.parametrize("address", ["/", "/tiny"])
def test_anybody_can_be_as_unusual_as_somebody(ask, address):
    text = ask(f"{address}?truncation=0.3&attr=smile:1").body.decode()
    assert 'data-truncation="0.3"' in text and 'data-attr="smile:1"' in text
    assert re.search(r'src="/tiny/\d+\.png\?truncation=0\.3&amp;attr=smile%3A1"', text)
    hidden = [attributes for tag, attributes in Tags(text).tags if attributes.get("type") == "hidden"]
    assert {(a["name"], a["value"]) for a in hidden} == {("truncation", "0.3"), ("attr", "smile:1")}


@pytest.mark.parametrize("psi", ["0.00005", "0.12345678", "0", "-0.5", "0.30000000000000004", "0.00000000000000000001"])
def test_a_truncation_is_written_as_addresses_have_it(ask, psi):
    text, facts = ask(f"/tiny/7?truncation={psi}").body.decode(), ask(f"/api/tiny/7?truncation={psi}").json()
    assert f'src="/tiny/7.png?truncation={psi}"' in text and f'href="/tiny/7?truncation={psi}"' in text
    assert facts["command"].endswith(f" --truncation {psi}")


class Glance:
    """A critic that likes bright images."""

    def __init__(self, seconds=0.0, failures=0):
        self.seconds, self.failures, self.calls = seconds, failures, 0

    def score(self, pixels):
        self.calls += 1
        time.sleep(self.seconds)
        if self.calls <= self.failures:
            raise DeviceError("There is not enough memory.")
        return [pixels.mean()]


@pytest.fixture
def install_critic(monkeypatch):
    def install(critic):
        monkeypatch.setattr(ranking, "path_of", lambda model: model.path)
        monkeypatch.setattr(Critic, "load", lambda _model: critic)
        return critic

    return install


def test_a_ranking_outlives_those_who_wait_for_it_and_lets_others_between(ask, sampler, install_critic):
    critic = install_critic(Glance(0.05))

    async def story(client):
        late = await asyncio.gather(*[client("/how/ranking") for _ in range(3)])
        assert (await client("/tiny/5.png")).status == 200 and critic.calls < ranking.COUNT
        while (answer := await client("/how/ranking")).status == 503:
            pass
        return late, answer

    late, answer = ask.visit(story, limits=Limits(seconds=1.0))
    assert {a.status for a in late} == {503} and critic.calls == ranking.COUNT, "made once"
    shown = sorted(sampler(range(ranking.COUNT)), key=lambda sample: -sample.pixels.mean())
    assert answer.json()["best"] == [f"/tiny/{sample.seed}.webp" for sample in shown[:4]]
    assert answer.json()["worst"] == [f"/tiny/{sample.seed}.webp" for sample in shown[-4:]]


def test_a_ranking_that_failed_is_tried_again(ask, install_critic):
    install_critic(Glance(failures=1))

    async def story(client):
        return [(await client("/how/ranking")).status for _ in range(2)]

    assert ask.visit(story) == [503, 200]


def test_a_ranking_ends_with_the_server(ask, install_critic):
    critic = install_critic(Glance(0.01))

    async def story(client):
        rankings = ranking.Rankings(client.studio)
        asking = asyncio.create_task(rankings.of("tiny"))
        await asyncio.sleep(0.05)
        await rankings.close()
        assert asking.done() and not rankings.tasks

    ask.visit(story)
    assert critic.calls < ranking.COUNT


def test_stages_of_training_are_shown_where_they_were_kept(ask, sampler, tmp_path, monkeypatch):
    for number, seen in enumerate([100, 200, 300, 400, 800, 1600, 3200, 6400]):
        side = 8 * (4 if seen < 1000 else 8)
        images.write_atomic(
            tmp_path / f"samples-{seen:08d}.png", images.encode(np.full((side, side, 3), number, np.uint8))
        )
    pixels = stages.strip(tmp_path)
    assert pixels.shape == (16, 48, 3)
    assert list(pixels[0, ::8, 0]) == [0, 1, 3, 5, 6, 7], "evenly in proportion, the first and the last among them"
    assert b"stages.webp" not in ask("/how").body and ask("/how/stages.webp").status == 404
    monkeypatch.setattr(sampler.model, "path", tmp_path / "tiny.safetensors")
    monkeypatch.setattr("sys.argv", ["stages", str(tmp_path), str(tmp_path / "tiny-stages.webp")])
    stages.main()
    assert b"/how/stages.webp" in ask("/how").body
    assert images.is_marked(ask("/how/stages.webp").body)


def test_text_is_compressed_and_images_are_not(ask):
    plain, packed = ask("/how"), ask("/how", accept_encoding="br, gzip")
    assert packed.headers["content-encoding"] == "gzip" and gzip.decompress(packed.body) == plain.body
    assert packed.headers["etag"] != plain.headers["etag"] and packed.headers["vary"] == "accept-encoding"
    assert "content-encoding" not in ask("/how", accept_encoding="gzip;q=0, br").headers
    assert "content-encoding" not in ask("/tiny/5.png", accept_encoding="gzip").headers
    sheet = pages.asset_url("page.css")
    answer = ask(sheet, accept_encoding="gzip")
    assert "immutable" in answer.headers["cache-control"]
    assert ask(sheet, accept_encoding="gzip", if_none_match=answer.headers["etag"]).status == 304


def test_programs_are_told_what_a_seed_stands_for(ask, tiny_model):
    facts = ask("/api/tiny/alice@example.com?attr=smile:0.00001").json()
    assert facts["recipe"]["attributes"] == {"smile": 1e-5}
    assert facts["page"] == "/tiny/alice@example.com?attr=smile%3A0.00001"
    assert facts["command"].endswith("--attr smile=0.00001")
    text = ask("/tiny/alice@example.com?attr=smile:1").body.decode()
    assert 'data-attr="smile:1"' in text and "alice@example.com.png?attr=smile%3A1" in text
    facts = ask("/api/tiny/alice@example.com?truncation=0.5&size=16").json()
    assert facts["seed"] == "alice@example.com" and facts["synthetic"] is True
    assert facts["images"]["png"] == "/tiny/alice@example.com.png?truncation=0.5&size=16"
    assert facts["page"] == "/tiny/alice@example.com?truncation=0.5"
    assert facts["command"] == f"tpdne generate {tiny_model.name} --seed alice@example.com --truncation 0.5"
    assert facts["recipe"] == images.read_recipe(ask(facts["images"]["png"]).body)
    assert ask("/api/tiny/7").json()["seed"] == 7
    assert ask("/api/tiny/7?to=8").json()["page"] == "/tiny/7", "a walk begins with the seed itself"
    (model,) = ask("/api/models").json()
    assert model == ask("/api/tiny").json() and model["weights"] == models.file_sha256(tiny_model)
    assert ask("/api/tiny/random").headers["cache-control"] == "no-store"
    assert not any(str(tiny_model.parent) in str(value) for value in model.values()), "paths of the machine stay here"


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "jpeg", "JPEG", "webp"])
def test_an_image_is_an_image_however_its_suffix_is_written(ask, suffix):
    kind = "image/jpeg" if suffix.lower() in ("jpg", "jpeg") else f"image/{suffix.lower()}"
    assert ask(f"/tiny/bob.{suffix}").headers["content-type"] == kind


@pytest.mark.parametrize("seed", ["logo.png", "a.JPEG", "x.gif", ".webp"])
def test_a_seed_that_reads_as_an_image_has_images_and_no_page(ask, seed):
    facts = ask(f"/api/tiny/{seed}").json()
    assert facts["seed"] == seed and facts["page"] is None
    assert images.read_recipe(ask(facts["images"]["png"]).body)["seed"] == seed


def test_the_command_of_a_file_makes_the_very_image_in_its_folder(tiny_model, tmp_path, monkeypatch):
    """Whatever its name: 'faces' is the bundled one, and a file's stem is no installed generator."""
    for name, own in (("mine", "mine.safetensors"), ("faces", "faces.safetensors")):
        (tmp_path / own).write_bytes(tiny_model.read_bytes())
        loaded = Sampler(models.load(tmp_path / own), device="cpu")
        look = Look(name, 1, Settings().check(loaded.model))
        command = web.command(name, look, loaded)
        assert command == f"tpdne generate {own} --seed 1"
        monkeypatch.chdir(tmp_path)
        assert run([*shlex.split(command)[1:], "-o", f"{name}.png"]) == 0
        assert (tmp_path / f"{name}.png").read_bytes() == Picture(look, "png", None).encode(next(loaded([1])))


def test_the_command_of_an_installed_generator_names_it(sampler, tiny_model, monkeypatch):
    look = Look("tiny", 7, Settings(0.5).check(sampler.model))
    monkeypatch.setattr(models, "weights_dir", lambda: tiny_model.parent)
    assert web.command("tiny", look, sampler) == "tpdne generate tiny --seed 7 --truncation 0.5"


def test_the_command_of_a_class_names_it(tmp_path):
    torch.manual_seed(0)
    config = Config(resolution=16, z_dim=8, w_dim=8, c_dim=3, mapping_layers=2, channel_base=128, channel_max=8)
    models.save(tmp_path / "m.safetensors", "stylegan2", config, Generator(config).state_dict(), {})
    loaded = Sampler(models.load(tmp_path / "m.safetensors"))
    look = Look("m", 7, Settings(class_index=2).check(loaded.model))
    assert web.command("m", look, loaded) == "tpdne generate m.safetensors --seed 7 --class 2"
    half = Sampler(models.load(tmp_path / "m.safetensors"), precision="float16")
    assert web.command("m", look, half).endswith("--class 2 --precision float16"), "other pixels, else"


def test_every_parameter_of_the_openapi_document_is_taken_and_no_other(ask):
    examples = {"truncation": "0.5", "attr": "smile:1", "size": "32", "to": "6", "mix": "6"}
    examples |= {"frame": "1&to=6", "frames": "3&to=6", "styles": "coarse&mix=6"}
    for path, operations in ask("/openapi.json").json()["paths"].items():
        if "{model}" in path and path != "/api/{model}":
            address = path.format(model="tiny", seed="5", format="png")
            named = {p["name"] for p in operations["get"]["parameters"] if p["in"] == "query"}
            taken = {name for name, value in examples.items() if ask(f"{address}?{name}={value}").status == 200}
            assert named - {"class"} == taken, path


def test_a_generators_own_size_is_never_too_large(ask):
    for address in ("/tiny/1.png", "/api/tiny/1"):
        assert ask(f"{address}?size=32", limits=Limits(size=16)).status == 200
        assert ask(f"{address}?size=33", limits=Limits(size=16)).status == 400


def test_a_large_generator_is_shown_large(ask, tmp_path):
    config = Config(resolution=512, z_dim=8, w_dim=8, mapping_layers=2, channel_base=512, channel_max=8)
    models.save(tmp_path / "m.safetensors", "stylegan2", config, Generator(config).state_dict(), {})
    large = Sampler(models.load(tmp_path / "m.safetensors"), device="cpu")

    async def story(client):
        small = await client("/tiny/1")
        client.studio.samplers["tiny"] = large
        return small.body, (await client("/tiny/1")).body

    small, shown = ask.visit(story)
    assert b'<figure class="large">' in shown and b"large" not in small


def test_the_page_that_explains_says_what_is_so_of_each_generator(ask):
    text = ask("/how").body.decode()
    assert "photographs of people" not in text and "Nothing in these pictures exists" in text


def test_the_openapi_document_names_what_is_there(ask):
    document = ask("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    values = {"model": "tiny", "seed": "5", "format": "webp"}
    for path, operations in document["paths"].items():
        address = path.format(**values)
        answer = ask(address)
        assert answer.status == 200, address
        said = operations["get"]["responses"]["200"]["content"]
        assert answer.headers["content-type"].partition(";")[0] in said, address
    for reference in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]
    for name, schema in (("Model", ask("/api/tiny").json()), ("Seed", ask("/api/tiny/5").json())):
        assert set(document["components"]["schemas"][name]["required"]) <= schema.keys()


def test_metrics_are_prometheus_text(ask):
    async def story(client):
        await client("/tiny/5.png")
        await client("/tiny/5.png")
        await client("/tiny/5.png?size=0")
        return await client("/metrics")

    answer = ask.visit(story)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.body.decode().splitlines()
    series = r'[a-z_]+(\{[a-z_]+="[^"\\\n]*"(,[a-z_]+="[^"\\\n]*")*\})? [0-9.e+-]+'
    assert all(re.fullmatch(rf"# (HELP|TYPE) [a-z_]+ .+|{series}", line) for line in lines), lines
    assert 'tpdne_requests_total{kind="image",status="200"} 2' in lines
    assert 'tpdne_requests_total{kind="image",status="400"} 1' in lines
    assert 'tpdne_images_total{model="tiny"} 1' in lines
    assert 'tpdne_request_seconds_count{kind="image"} 3' in lines
    assert 'tpdne_request_seconds_bucket{kind="image",le="+Inf"} 3' in lines


def test_an_error_inside_is_one_sentence_outside(ask, monkeypatch, caplog):
    monkeypatch.setattr("tpdne_cli.web.crew.draw", lambda *_: 1 / 0)

    async def story(client):
        return await client("/tiny/5.png"), await client("/healthz")

    answer, health = ask.visit(story)
    assert answer.status == 500 and "division" not in answer.body.decode() and health.status == 200
    assert "ZeroDivisionError" in caplog.text


# --- load


def slow_studio(monkeypatch, seconds=0.05):
    draw = crew.draw

    def slowly(sampler, looks):
        time.sleep(seconds)
        return draw(sampler, looks)

    monkeypatch.setattr(crew, "draw", slowly)


def test_overload_is_answered_and_nothing_is_lost(ask, monkeypatch):
    slow_studio(monkeypatch)

    async def story(client):
        answers = await asyncio.gather(*[client(f"/tiny/{k}.png") for k in range(40)])
        return answers, await client("/tiny/0.png")

    answers, after = ask.visit(story, limits=Limits(queue=10))
    statuses = [a.status for a in answers]
    assert set(statuses) == {200, 503} and 10 <= statuses.count(200) < 40
    refused = next(a for a in answers if a.status == 503)
    assert 1 <= int(refused.headers["retry-after"]) <= 60 and refused.json()["detail"].startswith("The queue is full")
    assert after.status == 200


def test_clients_that_go_away_cost_nothing(ask, monkeypatch):
    slow_studio(monkeypatch)

    async def story(client):
        busy = asyncio.create_task(client("/tiny/0.png"))
        await asyncio.sleep(0.01)
        gone = asyncio.Event()
        leaving = [asyncio.create_task(client(f"/tiny/{k}.png", gone=gone)) for k in range(1, 30)]
        shared = asyncio.create_task(client("/tiny/29.png"))
        await asyncio.sleep(0.01)
        gone.set()
        answers = await asyncio.gather(*leaving)
        waiting = client.studio.waiting
        assert (await busy).status == (await shared).status == 200
        return answers, waiting, client.studio.metrics.values[("tpdne_images_total", (("model", "tiny"),))]

    answers, waiting, made = ask.visit(story)
    assert {a.status for a in answers} == {499}
    assert waiting == 1 and made == 2, "only those made for somebody who waits"


def test_an_image_that_takes_too_long_is_given_up(ask, monkeypatch):
    slow_studio(monkeypatch, 0.3)
    answer = ask("/tiny/5.png", limits=Limits(seconds=0.05))
    assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1


def test_the_cache_keeps_to_its_bytes_and_drops_the_oldest():
    cache = Cache(3 * (1000 + OVERHEAD))
    for key in "abc":
        cache.put(key, Encoded(bytes(1000), key))
    assert cache.get("a").etag == "a"
    cache.put("d", Encoded(bytes(1000), "d"))
    assert cache.get("b") is None and all(map(cache.get, "acd"))
    cache.put("big", Encoded(bytes(10_000), "big"))
    assert not cache.entries and cache.bytes == 0
    cache.put("a", Encoded(bytes(10), ""))
    cache.put("a", Encoded(bytes(20), ""))
    assert cache.bytes == 20 + OVERHEAD


def batches_of(story, size=4, seconds=0.0, **options):
    """Runs `story(batcher)`; returns its result and the batches that were run."""
    batches = []

    async def work(items):
        batches.append(list(items))
        await asyncio.sleep(seconds)
        if "bad" in items:
            raise ValueError("bad")
        return [item.upper() for item in items]

    async def main():
        batcher = Batcher(work, lambda item: item[0], lambda _: size, **options)
        batcher.start()
        try:
            return await story(batcher)
        finally:
            await batcher.close()

    return asyncio.run(main()), batches


def test_batches_gather_while_the_network_works():
    async def story(batcher):
        return await asyncio.gather(*map(batcher, ["a1", "a2", "a3", "b1", "a4", "b2"]))

    results, batches = batches_of(story, seconds=0.01)
    assert results == ["A1", "A2", "A3", "B1", "A4", "B2"]
    assert batches == [["a1", "a2", "a3", "a4"], ["b1", "b2"]]


def test_a_lone_request_does_not_wait_for_company():
    async def story(batcher):
        for _ in range(3):
            start = time.perf_counter()
            await batcher("a")
            assert time.perf_counter() - start < 5

    _, batches = batches_of(story, deadline=30.0)
    assert batches == [["a"]] * 3


def test_who_came_together_is_waited_for_until_the_deadline():
    async def story(batcher):
        await asyncio.gather(*map(batcher, ["a1", "a2"]))
        first = asyncio.create_task(batcher("a3"))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, batcher("a4"))
        await batcher("a5")

    _, batches = batches_of(story, deadline=0.3)
    assert batches == [["a1", "a2"], ["a3", "a4"], ["a5"]]


def test_an_error_belongs_to_its_batch_and_the_next_goes_on():
    async def story(batcher):
        with pytest.raises(ValueError, match="bad"):
            await batcher("bad")
        return await batcher("good")

    result, _ = batches_of(story)
    assert result == "GOOD"


def test_a_full_queue_refuses_at_once():
    async def story(batcher):
        asking = [asyncio.create_task(batcher(f"a{k}")) for k in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as refusal:
            await batcher("a9")
        assert 1 <= refusal.value.seconds <= 60
        asking[1].cancel()
        await asyncio.sleep(0)
        return await asyncio.gather(batcher("a4"), asking[0], asking[2])

    assert batches_of(story, limit=3)[0] == ["A4", "A0", "A2"]


def test_as_many_batches_run_as_there_are_workers_and_a_large_one_waits_for_all():
    running, most = 0, {}

    async def work(items):
        nonlocal running
        group = items[0][0]
        running += 1
        most[group] = max(most.get(group, 0), running)
        await asyncio.sleep(0.02)
        running -= 1
        return items

    async def main():
        batcher = Batcher(work, lambda item: item[0], lambda _: 1, lambda group: 2 if group == "L" else 1, workers=2)
        batcher.start()
        try:
            await asyncio.gather(*map(batcher, ["s1", "s2", "L1", "s3", "L2", "s4", "s5"]))
        finally:
            await batcher.close()

    asyncio.run(main())
    assert most == {"s": 2, "L": 1}


# --- worker processes

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@pytest.fixture
def nursery(tiny_model):
    made = Nursery({"tiny": str(tiny_model), "again": str(tiny_model)}, ("cpu", "auto", None), 20)
    try:
        yield made
    finally:
        made.close()


def wish(seed, model="tiny", format="png"):
    return Picture(Look(model, seed, Settings(0.8)), format, None)


@on_linux
def test_a_worker_that_is_killed_is_replaced_and_no_image_is_lost(nursery, sampler):
    def images_of(seeds):
        return nursery("tiny", [wish(seed) for seed in seeds]).results

    assert nursery.learn("tiny").recipe(1) == sampler.recipe(1)
    expected = [wish(1).encode(sample) for sample in sampler([1])]
    assert images_of([1]) == expected
    for _ in range(3):
        (pid,) = nursery.pids[1:]
        os.kill(pid, signal.SIGKILL)
        assert images_of([1]) == expected
        assert pid not in nursery.pids and nursery.is_well


@on_linux
def test_a_worker_killed_at_work_is_replaced_too(nursery):
    nursery.learn("tiny")
    nursery("tiny", [wish(0)])
    (pid,) = nursery.pids[1:]
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    assert len(nursery("tiny", [wish(1), wish(2)]).results) == 2


@on_linux
def test_a_worker_that_is_stuck_is_killed_and_the_next_image_is_made(nursery):
    nursery.learn("tiny")
    nursery("tiny", [wish(0)])
    (pid,) = nursery.pids[1:]
    os.kill(pid, signal.SIGSTOP)
    nursery.seconds = 0.2
    with pytest.raises(DeviceError, match="stuck"):
        nursery("tiny", [wish(1)])
    assert not Path(f"/proc/{pid}").exists()
    nursery.seconds = 20
    assert nursery("tiny", [wish(1)]).images == 1


@on_linux
def test_a_model_that_is_loaded_later_reaches_workers_that_are_older(nursery):
    nursery.learn("tiny")
    first = nursery("tiny", [wish(1)]).results
    nursery.learn("again")
    assert nursery("again", [wish(1, "again")]).images == 1
    assert nursery("tiny", [wish(1)]).results == first
    assert len(nursery.pids) <= 1 + nursery.workers


@on_linux
def test_a_large_model_is_drawn_by_all_threads_of_one_worker(tiny_model, sampler, monkeypatch):
    monkeypatch.setattr("tpdne_cli.devices.cores", lambda: 2)
    monkeypatch.setattr("tpdne_cli.web.nursery.LARGEST_FOR_PROCESSES", 16)
    with closing(Nursery({"tiny": str(tiny_model)}, ("cpu", "auto", None), 20)) as made:
        made.learn("tiny")
        assert made.share("tiny") == made.workers
        results = made("tiny", [wish(seed) for seed in range(4)]).results
    assert results == [wish(0).encode(sample) for sample in sampler(range(4))], "the same bytes with two threads"


@on_linux
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_workers_draw_in_other_precisions(tiny_model, precision):
    if precision == "bfloat16" and not devices.bfloat16_survives():
        pytest.skip("this processor does not survive bfloat16")
    with closing(Nursery({"tiny": str(tiny_model)}, ("cpu", precision, None), 20)) as made:
        studio = Studio(["tiny"], made, LIMITS, Metrics())
        studio.load("tiny")
        (data,) = made("tiny", [wish(1)]).results
        assert images.read_recipe(data) == studio.recipe(wish(1).look)
        assert images.read_recipe(data)["precision"] == precision
        assert studio.etag(wish(1)).startswith('W/"'), "other processors may round otherwise"


@on_linux
def test_what_processes_share_is_counted_once(nursery):
    nursery.learn("tiny")
    alone = resident_bytes()
    nursery("tiny", [wish(0)])
    assert alone < resident_bytes(nursery.pids) < 3 * alone


@on_linux
def test_errors_of_a_worker_and_of_a_model_are_raised_here(nursery, tmp_path):
    nursery.learn("tiny")
    with pytest.raises(SettingsError, match="gif"):
        nursery("tiny", [wish(1, format="gif")])
    with pytest.raises(KeyError):
        nursery.learn("nobody")
    assert nursery("tiny", [wish(1)]).images == 1


@on_linux
def test_without_the_nursery_requests_fail_and_do_not_hang(nursery):
    nursery.learn("tiny")
    nursery("tiny", [wish(1)])
    os.kill(nursery.pid, signal.SIGKILL)
    os.kill(nursery.pids[1], signal.SIGKILL)
    for _ in range(2 * nursery.workers):
        with pytest.raises(DeviceError, match="killed"):
            nursery("tiny", [wish(1)])
    assert not nursery.is_well


@on_linux
def test_no_process_outlives_the_server(server):
    process, port = server
    get(port, b"/tiny/7.png")
    children = descendants(process.pid)
    assert len(children) >= 2
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in children))


@on_linux
def test_a_killed_worker_costs_the_client_nothing(server):
    process, port = server
    first = get(port, b"/tiny/7.png")
    for pid in descendants(process.pid)[1:]:
        os.kill(pid, signal.SIGKILL)
    assert get(port, b"/tiny/8.png").startswith(b"HTTP/1.1 200")
    assert get(port, b"/tiny/7.png").partition(b"\r\n\r\n")[2] == first.partition(b"\r\n\r\n")[2]


def descendants(pid: int) -> list[int]:
    """Process ids, parents before children."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, path.read_text().split())
    return found[1:]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


# --- the command


def test_a_name_that_is_no_address_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="api"):
        web.served([str(tmp_path / "api.safetensors")])
    with pytest.raises(SettingsError, match="twice"):
        web.served(["faces", "faces"])


def test_without_the_extra_the_command_says_how_to_get_it(tmp_path):
    code = (
        "import sys; sys.modules['starlette'] = None; sys.argv[1:] = ['serve']; from tpdne_cli.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert "pip install starlette uvicorn jinja2" in done.stderr and done.stderr.count("\n") == 1
    assert "tpdne[" not in done.stderr, "a stranger's package has that name"


@pytest.fixture
def server(tiny_model):
    with serving(str(tiny_model)) as running:
        yield running


def exchange(port: int, data: bytes, wait: float = 20.0) -> bytes:
    """What the server answers to bytes on a socket, until it closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def get(port: int, target: bytes) -> bytes:
    return exchange(port, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")


def test_the_command_serves_and_ends_quietly(server, tiny_model, tmp_path, capsys):
    process, port = server
    answer = get(port, b"/tiny/7.png")
    assert answer.startswith(b"HTTP/1.1 200") and b"server:" not in answer.lower()
    assert run(["generate", str(tiny_model), "--seed", "7", "--out", str(tmp_path / "7.png")]) == 0
    assert answer.partition(b"\r\n\r\n")[2] == (tmp_path / "7.png").read_bytes()
    for target in (b"/tiny/\xff.png", b"/tiny/\xc3\xa9.png", b"http://[", b"/tiny/%ff.png", b"/" + b"x" * 60_000):
        assert re.match(rb"HTTP/1.1 4\d\d", get(port, target)), target
    assert exchange(port, b"\x16\x03\x01 nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    head = exchange(port, b"HEAD /tiny/7.png HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and head.endswith(b"\r\n\r\n") and b"content-length" in head.lower()
    taken = run(["serve", str(tiny_model), "--port", str(port)])
    assert taken == 1 and "--port" in capsys.readouterr().err
    with socket.create_connection(("127.0.0.1", port)) as idle:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert idle.recv(1) == b""
    assert process.stderr.read().splitlines() == ["Ctrl-C stops it."]


@contextmanager
def running(site):
    """(server, port): a real server in a thread of this process."""
    bound = server_room.listen("127.0.0.1", 0)
    listening = threading.Event()
    made = server_room.Server(server_room.configure(site), listening.set)
    thread = threading.Thread(target=made.run, args=([bound],))
    thread.start()
    try:
        assert listening.wait(20)
        yield made, bound.getsockname()[1]
    finally:
        made.should_exit = True
        thread.join(20)


def test_who_never_finishes_a_request_is_hung_up_on(sampler, monkeypatch):
    monkeypatch.setattr(server_room, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(server_room, "KEEP_ALIVE_SECONDS", 1)
    with running(web.create(studio_of(sampler), NO_RULES)) as (_, port):
        assert exchange(port, b"") == b"" == exchange(port, b"GET / HT")
        whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answer = exchange(port, whole + b"GET / HT")
        assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("connection", [b"keep-alive", b"close"])
def test_who_does_not_read_an_answer_is_hung_up_on_and_who_reads_slowly_is_not(monkeypatch, connection):
    monkeypatch.setattr(server_room, "WRITE_SECONDS", 0.5)
    monkeypatch.setattr(server_room, "KEEP_ALIVE_SECONDS", 1)
    size = 32 << 20  # more than the system keeps for a connection
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: " + connection + b"\r\n\r\n"
    with running(Starlette(routes=[Route("/", lambda _: Response(bytes(size)))])) as (server, port):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as idle:
            idle.sendall(request)
            wait_until(lambda: server.server_state.total_requests and not server.server_state.connections)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
            slow.sendall(request)
            left = size
            while left > 0 and (part := slow.recv(2 << 20, socket.MSG_WAITALL)):
                left -= len(part)
                time.sleep(0.1)
            assert left <= 0


def test_there_is_room_for_all_connections():
    resource = pytest.importorskip("resource")
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < server_room.FILES:
        pytest.skip("this system allows fewer files")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        server_room.make_room()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (server_room.FILES, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_proxy_of_this_machine_is_believed_on_a_socket_of_both_kinds():
    async def client_of(peer):
        clients = []

        async def site(scope, receive, send):
            clients.append(scope["client"][0])

        app = server_room.configure(site, behind_proxy=True).loaded_app
        headers = [(b"x-forwarded-for", b"192.0.2.1")]
        await app({"type": "http", "client": (peer, 1), "headers": headers}, None, None)
        return clients[0]

    assert asyncio.run(client_of("127.0.0.1")) == asyncio.run(client_of("::ffff:127.0.0.1")) == "192.0.2.1"
    assert asyncio.run(client_of("::ffff:192.0.2.9")) == "::ffff:192.0.2.9"


def test_ctrl_c_ends_it_too(server):
    process, _ = server
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert "Traceback" not in process.stderr.read()


def test_marks_survive_the_way_to_the_client(ask):
    for format in images.FORMATS:
        marks = metadata.read_marks(ask(f"/tiny/5.{format}?size=40").body)
        assert marks.source_type == metadata.SYNTHETIC and marks.recipe["seed"] == 5
