"""data/preferences.py: every shape of a pair is one prompt with two answers, or an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from multi_token.data.formats import to_conversation
from multi_token.errors import RowError
from multi_token.types import Media, Text

USER = {"role": "user", "content": "What is <image>?"}
SYSTEM = {"role": "system", "content": "Be brief."}
RED = {"role": "assistant", "content": "red"}
BLUE = {"role": "assistant", "content": "blue"}
LLAVA = [{"from": "human", "value": "What is <image>?"}]
IMAGES = {"images": ["red.png"]}


def parts(content: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}]


def conversation(row: Any) -> Any:
    return to_conversation(row, ["image", "pulse"], row_id="rows[0]")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER], "chosen": "red", "rejected": "blue"},
        {"messages": [USER], "chosen": [RED], "rejected": [BLUE]},
        {"messages": [USER], "chosen": RED, "rejected": "blue"},
        {"prompt": [USER], "chosen": [RED], "rejected": [BLUE]},
        {"prompt": "What is <image>?", "chosen": "red", "rejected": "blue"},
        {"prompt": "What is <image>?", "chosen": [USER, RED], "rejected": [USER, BLUE]},
        {"chosen": [USER, RED], "rejected": [USER, BLUE], "messages": None},
        {"conversations": LLAVA, "chosen": "red", "rejected": "blue"},
        {
            "conversations": LLAVA,
            "chosen": {"from": "gpt", "value": "red"},
            "rejected": {"from": "gpt", "value": "blue"},
        },
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [*parts("What is "), {"type": "image", "text": None}, *parts("?")],
                }
            ],
            "chosen": [{"role": "assistant", "content": parts("red")}],
            "rejected": [{"role": "assistant", "content": parts("blue")}],
        },
    ],
)
def test_every_shape_is_the_same_prompt_with_two_answers(row: dict[str, Any]) -> None:
    found = conversation({**IMAGES, **row})
    assert [m.role for m in found.messages] == ["user", "assistant"]
    assert found.messages[0].parts == (Text("What is "), Media("image", "red.png"), Text("?"))
    assert found.messages[-1].parts == (Text("red"),)
    assert found.rejected.messages[:-1] == found.messages[:-1]
    assert found.rejected.messages[-1].parts == (Text("blue"),)
    assert found.rejected.rejected is None
    assert found.id == "rows[0]"


def test_a_common_start_of_several_turns_with_arrays_is_the_prompt() -> None:
    def turns(last: dict[str, Any]) -> list[dict[str, Any]]:
        pulse = {"type": "pulse", "pulse": np.arange(5.0)}  # no two are the same object
        first = {"role": "user", "content": [pulse, *parts("What?")]}
        return [SYSTEM, first, {"role": "assistant", "content": "one"}, USER, last]

    row = {"chosen": turns(RED), "rejected": turns(BLUE)}
    row["chosen"][3] = row["rejected"][3] = {"role": "user", "content": "And now?"}
    found = conversation(row)
    assert len(found.messages) == len(found.rejected.messages) == 5
    assert found.rejected.messages[-1].parts == (Text("blue"),)
    row["rejected"][1]["content"][0]["pulse"] = np.arange(5.0) + 1
    with pytest.raises(RowError, match="`chosen` has 4 turns after the prompt, expected one"):
        conversation(row)


def test_columns_of_a_table_that_are_null_leave_an_ordinary_row() -> None:
    row = {**IMAGES, "messages": [USER, RED], "chosen": None, "rejected": None}
    assert conversation(row).rejected is None


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": [USER], "chosen": "red"}, "has `chosen` but no `rejected`; give both"),
        ({"messages": [USER], "rejected": "red"}, "has `rejected` but no `chosen`; give both"),
        (
            {"messages": [USER], "prompt": "Why?", "chosen": "red", "rejected": "blue"},
            "`messages` and `prompt` are both given, and only one can be the prompt",
        ),
        ({"chosen": "red", "rejected": "blue"}, "has texts as answers but no prompt"),
        ({"messages": [], "chosen": "red", "rejected": "blue"}, "has no prompt: "),
        ({"chosen": [RED], "rejected": [BLUE]}, "has no prompt: `chosen` and `rejected` begin"),
        (
            {"messages": [USER], "chosen": 1, "rejected": "blue"},
            "`chosen` is a number, expected a text",
        ),
        (
            {"messages": 3, "chosen": "red", "rejected": "blue"},
            "`messages` is a number, expected a list of turns",
        ),
        (
            {"messages": [USER, RED], "chosen": "red", "rejected": "blue"},
            "its prompt ends with an assistant turn, expected the turn that",
        ),
        (
            {"messages": [USER], "chosen": [RED], "rejected": []},
            "`rejected` has 0 turns after the prompt, expected one of the assistant",
        ),
        (
            {"messages": [USER], "chosen": [RED], "rejected": [BLUE, USER, RED]},
            "`rejected` has 3 turns after the prompt, expected one of the assistant",
        ),
        (
            {"messages": [USER], "chosen": [USER], "rejected": "blue"},
            "the turn under `chosen` is an object .* with 'user' as its `role`, expected a turn",
        ),
        (
            {"conversations": LLAVA, "chosen": [RED], "rejected": [BLUE]},
            "with None as its `from`, expected a turn of the assistant with `from` and `value`",
        ),
        (
            {"messages": [USER], "chosen": "red", "rejected": "red"},
            "has the same answer under `chosen` and `rejected`",
        ),
        (
            {"messages": [SYSTEM, USER], "chosen": "red", "rejected": "red"},
            "has the same answer under `chosen` and `rejected`",
        ),
        (
            {"messages": [USER], "chosen": "red", "rejected": "blue", "images": []},
            "1 slot <image> but 0 in `images`",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_an_error_with_its_id(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RowError, match=f"row seven: .*{sentence}"):
        conversation({**IMAGES, **row, "id": "seven"})
