"""Presets: columns of common data sets -> media and turn templates of an adapter.

`DataSource.format` names a preset. Without it, the columns of the first rows choose one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from multi_token.data.content_parts import media_source
from multi_token.data.row_templates import TemplateFault
from multi_token.data.rows import Row, as_list, is_number, type_name
from multi_token.errors import MultiTokenError
from multi_token.modalities.base import Modality

_FILE_COLUMNS = ("file_name", "filename", "file", "path", "filepath", "file_path")
"""Columns that name a file of any kind, which its suffix tells."""
_DESCRIBE = {
    "image": "Describe the image.",
    "audio": "Describe the sound.",
    "video": "Describe the video.",
    "document": "Summarize the document.",
}
_TRANSCRIBE = "Write down what is said."


@dataclass(frozen=True)
class Preset:
    """Turns of a format, over columns that have one of several names each.

    `columns`: word of the templates -> accepted names, the most certain first.
    """

    columns: Mapping[str, tuple[str, ...]]
    turns: tuple[tuple[str, str], ...]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """As `columns`, for those that may be absent; a null counts as absent."""
    each: bool = False
    """The first column is a list of objects, one for each repetition of `turns`."""
    asks: bool = False
    """The user turn is `question` of the source, or a default one."""
    needs_media: bool = True
    """Chosen by itself only where a column holds media."""


_ANSWERS = ("answer", "answers", "multiple_choice_answer", "label_text", "a")
_QUESTIONS = ("question", "q", "query", "problem", "instruction", "prompt")
PRESETS: Mapping[str, Preset] = {
    "preferences": Preset(
        {"ask": _QUESTIONS, "yes": ("chosen",), "no": ("rejected",)},
        (("user", "{{ ask }}"), ("chosen", "{{ yes }}"), ("rejected", "{{ no }}")),
    ),
    "pairs": Preset(
        {"pairs": ("texts", "conversation", "qa_pairs", "qas")},
        (("user", "{{ user }}"), ("assistant", "{{ assistant }}")),
        each=True,
        needs_media=False,
    ),
    "alpaca": Preset(
        {"ask": ("instruction",), "answer": ("output",)},
        (
            ("user", "{{ ask }}{% if more %}\n{{ more }}{% endif %}"),
            ("assistant", "{{ answer }}"),
        ),
        {"more": ("input",)},
        needs_media=False,
    ),
    "query_response": Preset(
        {"ask": ("query",), "answer": ("response",)},
        (("user", "{{ ask }}"), ("assistant", "{{ answer }}")),
        needs_media=False,
    ),
    "qa": Preset(
        {"ask": _QUESTIONS, "answer": _ANSWERS},
        (
            (
                "user",
                "{% if hint %}{{ hint }}\n{% endif %}{{ ask }}"
                "{% if choices %}\n{{ choices | lettered }}\n"
                "Answer with the letter of the right choice.{% endif %}",
            ),
            (
                "assistant",
                "{% if choices %}{{ answer | letter(choices) }}"
                "{% else %}{{ answer | common }}{% endif %}",
            ),
        ),
        {"choices": ("choices", "options"), "hint": ("hint",)},
    ),
    "transcripts": Preset(
        {
            "text": (
                "sentence",
                "transcription",
                "transcript",
                "normalized_text",
                "raw_text",
                "text",
            )
        },
        (("user", "{{ question }}"), ("assistant", "{{ text }}")),
        asks=True,
    ),
    "captions": Preset(
        {
            "text": (
                *("caption", "captions", "text", "txt", "description", "descriptions", "alt_text"),
                *("sentences", "sentences_raw", "report", "en"),
            )
        },
        (("user", "{{ question }}"), ("assistant", "{{ text | pick }}")),
        asks=True,
    ),
    "summaries": Preset(
        {
            "document": ("article", "report", "document", "dialogue", "text"),
            "text": ("highlights", "summary", "abstract"),
        },
        (("user", "{{ question }}"), ("assistant", "{{ text }}")),
        asks=True,
        needs_media=False,
    ),
}
"""Formats whose turns are templates, in the order in which they are tried."""


_SHOWN = {"ask": "question", "text": "answer", "yes": "chosen", "no": "rejected", "more": "input"}


@dataclass(frozen=True)
class Reading:
    """A format, resolved for the columns of a source."""

    format: str
    media: Mapping[str, str]
    """Modality -> column or template."""
    turns: tuple[tuple[str, str], ...] = ()
    each: str | None = None
    history: str | None = None
    """Column with earlier turns."""
    question: tuple[str, ...] = ()
    shown: tuple[tuple[str, str], ...] = ()
    """Words and their columns, for a message."""


def find_media(row: Row, modalities: Mapping[str, Modality]) -> dict[str, str]:
    """Return the column of each modality's items, where the row leaves no doubt.

    A column of the modality's name (or with an s) is its own. Else it is one with a usual name of
    its kind, or a file name with a usual suffix. Raises MultiTokenError where two modalities claim
    one column, or one modality several kinds of columns.
    """
    given = {key for key, value in row.items() if value is not None and not is_number(value)}
    found = {
        name: key
        for name in modalities
        for key in (f"{name}s", name)
        if key in given and key not in modalities.keys() - {name}
    }
    claims: dict[str, str] = {}
    for name, modality in modalities.items():
        if name in found:
            continue
        free = given - set(found.values())
        columns = [
            next((column for column in usual if column in free), None)
            for usual in modality.usual_columns()
        ]
        columns = [column for column in columns if column is not None]
        if not columns:
            suffixes = tuple(s for kind in modality.file_kinds() for s in kind.suffixes)
            columns = [
                column
                for column in _FILE_COLUMNS
                if column in free
                and isinstance(value := media_source(row[column]), str)
                and value.lower().endswith(suffixes)
            ][:1]
        if len(columns) > 1:
            raise MultiTokenError(
                f"columns {', '.join(columns)} may all hold items of {name!r}; name one: "
                f"`media: {{{name}: {columns[0]}}}`"
            )
        if columns and columns[0] in claims:
            other = claims[columns[0]]
            raise MultiTokenError(
                f"column {columns[0]!r} may hold items of {other!r} or of {name!r}; say which: "
                f"`media: {{{other}: {columns[0]}}}`"
            )
        claims |= dict.fromkeys(columns, name)
    return found | {name: column for column, name in claims.items()}


def turn_format(row: Row) -> str | None:
    """Return the format of a row that has turns of its own; None for a row without."""
    given = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= given and not (
        isinstance(row["chosen"], str) and given & {"question", "query"}
    ):
        return "preferences" if given & _TURNS or not isinstance(row["chosen"], str) else None
    if {"prompt", "completion"} <= given:
        return "prompt_completion"
    if isinstance(row.get("request"), Mapping) and "messages" in row["request"]:
        return "requests"
    if "messages" in given:
        return "requests" if given & {"response", "choices"} else "messages"
    return "sharegpt" if "conversations" in given else None


_TURNS = {"messages", "conversations", "prompt"}


def choose_format(
    row: Row, modalities: Mapping[str, Modality], media: Mapping[str, str]
) -> str | None:
    """Return the format of a row's columns; None if none fits without doubt."""
    if (found := turn_format(row)) is not None:
        return found
    for name, preset in PRESETS.items():
        if preset.needs_media and not media:
            continue
        columns = _columns_of(preset, row, media)
        if columns is None:
            continue
        if name == "transcripts" and not _is_transcript(modalities, media):
            continue
        if name == "summaries" and _text_modality(modalities) is None:
            continue
        text = row[columns["text"]] if "text" in columns else ""
        if isinstance(text, str) and text[:1] in ("{", "[") and text[-1:] in ("}", "]"):
            continue  # JSON, whose parts `turns` can name
        # a number is the answer to a count, or of a choice in columns of its own
        if name == "qa" and isinstance(row[columns["answer"]], int) and "choices" not in columns:
            continue
        return name
    return None


def _is_transcript(modalities: Mapping[str, Modality], media: Mapping[str, str]) -> bool:
    kinds = {modalities[name].item_text for name in media}
    # `text` beside a sound is its caption, and beside speech what is said
    return kinds == {"transcript"}


def _text_modality(modalities: Mapping[str, Modality]) -> str | None:
    names = [name for name, m in modalities.items() if m.openai_kinds == ("document",)]
    return names[0] if len(names) == 1 else None


def _columns_of(preset: Preset, row: Row, media: Mapping[str, str]) -> dict[str, str] | None:
    """Return word -> column of a preset, or None if the row lacks one that it needs."""
    free = {k for k, value in row.items() if value is not None} - set(media.values())
    found: dict[str, str] = {}
    for word, names in preset.columns.items():
        column = next((name for name in names if name in free), None)
        if column is None:
            return None
        found[word] = column
        free.discard(column)
    if preset.each:
        items = as_list(row[next(iter(found.values()))])
        keys = set(items[0]) if items and isinstance(items[0], Mapping) else set()
        if not {"user", "assistant"} <= keys:
            return None
    # a column that is null here may hold something in another row
    for word, names in preset.optional.items():
        column = next((name for name in names if name in row), None)
        if column is not None:
            found[word] = column
    return found


def resolve(
    format: str, row: Row, modalities: Mapping[str, Modality], media: Mapping[str, str]
) -> Reading:
    """Resolve a format for the columns of a row. Raises MultiTokenError if the row lacks one."""
    preset = PRESETS.get(format)
    if preset is None or (format == "preferences" and turn_format(row) == format):
        return Reading(format, media)
    columns = _columns_of(preset, row, media)
    if columns is None:
        wanted = "; ".join(f"{' or '.join(names)}" for names in preset.columns.values())
        raise MultiTokenError(
            f"`format: {format}` needs the columns {wanted}, but the rows have {', '.join(row)}; "
            "write `turns` for other columns (docs/rows.md)"
        )
    media = dict(media)
    if format == "summaries":
        name = _text_modality(modalities)
        if name is None:
            raise MultiTokenError(
                "`format: summaries` needs exactly one modality that takes documents"
            )
        media[name] = '{{ {"text": ' + reference(columns.pop("document")) + "} }}"
    each = columns.pop("pairs", None) if preset.each else None
    words = {**columns}
    turns = tuple((role, _with_columns(text, preset, words)) for role, text in preset.turns)
    question: tuple[str, ...] = ()
    if preset.asks:
        kinds = [kind for name in media for kind in modalities[name].openai_kinds]
        default = f"Describe the {next(iter(media), 'item')}."
        question = (
            _TRANSCRIBE
            if format == "transcripts"
            else _DESCRIBE.get(kinds[0], default)
            if kinds
            else default,
        )
    shown = tuple((_SHOWN.get(word, word), column) for word, column in words.items())
    history = "history" if format == "alpaca" and "history" not in media.values() else None
    return Reading(format, media, turns, each, history, question, shown)


def _with_columns(text: str, preset: Preset, columns: Mapping[str, str]) -> str:
    """Return a preset's template with the names of columns in place of its words."""
    import re

    known = {**preset.columns, **preset.optional}

    def put(match: re.Match[str]) -> str:
        word = match[0]
        if word not in known:
            return word
        return reference(columns[word]) if word in columns else "none"

    # words are in `{{ }}` and `{% %}` only
    return re.sub(r"\{[{%].*?[%}]\}", lambda tag: re.sub(r"(?<!\| )\b[a-z]+\b", put, tag[0]), text)


def reference(column: str) -> str:
    """The column in a Jinja template, also where its name is no identifier."""
    return column if column.isidentifier() else f"row[{column!r}]"


def join_completion(row: Row) -> Row:
    """Return a row of `prompt` and `completion` with both under `messages`."""
    turns: list[Any] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[key]
        turns += (
            [{"role": role, "content": value}]
            if isinstance(value, str)
            else [value]
            if isinstance(value, Mapping)
            else as_list(value) or []
        )
    rest = {k: v for k, v in row.items() if k not in ("prompt", "completion")}
    return {**rest, "messages": turns}


def join_answer(row: Row) -> Row:
    """Return a logged request with its answer as the last turn of `messages`."""
    request = row["request"] if isinstance(row.get("request"), Mapping) else row
    answer = row.get("response", row)
    if isinstance(answer, Mapping) and isinstance(answer.get("body"), Mapping):
        answer = answer["body"]  # of a batch
    if isinstance(answer, Mapping):
        choices = as_list(answer.get("choices")) or [{}]
        message = choices[0].get("message") if isinstance(choices[0], Mapping) else choices[0]
        if not isinstance(message, (Mapping, type(None))):
            raise TemplateFault(
                f"`choices` has {type_name(message)}, expected an object with a `message` of "
                "`role` and `content`"
            )
        answer = (message or {}).get("content")
    turns = list(as_list(request.get("messages")) or [])
    # developers of today's API are systems of a chat template
    turns = [
        {**turn, "role": "system"}
        if isinstance(turn, Mapping) and turn.get("role") == "developer"
        else turn
        for turn in turns
    ]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return {"messages": turns, **({"id": row["id"]} if row.get("id") is not None else {})}
