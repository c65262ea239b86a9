"""Rows to evaluate on: which of them, and with what they are read.

Border: rows of a source in, conversations with their reader out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from multi_token.data.dataset import row_name, rows_root
from multi_token.data.formats import to_conversation
from multi_token.generate import reader_of
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import Reader
from multi_token.types import Conversation


def spread(num_rows: int, most: int) -> list[int]:
    """Indices of at most `most` of `num_rows` rows, evenly over all of them."""
    num = min(num_rows, most)
    return [i * num_rows // num for i in range(num)]


def with_reader(
    rows: Sequence[Mapping[str, Any]],
    model: MultiTokenForConditionalGeneration,
    *,
    source: str,
    indices: Sequence[int],
) -> list[tuple[Conversation, Reader]]:
    """Some rows of a file, folder or hub name, with the model's reader. Raises RowError."""
    reader = replace(reader_of(model), fetch=Fetch(root=rows_root(source)))
    names = list(model.modalities)
    return [
        (to_conversation(rows[i], names, row_id=row_name(i, rows[i], source)), reader)
        for i in indices
    ]
