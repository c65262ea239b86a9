"""Torch datasets of rows: index -> Sample, read on access inside data workers."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from multi_token.data.formats import to_conversation
from multi_token.data.rows import Row, row_id_of
from multi_token.errors import RowError
from multi_token.processor import Measured, MultiTokenProcessor
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


@dataclass(frozen=True)
class RowReader:
    """Reads rows as training does: `row_to_sample`, for one row or for several together."""

    processor: Callable[[Conversation], Sample]
    modalities: Collection[str]
    """The recipe's modalities by name, or their names alone."""

    def __call__(self, row: Row, row_id: str) -> Sample:
        """Read one row into its sample. Raises RowError."""
        return self.processor(self.conversation(row, row_id))

    def conversation(self, row: Row, row_id: str) -> Conversation:
        """Convert one row. Raises RowError."""
        return to_conversation(row, self.modalities, row_id=row_id)

    def measure(self, conversations: Sequence[Conversation]) -> list[Measured | RowError]:
        """Return the lengths of conversations; a RowError in place of a bad one."""
        if isinstance(self.processor, MultiTokenProcessor):
            return self.processor.measure(conversations)
        found: list[Measured | RowError] = []
        for conversation in conversations:
            try:
                found.append(Measured.of(self.processor(conversation)))
            except RowError as error:
                found.append(error)
        return found


class ConversationDataset(Dataset[Sample]):
    """Rows as samples: `dataset[i]` reads the i-th good row.

    Picklable if `rows` and `processor` are. Where rows were decoded by the scan, a row that cannot
    be read raises RowError.

    With `lengths`, rows are decoded here for the first time. A bad row, or one of another length,
    then returns a placeholder with `Sample.error`, and the step that contains it ends the run in
    all processes. A data worker that raised would end the other processes by a lost connection.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: Callable[[Conversation], Sample],
        *,
        modalities: Collection[str],
        good_indices: Sequence[int] | None = None,
        source: str = "rows",
        lengths: Sequence[int] | None = None,
    ) -> None:
        """`good_indices`: rows to use, by their index in `rows`; None for all.

        `lengths`: number of tokens of each good row, predicted from the headers of its media.
        """
        self.rows = rows
        self.processor = processor
        self.modalities = modalities
        # an array, not a list: reference counts of list items make forked workers copy its pages
        self.good_indices = array("q", range(len(rows)) if good_indices is None else good_indices)
        self.source = source
        self.lengths = None if lengths is None else array("q", lengths)

    def __len__(self) -> int:
        return len(self.good_indices)

    def __getitem__(self, index: int) -> Sample:
        if self.lengths is None:
            return self._read(index)
        try:
            sample = self._read(index)
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

    def _read(self, index: int) -> Sample:
        row_index = self.good_indices[index]
        row = self.rows[row_index]
        row_id = row_id_of(row_index, row, self.source)
        return row_to_sample(row, row_id, processor=self.processor, modalities=self.modalities)


def worker_loader(dataset: Dataset[Any], num_workers: int, **options: Any) -> DataLoader[Any]:
    """Return a loader of the dataset's items, one by one, as data workers return them."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_identity,
        worker_init_fn=_freeze,
        # DataLoader draws a seed from its generator. From torch's global one, the draw would change
        # the random numbers of training, and those after a resume
        generator=torch.Generator(),
        **options,
    )


def _freeze(_: int) -> None:
    # a garbage collection writes into every object, and would copy all pages of the main process
    gc.freeze()


def _identity(item: Any) -> Any:
    # a function of the module, since spawned workers unpickle it
    return item


def placeholder_sample(error: RowError) -> Sample:
    """Return two tokens that carry a bad row's error through the collators and one step."""
    ids = torch.zeros(2, dtype=torch.long)
    labels = torch.tensor([IGNORE_INDEX, 0])
    sample = Sample(ids, labels, id=error.row_id, error=error)
    # preference and distillation collators read these fields of every sample
    return replace(sample, teacher=sample, rejected=sample)
