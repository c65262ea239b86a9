"""Row of any accepted shape -> Conversation."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from torch import Tensor

from multi_token.data.content_parts import media_part, media_source
from multi_token.data.preferences import is_preference_row, split_preference_row
from multi_token.data.rows import as_list, is_number, type_name
from multi_token.errors import RowError, RowKind
from multi_token.types import Conversation, Media, Message, Part, Role, Text

ROLES: Mapping[str, Role] = {
    **{role: role for role in get_args(Role)},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Accepted names of a speaker -> its role."""

_NOT_MEDIA = ("id", "messages", "conversations", "media_texts", "chosen", "rejected")
_OTHER_FIELDS: Mapping[str, str] = {"speech": "speech_audios"}
"""Slot -> its field in rows of the original multi_token, where that is no plural of the slot."""


def to_conversation(
    row: Mapping[str, Any], modalities: Collection[str], *, row_id: str
) -> Conversation:
    """Convert a row; `modalities` are the recipe's, by name, or their names alone.

    | the row has                                  | shape         | a slot is                     |
    |----------------------------------------------|---------------|-------------------------------|
    | `conversations` of `from` and `value`        | LLaVA's       | `<name>` in the text          |
    | `messages`, every `content` a text           | the original's| `<name>` in the text          |
    | `messages`, at least one `content` a list    | content parts | a part whose `type` is a name |

    Text slots, and parts without a source of their own, are filled in reading order from the row's
    field `<name>` or `<name>s` (for `speech`, also the original's `speech_audios`): a list of
    items, or one item. A flat list of numbers is one item, and so is an array in `<name>`. An array
    of two or more axes in `<name>s` is split along its first axis. In a row of content parts,
    `<image>` in a text stays text in all messages.

    A `system` column is a system message before the others. Parts may have the spellings of OpenAI
    and Hugging Face (content_parts.py), where `modalities` is a mapping to the modalities.

    `media_texts` holds a text for each item of a name, in reading order:
    `{"speech": ["turn on the light"]}`.

    A row with `chosen` and `rejected` answers (data/preferences.py) becomes the conversation with
    the chosen answer; its `rejected` is the conversation with the other one.

    An `id` in the row replaces `row_id`. Raises RowError of kind `format` or `item_count`.
    """
    reader = _RowParser(row, modalities, row_id=str(row_id))
    if not is_preference_row(row):
        return reader.parse()
    chosen, rejected = (
        _RowParser(branch, modalities, row_id=reader.row_id).parse()
        for branch in split_preference_row(row, ROLES, reader.error)
    )
    # compared once parsed: a text and a list with that text are the same answer
    if chosen.messages[-1] == rejected.messages[-1]:
        raise reader.error(
            "has the same answer under `chosen` and `rejected`, so there is nothing to prefer; "
            "leave the row out"
        )
    return replace(chosen, rejected=rejected)


@functools.lru_cache(maxsize=64)
def _slot_pattern(names: tuple[str, ...]) -> re.Pattern[str] | None:
    """Return the pattern of slots in a text; rows of a data set share it."""
    # an empty alternative would match `<>`
    return re.compile(f"<({'|'.join(map(re.escape, names))})>") if names else None


class _RowParser:
    """Parser of one row: its id, the items of its fields, and the slots that were read."""

    def __init__(self, row: Mapping[str, Any], modalities: Collection[str], *, row_id: str) -> None:
        self.row_id = row_id
        self.modalities = modalities
        # longest first: with `image` and `image_left`, the longer name must win
        self.names = sorted(modalities, key=lambda name: (-len(name), name))
        if not isinstance(row, Mapping):
            raise self.error(
                f"expected an object with fields, got {type_name(row)}; {self.shapes()}"
            )
        if row.get("id") is not None:
            self.row_id = str(row["id"])
        self.row = row
        self.slot = _slot_pattern(tuple(self.names))
        self.items: dict[str, list[Any]] = {}
        self.fields: dict[str, str] = {}
        self.num_slots: dict[str, int] = dict.fromkeys(self.names, 0)

    def error(self, sentence: str, kind: RowKind = "format") -> RowError:
        return RowError(sentence, kind=kind, row_id=self.row_id)

    def shapes(self) -> str:
        """Describe the accepted shapes, with a name of the recipe where it has one."""
        name = min(self.names, default="image")
        return (
            f'the accepted shapes are {{"{name}s": [...], "messages": [{{"role": "user", '
            f'"content": "What is <{name}>?"}}, ...]}}, or '
            f'{{"{name}": ..., "conversations": [{{"from": "human", '
            f'"value": "What is <{name}>?"}}, ...]}}, or '
            f'{{"messages": [{{"role": "user", "content": [{{"type": "{name}", "{name}": ...}}, '
            '{"type": "text", "text": "What is it?"}]}, ...]}'
        )

    def parse(self) -> Conversation:
        turns, role_key, content_key = self._turns()
        for name in self.names:
            self._read_field(name)
        # for the row, not for each message: else `<image>` in one text would be a slot, and not in
        # the next
        text_slots = all(as_list(turn.get(content_key)) is None for turn in turns)
        messages = self._system_message(turns[0].get(role_key))
        for index, turn in enumerate(turns):
            role = self._role(turn, role_key, index)
            parts = self._parts(turn.get(content_key), index, content_key, text_slots=text_slots)
            if role == "assistant":
                self._check_no_media(parts, index)
            messages.append(Message(role, parts))
        self._check_counts(text_slots=text_slots)
        return self._with_media_texts(Conversation(tuple(messages), id=self.row_id))

    def _with_media_texts(self, conversation: Conversation) -> Conversation:
        """Return the conversation with the texts of the row's `media_texts` in its items."""
        if "surrogates" in self.row:
            raise self.error("the key `surrogates` is now called `media_texts`; rename the key")
        given = self.row.get("media_texts")
        if given is None:
            return conversation
        if not isinstance(given, Mapping):
            raise self.error(
                f"`media_texts` is {type_name(given)}, expected an object with a list of texts for "
                f"each of {', '.join(sorted(self.names))}"
            )
        texts: dict[str, Iterator[Any]] = {}
        for name, value in given.items():
            if value is None:
                continue  # a null field of a table is an absent one
            found: list[Any] | None = [value] if isinstance(value, str) else as_list(value)
            if (
                name not in self.names
                or found is None
                or not all(isinstance(text, (str, type(None))) for text in found)
            ):
                raise self.error(
                    f"`media_texts` has {type_name(value)} under {name!r}, expected a list of "
                    f"texts under one of {', '.join(sorted(self.names))}"
                )
            num_items = sum(item.modality == name for item in conversation.media)
            if len(found) != num_items:
                raise self.error(
                    f"`media_texts` has {len(found)} texts under {name!r}, but the row has "
                    f"{num_items} items of it; give one for each, in reading order",
                    kind="item_count",
                )
            texts[name] = iter(found)

        # parts are in reading order, which is the order of the texts
        def with_text(part: Part) -> Part:
            if isinstance(part, Media) and part.modality in texts:
                return replace(part, media_text=next(texts[part.modality]))
            return part

        return replace(
            conversation,
            messages=tuple(
                replace(message, parts=tuple(map(with_text, message.parts)))
                for message in conversation.messages
            ),
        )

    def _turns(self) -> tuple[list[Mapping[str, Any]], str, str]:
        # columns of a table exist in every row: a null field is an absent one
        found = [key for key in ("messages", "conversations") if self.row.get(key) is not None]
        if not found:
            fields = ", ".join(map(str, self.row)) or "none"
            raise self.error(f"no messages; its fields are {fields}; {self.shapes()}")
        if len(found) == 2:
            raise self.error("both `messages` and `conversations` are given; leave one of them out")
        key = found[0]
        role_key, content_key = ("role", "content") if key == "messages" else ("from", "value")
        turns = as_list(self.row[key])
        if turns is None:
            raise self.error(f"`{key}` is {type_name(self.row[key])}, expected a list of turns")
        if not turns:
            raise self.error(f"`{key}` is empty; a row needs at least one turn")
        for index, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                raise self.error(
                    f"turn {index} of `{key}` is {type_name(turn)}, "
                    f"expected an object with `{role_key}` and `{content_key}`"
                )
            for field in (role_key, content_key):
                if field not in turn:
                    raise self.error(
                        f"turn {index} of `{key}` has no `{field}`; "
                        f"its fields are {', '.join(map(str, turn)) or 'none'}; {self.shapes()}"
                    )
        return turns, role_key, content_key

    def _system_message(self, first_role: Any) -> list[Message]:
        """Return the message of the `system` column, if the row has one."""
        text = self.row.get("system")
        if text in (None, "") or "system" in self.names:
            return []
        if not isinstance(text, str):
            raise self.error(f"`system` is {type_name(text)}, expected a text")
        if first_role == "system":
            raise self.error(
                "has a field `system` and a first turn of the role system; leave one of them out"
            )
        return [Message("system", (Text(text),))]

    def _read_field(self, name: str) -> None:
        """Fill `items[name]` from the row's field `<name>` or `<name>s`, if there is one."""
        keys = [name]
        others = [f"{name}s", *([_OTHER_FIELDS[name]] if name in _OTHER_FIELDS else [])]
        keys += [key for key in others if key not in self.names]  # one may be an instance's name
        given = [k for k in keys if k not in _NOT_MEDIA and self.row.get(k) is not None]
        if len(given) > 1:
            raise self.error(f"both `{given[0]}` and `{given[1]}` are given; leave one of them out")
        if not given:
            return
        key = given[0]
        items = _split_items(self.row[key], plural=key != name)
        self.fields[name] = key
        self.items[name] = [
            self._source(item, f"item {i} of `{key}`") for i, item in enumerate(items)
        ]

    def _source(self, item: Any, where: str) -> Any:
        """Return an item as `Media.source`. Raises RowError."""
        item = media_source(item)
        if item is None:
            raise self.error(f"{where} is empty (null); give a path, an address or the data itself")
        return item

    def _role(self, turn: Mapping[str, Any], role_key: str, index: int) -> Role:
        role = turn[role_key]
        if not isinstance(role, str) or role not in ROLES:
            raise self.error(
                f"turn {index} has the unknown role {role!r}; the accepted ones are "
                f"{', '.join(ROLES)}"
            )
        return ROLES[role]

    def _parts(
        self, content: Any, index: int, content_key: str, *, text_slots: bool
    ) -> tuple[Part, ...]:
        if isinstance(content, str):
            if text_slots and self.slot is not None:
                return self._parts_of_text(content, self.slot)
            return (Text(content),) if content else ()
        entries = as_list(content)
        if entries is None:
            expected = "a text" if content_key == "value" else "a text or a list of parts"
            raise self.error(
                f"`{content_key}` of turn {index} is {type_name(content)}, expected {expected}"
            )
        if content_key == "value":
            raise self.error(
                f"`value` of turn {index} is a list, expected a text; content parts go into "
                '"messages" with "role" and "content"'
            )
        return tuple(
            part
            for i, entry in enumerate(entries)
            if (part := self._part(entry, f"part {i} of turn {index}")) != Text("")
        )

    def _parts_of_text(self, content: str, slot: re.Pattern[str]) -> tuple[Part, ...]:
        if "<" not in content:  # most texts have no slot
            return (Text(content),) if content else ()
        parts: list[Part] = []
        # split with a group gives text, name, text, name, ..., text
        for i, piece in enumerate(slot.split(content)):
            if i % 2:
                parts.append(self._next_item(piece))
            elif piece:
                parts.append(Text(piece))
        return tuple(parts)

    def _part(self, entry: Any, where: str) -> Part:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("type"), str):
            raise self.error(
                f'{where} is {type_name(entry)}, expected {{"type": ...}} with one of the types '
                f"{self._types()}"
            )
        kind: str = entry["type"]
        if kind == "text":
            text = entry.get("text")
            if not isinstance(text, str):
                raise self.error(f"{where} has {type_name(text)} under `text`, expected a text")
            return Text(text)
        try:
            name, source = media_part(entry, self.modalities)
        except LookupError:
            near = difflib.get_close_matches(kind, ["text", *self.names], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise self.error(
                f"{where} has the unknown type {kind!r}{hint}; this recipe has {self._types()}"
            ) from None
        except ValueError as error:
            raise self.error(f"{where} {error}") from None
        return self._next_item(name) if source is None else Media(name, self._source(source, where))

    def _types(self) -> str:
        return ", ".join(["text", *sorted(self.names)])

    def _next_item(self, name: str) -> Media:
        index = self.num_slots[name]
        self.num_slots[name] += 1
        items = self.items.get(name, [])
        # counts are compared once the row is read, so that the message can state both
        return Media(name, items[index] if index < len(items) else None)

    def _check_no_media(self, parts: tuple[Part, ...], index: int) -> None:
        for part in parts:
            if isinstance(part, Media):
                raise self.error(
                    f"turn {index} is the assistant's and has a <{part.modality}>; a model answers "
                    "in text, so move the item to a user turn (if the letters are meant, write "
                    "the row in content parts, where text is never a slot)"
                )

    def _check_counts(self, *, text_slots: bool) -> None:
        differing: list[str] = []
        for name in self.names:
            # only names that differ are listed, each with its own remedy
            num_items, num_slots = len(self.items.get(name, [])), self.num_slots[name]
            if num_items == num_slots:
                continue
            slot = f"<{name}>" if text_slots else f'{{"type": "{name}"}} without a source'
            field = self.fields.get(name)
            items = f"{num_items} in `{field}`" if field else f"no field `{name}` or `{name}s`"
            if num_items > num_slots:
                fix = f"write {slot} where each item belongs, or leave items out"
                if isinstance(self.items[name][0], (list, tuple)):
                    fix += "; a single item of several lists needs a list of its own around it"
            elif text_slots:
                fix = (
                    f"give one item for each slot (if the letters <{name}> are meant, write the "
                    "row in content parts, where text is never a slot)"
                )
            else:
                fix = f"give each part its source under `{name}`, or one item in `{name}s`"
            slots = f"{num_slots} slot{'' if num_slots == 1 else 's'}"
            differing.append(f"{slots} {slot} but {items}; {fix}")
        if differing:
            raise self.error("; also ".join(sorted(differing)), kind="item_count")


def _split_items(value: Any, *, plural: bool) -> list[Any]:
    # `image: array` of three axes is one image, `images: array` of four axes a batch of them
    if isinstance(value, (np.ndarray, Tensor)):
        many = plural and value.ndim > 1
        return [value[i] for i in range(value.shape[0])] if many else [value]
    items = as_list(value)
    if items is None or (items and all(is_number(item) for item in items)):
        return [value]
    return items
