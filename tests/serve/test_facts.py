"""A server writes facts as training does: the same ids and text, counted, cached and escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from multi_token.data.formats import to_conversation
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from tests.serve.asking import IMAGE, NUM_TOKENS, QUESTION, RED, asked, content_of
from tests.serve.running_server import RunningServer, running
from tests.serve.vllm_parts import started
from tests.serve.vllm_stand_in import StandIn

THREE = np.array([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]], np.float32)


def npy_part() -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, THREE)
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "media", "modality": "vector", "data": data}


@pytest.fixture(scope="module")
def model(recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> Any:
    """A model with facts before an image, and before each vector of an item."""
    folder = tmp_path_factory.mktemp("facts")
    fields = recipe_fields(folder)
    fields["model"]["modalities"]["image"]["facts"] = "{width}x{height} "
    fields["model"]["modalities"]["vector"] = {
        "type": "vector",
        "dim": 2,
        "facts": "<|im_end|>{norm:.1f}: ",
        "projector": {"type": "expand", "factor": 2},
    }
    torch.manual_seed(0)
    model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    model.save_pretrained(folder / "run")
    return MultiTokenForConditionalGeneration.from_pretrained(folder / "run")


@pytest.fixture(scope="module")
def server(model: Any) -> Iterator[RunningServer]:
    with running(model) as server:
        yield server


def ask(server: RunningServer, *parts: Any) -> httpx.Response:
    body = {"messages": asked(*parts, QUESTION), "max_tokens": NUM_TOKENS, "temperature": 0}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_the_server_answers_as_generate_does_and_counts_the_text(
    server: RunningServer, model: Any, tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    parts = [{"type": "image", "image": str(tmp_path / "red.png")}, QUESTION]
    row = {"messages": [{"role": "user", "content": parts}]}
    (expected,) = model.generate([row], max_new_tokens=NUM_TOKENS)
    answer = ask(server, IMAGE)
    assert content_of(answer).strip() == expected
    processor = model.require_processor()
    conversation = to_conversation(row, list(model.modalities), row_id="row")
    sample = processor(conversation, prompt_only=True)
    assert "24x24 " in processor.tokenizer.decode(sample.input_ids)
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] == len(sample.input_ids)
    assert usage["prompt_tokens_details"]["image_tokens"] == 3


def test_text_between_the_parts_of_an_item_is_cached_and_stays_text(
    server: RunningServer, model: Any
) -> None:
    first, again = ask(server, npy_part()), ask(server, npy_part())
    assert content_of(first) == content_of(again)
    details = again.json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == again.json()["usage"]["prompt_tokens"] - 1
    assert details["media_tokens"] == {"vector": 6}
    # as letters, `<|im_end|>` has more tokens than the one that would end the turn
    chat = model.require_processor().chat
    plain = chat.tokenizer("5.0: ").input_ids
    assert first.json()["usage"]["prompt_tokens"] > 6 + 3 * len(plain) + 3


@pytest.mark.slow
def test_a_gateway_sends_the_same_prompt_to_vllm(server: RunningServer, model: Any) -> None:
    stand_in = StandIn(model.language_model)
    with started(model, stand_in) as engine, running(model, engine=engine) as gateway:
        for part in (IMAGE, npy_part()):
            assert content_of(ask(gateway, part)) == content_of(ask(server, part))
