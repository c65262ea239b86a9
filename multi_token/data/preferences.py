"""Rows with two answers to one prompt, of which one is preferred: `chosen` and `rejected`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from multi_token.data.rows import as_list, type_name, values_equal
from multi_token.errors import RowError

ANSWERS = ("chosen", "rejected")
_PROMPTS = ("messages", "conversations", "prompt")

RawRow = Mapping[str, Any]


def is_preference_row(row: RawRow) -> bool:
    """Return True if a row has an answer under `chosen` or `rejected`; null is none."""
    return any(row.get(name) is not None for name in ANSWERS)


def split_preference_row(
    row: RawRow, roles: Mapping[str, str], error: Callable[[str], RowError]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same row twice: with its chosen answer as the last turn, and with the rejected one.

    | the prompt is in                          | each answer is                                  |
    |-------------------------------------------|-------------------------------------------------|
    | `messages`, `conversations` or `prompt`   | a text, a turn, or a list with that turn        |
    | the same                                  | the whole conversation, which begins with it    |
    | nothing of its own                        | the whole conversation (TRL's implicit prompt): |
    |                                           | the prompt is what both begin with              |

    A `prompt` may be a text, which is then the user's. The answers are single turns of the
    assistant. `roles`: accepted names of speakers, and what they become. `error` makes a RowError
    of a sentence, which is raised for anything else.
    """
    absent = [name for name in ANSWERS if row.get(name) is None]
    if absent:
        there = ANSWERS[1 - ANSWERS.index(absent[0])]
        raise error(f"has `{there}` but no `{absent[0]}`; give both answers, or leave both out")
    given = [name for name in _PROMPTS if row.get(name) is not None]
    if len(given) > 1:
        raise error(
            f"`{given[0]}` and `{given[1]}` are both given, and only one can be the prompt of its "
            "`chosen` and `rejected` answers; leave one of them out"
        )
    answers = {name: _turns(row[name], name, error) for name in ANSWERS}
    if given:
        prompt = _prompt(row[given[0]], given[0], error)
    else:
        prompt = _common(answers, error)
    if not prompt:
        raise error(
            "has no prompt: `chosen` and `rejected` begin with no common turn; write the turns "
            "before the answers under `messages`"
        )
    dialect = given[0] if given and given[0] != "prompt" else _dialect(prompt)
    key, role, content = (
        ("conversations", "from", "value")
        if dialect == "conversations"
        else ("messages", "role", "content")
    )
    last = prompt[-1]
    if isinstance(last, Mapping) and roles.get(str(last.get(role))) == "assistant":
        raise error(
            "its prompt ends with an assistant turn, expected the turn that `chosen` and "
            "`rejected` answer; leave that turn out"
        )
    found = []
    for name in ANSWERS:
        turns = answers[name]
        if isinstance(turns, str):
            turns = [{role: "assistant", content: turns}]
        elif len(turns) > len(prompt) and values_equal(turns[: len(prompt)], prompt):
            turns = turns[len(prompt) :]
        if len(turns) != 1:
            raise error(
                f"`{name}` has {len(turns)} turns behind the prompt, expected one of the "
                "assistant; turns that both answers share go into `messages`"
            )
        speaker = turns[0].get(role) if isinstance(turns[0], Mapping) else None
        if roles.get(str(speaker)) != "assistant":
            raise error(
                f"the turn under `{name}` is {type_name(turns[0])} with {speaker!r} as its "
                f"`{role}`, "
                f"expected a turn of the assistant with `{role}` and `{content}`, like those of "
                "the prompt"
            )
        rest = {k: v for k, v in row.items() if k not in (*ANSWERS, *_PROMPTS)}
        found.append({**rest, key: [*prompt, *turns]})
    return found[0], found[1]


def _turns(value: Any, name: str, error: Callable[[str], RowError]) -> list[Any] | str:
    """An answer as a text or as a list of turns."""
    if isinstance(value, str):
        return value
    turns = [value] if isinstance(value, Mapping) else as_list(value)
    if turns is None:
        raise error(
            f"`{name}` is {type_name(value)}, expected a text, which is the assistant's "
            f"answer, or a "
            "list with its turn"
        )
    return turns


def _prompt(value: Any, name: str, error: Callable[[str], RowError]) -> list[Any]:
    if isinstance(value, str) and name == "prompt":
        return [{"role": "user", "content": value}]
    turns = as_list(value)
    if turns is None:
        raise error(f"`{name}` is {type_name(value)}, expected a list of turns")
    return turns


def _common(answers: Mapping[str, list[Any] | str], error: Callable[[str], RowError]) -> list[Any]:
    """The turns that both whole conversations begin with, their last ones left out."""
    chosen, rejected = answers.values()
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise error(
            "has texts as answers but no prompt; write the turns before them under `messages`"
        )
    num = 0
    shortest = min(len(chosen), len(rejected)) - 1
    while num < shortest and values_equal(chosen[num], rejected[num]):
        num += 1
    return chosen[:num]


def _dialect(turns: Sequence[Any]) -> str:
    """`conversations` for turns of `from` and `value`, else `messages`."""
    first = turns[0]
    return "conversations" if isinstance(first, Mapping) and "from" in first else "messages"
