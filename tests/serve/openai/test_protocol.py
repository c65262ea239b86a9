"""Request schema: bounds, refused and ignored fields, and the error of each."""

from __future__ import annotations

import re
from typing import Any

import pytest

from multi_token.serve.errors import ServeError, sanitize
from multi_token.serve.openai.protocol import (
    NEUTRAL_FIELDS,
    ChatRequest,
    parse_chat,
    parse_json,
    request_params,
)
from multi_token.serve.settings import ServeSettings

MESSAGES = [{"role": "user", "content": "hi"}]


def parsed(**fields: Any) -> ChatRequest:
    return parse_chat({"messages": MESSAGES, **fields})[0]


def refused(fields: Any) -> ServeError:
    with pytest.raises(ServeError) as caught:
        parse_chat(fields)
    assert re.fullmatch(r"[\x20-\x7e]{1,300}", str(caught.value))
    return caught.value


WRONG = (-1, 2**31 + 1, 2**63, 1e308, float("inf"), float("nan"), "1", True, [], {})


@pytest.mark.parametrize(
    "field",
    ["max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "n"],
)
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_numbers_have_bounds(field: str, value: Any) -> None:
    if (field, value) in [("top_k", -1), ("seed", 2**31 + 1)]:
        assert getattr(parsed(**{field: value}), field) == value
        return
    error = refused({"messages": MESSAGES, field: value})
    assert (error.status, error.param) == (400, field)


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_top_logprobs_has_bounds(value: Any) -> None:
    error = refused({"messages": MESSAGES, "logprobs": True, "top_logprobs": value})
    assert error.param == "top_logprobs"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"user": "u" * 513}, "user"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "root", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "function", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages.0.tool_calls",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ],
    ids=str,
)
def test_a_field_out_of_bounds_is_named(fields: dict[str, Any], param: str) -> None:
    assert refused({"messages": MESSAGES, **fields}).param == param


@pytest.mark.parametrize("field", sorted(NEUTRAL_FIELDS))
def test_unsupported_fields_are_refused_unless_their_value_has_no_effect(field: str) -> None:
    error = refused({"messages": MESSAGES, field: {"some": "thing"}})
    assert error.code == "unsupported_parameter" and error.param == field
    for nothing in (None, *NEUTRAL_FIELDS[field]):
        parsed(**{field: nothing})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temprature": 1}, "'temperature'"),
        ({"max_token": 1}, "'max_tokens'"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "'content'"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "'include_usage'"),
    ],
)
def test_an_unknown_field_names_the_nearest(fields: dict[str, Any], words: str) -> None:
    error = refused({"messages": MESSAGES, **fields})
    assert error.code == "unknown_field" and f"did you mean {words}" in str(error)


def test_a_response_message_may_be_sent_back() -> None:
    from openai.types.chat import ChatCompletionMessage

    message = ChatCompletionMessage(role="assistant", content="A cat.").model_dump()
    request = parsed(messages=[*MESSAGES, message, {"role": "user", "content": "Sure?"}])
    assert request.messages[1].content == "A cat."


def test_developer_is_a_role_and_names_are_ignored() -> None:
    message = {"role": "developer", "content": "Be brief.", "name": "boss"}
    request, ignored = parse_chat({"messages": [message, *MESSAGES], "store": True})
    assert request.messages[0].role == "developer"
    assert ignored == ("store", "messages.name")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"\xff", "invalid_json"),
        (b'"\\ud800"', "invalid_json"),
        (b'"a\\udc00b"', "invalid_json"),
        (b'"\xed\xa0\x80"', "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b"[" * 100_000 + b"]" * 100_000, "invalid_json"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "invalid_json"),
        (b"9" * 10_000, "invalid_json"),
        (b"[" + b"[]," * 600_000 + b"1]", "too_many_values"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_invalid_and_too_large_json_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(ServeError) as caught:
        parse_json(body, max_values=1_000_000)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [
        ({}, 0.0),
        ({"seed": 3}, 0.0),
        ({"top_p": 0.9}, 1.0),
        ({"top_k": 40}, 1.0),
        ({"n": 2}, 1.0),
        ({"n": 2, "temperature": 0}, 0.0),
        ({"top_p": 0}, 0.0),
        ({"top_p": 0, "temperature": 0.7}, 0.0),
        ({"temperature": 0.7}, 0.7),
    ],
    ids=str,
)
def test_decoding_is_greedy_unless_sampling_is_asked_for(
    fields: dict[str, Any], temperature: float
) -> None:
    assert request_params(parsed(**fields), ServeSettings()).temperature == temperature


def test_sampling_parameters_are_those_of_the_request() -> None:
    request = parsed(max_completion_tokens=7, top_k=-1, stop="x", seed=2**63 - 1, logprobs=True)
    options = request_params(request, ServeSettings())
    assert (options.max_tokens, options.top_k, options.stop) == (7, 0, ("x",))
    assert options.num_logprobs == 0
    assert options.sampling_params(0, 7).seed == 2**63 - 1
    assert options.sampling_params(1, 7).seed == 0  # each choice has its own, within 63 bits
    with pytest.raises(ServeError, match="limit is 5"):
        request_params(request, ServeSettings(max_tokens=5))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot read /home/me/x.png here", "cannot read (path) here"),
        ("~/x and ../y/z", "(path) and (path)"),
        (r"C:\Users\me failed", "(path) failed"),
        ("<Image at 0x7F3a12bc>", "<Image at (address)>"),
        ("image/png, and/or, https://", "image/png, and/or, https://"),
        ("caf\u00e9\nnew\tline", "caf? new line"),
        ("x" * 400, "x" * 297 + "..."),
    ],
)
def test_error_messages_contain_no_paths_and_memory_addresses(text: str, expected: str) -> None:
    assert sanitize(text) == expected
