"""What is in a data set, before a GPU is rented: every problem, every length, one row in colour.

Border: reads rows the way training does; prints nothing but a progress bar, tables are the cli's.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multi_token.data.formats import to_conversation
from multi_token.data.lengths import Length, LengthStore
from multi_token.data.rows import Row, row_id_of
from multi_token.errors import ChatTemplateError, MediaError, RowError, RowKind
from multi_token.types import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    from rich.text import Text

    from multi_token.modalities.base import Modality


T = TypeVar("T")


class Decoder(Protocol):
    """The one thing of a tokenizer that `render_sample` needs."""

    def decode(self, token_ids: list[int], /) -> Any: ...


@dataclass(frozen=True)
class Problem:
    """A row that cannot become a sample."""

    index: int
    row_id: str
    kind: RowKind
    message: str


@dataclass
class ScanReport:
    """What `scan` found. `good_indices` and `lengths` run in parallel, in the order of the rows."""

    num_rows: int
    good_indices: list[int] = field(default_factory=list)
    lengths: list[Length] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    num_decoded: int = field(default=0, compare=False)
    """Good rows of which an item was decoded, or came from a feature cache."""
    num_known_before: int = field(default=0, compare=False)
    """Good rows that were not looked at, since their lengths were known."""

    @property
    def by_kind(self) -> dict[RowKind, list[Problem]]:
        """The problems by kind, kinds without any left out."""
        found: dict[RowKind, list[Problem]] = {kind: [] for kind in get_args(RowKind)}
        for problem in self.problems:
            found[problem.kind].append(problem)
        return {kind: problems for kind, problems in found.items() if problems}

    @property
    def num_tokens(self) -> int:
        """Tokens of all good rows."""
        return sum(length.num_tokens for length in self.lengths)

    @property
    def num_supervised(self) -> int:
        """Learned tokens of all good rows."""
        return sum(length.num_supervised for length in self.lengths)

    @property
    def num_media(self) -> int:
        """Media tokens of all good rows."""
        return sum(length.num_media for length in self.lengths)


@dataclass(frozen=True)
class Bin:
    """`count` rows have from `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


def scan(
    rows: Sequence[Row],
    read: Callable[[Row, str], Sample],
    *,
    source: str = "rows",
    num_workers: int = 0,
    progress: bool = True,
    indices: Sequence[int] | None = None,
    known: LengthStore | None = None,
) -> ScanReport:
    """Read every row the way training will, and report; a bad row never ends the scan.

    `read` takes a row and its name: `functools.partial(read_row, reader=..., modalities=...)`. It
    must be picklable where `num_workers` is not 0. `indices`: only these rows, in rising order
    (shares of several processes, which `merge` joins). `known`: rows whose length it has are not
    read, and it learns the others. Errors that are not about rows (`TypeError`, a full disk) are
    bugs or breakdowns, and are raised.
    """
    indices = range(len(rows)) if indices is None else indices
    # each worker takes a row at a time: rows differ in cost by their media
    results: Iterable[_Result] = DataLoader(
        _ScanDataset(rows, read, source, indices, known),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_identity,
        # its own, because a loader draws a seed: a scan must not change the training that follows
        generator=torch.Generator(),
    )
    report = ScanReport(num_rows=len(indices))
    try:
        found = zip(indices, _with_progress(results, len(indices), progress), strict=True)
        for index, (key, result, how) in found:
            if isinstance(result, Problem):
                report.problems.append(result)
                continue
            report.num_decoded += how == "decoded"
            report.num_known_before += how == "remembered"
            report.good_indices.append(index)
            report.lengths.append(result)
            if known is not None and key is not None:
                known.add(key, result)
    finally:
        if known is not None:
            known.save()
    return report


def merge_reports(reports: Sequence[ScanReport]) -> ScanReport:
    """One report of shares of the same rows, as if one process had read them all."""
    pairs = [pair for r in reports for pair in zip(r.good_indices, r.lengths, strict=True)]
    good = sorted(pairs, key=lambda pair: pair[0])
    return ScanReport(
        num_rows=sum(report.num_rows for report in reports),
        good_indices=[index for index, _ in good],
        lengths=[length for _, length in good],
        problems=sorted((p for report in reports for p in report.problems), key=lambda p: p.index),
        num_decoded=sum(report.num_decoded for report in reports),
        num_known_before=sum(report.num_known_before for report in reports),
    )


class _Result(NamedTuple):
    """A row's key, if it can be known again; its length, or what is wrong with it; and how."""

    key: str | None
    found: Length | Problem
    how: Literal["read", "decoded", "remembered"] = "read"


class _ScanDataset(Dataset[_Result]):
    def __init__(
        self,
        rows: Sequence[Row],
        read: Callable[[Row, str], Sample],
        source: str,
        indices: Sequence[int],
        known: LengthStore | None,
    ) -> None:
        self.rows = rows
        self.read = read
        self.source = source
        self.indices = indices
        self.known = known

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> _Result:
        index = self.indices[number]
        row_id = row_id_of(index, None, self.source)
        kind: RowKind
        try:
            row = self.rows[index]
            row_id = row_id_of(index, row, self.source)
            key = None if self.known is None else self.known.key(row, row_id)
            if self.known is not None and key is not None:
                length = self.known.get(key)
                if length is not None:
                    return _Result(key, length, "remembered")
            sample = self.read(row, row_id)
            decoded = any(item.inputs for item in sample.media)
            return _Result(key, sample_length(sample), "decoded" if decoded else "read")
        except RowError as error:
            # a line that is not JSON has no id of its own: then the error's name is the better one
            return _Result(None, Problem(index, error.row_id, error.kind, error.sentence))
        except MediaError as error:
            kind = error.kind
            return _Result(None, Problem(index, row_id, kind, str(error)))
        except ChatTemplateError as error:
            return _Result(None, Problem(index, row_id, "chat_template", str(error)))


def sample_length(sample: Sample) -> Length:
    """The three lengths of a sample."""
    return Length(
        num_tokens=int(sample.input_ids.numel()),
        num_supervised=int((sample.labels != IGNORE_INDEX).sum()),
        num_media=sum(place.length for place in sample.media_spans),
    )


def _identity(result: Any) -> Any:
    return result


def _with_progress(results: Iterable[T], total: int, progress: bool) -> Iterable[T]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        results,
        description="Reading rows",
        total=total,
        console=console,
        disable=not progress or not console.is_terminal,
        transient=True,
    )


def histogram(lengths: Sequence[int], *, num_bins: int = 10) -> list[Bin]:
    """At most `num_bins` bins of one width, from the shortest to the longest."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = math.ceil((high - low + 1) / num_bins)
    counts = [0] * math.ceil((high - low + 1) / width)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [
        Bin(low + i * width, min(low + (i + 1) * width - 1, high), count)
        for i, count in enumerate(counts)
    ]


def write_clean(rows: Sequence[Row], good: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Write the good rows as .jsonl; bytes and pictures become data URIs, arrays become lists.

    The file appears whole or not at all, so that it may replace the one that `rows` come from.
    Relative media paths stay as they are: see `first_relative_path`.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for index in good:
                row = rows[index]
                plain = partial(_plain, row_id=row_id_of(index, row, "rows"))
                json.dump(row, file, ensure_ascii=False, default=plain)
                file.write("\n")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def first_relative_path(
    rows: Sequence[Row], good: Sequence[int], *, modalities: Mapping[str, Modality]
) -> str | None:
    """The first relative media path of the good rows: it would be lost in another folder."""
    for index in good:
        for media in to_conversation(rows[index], modalities, row_id="").media:
            name = modalities[media.modality].named_file(media.source)
            text = "" if name is None else os.fspath(name)
            if not text or "://" in text or text[:5].lower() == "data:":
                continue
            if not os.path.isabs(os.path.expanduser(text)):
                return text
    return None


def _plain(value: Any, *, row_id: str) -> Any:
    """What JSON has no word for, as `to_conversation` and `Fetch` will read it again."""
    from PIL import Image

    if isinstance(value, (bytes, bytearray, memoryview)):
        return "data:application/octet-stream;base64," + base64.b64encode(value).decode("ascii")
    if isinstance(value, Image.Image):
        return _png_uri(value)
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "isoformat"):  # dates and times, which tables have
        return value.isoformat()
    raise RowError(
        f"holds a {type(value).__name__}, which a .jsonl file cannot; "
        "leave that field out before cleaning",
        kind="format",
        row_id=row_id,
    )


def _png_uri(picture: Any) -> str:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


PROMPT_STYLE, SUPERVISED_STYLE, MEDIA_STYLE = "dim", "bold green", "bold magenta"


def render_sample(sample: Sample, tokenizer: Decoder, *, marks: bool = False) -> Text:
    """A sample as the model gets it: the prompt dim, what is learned green, media as `[image x 4]`.

    With `marks`, what is learned also stands between `⟦` and `⟧`, for terminals without colour.
    """
    from rich.text import Text

    ids: list[int] = sample.input_ids.tolist()
    learned: list[bool] = (sample.labels != IGNORE_INDEX).tolist()
    starts = {place.start: place for place in sample.media_spans}
    opening, closing = ("⟦", "⟧") if marks else ("", "")
    text = Text.assemble(
        ("prompt", PROMPT_STYLE),
        "  ",
        (f"{opening}learned{closing}", SUPERVISED_STYLE),
        "  ",
        ("[media x tokens]", MEDIA_STYLE),
        "\n\n",
    )
    position = 0
    while position < len(ids):
        if place := starts.get(position):
            text.append(f"[{place.modality} x {place.length}]", style=MEDIA_STYLE)
            position += max(place.length, 1)
            continue
        end = position + 1
        while end < len(ids) and end not in starts and learned[end] == learned[position]:
            end += 1
        piece = str(tokenizer.decode(ids[position:end]))
        if learned[position]:
            text.append(f"{opening}{piece}{closing}", style=SUPERVISED_STYLE)
        else:
            text.append(piece, style=PROMPT_STYLE)
        position = end
    return text
