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

from multi_token.language_model.forward import layer_inputs, takes_positions, without_adapter
from multi_token.serve.engines.fallback import no_numbers, padded_inputs
from multi_token.serve.engines.local.kv_cache import can_be_padded, cut_left, join_rows, keep_rows
from multi_token.serve.engines.local.prefix_cache import Beginnings
from multi_token.serve.engines.scheduler import Running, choose

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration


@dataclass
class _Row:
    running: Running
    length: int
    """Of its tokens that are in the cache."""
    ids: list[int] = field(default_factory=list)
    """New ones. The last is not in the cache yet."""
    is_bad: bool = False
    """No numbers came of it, so what it has in the cache is of no use to others."""


class Stepping:
    """The rows that are being answered, padded on the left to `width` tokens.

    Every row's positions begin with its own first token, so that it is answered as it is alone. A
    row that has ended is not computed any more: before the next step it leaves the cache.
    """

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        filler_id: int,
        *,
        joins: bool,
        beginnings: Beginnings | None = None,
    ) -> None:
        """`joins`: rows join others, and padding that nobody needs is cut off when the longest has
        left; see `can_be_padded`. Without it all rows join at once. `beginnings`: what is kept of
        rows, and not read again.
        """
        self.model = model
        self.filler_id = filler_id
        self.joins = joins
        self.beginnings = beginnings
        self.width = 0
        self._rows: list[_Row] = []
        self._cache: Any = None
        parameters = inspect.signature(without_adapter(model.language_model).forward).parameters
        self._takes_positions = takes_positions(model.language_model)
        # of a prompt, only the last position is asked for its logits
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        self._device = weight.device
        self._processors = processors_of(model.language_model)

    @property
    def rows(self) -> list[Running]:
        """Those that have not ended."""
        return [row.running for row in self._rows if not row.running.is_done]

    @property
    def can_be_padded(self) -> bool:
        """Whether the cache is one that rows can join: see cached_rows.py."""
        return can_be_padded(self._cache, len(self._rows), self.width)

    def width_with(self, rows: Sequence[Running]) -> int:
        """What `width` would come to if these joined and all answers were as long as allowed."""
        ends = [(len(row.prompt.input_ids), row.options.max_new_tokens) for row in rows]
        for row in self._rows:
            if not row.running.is_done:
                ends.append((row.length, row.running.options.max_new_tokens - len(row.ids)))
        return max(length for length, _ in ends) + max(num_left for _, num_left in ends)

    @torch.no_grad()
    def join(self, rows: Sequence[Running]) -> None:
        """Read prompts, say the first token of each, and have them answered beside the others.

        Raises what the model raises; the others are then as they were.
        """
        self.take_in(self.read(rows))

    @torch.no_grad()
    def read(self, rows: Sequence[Running], *, is_beside: bool = False) -> Stepping:
        """Others than these, read, and the first token of each said; who ended with it has left.

        Raises what the model raises. With `is_beside` these may be stepped meanwhile, in another
        thread.
        """
        others = copy.copy(self)
        others.clear()
        rows = [row for row in rows if not row.is_done]
        if rows:
            others._read(rows, is_beside=is_beside)
            others._let_go()
        return others

    @torch.no_grad()
    def take_in(self, others: Stepping) -> None:
        """Have others, that `read` made, answered beside these."""
        others._let_go()
        self._let_go()
        groups = [group for group in (self, others) if group._rows]
        if not groups:
            return
        width = max(group.width for group in groups)
        cache = groups[0]._cache
        if len(groups) == 2:
            join_rows(cache, others._cache, width)
        self._rows = [row for group in groups for row in group._rows]
        self._cache, self.width = cache, width

    @torch.no_grad()
    def step(self, *, is_beside: bool = False) -> None:
        """Say one more token of each row that has not ended. Raises what the model raises.

        `is_beside`: others are read meanwhile, in another thread.
        """
        self._let_go()
        if not self._rows:
            return
        device = self._device
        lengths = [row.length for row in self._rows]
        attention_mask = None
        if min(lengths) < self.width:
            padding = torch.tensor([self.width - length for length in lengths])
            attention_mask = (torch.arange(self.width + 1) >= padding[:, None]).long().to(device)
        with _threads(device, is_beside=is_beside):
            output = self._forward(
                input_ids=torch.tensor([row.ids[-1:] for row in self._rows], device=device),
                attention_mask=attention_mask,
                position_ids=torch.tensor(lengths, device=device)[:, None],
                past_key_values=self._cache,
            )
        self._cache = output.past_key_values
        self.width += 1
        for row in self._rows:
            row.length += 1
        self._choose(output.logits)
        if not self.rows:
            self._let_go()  # now, since the next step may be long in coming

    def clear(self) -> None:
        """Nobody is answered any more."""
        self._rows, self._cache, self.width = [], None, 0

    def _read(self, rows: Sequence[Running], *, is_beside: bool) -> None:
        embeds, input_ids, attention_mask = padded_inputs(self.model, rows, self.filler_id)
        self._rows = [_Row(row, len(row.prompt.input_ids)) for row in rows]
        self.width = embeds.shape[1]
        is_padded = min(row.length for row in self._rows) < self.width
        first, cache = self._begun(rows)
        with _threads(self._device, is_beside=is_beside):
            output = self._forward(
                inputs_embeds=embeds[:, first:],
                attention_mask=attention_mask if is_padded else None,
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, first:],
                **({} if cache is None else {"past_key_values": cache}),
                **layer_inputs(self.model.language_model, input_ids[:, first:]),
            )
        self._cache = output.past_key_values
        self._choose(output.logits)
        self._keep(self._rows)

    def _begun(self, rows: Sequence[Running]) -> tuple[int, Any]:
        """How many of `width` tokens need not be read, and a cache that holds them.

        All rows are read from the same place on, so a row that is shorter, or shares more than the
        others, is read from there too; what stands before it is its own.
        """
        if self.beginnings is None:
            return 0, None
        found = [self.beginnings.find(row.prompt) for row in rows]
        lengths = [len(row.prompt.input_ids) for row in rows]
        num_read = max(length - num for length, (_, num) in zip(lengths, found, strict=True))
        begun = [
            (beginning, max(0, length - num_read))
            for length, (beginning, _) in zip(lengths, found, strict=True)
        ]
        for row, (_, num) in zip(rows, begun, strict=True):
            self.beginnings.hits.add(row, num)
        first = self.width - num_read
        return first, self.beginnings.cache_of(begun, first) if first else None

    def _keep(self, rows: Sequence[_Row]) -> None:
        """What these have in the cache, for others that begin so."""
        if self.beginnings is None:
            return
        for index, row in enumerate(self._rows):
            if row in rows and not row.is_bad:
                answer = row.ids[: row.length - len(row.running.prompt.input_ids)]
                self.beginnings.add(row.running.prompt, answer, self._cache, index, row.length)

    def _forward(self, *, position_ids: Tensor, **inputs: Any) -> Any:
        if self._takes_positions:
            inputs["position_ids"] = position_ids
        return self.model.language_model(
            use_cache=True, return_dict=True, **self._options, **inputs
        )

    def _choose(self, logits: Tensor) -> None:
        """logits [rows, time, vocabulary]: of the last position the next token of each row."""
        scores = logits[:, -1].float()
        if self._processors:
            scores = torch.cat(
                [
                    self._processors(
                        torch.tensor([row.ids], dtype=torch.long, device=scores.device), own
                    )
                    for row, own in zip(self._rows, scores.split(1), strict=True)
                ]
            )
        ids, bad, _ = choose([row.running for row in self._rows], scores)
        for running in bad:
            running.fail(no_numbers())
        for row, token_id in zip(self._rows, ids, strict=True):
            row.ids.append(token_id)
            row.is_bad = row.is_bad or row.running in bad

    def _let_go(self) -> None:
        """Without the rows that have ended."""
        kept = [i for i, row in enumerate(self._rows) if not row.running.is_done]
        if len(kept) == len(self._rows):
            return
        self._keep([row for row in self._rows if row.running.is_done])
        if not kept:
            self.clear()
            return
        keep_rows(self._cache, kept)
        self._rows = [self._rows[i] for i in kept]
        width = max(row.length for row in self._rows)
        if self.joins and width < self.width:
            cut_left(self._cache, width)
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


def processors_of(language_model: Any) -> Any:
    """What transformers' `generate` does to scores before the greedy choice (a penalty, say), by
    the model's own generation config; empty if nothing.

    Each takes new ids int64 [1, num_new] and scores float32 [1, vocabulary].
    """
    model = without_adapter(language_model)
    config = copy.deepcopy(model.generation_config)
    config.do_sample = False
    config.num_beams = config.num_return_sequences = 1
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "eos_token_id"):
        setattr(config, name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that prompts of embeddings have no ids to penalize
        model._prepare_special_tokens(config, device=model.device)
        return model._get_logits_processor(config, input_ids_seq_length=0, device=model.device)
