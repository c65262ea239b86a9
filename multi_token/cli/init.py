"""`multi-token init`: a recipe for the data of a user, from their first rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from multi_token.errors import MediaError, MultiTokenError, RowError
from multi_token.registry import did_you_mean

if TYPE_CHECKING:
    from multi_token.data.rows import Row
    from multi_token.media.fetch import Fetch
    from multi_token.modalities.base import Modality
    from multi_token.recipe.data import DataSource

PARTS: Mapping[str, dict[str, Any]] = {
    "image": {
        "encoder": "google/siglip2-base-patch16-224",
        "projector": {"type": "pool", "factor": 2, "grid": True},
    },
    "speech": {"encoder": "openai/whisper-small", "projector": {"type": "stack", "factor": 8}},
    "sound": {
        "encoder": "laion/clap-htsat-unfused",
        "projector": {"type": "expand", "factor": 4},
    },
    "video": {
        "encoder": "google/siglip2-base-patch16-224",
        "fps": 1.0,
        "max_frames": 64,
        "projector": {"type": "expand", "factor": 4},
    },
    "document": {
        "encoder": "sentence-transformers/all-MiniLM-L6-v2",
        "projector": {"type": "expand", "factor": 4},
    },
    "timeseries": {"projector": {"type": "mlp"}},
    "vector": {"projector": {"type": "expand", "factor": 4}},
}
"""Type of a modality -> the fields that `init` writes."""
_ANSWERS = ("answer", "label", "class", "category", "caption", "report", "description", "text")
_NUM_ROWS = 8
_MOST_HELD_OUT = 1000
_HELD_OUT_EVERY = 20
_SMALL = 500
"""Rows below which only the projector is trained: an adapter would learn them by heart."""


@dataclass
class Found:
    """The modality of some rows: its type, its column and its fields."""

    type: str
    column: str
    fields: dict[str, Any] = field(default_factory=dict)


def init(
    folder: Path = typer.Argument(..., metavar="DIR", help="Folder for the recipe and its run."),
    data: str = typer.Option(..., help="Rows: a file, a folder, a pattern, or hf://owner/name."),
    split: str = typer.Option("train", help="Split to train on, if there are several."),
    eval_data: str = typer.Option(None, "--eval", help="Held-out rows; default: a part of --data."),
    eval_split: str = typer.Option(None, help="Split of the held-out rows."),
    modality: str = typer.Option(
        None, metavar="[NAME=]TYPE", help="Modality of the items; default: by the columns."
    ),
    media: str = typer.Option(
        None, metavar="COLUMN", help="Column of the items; default: by name and values."
    ),
    answer: str = typer.Option(
        None, metavar="COLUMN", help="Column of the answers; default: by the columns."
    ),
    question: list[str] = typer.Option(
        None, help="Question before each item; repeatable, one is drawn for each row."
    ),
    language_model: str = typer.Option(None, help="Hub name or folder of the language model."),
    encoder: str = typer.Option(None, help="Hub name or folder of the encoder."),
) -> None:
    """Look at data and write a recipe for it, with held-out rows; prints what to run next."""
    from multi_token.data.files.open import load_rows
    from multi_token.data.row_source import first_rows, media_fetch
    from multi_token.recipe.data import DataSource

    target = folder / "recipe.yaml"
    if target.exists():
        raise MultiTokenError(f"{target} is there already; name another folder, or remove it")
    rows = load_rows(data, split=split)
    first = [row for row in first_rows(rows.__getitem__, len(rows)) if isinstance(row, Mapping)]
    if not first:
        raise MultiTokenError(f"{data} has no rows that can be read")
    fetch = media_fetch(DataSource(rows=data, split=split))
    name, _, type_name = (modality or "").rpartition("=")
    found = find_modality(first, fetch, type_name or None, media)
    if encoder is not None:
        found.fields["encoder"] = encoder
    name = name or found.type
    source = _reading(name, found, first, answer, question or [])
    text = _text(
        folder, data, split, eval_data, eval_split, name, found, first, source, len(rows),
        language_model,
    )  # fmt: skip
    recipe = _checked(text, target)
    for one in (*recipe.data.train, *recipe.data.eval):
        _check_rows(one, {name: _light(found)})
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    held_out = recipe.data.eval[0]
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    what = source.get("format") or "turns"
    console.print(
        f"{target}: {len(rows):,} rows of {data}; {name} <- {found.column}, read as {what}"
    )
    console.print("next:")
    item = _example(held_out.rows, held_out.split, found.column, fetch)
    asked = (source.get("question") or ["Describe it."])[0]
    for line in (
        f"multi-token train {target} --plan    # steps, memory and time",
        f"multi-token train {target}",
        f'multi-token ask {folder / "run"} "{asked}" --media {name}={item}'
        if item is not None
        else f"multi-token predict {folder / 'run'} {held_out.rows} --split '{held_out.split}' "
        f"--out {folder / 'answers.jsonl'}",
    ):
        console.print(f"  {line}")


def find_modality(
    rows: Sequence[Row], fetch: Fetch, type_name: str | None = None, column: str | None = None
) -> Found:
    """Return the modality of rows by their columns and values.

    Args:
        rows: The first rows.
        fetch: Reader of their media.
        type_name: The type, if it is given.
        column: The column, if it is given.

    Raises:
        MultiTokenError: If no column holds items, or the type or the column is unknown.
    """
    if type_name is not None and type_name not in PARTS:
        raise MultiTokenError(
            f"--modality {type_name}: expected one of {', '.join(PARTS)}"
            f"{did_you_mean(type_name, PARTS)}; write a recipe for another"
        )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if column is not None and column not in columns:
        raise MultiTokenError(
            f"--media {column}: no such column{did_you_mean(column, columns)} (the rows have "
            f"{', '.join(columns)})"
        )
    choices = list(_candidates(rows, columns if column is None else [column], fetch))
    for found in choices:
        if type_name in (None, found.type):
            return _with_parts(found, rows, fetch)
    if type_name is not None and (choices or column is not None):
        # audio may be speech or sound: the user knows
        return _with_parts(Found(type_name, column or choices[0].column), rows, fetch)
    raise MultiTokenError(
        f"no column of the rows holds items of a known kind (they have {', '.join(columns)}); name "
        "the column and its type: --media COLUMN --modality TYPE"
    )


def _candidates(rows: Sequence[Row], columns: Sequence[str], fetch: Fetch) -> Iterator[Found]:
    """Yield modalities that the columns may be, the most certain first."""
    from multi_token.data.presets import PRESETS
    from multi_token.modalities.base import USUAL_COLUMNS

    usual = {name: kind for kind, names in USUAL_COLUMNS.items() for name in names}
    texts = {column for row in rows for column in row if isinstance(row[column], str)}
    # a column with a usual name before one that only looks like items
    for column in sorted(columns, key=lambda column: column not in usual):
        value = next((row[column] for row in rows if row.get(column) is not None), None)
        kind = _kind_of(value, usual.get(column), fetch)
        if kind == "audio":
            is_speech = any(name in texts for name in PRESETS["transcripts"].columns["text"])
            yield Found("speech" if is_speech else "sound", column)
        elif kind is not None:
            yield Found(kind, column)


def _kind_of(value: Any, usual: str | None, fetch: Fetch) -> str | None:
    """Return the type of an item, or `audio`; None for a value that is no item."""
    from multi_token.data.content_parts import media_source
    from multi_token.data.rows import as_list, is_number
    from multi_token.media.sniff import FILE_KINDS

    items = as_list(value)
    if items:
        if all(map(is_number, items)):
            return "vector"
        inner = as_list(items[0])
        if inner and all(map(is_number, inner)):
            return "timeseries"
        return _kind_of(items[0], usual, fetch)
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is None:
        return usual if "array" in value or "url" in value else None
    path = media_source(value) if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        return usual if value is not None and not is_number(value) else None
    suffix = Path(path).suffix.lower()
    for kind in ("image", "audio", "video", "document"):
        if suffix in FILE_KINDS[kind].suffixes and (usual == kind or suffix != ".txt"):
            return kind
    if suffix in (".npy", ".edf", ".bdf", ".hea", ".dat", ".parquet", ".csv"):
        return _numbers(path, fetch)[0]
    is_name = not any(letter.isspace() for letter in path)
    # the name of a WFDB record has no suffix
    if is_name and (header := fetch.local_path(f"{path}.hea")) is not None and header.is_file():
        return "timeseries"
    return usual if isinstance(value, Mapping) or (is_name and usual != "document") else None


def _numbers(source: Any, fetch: Fetch) -> tuple[str, dict[str, Any]]:
    """Return whether numbers are a vector or a series, and the fields of the modality."""
    from multi_token.media.series import look_at_series

    shape, rate = look_at_series(source, fetch)
    if len(shape) == 1:
        return "vector", {"dim": shape[0]}
    return "timeseries", {"channels": shape[1], **({} if rate is None else {"rate": rate})}


def _with_parts(found: Found, rows: Sequence[Row], fetch: Fetch) -> Found:
    """Add the fields of the modality: those of its type, and sizes that the first item tells."""
    fields: dict[str, Any] = {}
    if found.type in ("vector", "timeseries"):
        value = next(row[found.column] for row in rows if row.get(found.column) is not None)
        try:
            kind, fields = _numbers(value, fetch)
        except MediaError as error:
            raise MultiTokenError(f"the first item of {found.column!r}: {error}") from None
        if kind != found.type:
            # a sequence of vectors, or a series of one channel
            width = fields.get("channels", 1)
            fields = {"dim": width} if found.type == "vector" else {"channels": 1}
    return Found(found.type, found.column, {"type": found.type, **fields, **PARTS[found.type]})


def _reading(
    name: str,
    found: Found,
    rows: Sequence[Row],
    answer: str | None,
    questions: Sequence[str],
) -> dict[str, Any]:
    """Return the keys of a source that make conversations of the columns."""
    from multi_token.data.presets import choose_format, reference, resolve

    row = max(rows, key=lambda row: sum(v is not None for v in row.values()))
    modalities: dict[str, Modality] = {name: _light(found)}
    media = {name: found.column}
    keys: dict[str, Any] = {"media": media}
    format = choose_format(row, modalities, media) if answer is None else None
    if format is not None:
        reading = resolve(format, row, modalities, media)
        asks = [*questions] or [*reading.question]
        return {"format": format, **keys, **({"question": asks} if reading.question else {})}
    texts = [c for c in row if c != found.column and isinstance(row[c], (str, int, float))]
    column = answer or next((c for c in _ANSWERS if c in texts), None)
    if column is None and len(texts) == 1:
        column = texts[0]
    if column is None or column not in row:
        raise MultiTokenError(
            f"which column holds the answers? --answer COLUMN"
            f"{did_you_mean(column, list(row)) if column else ''} (the rows have {', '.join(row)})"
        )
    asks = [*questions] or ["What is this?"]
    answers = "{{ " + reference(column) + " }}"
    turns = [{"user": f"<{name}>\n{{{{ question }}}}"}, {"assistant": answers}]
    return {**keys, "turns": turns, "question": asks}


def _light(found: Found) -> Modality:
    from typing import cast

    from multi_token import registry
    from multi_token.modalities.base import Modality

    return registry.build("modality", found.fields, cast(type[Modality], Modality))


def _text(
    folder: Path,
    data: str,
    split: str,
    eval_data: str | None,
    eval_split: str | None,
    name: str,
    found: Found,
    rows: Sequence[Row],
    source: Mapping[str, Any],
    num_rows: int,
    language_model: str | None,
) -> str:
    """Return the text of the recipe."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    num_held_out, step = 0, 0
    if eval_data is None and eval_split is None:
        step = _step_of_held_out(num_rows)
        num_held_out = len(range(0, num_rows, step))
        if num_rows < 2 or "[" in split:
            raise MultiTokenError(
                f"{num_rows} rows of {split} cannot be parted for held-out rows; give them: --eval "
                "DATA, or --eval-split SPLIT"
            )
    num_train = num_rows - num_held_out
    batch_size = max(1, min(16, num_train // 8))
    steps = -(-num_train // batch_size)
    is_long = steps > 2000
    is_random = found.type == "timeseries" and "encoder" not in found.fields
    words = {
        "data": data,
        "num_rows": f"{num_rows:,}",
        "columns": ", ".join(dict.fromkeys(str(key) for row in rows for key in row)),
        "language_model": language_model,
        "thinking": language_model is None or _can_think(language_model),
        "name": name,
        "modality": _lines(found.fields),
        "rows": json.dumps(data),
        "train_split": json.dumps(f"{split}[not ::{step}]" if step else split),
        "eval_rows": json.dumps(eval_data or data),
        "eval_split": json.dumps(eval_split or (f"{split}[::{step}]" if step else "train")),
        "reading": _lines(source),
        "max_tokens": 2048,
        "output_dir": json.dumps(str(folder / "run")),
        "trains_encoder": "; an encoder without weights is trained too" if is_random else "",
        "adapter": num_train >= _SMALL,
        # about 200 steps of a small set, one epoch of a large one
        "epochs": max(1, min(20, -(-200 // steps))),
        "batch_size": batch_size,
        "accumulate": 2 if num_train >= 10 * _SMALL else 1,
        "eval_strategy": "steps" if is_long else "epoch",
        "logging_steps": 10 if steps >= 100 else 1,
    }
    template = files("multi_token.cli.templates").joinpath("recipe.yaml.jinja").read_text("utf-8")
    return Environment(undefined=StrictUndefined).from_string(template).render(words) + "\n"


def _step_of_held_out(num_rows: int) -> int:
    """Return n, where every n-th row is held out: rows are often sorted by class."""
    step = max(_HELD_OUT_EVERY, -(-num_rows // _MOST_HELD_OUT))
    # no small divisor: of rows whose classes take turns, each is met
    while any(step % number == 0 for number in (2, 3, 5, 7)):
        step += 1
    return step


def _can_think(language_model: str) -> bool:
    """Return whether the template of a local model has the switch; a hub name is not asked."""
    from multi_token.chat.named import template_variables
    from multi_token.language_model.loading import load_tokenizer

    if not Path(language_model).is_dir():
        return False
    source = load_tokenizer(language_model, None).chat_template
    return isinstance(source, str) and "enable_thinking" in template_variables(source)


def _lines(fields: Mapping[str, Any]) -> list[str]:
    """Return a section as YAML, a line for each key; inner sections in one line."""
    # JSON is YAML, and quotes what YAML would read as something else
    return [
        f"{key}: {_flow(value)}" for key, value in fields.items() if value not in ([], {}, None)
    ]


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and value.replace("_", "").isalnum() and not value[0].isdigit():
        return value
    return json.dumps(value, ensure_ascii=False)


def _checked(text: str, target: Path) -> Any:
    from multi_token.recipe.recipe import parse_recipe

    return parse_recipe(text, where=str(target))


def _check_rows(source: DataSource, modalities: Mapping[str, Modality]) -> None:
    """Raise MultiTokenError if none of the first rows of a source can be read."""
    from multi_token.data.formats import to_conversation
    from multi_token.data.row_source import open_rows
    from multi_token.data.rows import row_id_of

    rows = open_rows(source, modalities).rows
    errors: list[RowError] = []
    for index in range(min(len(rows), _NUM_ROWS)):
        try:
            row = rows[index]
            to_conversation(row, modalities, row_id=row_id_of(index, row, source.rows))
            return
        except RowError as error:  # one bad row is left out in training
            errors.append(error)
    raise MultiTokenError(
        f"the recipe could read none of the first rows of {source.rows}, so it is not written: "
        f"{errors[0] if errors else 'there are none'}; name the columns: --media COLUMN --answer "
        "COLUMN"
    )


def _example(data: str, split: str, column: str, fetch: Fetch) -> str | None:
    """Return a path of a held-out item that a command can name, or None."""
    from multi_token.data.content_parts import media_source
    from multi_token.data.files.open import load_rows

    value = load_rows(data, split=split)[0].get(column)
    if isinstance(value, list) and value:
        value = value[0]
    path = media_source(value) if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        return None
    for name in (path, f"{path}.hea"):
        if (local := fetch.local_path(name)) is not None and Path(local).is_file():
            return str(local)[: len(str(local)) - len(name) + len(path)]
    return None
