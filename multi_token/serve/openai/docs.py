"""OpenAPI document of the routes, and a reference page in HTML without scripts.

Both are generated from the routes and request schemas. FastAPI's own pages load scripts from a CDN.
"""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from multi_token.serve.openai.protocol import CONTENT_PART_MODELS, ChatRequest

REFERENCE = "/docs"
_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "The request is invalid; `param` names the field.",
    "401": "Missing or invalid API key.",
    "404": "Unknown route or model.",
    "408": "The body did not arrive in time.",
    "413": "The body or its media are too large.",
    "415": "Content-Type is not application/json.",
    "421": "The Host header names another machine.",
    "422": "A media item takes too much time or memory to decode.",
    "429": "The queue is full; see Retry-After.",
    "500": "Internal server error.",
    "503": "The server is shutting down, or its engine has failed.",
    "504": "The request exceeded its deadline.",
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string", "maxLength": 300, "pattern": "^[\\x20-\\x7e]*$"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "error_id": {"type": "string"},
            },
        }
    },
}
_GENERATE_SCHEMA = {
    "type": "object",
    "required": ["messages"],
    "properties": {
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
            },
        },
        "images": {"type": "array", "items": {"type": "string"}},
    },
}


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's OpenAPI document plus the request bodies, which the routes parse themselves."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    models = (ChatRequest, *CONTENT_PART_MODELS.values())
    _, definitions = models_json_schema([(m, "validation") for m in models], ref_template=_REF)
    schemas |= definitions["$defs"]
    # The schema of ChatMessage takes any object as a part, since a run adds `<name>_url` parts. The
    # document lists the parts that every run has.
    parts: list[dict[str, Any]] = [
        {"$ref": _REF.format(model=m.__name__)} for m in CONTENT_PART_MODELS.values()
    ]
    content = schemas["ChatMessage"]["properties"]["content"]
    for branch in content["anyOf"]:
        if branch.get("type") == "array":
            branch["items"] = {"anyOf": parts}
    schemas["Error"] = _ERROR_SCHEMA
    schemas["GenerateRequest"] = _GENERATE_SCHEMA
    bodies = {"/v1/chat/completions": "ChatRequest", "/generate": "GenerateRequest"}
    # The routes take a bare Request, so FastAPI knows neither their bodies nor their errors.
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _add_body(operation, bodies.get(path), is_open=path == "/health")
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = document
    return document


def _add_body(operation: dict[str, Any], body: str | None, *, is_open: bool) -> None:
    if body is not None:
        schema = {"$ref": _REF.format(model=body)}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    operation["security"] = [] if is_open else [{"key": []}]
    responses = operation["responses"]
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    for status, meaning in _ERRORS.items():
        responses[status] = {"description": meaning, "content": error}
    if operation.get("tags") == ["state"]:
        # /health and /ready report 503 by a status of their own, not by an error object.
        del responses["503"]["content"]
    if body == "ChatRequest":  # `stream: true` answers with events
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    if "metrics" in operation["operationId"]:
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}


def reference_page(document: dict[str, Any]) -> str:
    """Render routes and fields as one HTML page."""
    rows = [
        f"<tr><td><code>{method.upper()} {escape(path)}</code></td>"
        f"<td>{escape(operation.get('description', ''))}</td></tr>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    fields = [
        f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(_type_text(schema))}</code></td></tr>"
        for name, schema in document["components"]["schemas"]["ChatRequest"]["properties"].items()
    ]
    return (
        "<!doctype html><meta charset=utf-8><title>multi_token</title>"
        "<style>body{font:16px system-ui;margin:2em auto;max-width:50em;padding:0 1em}"
        "td{padding:.2em 1em .2em 0;vertical-align:top}</style>"
        f"<h1>multi_token {escape(document['info']['version'])}</h1>"
        f"<h2>Routes</h2><table>{''.join(rows)}</table>"
        f"<h2>Fields of a chat request</h2><table>{''.join(fields)}</table>"
        '<p>OpenAPI: <a href="openapi.json">openapi.json</a></p>'
    )


def _type_text(schema: dict[str, Any]) -> str:
    names = []
    for branch in schema.get("anyOf", [schema]):
        name = branch.get("type") or str(branch.get("$ref", "")).rpartition("/")[2]
        bounds = [
            f"{sign} {branch[key]}"
            for key, sign in (("minimum", ">="), ("maximum", "<="))
            if key in branch
        ]
        names.append(" ".join([name, *bounds]))
    return " or ".join(name for name in names if name != "null")
