"""The rows of a run: opened, their items encoded once, and read to know which of them are good.

Border: from names in a recipe to rows with a reader; what is learned of them is run.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import DataSource
from multi_token.types import Conversation, Media


@dataclass(frozen=True)
class TrainingSource:
    """Rows of one place with the reader that opens their media."""

    rows: Sequence[Any]
    processor: MultiTokenProcessor
    name: str
    good_indices: Sequence[int] | None = None
    """Indices of rows that can be learned from, once they have been read."""
    lengths: Sequence[int] = ()
    """Tokens of each good row."""
    headers: bool = False
    """Whether headers may tell these lengths (`data.lengths`)."""

    @property
    def lengths_only(self) -> bool:
        """Whether they do: for a feature cache every item is decoded in any case."""
        return self.headers and self.processor.cache is None

    def conversations(self) -> Iterator[tuple[Conversation, MultiTokenProcessor]]:
        """The good rows, or before they are known those that are conversations at all."""
        for index in range(len(self.rows)) if self.good_indices is None else self.good_indices:
            try:
                row = self.rows[index]
                row_id = row_id_of(index, row, self.name)
                # what nobody has decoded may be bad, and is then named by its row
                processor = (
                    replace(self.processor, row_id=row_id) if self.lengths_only else self.processor
                )
                yield to_conversation(row, list(processor.modalities), row_id=row_id), processor
            except RowError:
                continue

    def with_feature_cache(self, cache: FeatureCache) -> TrainingSource:
        """The same rows, whose items come with features where the cache has them."""
        return replace(self, processor=replace(self.processor, cache=cache))

    def with_distillation(self, teacher: Literal["required", "optional"] | None) -> TrainingSource:
        """The same rows, also read with texts in place of their media
        (`MultiTokenProcessor.distillation`)."""
        return replace(self, processor=replace(self.processor, distillation=teacher))

    def with_preference(self, pairs: Literal["required", "optional"] | None) -> TrainingSource:
        """The same rows, read with their rejected answers too, or without
        (`MultiTokenProcessor.preference`)."""
        return replace(self, processor=replace(self.processor, preference=pairs))

    def items(self) -> Iterator[tuple[Media, MultiTokenProcessor]]:
        """The items of these conversations, one by one."""
        for conversation, processor in self.conversations():
            for item in conversation.media:
                yield item, processor


def open_source(
    source: DataSource,
    model: MultiTokenForConditionalGeneration,
    recipe: Recipe,
    cache: FeatureCache | None,
) -> TrainingSource:
    """The rows of a source; their items come from `cache`, if there is one.

    Headers may tell the lengths of training rows, for which batches are planned; held-out rows and
    those of the closed form alone are decoded always.
    """
    assert model.processor is not None
    processor = replace(model.processor, fetch=Fetch(root=media_root(source.rows)), cache=cache)
    headers = recipe.data.lengths == "headers" and any(s is source for s in recipe.data.train)
    rows = load_rows(source.rows, split=source.split)
    return TrainingSource(rows, processor, source.rows, headers=headers)


def good_rows(
    sources: Sequence[TrainingSource], recipe: Recipe, console: Console
) -> list[TrainingSource]:
    """The sources with their good rows known. Bad rows are refused, or left out and counted.

    Processes that train together share the reading, and so do data workers where the recipe has
    some. Lengths of good rows stay in `RUN/lengths`, so that the next start reads no media.
    """
    _check_same_rows(sources)
    good: list[TrainingSource] = []
    problems: list[Problem] = []
    num_rows = num_tokens = num_supervised = 0
    told = ScanReport(0)
    for source in sources:
        report = _scan_source(source, recipe, console)
        if source.lengths_only:
            told = merge_reports([told, report])
        num_rows += report.num_rows
        num_tokens += report.num_tokens
        num_supervised += report.num_supervised
        problems += report.problems
        lengths = [length.num_tokens for length in report.lengths]
        good.append(replace(source, good_indices=report.good_indices, lengths=lengths))
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
        first_said = f", the first, row {first.row_id}: {first.message}" if first else ""
        raise RecipeError(
            f"no row of {names} can be learned from: {num_rows} rows, {len(problems)} skipped"
            f"{first_said}; see them all with `multi-token data check`"
        )
    console.print(
        f"rows of {names}: {num_rows - len(problems)} good, {len(problems)} skipped, "
        f"{num_tokens} tokens, {num_supervised / num_tokens:.0%} supervised",
        *[f"  skipped row {p.row_id} ({p.kind}): {p.message}" for p in problems[:5]],
        sep="\n",
        highlight=False,
    )
    if told.num_rows:
        console.print(row_counts(told), highlight=False)
    return good


_NUM_COMPARED_ROWS = 1000
"""Rows of each source that are compared in full between processes."""


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


def check_has_items(sources: Sequence[TrainingSource], recipe: Recipe) -> None:
    """Raises RecipeError if rows have no item of any sense, and only senses are to learn.

    A key of a row that no sense reads is no fault of the row: it may hold anything.
    """
    learns = [stage.learn for stage in recipe.train.stages]
    if any(learn.adapter or learn.language_model for learn in learns):
        return
    if not any(True for source in sources for _ in source.items()):
        names = ", ".join(recipe.model.modalities)
        raise RecipeError(
            f"no row of {', '.join(source.name for source in sources)} has an item of {names}, so "
            "nothing would be learned; rows name their items as the recipe names its senses "
            "(docs of each in docs/modalities), and `multi-token data show` prints what is read"
        )


def row_counts(report: ScanReport) -> str:
    """How the lengths of good rows were found, in words."""
    num_good, num_decoded, num_known = (
        len(report.good_indices),
        report.num_decoded,
        report.num_known_before,
    )
    lengths_only = num_good - num_decoded - num_known
    known = f", {num_known:,} remembered" if num_known else ""
    return (
        f"lengths of {num_good:,} rows: {lengths_only:,} by header, {num_decoded:,} decoded{known}"
    )


def lengths_folder(recipe: Recipe) -> Path:
    """Where a run remembers how long its rows are."""
    return Path(recipe.train.output_dir) / "lengths"


_MANY = 50_000
"""Rows from which on it is said that decoding them can be spared."""
_NUM_COMPARED = 32
"""Rows of each source that every process reads, to see whether all find the same media."""


def _scan_source(source: TrainingSource, recipe: Recipe, console: Console) -> ScanReport:
    """The report on all rows, of which this process has read its share."""
    processor = replace(source.processor, lengths_only=source.lengths_only)
    read = partial(row_to_sample, processor=processor, modalities=list(processor.modalities))
    known = LengthStore(lengths_folder(recipe), processor)
    all_args = [{**recipe.train.args, **stage.args} for stage in recipe.train.stages]
    num_rows, num_shares = len(source.rows), num_processes()
    spared = recipe.data.lengths == "decode" and recipe.data.on_bad_row == "raise"
    if spared and source.processor.cache is None and num_rows - len(known) > _MANY:
        console.print(
            f"{num_rows:,} rows of {source.name} are read to know their lengths, with all media; "
            "`data.lengths: headers` would read headers alone (docs/lengths.md)",
            highlight=False,
        )
    look = partial(scan, source.rows, read, source=source.name, known=known)
    if num_shares > 1:
        some = look(indices=range(0, num_rows, max(1, -(-num_rows // _NUM_COMPARED))))
        found = [some.good_indices, [(n.num_tokens, n.num_media) for n in some.lengths]]
        # else a machine that lacks some files would only find the rows of its share bad
        check_same_values(
            f"data (media of {source.name})", found, "give all machines the same files"
        )
    mine = look(
        indices=range(rank(), num_rows, num_shares),
        num_workers=max(int(args.get("dataloader_num_workers", 0)) for args in all_args),
    )
    return merge_reports(all_gather(mine))


def build_dataset(
    sources: Sequence[TrainingSource], model: MultiTokenForConditionalGeneration
) -> ConcatDataset[Any]:
    """Return the good rows of all sources, in their order, as a dataset of samples."""
    return ConcatDataset([_source_dataset(source, list(model.modalities)) for source in sources])


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
