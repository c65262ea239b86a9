"""Rows that are answered together, a token of each at a step; they leave and join between steps.

Border: one batch of rows, its forwards and its cache. Who joins and when is static.py's to say,
and way.py finds whether a language model can be answered so.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multi_token.language_model.forward import (
    accepts_position_ids,
    base_language_model,
    per_layer_inputs,
)
from multi_token.serve.engines.fallback import nan_error, pad_prompts
from multi_token.serve.engines.local.kv_cache import (
    concat_rows,
    is_paddable,
    select_rows,
    trim_left,
)
from multi_token.serve.engines.local.prefix_cache import PrefixCache
from multi_token.serve.engines.scheduler import GenerationRequest, sample_batch

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration


@dataclass
class _BatchRow:
    request: GenerationRequest
    num_cached: int
    """Of its tokens that are in the cache."""
    output_ids: list[int] = field(default_factory=list)
    """New ones. The last is not in the cache yet."""
    is_bad: bool = False
    """No numbers came of it, so what it has in the cache is of no use to others."""


class DecodeBatch:
    """The rows that are being answered, padded on the left to `width` tokens.

    Every row's positions begin with its own first token, so that it is answered as it is alone. A
    row that has ended is not computed any more: before the next step it leaves the cache.
    """

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        filler_id: int,
        *,
        allow_add: bool,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """`allow_add`: rows join others, and padding that nobody needs is cut off when the longest
        has
        left; see `is_paddable`. Without it all rows join at once. `prefix_cache`: what is kept of
        rows, and not read again.
        """
        self.model = model
        self.filler_id = filler_id
        self.allow_add = allow_add
        self.prefix_cache = prefix_cache
        self.width = 0
        self._rows: list[_BatchRow] = []
        self._cache: Any = None
        parameters = inspect.signature(base_language_model(model.language_model).forward).parameters
        self._accepts_position_ids = accepts_position_ids(model.language_model)
        # of a prompt, only the last position is asked for its logits
        self._forward_kwargs = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        self._device = weight.device
        self._logits_processors = logits_processors(model.language_model)

    @property
    def requests(self) -> list[GenerationRequest]:
        """Those that have not ended."""
        return [row.request for row in self._rows if not row.request.is_finished]

    @property
    def is_paddable(self) -> bool:
        """Whether the cache is one that rows can join: see cached_rows.py."""
        return is_paddable(self._cache, len(self._rows), self.width)

    def width_after_adding(self, requests: Sequence[GenerationRequest]) -> int:
        """What `width` would come to if these joined and all answers were as long as allowed."""
        ends = [(len(row.prompt.input_ids), row.options.max_new_tokens) for row in requests]
        for row in self._rows:
            if not row.request.is_finished:
                ends.append(
                    (row.num_cached, row.request.options.max_new_tokens - len(row.output_ids))
                )
        return max(length for length, _ in ends) + max(num_left for _, num_left in ends)

    @torch.no_grad()
    def add(self, requests: Sequence[GenerationRequest]) -> None:
        """Read prompts, say the first token of each, and have them answered beside the others.

        Raises what the model raises; the others are then as they were.
        """
        self.merge(self.prefill(requests))

    @torch.no_grad()
    def prefill(
        self, requests: Sequence[GenerationRequest], *, is_beside: bool = False
    ) -> DecodeBatch:
        """Others than these, read, and the first token of each said; who ended with it has left.

        Raises what the model raises. With `is_beside` these may be stepped meanwhile, in another
        thread.
        """
        others = copy.copy(self)
        others.clear()
        requests = [row for row in requests if not row.is_finished]
        if requests:
            others._prefill(requests, is_beside=is_beside)
            others._drop_finished()
        return others

    @torch.no_grad()
    def merge(self, others: DecodeBatch) -> None:
        """Have others, that `prefill` made, answered beside these."""
        others._drop_finished()
        self._drop_finished()
        groups = [group for group in (self, others) if group._rows]
        if not groups:
            return
        width = max(group.width for group in groups)
        cache = groups[0]._cache
        if len(groups) == 2:
            concat_rows(cache, others._cache, width)
        self._rows = [row for group in groups for row in group._rows]
        self._cache, self.width = cache, width

    @torch.no_grad()
    def decode_step(self, *, is_beside: bool = False) -> None:
        """Say one more token of each row that has not ended. Raises what the model raises.

        `is_beside`: others are read meanwhile, in another thread.
        """
        self._drop_finished()
        if not self._rows:
            return
        device = self._device
        lengths = [row.num_cached for row in self._rows]
        attention_mask = None
        if min(lengths) < self.width:
            padding = torch.tensor([self.width - length for length in lengths])
            attention_mask = (torch.arange(self.width + 1) >= padding[:, None]).long().to(device)
        with _threads(device, is_beside=is_beside):
            output = self._forward(
                input_ids=torch.tensor([row.output_ids[-1:] for row in self._rows], device=device),
                attention_mask=attention_mask,
                position_ids=torch.tensor(lengths, device=device)[:, None],
                past_key_values=self._cache,
            )
        self._cache = output.past_key_values
        self.width += 1
        for row in self._rows:
            row.num_cached += 1
        self._sample(output.logits)
        if not self.requests:
            self._drop_finished()  # now, since the next step may be long in coming

    def clear(self) -> None:
        """Nobody is answered any more."""
        self._rows, self._cache, self.width = [], None, 0

    def _prefill(self, requests: Sequence[GenerationRequest], *, is_beside: bool) -> None:
        embeds, input_ids, attention_mask = pad_prompts(self.model, requests, self.filler_id)
        self._rows = [_BatchRow(row, len(row.prompt.input_ids)) for row in requests]
        self.width = embeds.shape[1]
        is_padded = min(row.num_cached for row in self._rows) < self.width
        first, cache = self._prefix_lookup(requests)
        with _threads(self._device, is_beside=is_beside):
            output = self._forward(
                inputs_embeds=embeds[:, first:],
                attention_mask=attention_mask if is_padded else None,
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, first:],
                **({} if cache is None else {"past_key_values": cache}),
                **per_layer_inputs(self.model.language_model, input_ids[:, first:]),
            )
        self._cache = output.past_key_values
        self._sample(output.logits)
        self._store_prefixes(self._rows)

    def _prefix_lookup(self, requests: Sequence[GenerationRequest]) -> tuple[int, Any]:
        """How many of `width` tokens need not be read, and a cache that holds them.

        All rows are read from the same place on, so a row that is shorter, or shares more than the
        others, is read from there too; what stands before it is its own.
        """
        if self.prefix_cache is None:
            return 0, None
        found = [self.prefix_cache.find(row.prompt) for row in requests]
        lengths = [len(row.prompt.input_ids) for row in requests]
        num_read = max(length - num for length, (_, num) in zip(lengths, found, strict=True))
        begun = [
            (beginning, max(0, length - num_read))
            for length, (beginning, _) in zip(lengths, found, strict=True)
        ]
        for row, (_, num) in zip(requests, begun, strict=True):
            self.prefix_cache.stats.record(row, num)
        first = self.width - num_read
        return first, self.prefix_cache.build_kv_cache(begun, first) if first else None

    def _store_prefixes(self, rows: Sequence[_BatchRow]) -> None:
        """What these have in the cache, for others that begin so."""
        if self.prefix_cache is None:
            return
        for index, row in enumerate(self._rows):
            if row in rows and not row.is_bad:
                answer = row.output_ids[: row.num_cached - len(row.request.prompt.input_ids)]
                self.prefix_cache.add(
                    row.request.prompt, answer, self._cache, index, row.num_cached
                )

    def _forward(self, *, position_ids: Tensor, **inputs: Any) -> Any:
        if self._accepts_position_ids:
            inputs["position_ids"] = position_ids
        return self.model.language_model(
            use_cache=True, return_dict=True, **self._forward_kwargs, **inputs
        )

    def _sample(self, logits: Tensor) -> None:
        """logits [rows, time, vocabulary]: of the last position the next token of each row."""
        scores = logits[:, -1].float()
        if self._logits_processors:
            scores = torch.cat(
                [
                    self._logits_processors(
                        torch.tensor([row.output_ids], dtype=torch.long, device=scores.device), own
                    )
                    for row, own in zip(self._rows, scores.split(1), strict=True)
                ]
            )
        ids, bad, _ = sample_batch([row.request for row in self._rows], scores)
        for running in bad:
            running.fail(nan_error())
        for row, token_id in zip(self._rows, ids, strict=True):
            row.output_ids.append(token_id)
            row.is_bad = row.is_bad or row.request in bad

    def _drop_finished(self) -> None:
        """Without the rows that have ended."""
        kept = [i for i, row in enumerate(self._rows) if not row.request.is_finished]
        if len(kept) == len(self._rows):
            return
        self._store_prefixes([row for row in self._rows if row.request.is_finished])
        if not kept:
            self.clear()
            return
        select_rows(self._cache, kept)
        self._rows = [self._rows[i] for i in kept]
        width = max(row.num_cached for row in self._rows)
        if self.allow_add and width < self.width:
            trim_left(self._cache, width)
            self.width = width


@contextmanager
def _threads(device: torch.device, *, is_beside: bool) -> Iterator[None]:
    """One core is left to HTTP, tokens as text and media; what is computed here shares little.

    If they have to wait for a core, all threads of torch wait for the one that lost its own: on two
    cores a step of 8 rows then takes 1.4 times as long (docs/benchmarks/serving.md). `is_beside`:
    prompts are read beside a step, so each gets half.
    """
    num_threads = torch.get_num_threads()
    if device.type != "cpu" or num_threads == 1:
        yield
        return
    torch.set_num_threads(num_threads // 2 if is_beside else num_threads - 1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def logits_processors(language_model: Any) -> Any:
    """What transformers' `generate` does to scores before the greedy choice (a penalty, say), by
    the model's own generation config; empty if nothing.

    Each takes new ids int64 [1, num_new] and scores float32 [1, vocabulary].
    """
    model = base_language_model(language_model)
    config = copy.deepcopy(model.generation_config)
    config.do_sample = False
    config.num_beams = config.num_return_sequences = 1
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "eos_token_id"):
        setattr(config, name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that prompts of embeddings have no ids to penalize
        model._prepare_special_tokens(config, device=model.device)
        return model._get_logits_processor(config, input_ids_seq_length=0, device=model.device)
