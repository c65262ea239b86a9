"""A plug-in modality has every right of a built-in in the server: a real one, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
import yaml

from multi_token import registry
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.serve.media.limits import RequestMediaLimits
from multi_token.serve.media.worker import warm_up
from multi_token.types import Conversation, Media, Message, Text
from tests.serve import plug_in
from tests.serve.asking import NUM_TOKENS, QUESTION, asked, content_of, fault_of
from tests.serve.running_server import RunningServer, b64, data_url, running

ODOUR = b"0.5 0.25 1.5"


@pytest.fixture(scope="module")
def smells(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server of a model whose only modality is a plug-in, named neither `image` nor `odour`."""
    folder = tmp_path_factory.mktemp("smells")
    fields = recipe_fields(folder)
    projector = {"type": "linear"}
    fields["model"]["modalities"] = {"nose": {"type": "odour", "projector": projector}}
    (folder / "scent.odour").write_bytes(ODOUR)
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "nose", "nose": "scent.odour"}]},
            {"role": "assistant", "content": "coffee"},
        ]
    }
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    fields["data"] = {"train": [{"rows": str(folder / "rows.jsonl")}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    registry.register_modality("odour", plug_in.OdourModality)
    try:
        torch.manual_seed(0)
        model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
        limits = RequestMediaLimits(max_seconds=8)
        with running(model, media_totals=limits, run_folder=folder, show_examples=True) as server:
            yield server
    finally:
        del registry._registered["modality"]["odour"]


def ask(server: RunningServer, *parts: Any) -> httpx.Response:
    body = {"messages": asked(*parts, QUESTION), "max_tokens": NUM_TOKENS}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


OWN = {"type": "nose_url", "nose_url": {"url": data_url(ODOUR, "application/octet-stream")}}
OPENAI = {"type": "image_url", "image_url": {"url": data_url(ODOUR, "application/octet-stream")}}
NAMED = {"type": "media", "modality": "nose", "data": b64(ODOUR)}
NUMBERS = {"type": "media", "modality": "nose", "data": [0.5, 0.25, 1.5]}


@pytest.mark.parametrize(
    "part", [OWN, OPENAI, NAMED, NUMBERS], ids=["own", "openai", "media", "numbers"]
)
def test_a_plug_in_takes_its_own_part_and_the_part_that_it_declares(
    smells: RunningServer, part: dict[str, Any]
) -> None:
    model: Any = smells.service.prompts.media_embedder.model
    message = Message("user", (Media("nose", ODOUR), Text("What is this?")))
    (expected,) = model.generate([Conversation((message,))], max_new_tokens=NUM_TOKENS)
    answer = ask(smells, part)
    assert content_of(answer) == expected
    details = answer.json()["usage"]["prompt_tokens_details"]
    assert details["media_tokens"] == {"nose": 3}
    assert details["image_tokens"] == 3, "counted as the part that carries it"


def test_a_plug_in_is_refused_over_the_limit_of_its_field(smells: RunningServer) -> None:
    long = b"1 " * 700  # the server's limit is 600 s, the default of the field a billion
    answer = ask(smells, {**NAMED, "data": b64(long)})
    assert answer.status_code == 400
    assert "700 s is over the limit of 600" in fault_of(answer)["message"]


def test_sizes_of_a_plug_in_count_towards_the_limits_of_a_request(smells: RunningServer) -> None:
    content_of(ask(smells, OWN, OPENAI))
    answer = ask(smells, OWN, OPENAI, NAMED)  # 9 s of 8
    assert answer.status_code == 413
    assert "9 seconds" in fault_of(answer)["message"]


def test_a_part_of_another_kind_is_refused_with_the_name_of_the_plug_in(
    smells: RunningServer,
) -> None:
    answer = ask(smells, {"type": "video_url", "video_url": data_url(ODOUR)})
    assert answer.status_code == 400 and "nose (odour)" in fault_of(answer)["message"]


def test_the_page_shows_a_plug_in_with_its_files_and_its_example(smells: RunningServer) -> None:
    facts = httpx.get(f"{smells.url}/page/facts").json()
    takes = [{"kind": "file", "noun": "odours", "suffixes": [".odour"]}]
    assert facts["modalities"] == [{"name": "nose", "type": "odour", "takes": takes}]
    (example,) = facts["examples"]
    assert example["answer"] == "coffee"
    (part,) = example["parts"]
    item = httpx.get(f"{smells.url}/page/examples/{part['item']}")
    assert (part["modality"], item.content) == ("nose", ODOUR)


def test_a_plug_in_is_warmed_up_with_its_own_example() -> None:
    plug_in.decoded.clear()
    warm_up(plug_in.OdourModality())
    assert plug_in.decoded == ["0.125"]
