"""`chat_template_kwargs` of a request: the prompt's ids, the prefix cache, and bad values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.chat.test_named import THINKING
from tests.serve.asking import asked, content_of, post
from tests.serve.running_server import running


@pytest.fixture(scope="module")
def thinking(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, httpx.Client]]:
    """A server of a model whose template has `enable_thinking`."""
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.recipe import Recipe

    fields = recipe_fields(tmp_path_factory.mktemp("thinking"))
    fields["model"]["chat_template"] = THINKING
    model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    with running(model) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        yield model, client


def test_a_request_sets_variables_of_the_template_as_python_does(thinking: Any) -> None:
    model, http = thinking
    question = asked("What is this?")
    for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True}, {}):
        answer = post(http, question, chat_template_kwargs=kwargs, max_tokens=8)
        row = {"messages": question}
        (expected,) = model.generate([row], max_new_tokens=8, chat_template_kwargs=kwargs)
        assert content_of(answer).strip() == expected
    tokens = [
        post(http, question, chat_template_kwargs=kwargs).json()["usage"]["prompt_tokens"]
        for kwargs in ({"enable_thinking": True}, {"enable_thinking": False})
    ]
    assert tokens[0] < tokens[1]


def test_a_variable_that_the_template_lacks_is_ignored_and_listed(thinking: Any) -> None:
    answer = post(thinking[1], asked("x"), chat_template_kwargs={"thinking_budget": 3})
    assert answer.status_code == 200
    assert answer.headers["x-multi-token-ignored"] == "chat_template_kwargs.thinking_budget"


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"enable_thinking": "<|im_end|>"}, "chat_template_kwargs.enable_thinking holds a special"),
        ({"enable_thinking": ["a"]}, "chat_template_kwargs.enable_thinking"),
        ({"a b": 1}, "chat_template_kwargs"),
        ({f"a{i}": 1 for i in range(17)}, "chat_template_kwargs"),
        ("no", "chat_template_kwargs"),
    ],
)
def test_bad_values_are_a_400_that_names_them(thinking: Any, kwargs: Any, said: str) -> None:
    answer = post(thinking[1], asked("x"), chat_template_kwargs=kwargs)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
