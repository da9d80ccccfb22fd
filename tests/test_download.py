"""Downloads against a server that misbehaves in every way known; nothing leaves this machine."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from tpdne_cli import download, store
from tpdne_cli.download import Policy, fetch
from tpdne_cli.errors import DownloadError, SettingsError

BODY = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()
HALF = 150_000

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Gives the n-th request the n-th answer, the last one for ever."""

    protocol_version = "HTTP/1.1"
    server: Site

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


class Site(ThreadingHTTPServer):
    """A server on this machine, what it was asked, and what it is to answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.answers: list[Answer] = [file()]
        self.over = threading.Event()
        self.base = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.base}/some/cat.pkl"

    def ranges(self) -> list[str | None]:
        return [headers.get("range") for _, headers in self.asked]

    def handle_error(self, *_args: object) -> None:
        pass  # clients that hang up are what is tested here


def file(body: bytes = BODY, tag: str | None = '"one"', upto: int | None = None, **extra: object) -> Answer:
    """A good server's answer, ranges and all; `upto` breaks it off there."""

    def answer(handler: Handler) -> None:
        start = 0
        asked, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        headers = dict(extra) if tag is None else {"ETag": tag, **extra}
        if asked and (condition is None or condition in (tag, extra.get("Last_Modified"))):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            handler.head(
                206,
                Content_Length=len(body) - start,
                Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}",
                **headers,
            )
        else:
            handler.head(200, Content_Length=len(body), **headers)
        handler.wfile.write(body[start:upto])

    return answer


def plain(status: int, body: bytes = b"no", **headers: object) -> Answer:
    def answer(handler: Handler) -> None:
        handler.head(status, Content_Length=len(body), **headers)
        handler.wfile.write(body)

    return answer


def redirect(target: str, status: int = 302) -> Answer:
    return plain(status, b"", Location=target)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TPDNE_HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "tpdne_offline"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path / "home"


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def quick(**changes: object) -> Policy:
    """No waiting between attempts."""
    values: dict[str, object] = {"attempts": 3, "connect_timeout": 10.0, "read_timeout": 10.0, "sleep": lambda _: None}
    return Policy(**{**values, **changes})  # type: ignore[arg-type]


def leftovers() -> list[str]:
    """What lies in the cache, apart from the mark and locks."""
    return sorted(p.name for p in store.cache_dir().glob("*") if p.suffix not in (".TAG", ".lock"))


def fails(url: str, *words: str, policy: Policy | None = None, expected: str | None = None) -> str:
    """The one sentence with which it ends; nothing that could be taken for the file is left."""
    with pytest.raises(DownloadError) as caught:
        fetch(url, expected_sha256=expected, policy=policy or quick())
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is missing from: {message}"
    assert "\n" not in message and message.endswith(".")
    mine = [name for name in leftovers() if name.startswith(store.url_key(url))]
    assert all(name.endswith((".part", ".part.json")) for name in mine)
    return message


def test_a_file_comes_whole_and_is_recorded(site: Site) -> None:
    seen: list[tuple[int, int | None]] = []
    path, digest = fetch(site.url, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == BODY and digest == DIGEST
    assert path.parent == store.cache_dir() and path.name.endswith("-cat.pkl")
    assert seen[0] == (0, len(BODY)) and seen[-1] == (len(BODY), len(BODY))
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    record = store.read_json(store.seen_path(site.url))
    assert (record["sha256"], record["bytes"], record["url"]) == (DIGEST, len(BODY), site.url)
    assert leftovers() == [path.name]


def test_the_cache_answers_without_the_network(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch(site.url)
    monkeypatch.setenv("TPDNE_OFFLINE", "1")
    assert fetch(site.url) == first and len(site.asked) == 1
    with pytest.raises(DownloadError, match=r"TPDNE_OFFLINE.*tpdne models import FILE"):
        fetch(f"{site.url}2")
    assert len(site.asked) == 1
    monkeypatch.setenv("TPDNE_OFFLINE", "0")
    fetch(f"{site.url}2")


def test_a_damaged_cache_is_mended(site: Site) -> None:
    path, _ = fetch(site.url)
    path.write_bytes(BODY[:-1])
    assert fetch(site.url) == (path, DIGEST) and path.read_bytes() == BODY


@pytest.mark.parametrize("tag", ['"one"', None], ids=["etag", "last-modified"])
def test_a_broken_connection_is_resumed_where_it_broke(site: Site, tag: str | None) -> None:
    dates = {} if tag else {"Last_Modified": formatdate(1e9, usegmt=True)}
    site.answers = [
        file(tag=tag, upto=HALF, **dates),
        file(tag=tag, upto=HALF + 70_000, **dates),
        file(tag=tag, **dates),
    ]
    path, digest = fetch(site.url, policy=quick())
    assert path.read_bytes() == BODY and digest == DIGEST
    assert site.ranges() == [None, f"bytes={HALF}-", f"bytes={HALF + 70_000}-"]
    assert site.asked[1][1]["if-range"] == (tag or dates["Last_Modified"])


@pytest.mark.parametrize(
    "headers",
    [{"tag": None}, {"tag": 'W/"weak"'}, {"tag": None, "Last_Modified": formatdate(usegmt=True)}, {"tag": "bare"}],
    ids=["none", "weak", "of this second", "unquoted"],
)
def test_without_a_strong_validator_it_begins_again(site: Site, headers: dict[str, str]) -> None:
    if "Last_Modified" in headers:
        headers = {**headers, "Last_Modified": formatdate(4e9, usegmt=True)}
    site.answers = [file(upto=HALF, **headers), file(**headers)]
    path, _ = fetch(site.url, policy=quick())
    assert path.read_bytes() == BODY and site.ranges() == [None, None]


def test_a_later_run_goes_on_where_an_interrupted_one_stopped(site: Site) -> None:
    def interrupt(done: int, _total: int | None) -> None:
        if done >= HALF:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(site.url, interrupt)
    starts: list[int] = []
    path, _ = fetch(site.url, lambda done, _total: starts.append(done))
    assert path.read_bytes() == BODY
    assert starts[0] >= HALF and site.ranges()[-1] == f"bytes={starts[0]}-"


def test_a_part_that_is_whole_already_is_not_asked_for_again(site: Site) -> None:
    path, _ = fetch(site.url)
    part = path.rename(path.with_name(f"{path.name}.part"))
    store.write_json(part.with_name(f"{part.name}.json"), {"validator": '"one"', "total": len(BODY)})
    assert fetch(site.url)[1] == DIGEST and len(site.asked) == 1


def test_a_file_that_changes_between_ranges_is_never_mixed(site: Site) -> None:
    site.answers = [file(upto=HALF), file(OTHER, '"two"')]
    path, digest = fetch(site.url, policy=quick())
    assert path.read_bytes() == OTHER and digest == hashlib.sha256(OTHER).hexdigest()
    assert site.ranges() == [None, f"bytes={HALF}-"]


def test_a_server_that_ignores_if_range_is_found_out_by_its_etag(site: Site) -> None:
    def careless(handler: Handler) -> None:
        del handler.headers["If-Range"]
        file(OTHER, '"two"')(handler)

    site.answers = [file(upto=HALF), careless, file(OTHER, '"two"')]
    assert fetch(site.url, policy=quick())[0].read_bytes() == OTHER
    assert site.ranges() == [None, f"bytes={HALF}-", None]


def test_a_server_that_ignores_ranges_sends_all_again(site: Site) -> None:
    site.answers = [file(upto=HALF), plain(200, BODY, ETag='"one"')]
    assert fetch(site.url, policy=quick())[0].read_bytes() == BODY


@pytest.mark.parametrize("header", ["bytes 0-9/300000", "bytes x-y/z", ""])
def test_a_wrong_part_is_thrown_away(site: Site, header: str) -> None:
    wrong = plain(206, b"0123456789", Content_Range=header, ETag='"one"')
    site.answers = [file(upto=HALF), wrong, file()]
    assert fetch(site.url, policy=quick())[0].read_bytes() == BODY
    assert site.ranges() == [None, f"bytes={HALF}-", None]


def test_a_part_longer_than_the_file_is_thrown_away(site: Site) -> None:
    site.answers = [file(upto=HALF), plain(416, b"", Content_Range="bytes */10"), file()]
    assert fetch(site.url, policy=quick())[0].read_bytes() == BODY
    assert site.ranges() == [None, f"bytes={HALF}-", None]


def test_a_file_shorter_than_announced_is_no_file(site: Site) -> None:
    site.answers = [file(tag=None, upto=HALF)]
    fails(site.url, "could not be fetched", "tpdne models import FILE")
    assert len(site.asked) == 3


def test_a_silent_server_is_left_and_its_bytes_are_kept(site: Site) -> None:
    def stall(handler: Handler) -> None:
        file(upto=HALF)(handler)
        handler.server.over.wait(20)

    site.answers = [stall, file()]
    path, _ = fetch(site.url, policy=quick(read_timeout=0.4))
    assert path.read_bytes() == BODY
    asked = site.ranges()[1]
    assert asked is not None and 2**16 <= int(asked[6:-1]) <= HALF  # at most one chunk is lost

    site.answers = [lambda handler: handler.server.over.wait(20) and None]
    fails(f"{site.url}2", "fell silent", policy=quick(read_timeout=0.1))


def test_a_chunked_answer_that_breaks_off_is_no_file(site: Site) -> None:
    def chunked(handler: Handler, end: bytes) -> None:
        handler.head(200, Transfer_Encoding="chunked")
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(BODY), BODY) + end)

    site.answers = [lambda h: chunked(h, b""), lambda h: chunked(h, b"0\r\n\r\n")]
    totals: set[int | None] = set()
    path, _ = fetch(site.url, lambda _done, total: totals.add(total), policy=quick())
    assert path.read_bytes() == BODY and totals == {None} and len(site.asked) == 2


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_passing_troubles_are_waited_for(site: Site, status: int) -> None:
    waits: list[float] = []
    site.answers = [plain(status), plain(status), file()]
    assert fetch(site.url, policy=quick(backoff=0.5, sleep=waits.append))[1] == DIGEST
    assert waits == [0.5, 1.0]


def test_retry_after_is_obeyed_within_reason(site: Site) -> None:
    waits: list[float] = []
    policy = quick(sleep=waits.append)
    site.answers = [plain(503, Retry_After=7), plain(503, Retry_After="soon"), file()]
    assert fetch(site.url, policy=policy)[1] == DIGEST and waits == [7, 2]
    site.answers = [plain(503, Retry_After=3600)]
    fails(f"{site.url}2", "answers 503", "in 3600 seconds", policy=policy)
    assert len(site.asked) == 4


def test_lasting_troubles_end_at_once(site: Site) -> None:
    for status, words in ((401, "login"), (403, "refuses"), (404, "no such file"), (410, "no longer"), (418, "418")):
        site.asked.clear()
        site.answers = [plain(status)]
        fails(site.url, words, str(status), "tpdne models import FILE")
        assert len(site.asked) == 1
    site.answers = [plain(500)]
    fails(site.url, "answers 500", "try again later")


def test_no_server_no_name_no_proxy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Site()
    closed.server_close()
    fails(closed.url, "cannot be reached")
    fails("http://no-such-host.invalid/a.pkl", "not known")
    monkeypatch.setenv("http_proxy", closed.base)
    fails(site.url, "proxy")
    monkeypatch.setenv("http_proxy", "gopher://127.0.0.1:1")
    fails(site.url, "proxy")


def test_the_environment_names_the_proxy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site.base.replace("//", "//me:se%40cret@"))
    assert fetch("http://generators.example/cat.pkl")[1] == DIGEST
    path, headers = site.asked[0]
    assert path == "http://generators.example/cat.pkl"
    assert headers["proxy-authorization"] == "Basic bWU6c2VAY3JldA=="  # me:se@cret
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fetch(site.url)
    assert site.asked[1][0] == "/some/cat.pkl" and "proxy-authorization" not in site.asked[1][1]


def test_redirects_are_followed_a_few_times(site: Site) -> None:
    site.answers = [redirect("/elsewhere"), redirect(f"{site.base}/signed?key=secret", 307), file()]
    path, digest = fetch(site.url)
    assert digest == DIGEST and path.name.endswith("-cat.pkl")
    assert [p for p, _ in site.asked] == ["/some/cat.pkl", "/elsewhere", "/signed?key=secret"]
    site.answers = [redirect("/round")]
    site.asked.clear()
    fails(f"{site.url}2", "leads on more than 5 times")
    assert len(site.asked) == 6


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "javascript:x", "http://[::"])
def test_redirects_lead_nowhere_but_to_the_web(site: Site, target: str) -> None:
    site.answers = [redirect(target)]
    fails(site.url, "not followed")
    assert len(site.asked) == 1


@pytest.fixture
def secure(tmp_path: Path, site: Site) -> Path:
    """The site behind TLS, with a certificate that nobody knows; its file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, so there is no certificate to test with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", *kind, *names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site.socket = context.wrap_socket(site.socket, server_side=True)
    return certificate


def test_a_certificate_must_be_trusted(site: Site, secure: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = site.url.replace("http:", "https:")
    fails(url, "certificate", "SSL_CERT_FILE")
    assert not site.asked
    monkeypatch.setenv("SSL_CERT_FILE", str(secure))
    assert fetch(url)[1] == DIGEST
    site.answers = [redirect(f"{site.base}/plain")]
    fails(f"{url}2", "not followed", "'http'")  # from https down to http


def test_another_content_than_the_first_time_is_told(site: Site) -> None:
    path, _ = fetch(site.url)
    path.unlink()
    site.answers = [file(OTHER, '"two"')]
    message = fails(site.url, "another file", DIGEST, store.today(), str(store.seen_path(site.url)))
    assert hashlib.sha256(OTHER).hexdigest() in message and leftovers() == []
    store.seen_path(site.url).unlink()  # the way out that the message tells
    assert fetch(site.url)[0].read_bytes() == OTHER


def test_what_is_no_generator_is_not_kept(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that lies about the length once must not spoil every later attempt."""
    from tpdne_cli.cli import run

    whole = (ROOT / "weights" / "cats.safetensors").read_bytes()
    site.answers = [file(whole[:-1000]), file(whole)]
    assert run(["models", "import", site.url, "--name", "mine"]) == 1
    err = capsys.readouterr().err
    assert "is thrown away" in err and str(store.cache_dir()) not in err
    assert leftovers() == [] and not store.seen_path(site.url).exists()
    assert run(["models", "import", site.url, "--name", "mine"]) == 0


def test_the_cache_can_be_listed(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    from tpdne_cli.cli import run

    fetch(site.url)
    assert run(["models", "cache", "--json"]) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert record["bytes"] == len(BODY) and record["url"] == download.shown(site.url) and record["complete"]
    assert run(["models", "cache"]) == 0
    assert "0.3 MB" in capsys.readouterr().out
    assert run(["models", "clear-cache", "-q"]) == 0 and run(["models", "cache"]) == 0
    assert capsys.readouterr().out == ""


def test_waiting_is_told(site: Site) -> None:
    told: list[tuple[str, float]] = []
    site.answers = [plain(503), file(BODY)]
    fetch(site.url, on_wait=lambda reason, seconds: told.append((reason, seconds)), policy=Policy(sleep=lambda _: None))
    assert told == [("its server answers 503", 1.0)]


def test_a_pinned_sha256_is_held_to(site: Site) -> None:
    fails(site.url, "expected", DIGEST, "0" * 64, expected="0" * 64)
    assert leftovers() == [] and not store.seen_path(site.url).exists()
    assert fetch(site.url, expected_sha256=DIGEST.upper())[1] == DIGEST
    with pytest.raises(SettingsError, match="64 hexadecimal"):
        fetch(site.url, expected_sha256="abc")


def test_too_much_is_refused_before_it_comes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(site.url, "larger than", policy=quick(max_bytes=100_000))
    fails(site.url, "MB are free", "TPDNE_HOME", policy=quick(spare_bytes=10**18))
    site.answers = [lambda handler: handler.head(200, Content_Length=10**17)]
    fails(site.url, "larger than")

    def endless(handler: Handler) -> None:
        handler.head(200, Connection="close")  # no length: the bound is found out on the way
        while True:
            handler.wfile.write(BODY)

    site.answers = [endless]
    fails(site.url, "larger than", policy=quick(max_bytes=2**20))
    assert leftovers() == []


def test_what_is_no_file_is_told(site: Site) -> None:
    site.answers = [plain(200, b"<html>log in</html>", Content_Type="text/html; charset=utf-8")]
    fails(site.url, "web page")
    site.answers = [plain(200, b"\x1f\x8b", Content_Encoding="gzip")]
    fails(site.url, "compressed")


def test_a_full_disk_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr(store, "make_cache_dir", lambda: store.make_dir(store.cache_dir()))
    monkeypatch.setattr(store, "write_json", lambda path, value: path.write_text("{}"))
    fails(site.url, "No space left", "TPDNE_HOME")


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h/x", "cat.pkl", "", "http://", "https://[", "http://h:x/"]
)
def test_what_is_no_address_is_told(url: str) -> None:
    fails(url, "is no address")


def test_logins_and_keys_stay_out_of_messages_and_records(site: Site) -> None:
    message = fails("https://me:secret@h.example/x.pkl", "login")
    assert "secret" not in message
    path, _ = fetch(f"{site.url}?key=secret")
    assert "secret" not in store.seen_path(f"{site.url}?key=secret").read_text() + str(path)
    site.answers = [plain(403)]
    assert "secret" not in fails(f"{site.base}/a?key=secret", "refuses")
    site.answers = [redirect("ftp://h.example/x?key=secret")]
    assert "secret" not in fails(f"{site.base}/b?key=secret", "not followed")


def test_two_at_once_fetch_once(site: Site) -> None:
    results: list[tuple[Path, str]] = []
    threads = [threading.Thread(target=lambda: results.append(fetch(site.url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(site.asked) == 1 and len(results) == 4 and len(set(results)) == 1


def test_kill_9_loses_little(site: Site) -> None:
    def stall(handler: Handler) -> None:
        file(upto=HALF)(handler)
        handler.server.over.wait(20)

    site.answers = [stall, file()]
    script = (
        "import sys; from tpdne_cli.download import fetch; fetch(sys.argv[1], lambda done, _: print(done, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", script, site.url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 2**17:
            pass
        process.kill()
    assert [Path(name).suffix for name in leftovers()] == [".part", ".json"]
    path, digest = fetch(site.url, policy=quick())  # nor does the lock of the dead process hold anybody up
    assert digest == DIGEST and leftovers() == [path.name]


def test_a_cache_emptied_meanwhile_is_told_and_the_next_run_succeeds(site: Site) -> None:
    def empty(_done: int, _total: int | None) -> None:
        for path in store.cache_dir().glob("*.part*"):
            path.unlink()

    with pytest.raises(DownloadError, match="cannot be written"):
        fetch(site.url, empty, policy=quick())
    assert fetch(site.url)[1] == DIGEST


def test_a_trickle_does_not_go_on_for_ever(site: Site) -> None:
    tiny = iter(range(1, 100))
    site.answers = [lambda handler: file(upto=next(tiny) * 1000)(handler)]
    fails(site.url, "could not be fetched", "0.0 MB of it have come and are kept", policy=quick())
    assert len(site.asked) == 3


@given(st.text())
def test_any_address_makes_a_harmless_file_name(tail: str) -> None:
    name = download.file_name(f"https://h.example/{tail}")
    assert 0 < len(name) <= 100 and set(name).isdisjoint('/\\:*?"<>|\0 ') and not name.startswith(".")


def test_file_names_are_those_of_the_addresses() -> None:
    names = {"/a%20cat.pkl?x=/b": "a-cat.pkl", "/..%2f..%2fetc": "etc", "/": "file", "": "file", "/d/": "d"}
    for tail, name in names.items():
        assert download.file_name(f"https://h.example{tail}") == name
