"""web/nursery.py, web/guard.py, web/server.py and the command's options: what goes wrong around the pages."""

# ruff: noqa: F811 (fixtures are imported, and asked for by naming them)
from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from serving import serving
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from test_web import NO_RULES, ask, exchange, get, nursery, on_linux, running, sampler, studio_of, wish  # noqa: F401

from tpdne_cli import devices
from tpdne_cli.cli import run
from tpdne_cli.errors import DeviceError
from tpdne_cli.web import app as web
from tpdne_cli.web import server as server_room
from tpdne_cli.web.guard import Rules
from tpdne_cli.web.nursery import Nursery
from tpdne_cli.web.studio import Limits

# --- worker processes


@on_linux
def test_the_death_of_the_nursery_is_known_before_anybody_asks_it_for_a_worker(nursery):
    nursery.learn("tiny")
    nursery("tiny", [wish(1)])
    assert nursery.is_well
    os.kill(nursery.pid, signal.SIGKILL)
    os.waitid(os.P_PID, nursery.pid, os.WEXITED | os.WNOWAIT)
    assert not nursery.is_well and nursery.pid not in nursery.pids
    assert nursery("tiny", [wish(2)]).images == 1, "the worker that lives finishes what is in flight"


@on_linux
def test_without_memory_the_kernel_kills_a_worker_rather_than_the_nursery(nursery):
    nursery.learn("tiny")
    nursery("tiny", [wish(1)])
    held, free = (int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in nursery.pids)
    assert held < free == 1000


@on_linux
def test_where_no_worker_can_be_started_it_is_a_matter_of_time(tiny_model, tmp_path, monkeypatch):
    fork, here, want = os.fork, os.getpid(), tmp_path / "want"

    def poor():
        if os.getpid() != here and want.exists():
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return fork()

    monkeypatch.setattr(os, "fork", poor)
    made = Nursery({"tiny": str(tiny_model)}, ("cpu", "auto", None), 20)
    try:
        made.learn("tiny")
        want.touch()
        for _ in range(2 * made.workers):
            with pytest.raises(DeviceError, match=r"No worker .*\(Cannot allocate memory\)"):
                made("tiny", [wish(1)])
        want.unlink()
        assert made("tiny", [wish(1)]).images == 1 and made.is_well
    finally:
        made.close()


@on_linux
def test_a_server_without_its_nursery_ends_so_that_it_is_started_again(tiny_model):
    with serving(str(tiny_model)) as (process, port):
        assert get(port, b"/healthz").startswith(b"HTTP/1.1 200")
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert process.wait(20) == 1
        said = process.stderr.read().splitlines()
    assert said[-1].startswith("Error: The process that holds the models was killed") and len(said) == 2


# --- the server


def test_a_server_that_is_not_well_finishes_what_is_in_flight():
    asked, ill, ready = threading.Event(), threading.Event(), threading.Event()

    def slow(_request):
        asked.set()
        assert ill.wait(20)
        time.sleep(0.3)
        return Response(b"whole")

    bound = server_room.listen("127.0.0.1", 0)
    config = server_room.configure(Starlette(routes=[Route("/", slow)]))
    made = server_room.Server(config, ready.set, lambda: not ill.is_set())
    thread = threading.Thread(target=made.run, args=([bound],))
    thread.start()
    assert ready.wait(20)
    threading.Thread(target=lambda: asked.wait(20) and ill.set()).start()
    assert get(bound.getsockname()[1], b"/").endswith(b"whole")
    thread.join(20)
    assert made.gave_up and not thread.is_alive()


def test_a_head_without_an_end_is_hung_up_on(sampler):
    with running(web.create(studio_of(sampler), NO_RULES)) as (_, port):
        start = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
        with pytest.raises(ConnectionError):
            exchange(port, start + b"X: y\r\n" * 200_000)
        with pytest.raises(ConnectionError):
            exchange(port, start + b"\r\n" + start + b"X: " + b"y" * 1_000_000)
        many = start + b"Content-Length: 300000\r\n\r\n" + b"y" * 300_000
        many += (start + b"X: " + b"y" * 10_000 + b"\r\n\r\n") * 20
        answers = exchange(port, many + start + b"Connection: close\r\n\r\n")
        assert answers.count(b"HTTP/1.1 200") == 22, "bodies, and heads that have an end, are none"


def test_more_connections_than_there_is_room_for_are_refused():
    config = server_room.configure(lambda *_: None)
    assert config.limit_concurrency == server_room.CONNECTIONS and server_room.FILES > server_room.CONNECTIONS
    assert not config.access_log, "addresses may hold e-mail addresses"


# --- the guard


@pytest.mark.parametrize("address", ["/", "/tiny/alice@example.com", "/tiny/7.png", "/nobody", "/static/page.css"])
def test_no_answer_leaks_an_address_or_is_taken_for_something_else(ask, address):
    headers = ask(address, accept="text/html").headers
    assert headers["referrer-policy"] == "no-referrer", "an address may hold an e-mail address"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-opener-policy"] == "same-origin"


def test_an_address_beyond_all_measure_is_refused_as_such(ask):
    assert ask("/" + "x" * 5000).status == 414 == ask("/tiny/5.png?to=" + "x" * 5000).status


def test_people_whom_the_guard_refuses_get_a_page_and_programs_a_problem(ask):
    async def story(client):
        while (answer := await client("/tiny", accept="text/html,*/*")).status == 200:
            pass
        return answer, await client("/tiny")

    page, problem = ask.visit(story, rules=Rules(rate=0.01))
    assert page.status == problem.status == 429 and 0 < int(page.headers["retry-after"]) <= 100
    assert page.headers["content-type"].startswith("text/html") and b"<h1>One moment</h1>" in page.body
    assert problem.headers["content-type"] == "application/problem+json"
    stranger = ask("/", host="<b>.example.org", accept="text/html")
    assert stranger.status == 421 and b"--allow-host" in stranger.body
    assert b"<b>" not in stranger.body and b"tiny" not in stranger.body, "strangers are not told what there is"


# --- the command's options


def test_every_option_of_the_command_reaches_the_server(tiny_model, monkeypatch):
    """A token that is not passed on would open the server to everybody."""
    given = {}

    def serve(site, bound, ready, is_well, behind_proxy):
        given.update(rules=site.rules, limits=site.app.state.studio.limits, behind_proxy=behind_proxy)
        given["host"] = bound.getsockname()[0]
        bound.close()
        assert is_well()
        ready()

    monkeypatch.setattr(server_room, "run", serve)
    command = ["serve", str(tiny_model), "--port", "0", "-q"]
    assert run(command) == 0
    assert given == {
        "rules": Rules(frozenset({"127.0.0.1"})),
        "limits": Limits(),
        "behind_proxy": False,
        "host": "127.0.0.1",
    }
    options = ["--token", "Sésame", "--rate", "2.5", "--allow-host", "Faces.Example.org", "--behind-proxy"]
    options += ["--queue", "7", "--timeout", "4", "--cache", "3", "--max-size", "99", "--host", "127.0.0.2"]
    assert run([*command, *options]) == 0
    assert given == {
        "rules": Rules(frozenset({"127.0.0.2", "faces.example.org"}), "Sésame", 2.5),
        "limits": Limits(7, 4.0, cache_bytes=3 << 20, size=99),
        "behind_proxy": True,
        "host": "127.0.0.2",
    }
    monkeypatch.setenv("TPDNE_TOKEN", "of the environment")
    assert run(command) == 0 and given["rules"].token == "of the environment"


@pytest.mark.parametrize(
    ("host", "token", "warned"),
    [("0.0.0.0", [], True), ("0.0.0.0", ["--token", "x"], False), ("127.0.0.1", [], False)],
)
def test_who_opens_the_server_to_everybody_is_told(tiny_model, monkeypatch, capsys, host, token, warned):
    monkeypatch.setattr(server_room, "run", lambda _site, bound, *_: bound.close())
    assert run(["serve", str(tiny_model), "--port", "0", "--host", host, *token]) == 0
    assert ("--token and --rate set limits" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("options", "variable"), [(["--token", ""], "x"), (["--token", " "], None), ([], ""), ([], "\n")]
)
def test_an_empty_token_opens_the_server_to_nobody(tiny_model, monkeypatch, capsys, options, variable):
    monkeypatch.setattr(server_room, "run", lambda *_: pytest.fail("it is open to everybody"))
    if variable is not None:
        monkeypatch.setenv("TPDNE_TOKEN", variable)
    assert run(["serve", str(tiny_model), "--port", "0", *options]) == 2
    assert "The token is empty" in capsys.readouterr().err


def test_a_limit_of_memory_is_noticed_before_the_libraries_are_loaded(tiny_model, monkeypatch, capsys):
    def fail(package):
        raise DeviceError(devices.NO_ROOM)

    monkeypatch.setattr(devices, "rehearse_import", fail)
    monkeypatch.setattr(server_room, "run", lambda *_: pytest.fail("it began"))
    assert run(["serve", str(tiny_model), "--port", "0"]) == 1
    assert capsys.readouterr().err == f"Error: {devices.NO_ROOM}\n"
