"""Recorded events of vLLM 0.32 are parsed, and other events are refused."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
import torch

from multi_token.serve.engines.base import SamplingParams, TokenEvent
from multi_token.serve.engines.vllm.client import EngineError, completion_body, parse_event


def event(**choice: Any) -> dict[str, Any]:
    return {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, **choice}]}


def test_events_become_tokens_with_the_most_probable_ids() -> None:
    logprobs = {
        "text_offset": [0],
        "token_logprobs": [-3.5],
        "tokens": ["token_id:60"],
        "top_logprobs": [{"token_id:60": -3.5, "token_id:361": -1.25, "token_id:7": -2.0}],
    }
    fields = event(text="S", token_ids=[60], logprobs=logprobs, finish_reason=None)
    delta = parse_event(fields, num_top=2)
    assert delta is not None and delta.finish is None
    assert delta.tokens == (TokenEvent(60, -3.5, ((361, -1.25), (7, -2.0))),)
    none = parse_event(fields)
    assert none is not None and none.tokens == (TokenEvent(60, -3.5),)
    several = parse_event(event(token_ids=[5, 6], finish_reason="stop", stop_reason=6))
    assert several is not None
    assert several.tokens == (TokenEvent(5), TokenEvent(6))
    assert (several.finish, several.stop_id) == ("stop", 6)
    assert parse_event({"choices": [], "usage": {"prompt_tokens": 18}}) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"error": {"message": "EngineCore died", "code": 500}}, "failed"),
        ({"error": {"message": "Out of range float values", "code": 400}}, "rejected"),
        ({"error": {"message": "The engine is currently busy", "code": 503}}, "full"),
        ({"error": "Unauthorized"}, "failed"),
        ({"object": "chat.completion.chunk"}, "failed"),
        (event(token_ids=["60"]), "failed"),
        (event(token_ids=[-1]), "failed"),
        (event(token_ids=[60], logprobs={"tokens": ["S"]}), "failed"),
        (event(token_ids=[], finish_reason="abort"), "failed"),
    ],
)
def test_an_invalid_event_is_an_error_with_its_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(EngineError) as fault:
        parse_event(fields)
    assert fault.value.reason == reason


def test_a_body_names_every_field_that_vllm_would_fill_from_a_generation_config() -> None:
    options = SamplingParams(5, seed=2**63 + 1, num_logprobs=0)
    body = json.loads(completion_body([1, 2], options, model="m", end_ids={9, 4}, salt="s"))
    assert body["prompt"] == [1, 2] and "prompt_embeds" not in body
    assert body["stop_token_ids"] == [4, 9] and not body["ignore_eos"]
    assert (body["seed"], body["logprobs"], body["cache_salt"]) == (1, 0, "s")
    filled = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {name: body[name] for name in filled} == filled
    on = SamplingParams(5, ignore_eos=True)
    assert json.loads(completion_body([1], on, model="m", end_ids={4}))["stop_token_ids"] == []


def test_embeddings_are_sent_in_their_own_precision_and_without_the_rest_of_their_storage() -> None:
    rows = torch.randn(1000, 64, dtype=torch.bfloat16)
    body = json.loads(completion_body(rows[:2], SamplingParams(1), model="m", end_ids=()))
    data = base64.b64decode(body["prompt_embeds"])
    assert len(data) < 4096, "a view must not bring its complete storage"
    found = torch.load(io.BytesIO(data), weights_only=True)
    assert found.dtype == torch.bfloat16 and torch.equal(found, rows[:2])
