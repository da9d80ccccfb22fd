"""The OpenAPI document of the HTTP interface."""

from __future__ import annotations

from typing import Any

from tpdne_cli import __version__
from tpdne_cli.images import FORMATS
from tpdne_cli.web.addresses import AMOUNTS, MAX_FRAMES, MAX_SEED_LENGTH, NUMBER, TRUNCATIONS

ATTRIBUTE = f"[^:,]{{1,40}}:{NUMBER}"


def document(models: list[str], max_size: int) -> dict[str, Any]:
    """OpenAPI 3.1, for the models that this server has."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tpdne",
            "version": __version__,
            "description": "Pictures of people, and of other things, that do not exist. A seed is an address.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": _paths(models, max_size),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _paths(models: list[str], max_size: int) -> dict[str, Any]:
    model = _parameter("model", "path", {"type": "string", "enum": models}, "The generator.")
    seed = _parameter(
        "seed",
        "path",
        {"type": "string", "minLength": 1, "maxLength": MAX_SEED_LENGTH},
        "A number from 0 to 4294967295, or any text, percent-encoded (/ as %2F); 'random' for a fresh one.",
    )
    format = _parameter("format", "path", {"type": "string", "enum": list(FORMATS)}, "How it is written.")
    parameters = _queries(max_size)
    image = {
        "200": {
            "description": "The image, marked as synthetic, its recipe inside; a bundled generator's is kept for ever.",
            "headers": {"ETag": {"schema": {"type": "string"}}},
            "content": {entry.mime: {"schema": {"type": "string", "format": "binary"}} for entry in FORMATS.values()},
        },
        "303": {"description": "For 'random': the address of a fresh one."},
        "304": {"description": "The client has it already."},
    }
    return {
        "/{model}/{seed}.{format}": _get("image", "An image.", [model, seed, format, *parameters], image),
        "/{model}/{seed}": _get(
            "page", "The page of one seed.", [model, seed, *parameters[1:4]], {**_html(), "303": image["303"]}
        ),
        "/{model}": _get("anybody", "A page that shows another one each time.", [model, *parameters[1:4]], _html()),
        "/api/models": _get("models", "The generators.", [], _json({"type": "array", "items": _ref("Model")})),
        "/api/{model}": _get("model", "One generator.", [model], _json(_ref("Model"))),
        "/api/{model}/{seed}": _get("seed", "What a seed stands for.", [model, seed, *parameters], _json(_ref("Seed"))),
        "/healthz": _get("health", "Whether the server answers.", [], _json({"type": "object"})),
        "/metrics": _get(
            "metrics", "Counters for Prometheus.", [], {"200": {"description": "Text.", "content": {"text/plain": {}}}}
        ),
    }


def _queries(max_size: int) -> list[dict[str, Any]]:
    least, most = TRUNCATIONS
    text = {"type": "string", "minLength": 1, "maxLength": MAX_SEED_LENGTH}
    whole: dict[str, Any] = {"type": "integer", "minimum": 0}
    return [
        _query(
            "size",
            {**whole, "minimum": 1, "maximum": max_size},
            "The longest side in pixels; a generator's own is never too large.",
        ),
        _query(
            "truncation",
            {"type": "number", "minimum": least, "maximum": most},
            "0: the average, 1: full variety. At most 20 decimals, no exponent.",
        ),
        _query("class", whole, "The class, for conditional generators."),
        _query(
            "attr",
            {"type": "string", "pattern": f"^{ATTRIBUTE}(,{ATTRIBUTE})*$"},
            f"Steps along the generator's directions, {AMOUNTS[0]:g} to {AMOUNTS[1]:g}: age:1.5,smile:-1.",
        ),
        _query("to", text, "A seed: the image is a frame of the walk that leads there."),
        _query("frame", {**whole, "maximum": MAX_FRAMES - 1}, "Which frame of the walk; 0 is the seed itself."),
        _query(
            "frames", {**whole, "minimum": 2, "maximum": MAX_FRAMES}, "How many frames the walk has, both ends counted."
        ),
        _query("mix", text, "A seed: the image has some of its styles."),
        _query(
            "styles", {"type": "string", "pattern": "^(coarse|middle|fine|[0-9]{1,2}(-[0-9]{1,2})?)$"}, "Which ones."
        ),
    ]


def _query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return _parameter(name, "query", schema, description)


def _parameter(name: str, where: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "description": description, "schema": schema}


def _get(name: str, summary: str, parameters: list[dict[str, Any]], answers: dict[str, Any]) -> dict[str, Any]:
    wrong = {"description": "What is wrong.", "content": {"application/problem+json": {"schema": _ref("Problem")}}}
    wait = {**wrong, "headers": {"Retry-After": {"schema": {"type": "integer"}}}}
    refused = {"400": wrong, "401": wrong, "404": wrong, "414": wrong, "421": wrong, "429": wait, "503": wait}
    return {"get": {"operationId": name, "summary": summary, "parameters": parameters, "responses": answers | refused}}


def _html() -> dict[str, Any]:
    return {"200": {"description": "A page.", "content": {"text/html": {"schema": {"type": "string"}}}}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"200": {"description": "JSON.", "content": {"application/json": {"schema": schema}}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas() -> dict[str, Any]:
    string, number, integer = {"type": "string"}, {"type": "number"}, {"type": "integer"}
    seed = {"anyOf": [integer, string]}
    address = {"type": ["string", "null"]}
    return {
        "Model": {
            "type": "object",
            "required": ["name", "arch", "resolution", "truncation", "classes", "directions", "weights"],
            "properties": {
                "name": string,
                "arch": string,
                "resolution": integer,
                "truncation": number,
                "classes": integer,
                "directions": {"type": "array", "items": string},
                "weights": {**string, "description": "SHA-256 of the file."},
            },
        },
        "Seed": {
            "type": "object",
            "required": ["model", "seed", "synthetic", "recipe", "page", "images", "command"],
            "properties": {
                "model": string,
                "seed": seed,
                "synthetic": {"const": True},
                "recipe": {"type": "object"},
                "page": address,
                "images": {"type": "object", "additionalProperties": string},
                "command": address,
            },
        },
        "Problem": {
            "type": "object",
            "required": ["title", "status", "detail"],
            "properties": {"title": string, "status": integer, "detail": string},
        },
    }
