"""`multi-token data preview`: the first rows as conversations, without a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from multi_token.cli.data import MEDIA_STYLE, Data, Reading, Split, data_app, source_of
from multi_token.errors import MultiTokenError, RowError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from multi_token.data.rows import Row
    from multi_token.modalities.base import Modality
    from multi_token.types import Conversation

_GUESSED = {
    "image": "image",
    "audio": "speech",
    "video": "video",
    "document": "document",
    "vector": "vector",
    "series": "timeseries",
}
"""Name -> type of the modalities that are looked for."""


@data_app.command()
def preview(
    rows: Data,
    modality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TYPE",
            help="A modality of the rows, such as image=image or ecg=timeseries; repeatable. "
            "Default: by columns and slots.",
        ),
    ] = None,
    reading: Reading = None,
    split: Split = "train",
    num_rows: Annotated[int, typer.Option("--num-rows", "-n", help="Rows to print.", min=1)] = 3,
) -> None:
    """Print the first rows as conversations. Needs no recipe, and opens no media."""
    from multi_token.data.files.open import load_rows
    from multi_token.data.formats import to_conversation
    from multi_token.data.row_source import first_rows, open_rows
    from multi_token.data.rows import row_id_of

    source = source_of(rows, split, None, reading)
    if modality:
        modalities = dict(map(_named, modality))
    else:
        opened = load_rows(rows, split=split)
        modalities = _guess(first_rows(opened.__getitem__, len(opened)), source.media)
    found = open_rows(source, modalities)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    names = ", ".join(f"{name} ({m.type})" for name, m in modalities.items())
    console.print(f"{len(found.rows):,} rows of {rows}; modalities: {names or 'none'}")
    if found.note is not None:
        console.print(found.note)
    num_bad = 0
    for index in range(min(num_rows, len(found.rows))):
        console.print()
        try:
            row = found.rows[index]
            row_id = row_id_of(index, row, rows)
            console.print(_rendered(to_conversation(row, modalities, row_id=row_id)))
        except RowError as error:
            num_bad += 1
            console.print(str(error))
    if num_bad or not len(found.rows):
        raise typer.Exit(1)


def _named(option: str) -> tuple[str, Modality]:
    name, equals, type = option.partition("=")
    if not equals:
        raise MultiTokenError(f"expected --modality NAME=TYPE (image=image), got {option!r}")
    return name, _without_encoder(type)


def _without_encoder(type: str) -> Modality:
    """Return a modality by its type, without the name of an encoder: no item is decoded."""
    from multi_token import registry

    found: Any = registry.resolve("modality", type)
    return found.model_construct(type=type)


def _guess(first: Sequence[Row], media: Mapping[str, str]) -> dict[str, Modality]:
    """Return the modalities that the columns, slots or parts of the first rows name."""
    from multi_token.data.presets import choose_format, find_media

    merged = {key: value for row in first for key, value in row.items() if value is not None}
    texts = str([{key: row.get(key) for key in ("messages", "prompt", *row)} for row in first])
    found: dict[str, Modality] = {}
    for name, type in _GUESSED.items():
        one = {name: _without_encoder(type)}
        is_named = name in media or f"<{name}>" in texts or f"'type': '{name}" in texts
        if is_named or find_media(merged, one):
            found |= one
    if not found and choose_format(merged, one := {"document": _without_encoder("document")}, {}):
        found = one
    # LLaVA's files of videos have the slot <image>
    if "video" in found and "image" in found and not find_media(merged, {"image": found["image"]}):
        del found["image"]
    return found


def _rendered(conversation: Conversation) -> Text:
    from multi_token.media.fetch import shorten
    from multi_token.types import Text as TextPart

    text = Text(f"row {conversation.id}\n", style="bold")
    messages = list(conversation.messages)
    labels = [message.role for message in messages]
    if conversation.rejected is not None:
        messages.append(conversation.rejected.messages[-1])
        labels[-1:] = ["chosen", "rejected"]
    for label, message in zip(labels, messages, strict=True):
        text.append(f"{label}: ", style="dim")
        for part in message.parts:
            if isinstance(part, TextPart):
                text.append(part.text, style="default")
                continue
            source = part.source
            in_memory = isinstance(source, (bytes, bytearray))
            shown = f"{len(source):,} bytes" if in_memory else shorten(source, 60)
            text.append(f"[{part.modality} {shown}]", style=MEDIA_STYLE)
        text.append("\n")
    return text
