"""Sources of a run: rows of the recipe with their processor, scanned for good rows and lengths.

DataSource -> open_source -> TrainingSource -> good_rows -> indices and lengths of good rows
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch.utils.data import ConcatDataset

from multi_token.data.dataset import ConversationDataset, HeaderLengthDataset, row_to_sample
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.files.open import load_rows, media_root
from multi_token.data.formats import to_conversation
from multi_token.data.lengths import LengthStore
from multi_token.data.rows import row_id_of
from multi_token.data.scan import Problem, ScanReport, merge_reports, scan
from multi_token.distributed import all_gather, check_same_values, num_processes, rank
from multi_token.errors import RecipeError, RowError
from multi_token.media.fetch import Fetch
from multi_token.processor import MultiTokenProcessor
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import DataSource
from multi_token.types import Conversation, Media


@dataclass(frozen=True)
class TrainingSource:
    """Rows of one place with the processor that opens their media."""

    rows: Sequence[Any]
    processor: MultiTokenProcessor
    name: str
    good_indices: Sequence[int] | None = None
    """Rows that can be trained on; None before `good_rows` has scanned them."""
    lengths: Sequence[int] = ()
    """Number of tokens of each good row."""
    headers: bool = False
    """True if `data.lengths: headers` applies to these rows."""

    @property
    def lengths_only(self) -> bool:
        """True if the scan predicts lengths from headers instead of decoding."""
        # filling a feature cache decodes every item, so nothing is saved by reading headers
        return self.headers and self.processor.cache is None

    def conversations(self) -> Iterator[tuple[Conversation, MultiTokenProcessor]]:
        """Yield the good rows; before the scan, all rows that are conversations at all."""
        for index in range(len(self.rows)) if self.good_indices is None else self.good_indices:
            try:
                row = self.rows[index]
                row_id = row_id_of(index, row, self.name)
                # undecoded rows may turn out bad; the processor then names the row in its error
                processor = (
                    replace(self.processor, row_id=row_id) if self.lengths_only else self.processor
                )
                yield to_conversation(row, list(processor.modalities), row_id=row_id), processor
            except RowError:
                continue

    def items(self) -> Iterator[tuple[Media, MultiTokenProcessor]]:
        """Yield the media items of these conversations, one by one."""
        for conversation, processor in self.conversations():
            for item in conversation.media:
                yield item, processor

    def with_feature_cache(self, cache: FeatureCache) -> TrainingSource:
        """Return the same rows; items in the cache come with features."""
        return replace(self, processor=replace(self.processor, cache=cache))

    def with_distillation(self, teacher: Literal["required", "optional"] | None) -> TrainingSource:
        """Return the same rows, with or without the teacher's sample in each sample."""
        return replace(self, processor=replace(self.processor, distillation=teacher))

    def with_preference(self, pairs: Literal["required", "optional"] | None) -> TrainingSource:
        """Return the same rows, with or without the rejected answer in each sample."""
        return replace(self, processor=replace(self.processor, preference=pairs))


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
    processor = replace(processor, fetch=Fetch(root=media_root(source.rows)), cache=cache)
    headers = recipe.data.lengths == "headers" and any(s is source for s in recipe.data.train)
    rows = load_rows(source.rows, split=source.split)
    return TrainingSource(rows, processor, source.rows, headers=headers)


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
    _check_same_rows(sources)
    scanned: list[TrainingSource] = []
    problems: list[Problem] = []
    num_rows = num_tokens = num_supervised = 0
    predicted = ScanReport(0)
    for source in sources:
        report = _scan_source(source, recipe, console)
        if source.lengths_only:
            predicted = merge_reports([predicted, report])
        num_rows += report.num_rows
        num_tokens += report.num_tokens
        num_supervised += report.num_supervised
        problems += report.problems
        lengths = [length.num_tokens for length in report.lengths]
        scanned.append(replace(source, good_indices=report.good_indices, lengths=lengths))
    if problems and recipe.data.on_bad_row == "raise":
        first = problems[0]
        raise RowError(
            f"{first.message} ({len(problems)} of {num_rows} rows are bad; see them all with "
            "`multi-token data check`, or set data.on_bad_row=skip to leave them out)",
            kind=first.kind,
            row_id=first.row_id,
        )
    names = ", ".join(source.name for source in sources)
    if num_rows == len(problems):
        first = problems[0] if problems else None
        example = f", the first, row {first.row_id}: {first.message}" if first else ""
        raise RecipeError(
            f"no row of {names} can be trained on: {num_rows} rows, {len(problems)} skipped"
            f"{example}; see them all with `multi-token data check`"
        )
    console.print(
        f"rows of {names}: {num_rows - len(problems)} good, {len(problems)} skipped, "
        f"{num_tokens} tokens, {num_supervised / num_tokens:.0%} supervised",
        *[f"  skipped row {p.row_id} ({p.kind}): {p.message}" for p in problems[:5]],
        sep="\n",
        highlight=False,
    )
    if predicted.num_rows:
        console.print(_length_counts(predicted), highlight=False)
    return scanned


def check_has_items(sources: Sequence[TrainingSource], recipe: Recipe) -> None:
    """Raise RecipeError if only modalities are trained, and no row has an item of any.

    A single row is never at fault: its keys that no modality takes may hold anything.
    """
    trainable = [stage.learn for stage in recipe.train.stages]
    if any(learn.adapter or learn.language_model for learn in trainable):
        return
    if not any(True for source in sources for _ in source.items()):
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
_MANY_ROWS = 50_000
"""Number of rows from which a message suggests `data.lengths: headers`."""


def _check_same_rows(sources: Sequence[TrainingSource]) -> None:
    """Raise RecipeError in all processes if their rows differ, by number or by content."""
    if num_processes() == 1:
        return
    for source in sources:
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


def _length_counts(report: ScanReport) -> str:
    num_good, num_decoded = len(report.good_indices), report.num_decoded
    num_known = report.num_known_before
    lengths_only = num_good - num_decoded - num_known
    known = f", {num_known:,} remembered" if num_known else ""
    return (
        f"lengths of {num_good:,} rows: {lengths_only:,} by header, {num_decoded:,} decoded{known}"
    )


def _scan_source(source: TrainingSource, recipe: Recipe, console: Console) -> ScanReport:
    """Scan this process' share of the rows; returns the merged report of all processes."""
    processor = replace(source.processor, lengths_only=source.lengths_only)
    read = partial(row_to_sample, processor=processor, modalities=list(processor.modalities))
    known = LengthStore(lengths_folder(recipe), processor)
    all_args = [{**recipe.train.args, **stage.args} for stage in recipe.train.stages]
    num_rows, num_shares = len(source.rows), num_processes()
    headers_allowed = recipe.data.lengths == "decode" and recipe.data.on_bad_row == "raise"
    if headers_allowed and processor.cache is None and num_rows - len(known) > _MANY_ROWS:
        console.print(
            f"{num_rows:,} rows of {source.name} are read to know their lengths, with all media; "
            "`data.lengths: headers` would read headers alone (docs/lengths.md)",
            highlight=False,
        )
    look = partial(scan, source.rows, read, source=source.name, known=known)
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
        num_workers=max(int(args.get("dataloader_num_workers", 0)) for args in all_args),
    )
    return merge_reports(all_gather(mine))


def build_dataset(
    sources: Sequence[TrainingSource], modalities: Collection[str]
) -> ConcatDataset[Any]:
    """Return the good rows of all sources, in their order, as a dataset of samples."""
    return ConcatDataset([_source_dataset(source, list(modalities)) for source in sources])


def _source_dataset(source: TrainingSource, modalities: list[str]) -> ConversationDataset:
    processor, good, name = source.processor, source.good_indices, source.name
    if not source.lengths_only:
        return ConversationDataset(
            source.rows, processor, modalities=modalities, good_indices=good, source=name
        )
    return HeaderLengthDataset(
        source.rows,
        processor,
        modalities=modalities,
        good_indices=good,
        source=name,
        lengths=source.lengths,
    )
