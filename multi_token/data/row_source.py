"""Source of a recipe -> its rows, adapted to content parts, and the reader of their media.

DataSource -> open_rows -> RowSource(rows, fetch): the one way into all passes over rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from multi_token.data.adapter import RowAdapter, TurnTemplate, marked_template
from multi_token.data.chosen_rows import chosen_rows
from multi_token.data.content_parts import media_source
from multi_token.data.files.hub import hub_args_fault, open_hub_args
from multi_token.data.files.hub_files import media_root_of
from multi_token.data.files.open import load_rows, media_root
from multi_token.data.presets import (
    Reading,
    choose_format,
    find_media,
    join_answer,
    join_completion,
    resolve,
)
from multi_token.data.row_templates import RowCondition, RowTemplate, TemplateFault
from multi_token.data.rows import IndexedRows, Row, as_list, row_id_of
from multi_token.distributed import is_main_process
from multi_token.errors import MultiTokenError, RecipeError, RowError
from multi_token.media.fetch import Fetch, shorten
from multi_token.modalities.base import Modality, OpenAIKind
from multi_token.recipe.data import DataSource
from multi_token.registry import did_you_mean

CHOSEN_FOLDER = "where"
"""Folder of a run that remembers the rows of a `where`."""
_NUM_LOOKED_AT = 8
"""First rows whose columns choose a format, at most: the first of a file may have no media."""
_REWRITES = {"prompt_completion": join_completion, "requests": join_answer}
_NUM_DATA_SETS = 8
"""Data sets of `dataset_args` that a process keeps open."""


@dataclass(frozen=True)
class RowSource:
    """Rows of one source, adapted on access, with the reader of their media."""

    rows: Sequence[Any]
    fetch: Fetch
    name: str
    note: str | None = None
    """How the rows are read, in one line; None where they are read as they are."""


class AdaptedRows(IndexedRows):
    """Rows with an adapter between; picklable if the rows are."""

    def __init__(self, rows: Sequence[Row], adapter: RowAdapter, name: str) -> None:
        self.rows, self.adapter, self.name = rows, adapter, name

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        """Read and adapt a row; see IndexedRows. Raises RowError."""
        row = self.rows[index]
        return self.adapter(row, row_id_of(index, row, self.name))


def open_rows(
    source: DataSource,
    modalities: Mapping[str, Modality],
    *,
    seed: int = 0,
    run: str | None = None,
    num_readers: Callable[[int], int] = lambda _: 0,
) -> RowSource:
    """Open the rows of a source for the modalities of a recipe. Collective with `where`.

    Args:
        source: The source.
        modalities: The recipe's modalities by name.
        seed: Draws a `question` for each row.
        run: Folder of the run, which remembers the rows of a `where`.
        num_readers: Number of data workers for a number of rows.

    Raises:
        MultiTokenError: the rows or media cannot be opened, or the columns leave a doubt.
    """
    fetch = media_fetch(source)
    rows = load_rows(source.rows, split=source.split)
    if (condition := row_condition(source)) is not None:
        folder = None if run is None else Path(run) / CHOSEN_FOLDER
        rows = chosen_rows(rows, condition, source.rows, folder=folder, num_readers=num_readers)
    first = first_rows(rows.__getitem__, len(rows))
    adapter, note = adapter_of(source, modalities, first, seed=seed)
    if adapter is not None:
        rows = AdaptedRows(rows, adapter, source.rows)
    return RowSource(rows, fetch, source.rows, note)


def row_condition(source: DataSource) -> RowCondition | None:
    """Return the condition of a source with `where`. Raises RecipeError."""
    try:
        return None if source.where is None else RowCondition(source.where)
    except TemplateFault as fault:
        raise RecipeError(f"rows of {source.rows}: {fault}") from None


def show_note(note: str | None) -> None:
    """Print how rows of a source are read, in the main process."""
    if note is not None and is_main_process():
        Console(soft_wrap=True).print(note, highlight=False, markup=False)


def media_fetch(source: DataSource) -> Fetch:
    """Return the reader of a source's media. Raises MultiTokenError."""
    if source.root is None:
        return Fetch(root=media_root(source.rows))
    return Fetch(root=media_root_of(source.root), inside_root=True)


def first_rows(read: Callable[[int], Row], num_rows: int = _NUM_LOOKED_AT) -> list[Row]:
    """Return the first rows that can be read."""
    found: list[Row] = []
    for index in range(min(num_rows, _NUM_LOOKED_AT)):
        try:
            found.append(read(index))
        except RowError:  # a line that is not JSON, which the scan names
            continue
    return found


def adapter_of(
    source: DataSource,
    modalities: Mapping[str, Modality],
    first: Sequence[Row],
    *,
    seed: int = 0,
) -> tuple[RowAdapter | None, str | None]:
    """Return the adapter of a source, and a line on how its rows are read.

    None for rows that `to_conversation` reads as they are. `first`: the first rows, whose columns
    choose what the source leaves open. Raises MultiTokenError.
    """
    for key in ("media", "media_texts"):
        _check_names(source, key, getattr(source, key), modalities)
    _check_names(source, "slots", source.slots.values(), modalities)
    first = [row for row in first if isinstance(row, Mapping)]
    try:
        return _adapter_of(source, modalities, first, seed)
    except TemplateFault as fault:
        raise RecipeError(f"rows of {source.rows}: {fault}") from None
    except MultiTokenError as error:
        raise type(error)(f"rows of {source.rows}: {error}") from None


def _adapter_of(
    source: DataSource, modalities: Mapping[str, Modality], first: list[Row], seed: int
) -> tuple[RowAdapter | None, str | None]:
    names = tuple(modalities)
    # of several rows, the one whose columns hold the most: columns of a table are in every row
    row = max(first, key=lambda row: sum(v is not None for v in row.values()), default={})
    media = dict(source.media)
    found = {n: m for n, m in modalities.items() if n not in media}
    if found and row and (not source.turns or not media):
        media |= find_media({k: v for k, v in row.items() if k not in media.values()}, found)
    texts = {
        name: RowTemplate(text, f"media_texts.{name}") for name, text in source.media_texts.items()
    }
    common: dict[str, Any] = {
        "names": names,
        "slots": source.slots,
        "media_texts": texts,
        "seed": seed,
    }
    if source.turns:
        turns = [(role, text) for turn in source.turns for role, text in turn.items()]
        adapter = RowAdapter(
            media=_media_specs(media),
            turns=_turn_templates(turns, "turns", names, source.slots),
            question=tuple(source.question),
            **common,
        )
        return adapter, None
    format = source.format or choose_format(row, modalities, media)
    if format is None:
        # rows of no known form, each of which is refused with its columns
        return None, None
    reading = resolve(format, row, modalities, media)
    if not reading.turns:
        return _adapter_in_place(source, modalities, first, reading, common)
    turns = _turn_templates(reading.turns, f"format: {format}", (), {})
    read = {*reading.media.values(), reading.each, reading.history, "system"}
    read |= {column for turn in turns for column in turn.template.columns}
    adapter = RowAdapter(
        media=_media_specs(reading.media),
        # without marks: the slots of these formats stand in the columns
        turns=turns,
        unread={
            column: name
            for name, modality in modalities.items()
            if name not in reading.media
            for column in (name, f"{name}s", *chain.from_iterable(modality.usual_columns()))
            if column not in read
        },
        each=reading.each,
        history=reading.history,
        question=tuple(source.question) or reading.question,
        items_first=True,
        **common,
    )
    return adapter, _note(source, reading, reading.shown)


def _adapter_in_place(
    source: DataSource,
    modalities: Mapping[str, Modality],
    first: list[Row],
    reading: Reading,
    common: dict[str, Any],
) -> tuple[RowAdapter | None, str | None]:
    renamed = {
        name: spec
        for name, spec in reading.media.items()
        if name in source.media or spec not in (name, f"{name}s", "speech_audios")
    }
    rewrite = _REWRITES.get(reading.format)
    slots = dict(common["slots"])
    changes: list[str] = []
    texts = [
        str(row.get(key)) for row in first for key in _TEXT_COLUMNS if row.get(key) is not None
    ]
    for name, modality in modalities.items():
        kinds = [k for k in get_args(OpenAIKind) if k in modality.openai_kinds]
        # the slot of LLaVA's files is <image>, also where the item is a video
        for word in [*kinds, *(["image"] if kinds == ["video"] else [])]:
            slot = f"<{word}>"
            if word in modalities or slot in slots or name not in reading.media:
                continue
            takes = [n for n, m in modalities.items() if set(kinds) & set(m.openai_kinds)]
            if takes == [name] and any(slot in text for text in texts):
                slots[slot] = name
                changes.append(f"{slot} is <{name}>")
    has_slots = any(
        slot in text or f"'type': '{slot[1:-1]}'" in text
        for text in texts
        for slot in (*(f"<{name}>" for name in modalities), *slots)
    )
    items_first = bool(reading.media) and not has_slots and bool(texts)
    if items_first:
        changes.append("no slots in the texts, so items come first")
    original = any(
        isinstance(item, Mapping) and "dataset_args" in item
        for row in first
        for column in reading.media.values()
        for item in as_list(row.get(column)) or [row.get(column)]
    )
    common = {**common, "slots": slots}
    if original:
        rewrite = functools.partial(
            _with_data_sets, columns=tuple(reading.media.values()), root=source.root
        )
    if not (renamed or slots or items_first or rewrite or common["media_texts"]):
        return None, None
    adapter = RowAdapter(
        media=_media_specs(renamed), items_first=items_first, rewrite=rewrite, **common
    )
    return adapter, _note(source, reading, [], changes)


_TEXT_COLUMNS = ("messages", "conversations", "prompt", "request")


def _note(
    source: DataSource,
    reading: Reading,
    shown: Collection[tuple[str, str]],
    changes: Sequence[str] = (),
) -> str | None:
    if source.format is not None and not changes:
        return None
    arrows = [f"{name} <- {spec}" for name, spec in reading.media.items()]
    arrows += [f"{word} <- {column}" for word, column in shown]
    if reading.question and not source.question:
        changes = [*changes, f"question: {reading.question[0]!r}"]
    return (
        f"rows of {source.rows} read as {reading.format}: {', '.join([*arrows, *changes])}; set "
        "`format:` or `turns:` to change"
    )


def _turn_templates(
    turns: Sequence[tuple[str, str]],
    where: str,
    names: Sequence[str],
    slots: Mapping[str, str],
) -> tuple[TurnTemplate, ...]:
    return tuple(
        TurnTemplate(
            role,
            # an assistant's slot is refused, so its letters are meant
            marked_template(text, f"{where}.{i}.{role}", names, slots)
            if role == "user"
            else RowTemplate(text, f"{where}.{i}.{role}"),
        )
        for i, (role, text) in enumerate(turns)
    )


def _media_specs(media: Mapping[str, str]) -> dict[str, str | RowTemplate]:
    return {
        name: RowTemplate(spec, f"media.{name}") if "{{" in spec or "{%" in spec else spec
        for name, spec in media.items()
    }


def _check_names(
    source: DataSource, key: str, names: Collection[str], modalities: Mapping[str, Modality]
) -> None:
    for name in names:
        if name not in modalities:
            raise RecipeError(
                f"`{key}` of {source.rows} names {name!r}, which is no modality of the recipe"
                f"{did_you_mean(name, modalities)} (known: {', '.join(modalities)})"
            )


def _with_data_sets(row: Row, *, columns: tuple[str, ...], root: str | None) -> Row:
    """Return a row of the original multi_token with the items that its `dataset_args` name."""
    out = dict(row)
    for column in columns:
        items = as_list(row.get(column))
        if items is not None:
            out[column] = [_item_of_data_set(item, root) for item in items]
        elif row.get(column) is not None:
            out[column] = _item_of_data_set(row[column], root)
    return out


def _item_of_data_set(item: Any, root: str | None) -> Any:
    if not isinstance(item, Mapping) or "dataset_args" not in item:
        return item
    args, index = item["dataset_args"], item.get("idx")
    if not isinstance(args, Mapping) or not isinstance(index, int):
        raise TemplateFault("an item has `dataset_args` and `idx`, expected an object and a number")
    if root is not None:
        raise TemplateFault(
            f"an item has `dataset_args`, and the media of this source are inside of `root` "
            f"({root}); remove `root`, or write the item as a file in it"
        )
    args = {key: value for key, value in args.items() if value is not None}
    if fault := hub_args_fault(args):
        raise TemplateFault(f"`dataset_args` of an item {fault}")
    rows = _open_data_set(json.dumps(args, sort_keys=True))
    if not 0 <= index < len(rows):
        raise TemplateFault(f"an item has the `idx` {index} of a data set of {len(rows):,} rows")
    row = rows[index]
    for column in get_args(OpenAIKind):
        if isinstance(found := row.get(column), (Mapping, str, bytes)):
            return media_source(found)
    raise TemplateFault(
        f"the data set of {shorten(args)} has no column audio, image or video (it has "
        f"{', '.join(row)})"
    )


@functools.lru_cache(maxsize=_NUM_DATA_SETS)
def _open_data_set(args: str) -> Sequence[Row]:
    return open_hub_args(json.loads(args))
