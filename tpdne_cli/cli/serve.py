"""`tpdne serve`: the web page and its HTTP interface."""

from __future__ import annotations

import os
from typing import Any

import click

from tpdne_cli import devices
from tpdne_cli import models as registry
from tpdne_cli.cli import options
from tpdne_cli.cli.output import Output

NEEDS = (
    "The page needs Starlette, uvicorn and Jinja: "
    "pip install starlette uvicorn jinja2, or pip install '.[serve]' in a clone."
)

serving_options = options.group(
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."),
    click.option("--allow-host", multiple=True, metavar="NAME", help="Answer to this name, too. Repeatable; '*': all."),
    click.option("--token", envvar="TPDNE_TOKEN", metavar="TEXT", help="Ask for this bearer token (or TPDNE_TOKEN)."),
    click.option("--rate", type=click.FloatRange(0, min_open=True), metavar="N", help="Requests a second per client."),
    click.option("--behind-proxy", is_flag=True, help="Believe X-Forwarded-For of a proxy on this machine."),
    click.option(
        "--cache", type=click.IntRange(0), default=64, show_default=True, metavar="MB", help="Of images, in memory."
    ),
    click.option(
        "--queue", type=click.IntRange(1), default=256, show_default=True, metavar="N", help="Images that may wait."
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        default=30,
        show_default=True,
        metavar="SECONDS",
        help="How long an image may take.",
    ),
    click.option(
        "--max-size", type=click.IntRange(1, 4096), default=1024, show_default=True, metavar="PX", help="Largest size."
    ),
)


@click.command(short_help="Show a page where every reload is somebody new.")
@click.argument("model", nargs=-1)
@serving_options
@options.device_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the address.")
@click.option("-q", "--quiet", is_flag=True, help="Print the address and errors only.")
def serve(model: tuple[str, ...], **given: Any) -> None:
    """Show a page where every reload is somebody new, and an HTTP interface for other programs.

    \b
    tpdne serve                         faces and cats at http://127.0.0.1:8000/
    tpdne serve dishes.safetensors      another generator
    curl -O http://127.0.0.1:8000/faces/alice@example.com.webp

    The first MODEL is the one at /; with none, all installed ones are shown.
    """
    token = token_of(given["token"])
    devices.rehearse_import("torch")
    try:
        from tpdne_cli.web import app, crew, server
        from tpdne_cli.web.guard import Rules
        from tpdne_cli.web.metrics import Metrics
        from tpdne_cli.web.studio import Limits, Studio
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "jinja2", "anyio"):
            raise
        raise click.ClickException(NEEDS) from None
    output = Output(given["as_json"], given["quiet"])
    names = app.served(list(model) or default_models())
    limits = Limits(given["queue"], given["timeout"], cache_bytes=given["cache"] << 20, size=given["max_size"])
    placement = (given["device"], given["precision"], given["batch_size"])
    staff = crew.assemble(names, placement, 2 * limits.seconds)
    click.get_current_context().call_on_close(staff.close)
    studio = Studio(list(names), staff, limits, Metrics())
    studio.load(next(iter(names)))
    hosts = frozenset(name.lower() for name in (given["host"], *given["allow_host"]))
    site = app.create(studio, Rules(hosts, token, given["rate"]))
    try:
        bound = server.listen(given["host"], given["port"])
    except OSError as error:
        where = f"{given['host']}:{given['port']}"
        raise click.ClickException(f"Cannot listen at {where} ({error.strerror}): choose another --port.") from None
    url = server.url_of(bound)
    if not is_loopback(bound) and token is None:
        output.note("Everybody who reaches this machine can use it: --token and --rate set limits.")

    def ready() -> None:
        output.result(url, {"url": url, "models": list(names)})
        output.note("Ctrl-C stops it.")

    server.run(site, bound, ready, lambda: staff.is_well, given["behind_proxy"])


def token_of(given: str | None) -> str | None:
    """The token to ask for. An empty one (an unset variable, an empty secret) would open the server to everybody."""
    token = os.environ.get("TPDNE_TOKEN") if given is None else given  # click takes an empty variable for none at all
    if token is not None and not token.strip():
        raise click.UsageError("The token is empty: give --token (or TPDNE_TOKEN) a text, or leave it out.")
    return token


def default_models() -> list[str]:
    """All installed ones, faces first."""
    return sorted(registry.names(), key=lambda name: (name != "faces", name))


def is_loopback(bound: Any) -> bool:
    import ipaddress

    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback
