"""The OpenAPI document describes the routes, and requests generated from it do no harm."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.serve.running_server import RunningServer, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def open_server(served_model: Any) -> Iterator[RunningServer]:
    """A server without modalities, whose answers are short."""
    model = copy.copy(served_model)
    model.modalities = {}
    with running(model, max_tokens=4, default_max_tokens=4) as server:
        yield server


ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/generate"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/version"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=str)
def test_generated_requests_get_an_answer_or_an_error(
    method: str, path: str, open_server: RunningServer
) -> None:
    schema = schemathesis.openapi.from_url(f"{open_server.url}/openapi.json")
    statuses: set[int] = set()

    # strategies, since schemathesis' plug-in needs what newer pytest lacks
    @given(case=schema[path][method].as_strategy())
    @settings(
        max_examples=40 if method == "POST" else 5,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def ask(case: Any) -> None:
        response = case.call(timeout=30)
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert re.fullmatch(r"[\x20-\x7e]{1,300}", error["message"])
            assert "0x" not in error["message"]

    ask()
    assert statuses


def test_generated_requests_cover_every_route(open_server: RunningServer) -> None:
    document = httpx.get(f"{open_server.url}/openapi.json").json()
    described = [(m.upper(), path) for path, ops in document["paths"].items() for m in ops]
    assert sorted(described) == sorted(ROUTES)


def test_the_document_names_every_field_and_part(open_server: RunningServer) -> None:
    document = httpx.get(f"{open_server.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"temperature", "top_k", "stop", "seed"} <= set(schemas["ChatRequest"]["properties"])
    parts = schemas["ChatMessage"]["properties"]["content"]["anyOf"][1]["items"]["anyOf"]
    assert {part["$ref"].rpartition("/")[2] for part in parts} >= {"TextPart", "MediaPart"}
    refs = re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', str(document).replace("'", '"'))
    assert refs and set(refs) <= set(schemas)
    assert document["paths"]["/v1/chat/completions"]["post"]["security"] == [{"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []


def test_the_page_of_routes_loads_nothing(open_server: RunningServer) -> None:
    page = httpx.get(f"{open_server.url}/docs").text
    assert "/v1/chat/completions" in page and "top_logprobs" in page
    assert "<script" not in page and "http://" not in page and "https://" not in page


def test_a_public_server_has_no_description_of_its_routes(served_model: Any) -> None:
    from fastapi.testclient import TestClient

    from multi_token.serve.openai.app import build_app
    from multi_token.serve.service import Service
    from multi_token.serve.settings import ServeSettings

    key = "sk-test-key-1"
    found = ServeSettings(host="0.0.0.0", api_keys=(key,))
    client = TestClient(build_app(Service(served_model, found)))
    headers = {"Authorization": f"Bearer {key}"}
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert client.get(path, headers=headers).status_code == 404
    assert client.get("/version", headers=headers).status_code == 200
