"""Rows whose lengths were told by headers, compared with what they turn out to be.

Border: after lengths.py and inspect.py, which plan with a promise; whether one is kept is seen
here, and what follows from a broken one is distributed.py's.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from multi_token.data.dataset import ConversationDataset, Row
from multi_token.errors import RowError
from multi_token.types import IGNORE_INDEX, Conversation, Sample


class HeaderLengthDataset(ConversationDataset):
    """Rows of known lengths, none of which was decoded; a bad one does not raise.

    It comes as a sample with its `error`, and ends the run with the step that it is in, in all
    processes: raised by a data worker it would reach its own process as a page of text, and the
    others as a connection that is lost.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: Callable[[Conversation], Sample],
        *,
        modalities: Collection[str],
        good: Sequence[int] | None = None,
        source: str = "rows",
        lengths: Sequence[int],
    ) -> None:
        """`lengths`: tokens of each good row, as they were told."""
        super().__init__(rows, processor, modalities=modalities, good=good, source=source)
        self.lengths = array("q", lengths)

    def __getitem__(self, index: int) -> Sample:
        try:
            sample = super().__getitem__(index)
            if len(sample.input_ids) != self.lengths[index]:
                raise RowError(
                    f"is {len(sample.input_ids)} tokens long, but by the headers of its media it "
                    f"would be {self.lengths[index]}; write these files anew, or set "
                    "`data.lengths` to decode",
                    kind="undecodable",
                    row_id=sample.id,
                )
        except RowError as error:
            return placeholder_sample(error)
        return sample


def placeholder_sample(error: RowError) -> Sample:
    """A sample of two tokens that goes through a step in place of a row that is bad."""
    ids = torch.zeros(2, dtype=torch.long)
    labels = torch.tensor([IGNORE_INDEX, 0])
    sample = Sample(ids, labels, id=error.row_id, error=error)
    # whoever reads pairs, or lets a teacher read, finds what they look for
    return replace(sample, teacher=sample, rejected=sample)
