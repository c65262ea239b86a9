"""Rows to evaluate on: which of them, and with what they are read.

Border: rows of a source in, conversations with their reader out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from multi_token.data.files.open import media_root
from multi_token.data.formats import to_conversation
from multi_token.data.rows import row_id_of
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.types import Conversation


def evenly_spaced(num_rows: int, most: int) -> list[int]:
    """Indices of at most `most` of `num_rows` rows, evenly over all of them."""
    num = min(num_rows, most)
    return [i * num_rows // num for i in range(num)]


def with_processor(
    rows: Sequence[Mapping[str, Any]],
    model: MultiTokenForConditionalGeneration,
    *,
    source: str,
    indices: Sequence[int],
) -> list[tuple[Conversation, MultiTokenProcessor]]:
    """Some rows of a file, folder or hub name, with the model's reader. Raises RowError."""
    processor = replace(model.require_processor(), fetch=Fetch(root=media_root(source)))
    names = list(model.modalities)
    return [
        (to_conversation(rows[i], names, row_id=row_id_of(i, rows[i], source)), processor)
        for i in indices
    ]
