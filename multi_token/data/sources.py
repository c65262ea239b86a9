"""Sources of a run: rows of the recipe with their processor, scanned for good rows and lengths.

DataSource -> open_source -> TrainingSource -> good_rows -> indices and lengths of good rows
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.data import ConcatDataset

from multi_token.data.dataset import ConversationDataset, RowReader
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.formats import to_conversation
from multi_token.data.lengths import LengthStore
from multi_token.data.row_source import open_rows, show_note
from multi_token.data.rows import row_id_of
from multi_token.data.scan import ScanReport, merge_reports, scan
from multi_token.distributed import (
    all_gather,
    check_same_values,
    num_processes,
    rank,
)
from multi_token.errors import RecipeError, RowError
from multi_token.processor import MultiTokenProcessor
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import DataSource
from multi_token.types import Conversation, Media


@dataclass(frozen=True)
class TrainingSource:
    """Rows of one source with the processor that opens their media."""

    rows: Sequence[Any]
    processor: MultiTokenProcessor
    name: str
    good_indices: Sequence[int] | None = None
    """Rows that can be trained on; None before `good_rows` has scanned them."""
    lengths: Sequence[int] = ()
    """Number of tokens of each good row."""
    num_items: Sequence[int] = ()
    """Number of media items of each good row."""
    num_rejected: Sequence[int] = ()
    """Number of tokens of each good row with its rejected answer; 0 where it has none."""
    modalities: Sequence[int] = ()
    """Modalities that each good row has an item of (`ScanReport`); empty if it is not known."""
    references: NDArray[np.uint8] | None = None
    """With `packing.share`, uint8 [rows, 32] of the good rows (`ScanReport`)."""
    headers: bool = False
    """True if `data.lengths: headers` applies to these rows."""

    @property
    def lengths_only(self) -> bool:
        """True if the scan predicts lengths from headers instead of decoding."""
        # filling a feature cache decodes every item, so nothing is saved by reading headers
        return self.headers and self.processor.cache is None

    @property
    def num_rows(self) -> int:
        """Number of good rows; before the scan, of all rows."""
        return len(self.rows) if self.good_indices is None else len(self.good_indices)

    def conversation(self, number: int) -> tuple[Conversation, MultiTokenProcessor]:
        """Return a good row by its number, and the processor that opens its media.

        Raises RowError for a row that is no conversation.
        """
        index = number if self.good_indices is None else self.good_indices[number]
        row = self.rows[index]
        row_id = row_id_of(index, row, self.name)
        # undecoded rows may turn out bad; the processor then names the row in its error
        processor = replace(self.processor, row_id=row_id) if self.lengths_only else self.processor
        return to_conversation(row, processor.modalities, row_id=row_id), processor

    def conversations(self) -> Iterator[tuple[Conversation, MultiTokenProcessor]]:
        """Yield the good rows; before the scan, all rows that are conversations at all."""
        for number in range(self.num_rows):
            try:
                yield self.conversation(number)
            except RowError:
                continue

    def rows_with(self, names: Collection[str]) -> NDArray[np.int64]:
        """Return the numbers of the rows that may have an item of these modalities."""
        if not self.modalities:
            return np.arange(self.num_rows)
        bits = sum(1 << i for i, name in enumerate(self.processor.modalities) if name in names)
        return np.flatnonzero(np.array(self.modalities, np.int64) & bits)

    def items(self, name: str) -> Iterator[tuple[Media, MultiTokenProcessor]]:
        """Yield the media items of one modality, one by one; no other row is read."""
        for number in self.rows_with([name]).tolist():
            try:
                conversation, processor = self.conversation(number)
            except RowError:
                continue
            yield from ((item, processor) for item in conversation.media if item.modality == name)

    def with_processor(self, **fields: Any) -> TrainingSource:
        """Return the same rows with other fields of the processor, such as `cache`."""
        return replace(self, processor=replace(self.processor, **fields))


def open_source(
    source: DataSource,
    processor: MultiTokenProcessor | None,
    recipe: Recipe,
    cache: FeatureCache | None,
) -> TrainingSource:
    """Open the rows of a source for the processor of a model; features come from `cache`, if any.

    `data.lengths: headers` applies to training rows only. No batches are planned for held-out rows
    and those of the closed-form start, so they are always decoded.
    """
    assert processor is not None
    opened = open_rows(source, processor.modalities, seed=recipe.train.seed)
    show_note(opened.note)
    # media paths are relative to the folder of the rows, which differs between sources
    processor = replace(processor, fetch=opened.fetch, cache=cache)
    headers = recipe.data.lengths == "headers" and any(s is source for s in recipe.data.train)
    return TrainingSource(opened.rows, processor, source.rows, headers=headers)


def good_rows(
    sources: Sequence[TrainingSource], recipe: Recipe, console: Console
) -> list[TrainingSource]:
    """Scan all rows, and return the sources with indices and lengths of their good rows.

    Processes of a run share the rows, and so do `dataloader_num_workers`. Lengths are stored in
    `RUN/lengths`, so that the next start opens no media.

    Raises:
        RowError: a row is bad, and `data.on_bad_row` is `raise`.
        RecipeError: no row is good, or the processes of this run see different rows.
    """
    # before the scan: with other rows, the processes would report other shares as bad
    _check_same_rows(sources)
    reports = [_scan_source(source, recipe, console) for source in sources]
    problems = [problem for report in reports for problem in report.problems]
    num_rows = sum(report.num_rows for report in reports)
    if problems and recipe.data.on_bad_row == "raise":
        raise problems[0].error(
            f"{problems[0].message} ({len(problems)} of {num_rows} rows are bad; see them all with "
            "`multi-token data check`, or set data.on_bad_row=skip to leave them out)"
        )
    names = ", ".join(source.name for source in sources)
    if num_rows == len(problems):
        example = "".join(f", the first, row {p.row_id}: {p.message}" for p in problems[:1])
        raise RecipeError(
            f"no row of {names} can be trained on: {num_rows} rows, {len(problems)} skipped"
            f"{example}; see them all with `multi-token data check`"
        )
    num_tokens, num_supervised, *_ = map(sum, zip(*(r.total for r in reports), strict=True))
    console.print(
        f"rows of {names}: {num_rows - len(problems)} good, {len(problems)} skipped, "
        f"{num_tokens} tokens, {num_supervised / num_tokens:.0%} supervised",
        *[f"  skipped row {p.row_id} ({p.kind}): {p.message}" for p in problems[:5]],
        sep="\n",
        highlight=False,
    )
    predicted = [r for s, r in zip(sources, reports, strict=True) if s.lengths_only]
    if predicted:
        console.print(_length_counts(predicted), highlight=False)
    return [
        replace(
            source,
            good_indices=r.good_indices,
            lengths=r.lengths.column("num_tokens"),
            num_items=r.lengths.column("num_items"),
            num_rejected=r.lengths.column("num_rejected"),
            modalities=r.modalities,
            references=r.reference_table if _shares(recipe) else None,
        )
        for source, r in zip(sources, reports, strict=True)
    ]


def check_has_items(sources: Sequence[TrainingSource], recipe: Recipe) -> None:
    """Raise RecipeError if only modalities are trained, and no row has an item of any.

    A single row is never at fault: its keys that no modality takes may hold anything.
    """
    trainable = [stage.learn for stage in recipe.train.stages]
    if any(learn.adapter or learn.language_model for learn in trainable):
        return
    if not any(map(any, (source.num_items for source in sources))):
        names = ", ".join(recipe.model.modalities)
        raise RecipeError(
            f"no row of {', '.join(source.name for source in sources)} has an item of {names}, so "
            "nothing would be trained; rows name their items as the recipe names its modalities "
            "(docs of each in docs/modalities), and `multi-token data show` prints what is read"
        )


def lengths_folder(recipe: Recipe) -> Path:
    """Return the folder where a run stores the lengths of its rows."""
    return Path(recipe.train.output_dir) / "lengths"


_NUM_COMPARED_ROWS = 1000
"""Rows of each source that are compared in full between processes."""
_NUM_COMPARED_MEDIA = 32
"""Rows of each source that every process decodes, to compare the media found."""
_MANY_FOR_ONE = 5_000
"""Number of rows from which one process reads longer than data workers take to start."""
_MAX_READERS = 16
"""Data workers of a pass over rows where the recipe names no number."""
_MANY_ROWS = 50_000
"""Number of rows from which a message suggests `data.lengths: headers`."""


def _check_same_rows(sources: Sequence[TrainingSource]) -> None:
    """Raise RecipeError in all processes if their rows differ, by number or by content."""
    if num_processes() == 1:
        return
    for source in sources:
        # evenly spread: files often differ at the end, where a copy was cut off
        step = max(1, -(-len(source.rows) // _NUM_COMPARED_ROWS))
        some = [_row_or_problem(source.rows, i) for i in range(0, len(source.rows), step)]
        check_same_values(
            f"data (rows of {source.name})",
            [len(source.rows), *some],
            "give all machines the same files",
        )


def _row_or_problem(rows: Sequence[Any], index: int) -> Any:
    try:
        return rows[index]
    except RowError as error:
        return [error.row_id, error.kind]


def _length_counts(reports: Sequence[ScanReport]) -> str:
    num_good = sum(len(report.good_indices) for report in reports)
    num_decoded = sum(report.num_decoded for report in reports)
    num_known = sum(report.num_known_before for report in reports)
    known = f", {num_known:,} remembered" if num_known else ""
    return (
        f"lengths of {num_good:,} rows: {num_good - num_decoded - num_known:,} without "
        f"decoding, {num_decoded:,} decoded{known}"
    )


def _scan_source(source: TrainingSource, recipe: Recipe, console: Console) -> ScanReport:
    """Scan this process' share of the rows; returns the merged report of all processes."""
    # only for the scan: in training, items without inputs would reach the encoder
    processor = replace(source.processor, lengths_only=source.lengths_only, once=True)
    read = RowReader(processor, processor.modalities)
    known = LengthStore(lengths_folder(recipe), processor)
    num_rows, num_shares = len(source.rows), num_processes()
    headers_allowed = recipe.data.lengths == "decode" and recipe.data.on_bad_row == "raise"
    if headers_allowed and processor.cache is None and num_rows - len(known) > _MANY_ROWS:
        console.print(
            f"{num_rows:,} rows of {source.name} are read to know their lengths, with all media; "
            "`data.lengths: headers` would read headers alone (docs/lengths.md)",
            highlight=False,
        )
    # a copy of a tokenizer may take 100 MB, which would be made by each worker
    processor.chat.build_slot_tokenizer()
    look = partial(
        scan, source.rows, read, source=source.name, known=known, references=_shares(recipe)
    )
    if num_shares > 1:
        some = look(indices=range(0, num_rows, max(1, -(-num_rows // _NUM_COMPARED_MEDIA))))
        found = [some.good_indices, [(n.num_tokens, n.num_media) for n in some.lengths]]
        # a machine that lacks some media files would otherwise report its share of rows as bad
        check_same_values(
            f"data (media of {source.name})", found, "give all machines the same files"
        )
    # every n-th row: neighbours often cost alike, so blocks would end at different times
    mine = look(
        indices=range(rank(), num_rows, num_shares),
        num_workers=num_readers(recipe, num_rows // num_shares),
    )
    return merge_reports(all_gather(mine))


def _shares(recipe: Recipe) -> bool:
    return recipe.train.packing is not None and recipe.train.packing.share


def num_readers(recipe: Recipe, num_rows: int) -> int:
    """Return the data workers of a pass over rows: the recipe's, else all cores for many rows."""
    all_args = [{**recipe.train.args, **stage.args} for stage in recipe.train.stages]
    given = [
        args["dataloader_num_workers"] for args in all_args if "dataloader_num_workers" in args
    ]
    if given or num_rows < _MANY_FOR_ONE:
        return max(map(int, given), default=0)
    # no worker holds a device or weights, so that all cores of the machine may read
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(_MAX_READERS, (cores or 1) // num_local)


def build_dataset(
    sources: Sequence[TrainingSource], modalities: Collection[str]
) -> ConcatDataset[Any]:
    """Return the good rows of all sources, in their order, as a dataset of samples."""
    return ConcatDataset(
        [
            ConversationDataset(
                source.rows,
                source.processor,
                modalities=modalities,
                good_indices=source.good_indices,
                source=source.name,
                lengths=source.lengths if source.lengths_only else None,
            )
            for source in sources
        ]
    )
