"""Routes of the chat page: which need a key, which example a number opens, which rows are shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from multi_token.serve.chat_ui.examples import read_examples
from multi_token.serve.chat_ui.routes import PUBLIC_PATHS
from multi_token.serve.openai.app import build_app
from multi_token.serve.service import Service
from multi_token.serve.settings import ServeSettings
from tests.serve.page_run import page_run
from tests.serve.running_server import KEY, npy

pytestmark = pytest.mark.slow

HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def run_folder(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return page_run(recipe_fields, tmp_path_factory.mktemp("run"))


class Asked:
    """A client of the application, without a socket."""

    def __init__(self, model: Any, **settings: Any) -> None:
        self.app = build_app(Service(model, ServeSettings(**settings)))

    def get(self, *paths: str, **headers: str) -> list[httpx.Response]:
        async def answers() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app)
            base = "http://127.0.0.1"
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                return [await client.get(path, headers=headers) for path in paths]

        return asyncio.run(answers())


@pytest.fixture
def keyed(served_model: Any, run_folder: Path) -> Asked:
    return Asked(served_model, api_keys=(KEY,), run_folder=run_folder, show_examples=True)


def test_only_the_pages_own_files_need_no_key(keyed: Asked) -> None:
    own = sorted(PUBLIC_PATHS - {"/page/report"})
    for answer in keyed.get(*own):
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy
    held = ("/page/facts", "/page/examples/0", "/page/report", "/page/report?ticket=1.2")
    assert [answer.status_code for answer in keyed.get(*held)] == [401] * 4
    assert [a.status_code for a in keyed.get("/page/facts", "/page/examples/0", **HEADERS)] == [
        200,
        200,
    ]


def test_a_ticket_that_was_changed_opens_nothing(keyed: Asked, served_model: Any) -> None:
    link = "/" + keyed.get("/page/facts", **HEADERS)[0].json()["report"]
    wrong = (link.replace("ticket=1", "ticket=2", 1), link[:-1], link + "0", link.split(".")[0])
    opened, *refused = keyed.get(link, *wrong)
    assert opened.status_code == 200 and "Trained" in opened.text
    assert "sandbox" in opened.headers["content-security-policy"]
    assert [answer.status_code for answer in refused] == [401] * 4
    (other,) = Asked(served_model, api_keys=(KEY,)).get(link)
    assert other.status_code == 401  # a ticket of another server


def test_a_ticket_expires(keyed: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    link = "/" + keyed.get("/page/facts", **HEADERS)[0].json()["report"]
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert keyed.get(link)[0].status_code == 401


@pytest.mark.parametrize("item", ["999", "-1", "..", "0/..", "%2e%2e%2frecipe.yaml", "0.png"])
def test_an_example_is_reached_by_its_number_alone(item: str, keyed: Asked) -> None:
    assert keyed.get(f"/page/examples/{item}", **HEADERS)[0].status_code == 404


def test_an_example_has_the_text_and_the_items_of_its_row(keyed: Asked, data: Path) -> None:
    (facts,) = keyed.get("/page/facts", **HEADERS)
    hostile, *named = facts.json()["examples"]
    assert hostile["answer"] == "a vector" and hostile["system"] == "You name things."
    assert hostile["held_out"] and not any(row["held_out"] for row in named)
    assert sorted(row["answer"] for row in named) == ["blue", "green", "red", "white"]
    (red,) = (row for row in named if row["answer"] == "red")
    words, image, end = red["parts"]
    assert (words, end) == ({"text": "What is "}, {"text": "?"})
    assert image["modality"] == "image" and image["shown"] == "image"
    item, vector = keyed.get(
        f"/page/examples/{image['item']}",
        f"/page/examples/{hostile['parts'][1]['item']}",
        **HEADERS,
    )
    assert item.content == (data / "red.png").read_bytes()
    assert item.headers["content-type"] == "application/octet-stream"
    assert vector.content == npy(1, 2, 3, 4, 5)


def test_missing_rows_give_no_examples(run_folder: Path, served_model: Any, tmp_path: Path) -> None:
    found = read_examples(run_folder, served_model.modalities)
    assert len(found.rows) == 5  # of six rows: the images of one are missing
    fields = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    fields["data"] = {"train": [{"rows": str(tmp_path / "gone.jsonl")}, {"rows": "owner/name"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    assert not read_examples(tmp_path, served_model.modalities).rows
    assert not read_examples(tmp_path / "gone", served_model.modalities).rows
    (tmp_path / "recipe.yaml").write_text("model: [")
    assert not read_examples(tmp_path, served_model.modalities).rows


def test_no_more_than_six_examples_are_shown(
    run_folder: Path, served_model: Any, tmp_path: Path
) -> None:
    rows = [
        {
            "vector": [i] * 5,
            "messages": [
                {"role": "user", "content": f"<vector> {i // 2}"},
                {"role": "assistant", "content": "x"},
            ],
        }
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    fields["data"] = {"train": [{"rows": str(tmp_path / "rows.jsonl")}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    found = read_examples(tmp_path, served_model.modalities)
    asked = [row["parts"][-1]["text"] for row in found.rows]
    assert len(asked) == len(set(asked)) == 6 and len(found.items) == 6


def test_no_row_of_the_data_is_shown_by_default(served_model: Any, run_folder: Path) -> None:
    closed = Asked(served_model, run_folder=run_folder)
    facts, example, page = closed.get("/page/facts", "/page/examples/0", "/")
    assert facts.json()["examples"] == [] and facts.json()["system"] is None
    assert example.status_code == 404
    # the report has samples of rows
    assert facts.json()["report"] is None
    shown = facts.text + page.text
    assert not any(
        word in shown for word in ("a vector", "You name things", "What is <", "Trained")
    )


def test_the_page_knows_which_files_a_modality_takes(keyed: Asked) -> None:
    image, vector = keyed.get("/page/facts", **HEADERS)[0].json()["modalities"]
    assert image["name"] == "image" and ".png" in image["takes"][0]["suffixes"]
    assert vector["name"] == "vector" and ".npy" in vector["takes"][0]["suffixes"]
