"""Torch datasets of rows: index -> Sample, read on access inside data workers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch.utils.data import Dataset

from multi_token.data.formats import to_conversation
from multi_token.data.rows import Row, row_id_of
from multi_token.errors import RowError
from multi_token.types import IGNORE_INDEX, Conversation, Sample


def row_to_sample(
    row: Row,
    row_id: str,
    *,
    processor: Callable[[Conversation], Sample],
    modalities: Collection[str],
) -> Sample:
    """Read one row into its sample: the same path for training, `data check` and plug-ins."""
    return processor(to_conversation(row, modalities, row_id=row_id))


class ConversationDataset(Dataset[Sample]):
    """Rows as samples: `dataset[i]` reads the i-th good row.

    Picklable if `rows` and `processor` are. A row that cannot be read raises RowError, since `scan`
    has selected the good rows before.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: Callable[[Conversation], Sample],
        *,
        modalities: Collection[str],
        good_indices: Sequence[int] | None = None,
        source: str = "rows",
    ) -> None:
        """`good_indices`: rows to use, by their index in `rows`; None for all."""
        self.rows = rows
        self.processor = processor
        self.modalities = tuple(modalities)
        # an array, not a list: reference counts of list items make forked workers copy its pages
        self.good_indices = array("q", range(len(rows)) if good_indices is None else good_indices)
        self.source = source

    def __len__(self) -> int:
        return len(self.good_indices)

    def __getitem__(self, index: int) -> Sample:
        row_index = self.good_indices[index]
        row = self.rows[row_index]
        row_id = row_id_of(row_index, row, self.source)
        return row_to_sample(row, row_id, processor=self.processor, modalities=self.modalities)


class HeaderLengthDataset(ConversationDataset):
    """Dataset that checks each decoded row against the length predicted from its media headers.

    A bad row returns a placeholder sample with `Sample.error` set, and never raises. The step that
    contains it ends the run in all processes. An exception from a data worker would reach its own
    process as a formatted traceback, and the other processes as a lost connection.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: Callable[[Conversation], Sample],
        *,
        modalities: Collection[str],
        good_indices: Sequence[int] | None = None,
        source: str = "rows",
        lengths: Sequence[int],
    ) -> None:
        """`lengths`: predicted number of tokens of each good row."""
        super().__init__(
            rows, processor, modalities=modalities, good_indices=good_indices, source=source
        )
        self.lengths = array("q", lengths)

    def __getitem__(self, index: int) -> Sample:
        try:
            sample = super().__getitem__(index)
            if len(sample.input_ids) != self.lengths[index]:
                raise RowError(
                    f"is {len(sample.input_ids)} tokens long, but by the headers of its media it "
                    f"would be {self.lengths[index]}; write these files again, or set "
                    "`data.lengths` to decode",
                    kind="undecodable",
                    row_id=sample.id,
                )
        except RowError as error:
            return placeholder_sample(error)
        return sample


def placeholder_sample(error: RowError) -> Sample:
    """Return two tokens that carry a bad row's error through the collators and one step."""
    ids = torch.zeros(2, dtype=torch.long)
    labels = torch.tensor([IGNORE_INDEX, 0])
    sample = Sample(ids, labels, id=error.row_id, error=error)
    # preference and distillation collators read these fields of every sample
    return replace(sample, teacher=sample, rejected=sample)
