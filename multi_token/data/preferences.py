"""Rows with two answers to one prompt, of which one is preferred: `chosen` and `rejected`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from multi_token.data.rows import Row, as_list, type_name, values_equal
from multi_token.errors import RowError

ANSWERS = ("chosen", "rejected")
_PROMPTS = ("messages", "conversations", "prompt")

ErrorOf = Callable[[str], RowError]
"""Makes the RowError of a row from a sentence."""


def is_preference_row(row: Row) -> bool:
    """Return True if a row has an answer under `chosen` or `rejected`; null is none."""
    return any(row.get(name) is not None for name in ANSWERS)


def split_preference_row(
    row: Row, roles: Mapping[str, str], error: ErrorOf
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a row into two: one ends with the chosen answer, the other with the rejected one.

    | the prompt is in                          | each answer is                                  |
    |-------------------------------------------|-------------------------------------------------|
    | `messages`, `conversations` or `prompt`   | a text, a turn, or a list with that turn        |
    | the same                                  | the whole conversation, which begins with it    |
    | no field of its own                       | the whole conversation (TRL's implicit prompt): |
    |                                           | the prompt is the common start of both          |

    A `prompt` may be a text, which is a user turn. Each answer is a single turn of the assistant;
    anything else raises the RowError that `error` makes. `roles`: accepted speakers -> their role.
    """
    for absent, there in (ANSWERS, ANSWERS[::-1]):
        if row.get(absent) is None:
            raise error(f"has `{there}` but no `{absent}`; give both answers, or leave both out")
    given = [name for name in _PROMPTS if row.get(name) is not None]
    if len(given) > 1:
        raise error(
            f"`{given[0]}` and `{given[1]}` are both given, and only one can be the prompt of its "
            "`chosen` and `rejected` answers; leave one of them out"
        )
    answers = [_answer(row[name], name, error) for name in ANSWERS]
    prompt = _prompt(row[given[0]], given[0], error) if given else _common_start(answers, error)
    if not prompt:
        raise error(
            "has no prompt: `chosen` and `rejected` begin with no common turn; write the turns "
            "before the answers under `messages`"
        )
    # texts have no keys of their own, so the prompt decides which keys the answers get
    llava = given == ["conversations"] or (
        given != ["messages"] and isinstance(prompt[0], Mapping) and "from" in prompt[0]
    )
    key, role, content = (
        ("conversations", "from", "value") if llava else ("messages", "role", "content")
    )

    def speaker(turn: Any) -> Any:
        return turn.get(role) if isinstance(turn, Mapping) else None

    if roles.get(str(speaker(prompt[-1]))) == "assistant":
        raise error(
            "its prompt ends with an assistant turn, expected the turn that `chosen` and "
            "`rejected` answer; leave that turn out"
        )
    # media fields stay: both rows fill the slots of the same prompt
    rest = {k: v for k, v in row.items() if k not in (*ANSWERS, *_PROMPTS)}
    found = []
    for name, turns in zip(ANSWERS, answers, strict=True):
        if isinstance(turns, str):
            turns = [{role: "assistant", content: turns}]
        elif len(turns) > len(prompt) and values_equal(turns[: len(prompt)], prompt):
            turns = turns[len(prompt) :]
        if len(turns) != 1:
            raise error(
                f"`{name}` has {len(turns)} turns after the prompt, expected one of the "
                "assistant; turns that both answers share go into `messages`"
            )
        if roles.get(str(speaker(turns[0]))) != "assistant":
            raise error(
                f"the turn under `{name}` is {type_name(turns[0])} with {speaker(turns[0])!r} as "
                f"its `{role}`, expected a turn of the assistant with `{role}` and `{content}`, "
                "like those of the prompt"
            )
        found.append({**rest, key: [*prompt, *turns]})
    return found[0], found[1]


def _answer(value: Any, name: str, error: ErrorOf) -> list[Any] | str:
    if isinstance(value, str):
        return value
    turns = [value] if isinstance(value, Mapping) else as_list(value)
    if turns is None:
        raise error(
            f"`{name}` is {type_name(value)}, expected a text, which is the assistant's answer, or "
            "a list with its turn"
        )
    return turns


def _prompt(value: Any, name: str, error: ErrorOf) -> list[Any]:
    if isinstance(value, str) and name == "prompt":
        return [{"role": "user", "content": value}]
    turns = as_list(value)
    if turns is None:
        raise error(f"`{name}` is {type_name(value)}, expected a list of turns")
    return turns


def _common_start(answers: list[list[Any] | str], error: ErrorOf) -> list[Any]:
    """Return the common first turns of two conversations, without the last turn of either."""
    chosen, rejected = answers
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise error(
            "has texts as answers but no prompt; write the turns before them under `messages`"
        )
    # the last turns are the answers, even where they are equal
    num, shortest = 0, min(len(chosen), len(rejected)) - 1
    while num < shortest and values_equal(chosen[num], rejected[num]):
        num += 1
    return chosen[:num]
