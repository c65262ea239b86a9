"""Adapter: a row with any columns -> a row of content parts, or one of conversations in place.

`DataSource` and presets say how; every pass over rows reads through the same adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from multi_token.data.row_templates import (
    CLOSE,
    DRAW,
    OPEN,
    RowTemplate,
    TemplateFault,
    check_text,
    draw,
    missing_column,
)
from multi_token.data.rows import Row, as_list, is_number, type_name
from multi_token.errors import RowError
from multi_token.media.fetch import shorten

TURN_LISTS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
"""Columns that may hold turns."""

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class TurnTemplate:
    """One turn: `role` is system, user, assistant, chosen or rejected."""

    role: str
    template: RowTemplate


@dataclass(frozen=True)
class RowAdapter:
    """Turns rows of one source into rows that `to_conversation` reads; picklable."""

    names: tuple[str, ...]
    """The recipe's modalities."""
    media: Mapping[str, str | RowTemplate] = field(default_factory=dict)
    """Modality -> column or template of its items."""
    media_texts: Mapping[str, RowTemplate] = field(default_factory=dict)
    slots: Mapping[str, str] = field(default_factory=dict)
    """Another spelling of a slot -> modality."""
    turns: tuple[TurnTemplate, ...] = ()
    """Templates of the turns. Without them, the row has turns of its own."""
    each: str | None = None
    """Column with a list of objects: `turns` are repeated for each of them."""
    history: str | None = None
    """Column with pairs of earlier turns, `[[question, answer], ...]`."""
    question: tuple[str, ...] = ()
    seed: int = 0
    items_first: bool = False
    """Items without a slot come first in the first user turn."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Column that may hold items, but did not in the first rows -> its modality."""
    rewrite: Callable[[Row], Row] | None = None
    """A preset's own change of rows with turns, such as joining `prompt` and `completion`."""

    def __call__(self, row: Row, row_id: str) -> Row:
        """Adapt a row. Raises RowError."""
        if not isinstance(row, Mapping):
            return row  # `to_conversation` says what it is
        try:
            adapted = self._from_templates(row, row_id) if self.turns else self._in_place(row)
            texts = {name: t.fill(row) for name, t in self.media_texts.items()}
        except TemplateFault as fault:
            raise RowError(str(fault), kind="format", row_id=row_id) from None
        except _CountFault as fault:
            raise RowError(str(fault), kind="item_count", row_id=row_id) from None
        if texts:
            adapted["media_texts"] = {
                name: [text] if isinstance(text, str) else text for name, text in texts.items()
            }
        adapted["id"] = row_id
        return adapted

    # --- rows with turns of their own ---

    def _in_place(self, row: Row) -> dict[str, Any]:
        out = dict(row if self.rewrite is None else self.rewrite(row))
        for name, spec in self.media.items():
            value = spec.fill(row) if isinstance(spec, RowTemplate) else row.get(spec)
            for column in (name, f"{name}s", spec):
                if isinstance(column, str) and column not in TURN_LISTS:
                    out.pop(column, None)
            if value is not None:
                out[name] = value
        if not (self.slots or self.items_first):
            return out
        keys = [key for key in TURN_LISTS if key in out]
        num_slots = dict.fromkeys(self.names, 0)
        for key in keys:
            out[key] = self._with_our_slots(out[key], num_slots)
        if self.items_first and keys:
            first = self._missing_slots(out, num_slots)
            # without a prompt of their own, both answers begin with it
            prompts = [key for key in keys if key not in ("completion", "chosen", "rejected")]
            for key in prompts[:1] or keys:
                out[key] = _put_first(out[key], first)
        return out

    def _with_our_slots(self, value: Any, num_slots: dict[str, int]) -> Any:
        """Return turns or a text with our slots in place of other spellings, and count them."""
        if isinstance(value, str):
            for spelling, name in self.slots.items():
                value = value.replace(spelling, f"<{name}>")
            for name in self.names:
                num_slots[name] += value.count(f"<{name}>")
            return value
        if isinstance(value, Mapping):
            if "type" in value:
                return self._with_our_type(value, num_slots)
            return {
                key: self._with_our_slots(one, num_slots) if key in ("content", "value") else one
                for key, one in value.items()
            }
        items = as_list(value)
        return value if items is None else [self._with_our_slots(one, num_slots) for one in items]

    def _with_our_type(
        self, part: Mapping[str, Any], num_slots: dict[str, int]
    ) -> Mapping[str, Any]:
        name = self.slots.get(f"<{part['type']}>", part["type"])
        if name in num_slots:
            num_slots[name] += 1
        return part if name == part["type"] else {**part, "type": name}

    def _missing_slots(self, row: Row, num_slots: Mapping[str, int]) -> list[str]:
        """Return a name for each item without a slot, of modalities without any slot."""
        found: list[str] = []
        for name in self.names:
            value = next((row[k] for k in (name, f"{name}s") if row.get(k) is not None), None)
            if value is not None and not num_slots[name]:
                found += [name] * len(_split(value))
        return found

    # --- rows whose turns are templates ---

    def _from_templates(self, row: Row, row_id: str) -> dict[str, Any]:
        for column, name in self.unread.items():
            value = row.get(column)
            # left out without a word, the row would be one of text alone
            if value is not None and not is_number(value) and as_list(value) != []:
                raise TemplateFault(
                    f"column `{column}` seems to hold items of {name!r}, which the first rows do "
                    f"not have; say so: `media: {{{name}: {column}}}`"
                )
        waiting = {name: self._items(row, name, spec) for name, spec in self.media.items()}
        counts = {name: len(items) for name, items in waiting.items()}
        of = f"{self.seed} {row_id}"
        others: dict[str, Any] = {DRAW: of}
        if self.question:
            others["question"] = self.question[draw(f"{of} question", len(self.question))]
        messages: Turns = []
        out: dict[str, Any] = {"messages": messages}
        num_slots = dict.fromkeys(self.names, 0)
        marked = {name for name in self.names if any(_mark(name) in t.text for t in self._users())}
        if self._adds_system():
            out["system"] = row.get("system")
        for role, text in self._earlier(row):
            parts = [{"type": "text", "text": text}]
            if role == "user":
                parts = self._parts(text, marked, waiting, num_slots)
            messages.append({"role": role, "content": parts})
        for repeated in self._repeated(row):
            for turn in self.turns:
                text = self._text(turn, {**row, **repeated}, others)
                if turn.role in ("chosen", "rejected"):
                    out[turn.role] = text
                    continue
                if turn.role == "system" and not text:
                    continue
                parts = (
                    self._parts(text, marked, waiting, num_slots)
                    if turn.role == "user"
                    else [{"type": "text", "text": text}]
                )
                messages.append({"role": turn.role, "content": parts})
        left = {name: items for name, items in waiting.items() if items}
        if self.items_first:
            items = [
                {"type": name, name: item}
                for name, rest in left.items()
                if not num_slots[name]
                for item in rest
            ]
            first = next((m for m in messages if m["role"] == "user"), None)
            if items and first is not None:
                texts = [p["text"] for p in first["content"][:1] if "text" in p]
                rest = first["content"][len(texts) :]
                opening = [{"type": "text", "text": f"\n{text}"} for text in texts]
                first["content"] = [*items, *opening, *rest]
                left = {name: rest for name, rest in left.items() if num_slots[name]}
        for name, num in num_slots.items():
            if left.get(name) or num > counts.get(name, 0):
                raise _CountFault(
                    f"the turns have {num} slot{'' if num == 1 else 's'} <{name}>, but there "
                    f"{'is' if counts.get(name) == 1 else 'are'} {counts.get(name, 0)} in "
                    f"{self._place(name)}; write <{name}> in a user turn where each item belongs"
                )
        if any(m["role"] == "user" and not m["content"] for m in messages):
            raise TemplateFault("a user turn is empty: neither text nor items came out of it")
        return out

    def _users(self) -> list[RowTemplate]:
        return [turn.template for turn in self.turns if turn.role == "user"]

    def _adds_system(self) -> bool:
        """Return whether a `system` column is a message: not where turns or media read it."""
        templates = [t.template for t in self.turns]
        templates += [spec for spec in self.media.values() if isinstance(spec, RowTemplate)]
        return not (
            any(turn.role == "system" for turn in self.turns)
            or "system" in (*self.names, *self.media.values(), self.each)
            or any("system" in template.columns for template in templates)
        )

    def _earlier(self, row: Row) -> Iterator[tuple[str, str]]:
        """Yield role and text of each turn of the column `history`."""
        value = None if self.history is None else row.get(self.history)
        if value is None or (isinstance(value, str) and not value):
            return
        pairs = as_list(value)
        for pair in [value] if pairs is None else pairs:
            texts = as_list(pair) or []
            if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
                raise TemplateFault(
                    f"`{self.history}` has {shorten(pair)}, expected pairs of texts: "
                    "[[question, answer], ...]"
                )
            yield from zip(("user", "assistant"), texts, strict=True)

    def _repeated(self, row: Row) -> list[Mapping[str, Any]]:
        if self.each is None:
            return [{}]
        if self.each not in row:
            raise TemplateFault(missing_column(self.each, row))
        pairs = as_list(row[self.each])
        if not pairs or not all(isinstance(pair, Mapping) for pair in pairs):
            raise TemplateFault(
                f"`{self.each}` is {type_name(row[self.each])}, expected a list of objects"
            )
        return pairs

    def _text(self, turn: TurnTemplate, row: Row, others: Mapping[str, Any]) -> str:
        found = turn.template.fill(row, **others)
        try:
            check_text(found, row)
        except TemplateFault as fault:
            raise TemplateFault(
                f"{fault} (`{turn.template.where}`: {turn.template.shown})"
            ) from None
        text = str(found)
        if not text.strip() and turn.role in ("assistant", "chosen", "rejected"):
            raise TemplateFault(
                f"the {turn.role} turn is empty (`{turn.template.where}`: {turn.template.shown})"
            )
        return text

    def _parts(
        self,
        text: str,
        marked: set[str],
        waiting: Mapping[str, list[Any]],
        num_slots: dict[str, int],
    ) -> list[dict[str, Any]]:
        """Split a text at its slots; an item is taken for each."""
        spellings = {f"<{name}>": name for name in self.names if name not in marked}
        spellings |= {s: name for s, name in self.slots.items() if name not in marked}
        spellings |= {_mark(name): name for name in self.names}
        # longest first: `<image>` must not win in `<image><image 1>`
        pattern = "|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))
        parts: list[dict[str, Any]] = []
        for i, piece in enumerate(re.split(f"({pattern})", text)):
            if not i % 2:
                parts += [{"type": "text", "text": piece}] if piece else []
                continue
            name = spellings[piece]
            num_slots[name] += 1
            # a slot too many is counted, and refused with both numbers
            item = waiting[name].pop(0) if waiting.get(name) else ""
            parts.append({"type": name, name: item})
        return parts

    def _items(self, row: Row, name: str, spec: str | RowTemplate) -> list[Any]:
        if isinstance(spec, RowTemplate):
            value = spec.fill(row)
            if value == "":
                raise TemplateFault(f"`{spec.where}` is empty: {spec.shown}")
        elif spec in row:
            value = row[spec]
        else:
            raise TemplateFault(f"{missing_column(spec, row)} (`media.{name}`)")
        return [] if value is None else _split(value)

    def _place(self, name: str) -> str:
        spec = self.media.get(name)
        if spec is None:
            return f"`media`, which names none for {name}"
        return f"`{spec.shown}`" if isinstance(spec, RowTemplate) else f"`{spec}`"


class _CountFault(ValueError):
    """Slots and items differ in number."""


def _mark(name: str) -> str:
    return f"{OPEN}{name}{CLOSE}"


def marked_template(
    text: str, where: str, names: Sequence[str], slots: Mapping[str, str]
) -> RowTemplate:
    """Return a turn's template, in which its own slots differ from the same letters in a value."""
    for spelling, name in sorted(
        [*((f"<{name}>", name) for name in names), *slots.items()], key=lambda pair: -len(pair[0])
    ):
        text = text.replace(spelling, _mark(name))
    return RowTemplate(text, where)


def _split(value: Any) -> list[Any]:
    """Return the items of a value; numbers, and lists of lists of numbers, are one item."""
    items = None if isinstance(value, (np.ndarray, Tensor)) else as_list(value)
    if items is None or (items and all(map(is_number, items))):
        return [value]
    inner = [as_list(item) for item in items]
    if items and all(one and all(map(is_number, one)) for one in inner):
        return [value]
    return items


def _put_first(turns: Any, names: Sequence[str]) -> Any:
    """Put a slot for each name at the start of the first user turn."""
    slots = "".join(f"<{name}>" for name in names)
    if not names:
        return turns
    if isinstance(turns, str):
        return f"{slots}\n{turns}"
    found = as_list(turns) or []
    for index, turn in enumerate(found):
        if not isinstance(turn, Mapping):
            continue
        role, key = ("role", "content") if "role" in turn else ("from", "value")
        if turn.get(role) not in ("user", "human"):
            continue
        content = turn.get(key)
        parts = as_list(content)
        put = (
            f"{slots}\n{content}"
            if parts is None
            else [*({"type": name} for name in names), *parts]
        )
        return [*found[:index], {**turn, key: put}, *found[index + 1 :]]
    return turns
