"""`tpdne doctor`: what to paste in a bug report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tpdne_cli.cli.output import Output, complain, one_line


@click.command(short_help="Test the installation and tell what to paste in a bug report.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Test the installation and tell what to paste in a bug report.

    Exit code 0 if all is well, 1 if not.
    """
    from tpdne_cli.diagnosis import diagnose

    output = Output(as_json)
    found = diagnose()
    if as_json:
        output.result("", found)
    else:
        output.table([(key, one_line(value)) for key, value in rows(found)])
    for problem in found["problems"]:
        complain(problem)
    return 1 if found["problems"] else 0


def rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, value) for people, of all that could be told; the home directory is left out of paths."""
    yield "tpdne", found["tpdne"]
    yield "python", at_home(found["python"])
    yield "platform", found["platform"]
    for what in ("packages", "optional"):
        yield what, ", ".join(f"{name} {version or 'MISSING'}" for name, version in found[what].items())
    if processor := found["processor"]:
        yield "processor", f"{processor['name']}, cores: {processor['cores']}{gigabytes(processor['memory'])}"
    for entry in found["devices"] or ():
        state = "usable" if entry["usable"] else f"not usable: {entry['reason']}"
        yield entry["device"], f"{entry.get('name', '')}{gigabytes(entry.get('memory'))} {state}".strip(" ,")
    if precisions := found["precisions"]:
        yield "precisions", ", ".join(f"{name} {'works' if works else 'fails'}" for name, works in precisions.items())
    for place, path in (found["places"] or {}).items():
        yield place, at_home(path)
    for model in found["models"]:
        yield (
            model["name"],
            model.get("problem") or f"{model['arch'] or '?'}, {model['bytes']} bytes, sha256 {model['sha256']}",
        )
    test = found["self_test"]
    took = f" in {test['seconds']:.1f} s" if "seconds" in test else ", not even tried"
    yield "self-test", f"{'passed' if test['passed'] else 'FAILED'}{took}"


def gigabytes(count: int | None) -> str:
    return f", {count / 2**30:.1f} GiB" if count else ""


def at_home(text: str) -> str:
    return text.replace(str(Path.home()), "~") if str(Path.home()) != "/" else text
