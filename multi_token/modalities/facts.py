"""Facts in words: numbers that the decoder used, written as text beside an item.

    Prepared.facts -> texts and runs of embeddings -> parts of the message -> one span of the item

The texts are ordinary text parts, so they are tokenized, counted and served as the user's text is.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from multi_token.errors import MultiTokenError, RecipeError
from multi_token.media.errors import undecodable
from multi_token.registry import did_you_mean
from multi_token.types import Conversation, Fact, Media, MediaSpan, Message, Part, Text

_MAX_CHARACTERS = 1000
"""Longest text of one fact: a name in a file may be of any length."""


@dataclass(frozen=True)
class Run:
    """A run of an item's media embeddings, and the text before it."""

    text: str
    num_tokens: int


def check_format(facts: str, names: Mapping[str, str]) -> None:
    """Raise ValueError for a format string that these facts cannot fill."""
    known = ", ".join(names)
    if not names:
        raise ValueError("`facts` is for modalities with facts, and this type has none; remove it")
    try:
        fields = [field for field in string.Formatter().parse(facts) if field[1] is not None]
    except ValueError as error:
        raise ValueError(f"`facts` is no format string ({error}); write {{{{ for a brace") from None
    if not fields:
        raise ValueError(f"`facts` names no fact in braces (known: {known})")
    for _, name, spec, _ in fields:
        if name not in names:
            raise ValueError(
                f"`facts` has no {{{name}}}{did_you_mean(str(name), names)} (known: {known})"
            )
        # a width of many digits would take gigabytes
        plain = re.search(r"\{|\d{4}", str(spec)) is None
        if not plain or not any(_formats(f"{{x:{spec}}}", value) for value in (1.5, 1, "a")):
            raise ValueError(
                f"`facts` formats {name} as {spec!r}, which Python cannot; use one such as .1f"
            )


def _formats(text: str, value: Any) -> bool:
    try:
        text.format(x=value)
    except ValueError:
        return False
    return True


def fact_text(facts: str, fact: Fact) -> str:
    """Return the text of a fact. Raises MediaError for a value that the item does not have."""
    for _, name, _, _ in string.Formatter().parse(facts):
        if name is not None and fact.values.get(name) is None:
            raise undecodable(
                f"`facts` writes {{{name}}}, which this item does not have; give it in the row or "
                "the recipe, or leave it out of `facts`"
            )
    try:
        text = facts.format_map(fact.values)
    except ValueError as error:
        raise RecipeError(f"`facts` {facts!r} does not fit {dict(fact.values)}: {error}") from None
    if len(text) > _MAX_CHARACTERS:
        raise undecodable(
            f"a fact of this item is {len(text):,} characters long; shorten its names"
        )
    return text


def runs_of(
    facts: str | None,
    given: Sequence[Fact],
    num_tokens: Callable[[int], int],
    num_features: int,
) -> list[Run]:
    """Return an item's media embeddings in runs, with the text before each.

    Args:
        facts: Format string of the modality; None writes nothing.
        given: Facts of the item.
        num_tokens: Media embeddings of N features, by the projector.
        num_features: Features of the item.

    Raises:
        MediaError: The item does not have a fact that is to be written.
        RecipeError: The projector joins features of both sides of a text.
    """
    texts: dict[int, str] = {0: ""}
    for fact in given if facts is not None else ():
        if text := fact_text(str(facts), fact):
            texts[fact.at] = texts.get(fact.at, "") + text
    starts = {at: _num_before(at, num_tokens) for at in sorted(texts)}
    ends = [*list(starts.values())[1:], num_tokens(num_features)]
    return [
        Run(texts[at], end - start) for (at, start), end in zip(starts.items(), ends, strict=True)
    ]


def _num_before(at: int, num_tokens: Callable[[int], int]) -> int:
    """Media embeddings of the first `at` features, if the next one begins an embedding."""
    if at == 0:
        return 0
    try:
        before, after = num_tokens(at), num_tokens(at + 1)
    except MultiTokenError:  # of a projector that takes some numbers only
        before = after = 0
    if after <= before:
        raise RecipeError(
            f"`facts` writes text after {at} features of an item, and the projector joins features "
            "of both sides into one embedding; use `linear`, `mlp` or `expand`, or a `factor` that "
            f"divides {at}"
        )
    return before


def with_texts(
    conversation: Conversation, items: Sequence[Sequence[Run]]
) -> tuple[Conversation, list[int]]:
    """Return the conversation with the texts of facts, and the embeddings of each of its media.

    An item with several runs becomes as many media parts; `joined` makes one span of them.

    Args:
        conversation: Messages with their media items.
        items: Runs of each item, in reading order.
    """
    numbers = [run.num_tokens for runs in items for run in runs]
    if not any(run.text for runs in items for run in runs):
        return conversation, numbers
    following = iter(items)
    messages: list[Message] = []
    for message in conversation.messages:
        parts: list[Part] = []
        for part in message.parts:
            if not isinstance(part, Media):
                parts.append(part)
                continue
            for number, run in enumerate(next(following)):
                parts += [Text(run.text)] if run.text else []
                # a teacher reads the text of an item once
                again = number and part.media_text is not None
                parts.append(replace(part, media_text="") if again else part)
        messages.append(replace(message, parts=tuple(parts)))
    return replace(conversation, messages=tuple(messages)), numbers


def joined(spans: Sequence[MediaSpan], items: Sequence[Sequence[Run]]) -> list[MediaSpan]:
    """Return one span for each item, of the spans of its runs."""
    found: list[MediaSpan] = []
    at = 0
    for runs in items:
        first, *rest = spans[at : at + len(runs)]
        at += len(runs)
        if rest:
            pieces = tuple((span.start - first.start, span.length) for span in (first, *rest))
            first = replace(first, length=sum(pieces[-1]), pieces=pieces)
        found.append(first)
    return found


def facts_in_answers(conversation: Conversation, items: Sequence[Sequence[Run]]) -> str | None:
    """Return the modality of an item with facts in an assistant's turn, or None."""
    following = iter(items)
    for message in conversation.messages:
        for part in message.parts:
            if not isinstance(part, Media):
                continue
            has_text = any(run.text for run in next(following))
            if has_text and message.role == "assistant":
                return part.modality
    return None


def facts_to_json(facts: Sequence[Fact]) -> list[Any]:
    """Return facts as lists and mappings of JSON."""
    return [[fact.at, dict(fact.values)] for fact in facts]


def facts_from_json(fields: Any, num_features: int) -> tuple[Fact, ...]:
    """Return facts of `facts_to_json`. Raises ValueError or TypeError for anything else."""
    facts = tuple(Fact(dict(values), int(at)) for at, values in fields)
    for fact in facts:
        for name, value in fact.values.items():
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if not isinstance(name, str) or not (value is None or is_number or type(value) is str):
                raise ValueError(f"a fact {name!r} is {value!r}")
    places = [fact.at for fact in facts]
    if places != sorted(places) or not all(0 <= at < num_features for at in places):
        raise ValueError(f"facts of {num_features} features are at {places}")
    return facts


def facts_to_bytes(facts: Sequence[Fact]) -> bytes:
    """Return facts as bytes, for files."""
    return json.dumps(facts_to_json(facts)).encode()


def facts_from_bytes(data: bytes, num_features: int) -> tuple[Fact, ...]:
    """Return the facts of `facts_to_bytes`."""
    return facts_from_json(json.loads(data), num_features)


def fault_of_facts(modality: Any, source: Any, fetch: Any) -> str | None:
    """Return a sentence if `prepare` does not give a source's facts as declared, else None."""
    names = modality.fact_names
    # on demand alone, if the modality likes
    text = " ".join(f"{{{name}}}" for name in names) or None
    modality = modality.model_copy(update={"facts": text})
    item, again = (modality.prepare(modality.load(source, fetch)) for _ in range(2))
    if names and not item.facts:
        return "`prepare` gives none of `fact_names`"
    for fact in item.facts:
        if fact.values.keys() != names.keys():
            return (
                f"`prepare` gives the facts {', '.join(fact.values)}, and `fact_names` has "
                f"{', '.join(names) or 'none'}"
            )
    try:
        # as caches and the server's decoders pass them on
        read = facts_from_bytes(facts_to_bytes(item.facts), item.num_features)
    except (TypeError, ValueError) as error:
        return f"{error}; facts are numbers or texts"
    if not read == item.facts == again.facts:
        return "`prepare` gives other facts the second time"
    size = modality.size_from_header(source, fetch)
    promised = None if size is None else modality.facts_from_size(size)
    if promised is not None and promised != item.facts:
        return "`facts_from_size` gives other facts than `prepare`"
    return None
