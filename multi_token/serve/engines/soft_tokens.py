"""Ids for media: beyond the vocabulary, each stands for one row that a projector made.

Border: ids and rows. continuous.py decides which contents are here, and for how long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from multi_token.errors import LanguageModelError
from multi_token.serve.engines.base import Prompt
from multi_token.types import MediaSpan

MAX_ID = 2**31 - 1
"""transformers' continuous batching keeps ids as int32."""


class SoftEmbedding(nn.Module):
    """An embedding whose ids beyond the vocabulary look up a pool of rows, by the id modulo its
    size.
    """

    def __init__(self, embedding: nn.Module, num_rows: int) -> None:
        super().__init__()
        weight: Tensor = embedding.weight  # type: ignore[assignment]
        self.embedding = embedding
        self.num_ids = weight.shape[0]
        pool = torch.zeros(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        self.register_buffer("pool", pool, persistent=False)

    pool: Tensor

    @property
    def weight(self) -> Tensor:
        """The weights of the vocabulary [num_ids, dim]."""
        return self.embedding.weight  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] -> [..., dim]"""
        is_soft = input_ids >= self.num_ids
        if input_ids.device.type == "cpu" and not bool(is_soft.any()):  # elsewhere a look waits
            return self.embedding(input_ids)
        text = self.embedding(input_ids.masked_fill(is_soft, 0))
        rows = self.pool[(input_ids - self.num_ids).clamp(min=0) % len(self.pool)]
        return torch.where(is_soft[..., None], rows.to(text.dtype), text)


@contextmanager
def soft_embedding(language_model: Any, num_rows: int) -> Iterator[SoftEmbedding]:
    """A language model whose input embedding knows soft ids, until the end of the block.

    Its output layer stays what it is, also where its weights are tied to the embedding's. Raises
    LanguageModelError for a model whose output changes with it.
    """
    embedding = language_model.get_input_embeddings()
    output = language_model.get_output_embeddings()
    before = None if output is None else output.weight
    soft = SoftEmbedding(embedding, num_rows)
    language_model.set_input_embeddings(soft)
    try:
        after = language_model.get_output_embeddings()
        if language_model.get_input_embeddings() is not soft or (
            before is not None and (after is None or after.weight is not before)
        ):
            raise LanguageModelError(
                f"{type(language_model).__name__} does not take another input embedding without "
                "changing its output; serve it with the static engine"
            )
        yield soft
    finally:
        language_model.set_input_embeddings(embedding)


@torch.no_grad()
def own_to_tenant(prompt: Prompt, soft: SoftEmbedding, embedding_scale: float) -> Prompt:
    """A prompt whose first token has an id that only its tenant's prompts have.

    transformers shares keys and values of equal ids, whoever asks: without this, a client could
    learn from how fast an answer comes, and from its `cached_tokens`, what another one has asked.
    """
    if not prompt.tenant or any(place.start == 0 for place in prompt.media_spans):
        return prompt
    first = prompt.input_ids[:1]
    row = soft.embedding(first.to(soft.weight.device)).float() * embedding_scale
    return replace(
        prompt,
        media_spans=(MediaSpan("text", 0, 1), *prompt.media_spans),
        media_embeds=(row, *prompt.media_embeds),
        media_keys=(f"token {int(first)} of {prompt.tenant}", *prompt.media_keys),
    )


@dataclass
class _Block:
    """Consecutive ids of one content, and how many prompts need them now."""

    first: int
    length: int
    num_pins: int = 0


class SoftIds:
    """Gives each content ids that no other content ever gets, and a place in the pool.

    Ids only grow: keys and values that were computed of an id stay right for as long as anybody
    keeps them, since the id never stands for anything else. The place is the id modulo the number
    of rows, so what lies there before is overwritten, but never while a prompt needs it.
    """

    def __init__(self, num_ids: int, num_rows: int, *, max_id: int = MAX_ID) -> None:
        """`num_ids`: of the vocabulary, the first soft id. `num_rows`: of the pool."""
        self.num_ids = num_ids
        self.num_rows = num_rows
        self.max_id = max_id
        self.is_worn_out = False
        """No new ids are left: `reset` when nothing that was computed of the old ones is kept."""
        self._next = num_ids
        self._blocks: dict[str, _Block] = {}

    def reset(self) -> None:
        """Forget all contents and begin with the first id again."""
        self._blocks.clear()
        self._next = self.num_ids
        self.is_worn_out = False

    def pin(self, items: Sequence[tuple[str, int]]) -> tuple[list[int], list[int]] | None:
        """Keys and lengths of a prompt's items -> the first id of each, and which of them are new.

        The rows of new ones must be written before the ids are used. They stay where they are
        until `unpin`. None if there is no room now, or no id is left (`is_worn_out`).
        """
        before = self._next
        pinned: list[str] = []
        new: list[int] = []
        for index, (key, length) in enumerate(items):
            if key not in self._blocks:
                first = self._room(length)
                if first is None:
                    return self._pin_all_anew(items, pinned, before)
                self._place(key, first, length)
                new.append(index)
            self._blocks[key].num_pins += 1
            pinned.append(key)
        return [self._blocks[key].first for key, _ in items], new

    def _pin_all_anew(
        self, items: Sequence[tuple[str, int]], pinned: Sequence[str], before: int
    ) -> tuple[list[int], list[int]] | None:
        """What is here of them may lie so that the rest finds no room between. If nobody else
        needs anything, all of them are laid one behind the other.
        """
        self.unpin(pinned)
        self._next = before
        for key, block in list(self._blocks.items()):
            if block.first >= before:  # never written
                del self._blocks[key]
        lengths = dict(items)
        if self.is_worn_out or self.num_pinned or sum(lengths.values()) > self.num_rows:
            return None
        if self._next + sum(lengths.values()) - 1 > self.max_id:
            self.is_worn_out = True
            return None
        for key in lengths:
            self._blocks.pop(key, None)
        return self.pin(items)

    def unpin(self, keys: Sequence[str]) -> None:
        """A prompt with these items has ended; they stay known until their rows are needed."""
        for key in keys:
            block = self._blocks.get(key)
            if block is not None and block.num_pins:
                block.num_pins -= 1

    def rows(self, first: int, length: int) -> Tensor:
        """Where in the pool the rows of these ids lie: int64 [length]."""
        return (torch.arange(first, first + length) - self.num_ids) % self.num_rows

    @property
    def num_pinned(self) -> int:
        """Contents that some prompt needs now."""
        return sum(block.num_pins > 0 for block in self._blocks.values())

    def _room(self, length: int) -> int | None:
        """The next id whose rows are free, up to `length` of them."""
        first = self._next
        while first + length - 1 <= self.max_id:
            if length > self.num_rows or first - self._next >= self.num_rows:
                return None
            behind = self._behind_pinned(first, length)
            if behind is None:
                return first
            first = behind
        self.is_worn_out = True
        return None

    def _behind_pinned(self, first: int, length: int) -> int | None:
        """The first id behind a pinned block that lies in the way, if there is one."""
        for block in self._blocks.values():
            if not block.num_pins:
                continue
            ahead = (block.first - first) % self.num_rows
            if ahead < length:
                return first + ahead + block.length
            if ahead + block.length > self.num_rows:  # it begins before and reaches into it
                return first + ahead + block.length - self.num_rows
        return None

    def _place(self, key: str, first: int, length: int) -> None:
        for other, block in list(self._blocks.items()):
            ahead = (block.first - first) % self.num_rows
            if ahead < length or ahead + block.length > self.num_rows:
                del self._blocks[other]  # its rows are about to be written over
        self._blocks[key] = _Block(first, length)
        self._next = first + length
