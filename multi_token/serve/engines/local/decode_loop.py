"""Decode loop: prefill and decode steps of one batch over a left-padded KV cache.

    prefill(requests)   one forward over the new prompts, after their cached prefix;
                        sample the first token of each -> a batch of its own
    batch.extend(new)   pad the shorter KV cache on the left, concatenate rows
    batch.decode_step() drop finished rows, one forward over one token a row, sample
    dropped rows        go to the prefix cache; padding that no row needs is cut off

Position ids of a row start at its own first token, so padding changes no result. `parity` checks at
startup whether that holds for a language model.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multi_token.language_model.forward import (
    GREEDY,
    accepts_position_ids,
    base_language_model,
    per_layer_inputs,
)
from multi_token.serve.engines.fallback import pad_prompts
from multi_token.serve.engines.local.kv_cache import (
    concat_rows,
    is_paddable,
    select_rows,
    trim_left,
)
from multi_token.serve.engines.local.prefix_cache import PrefixCache
from multi_token.serve.engines.request import GenerationRequest, sample_batch

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration


class DecodeParams:
    """Everything that batches of one model share."""

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        *,
        allow_add: bool,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """Read the language model's settings, once for all batches.

        `allow_add`: requests may join a running batch, and padding is cut off when the longest row
        has left (see `is_paddable`). Otherwise all requests start together.
        """
        self.model = model
        self.allow_add = allow_add
        self.prefix_cache = prefix_cache
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        self.device = weight.device
        self.accepts_position_ids = accepts_position_ids(model.language_model)
        forward = base_language_model(model.language_model).forward
        # A prompt needs logits at its last position only. For all positions they would be the
        # largest tensor of the prefill (time x vocabulary).
        takes_keep = "logits_to_keep" in inspect.signature(forward).parameters
        self.forward_kwargs = {"logits_to_keep": 1} if takes_keep else {}
        self.logits_processors = logits_processors(model.language_model)


@dataclass
class _BatchRow:
    request: GenerationRequest
    num_cached: int
    """Tokens of this row in the KV cache."""
    output_ids: list[int] = field(default_factory=list)
    """New tokens. The last one is not in the KV cache yet."""
    is_bad: bool = False
    """The row's logits were NaN or inf, so its KV cache must not be reused."""


class DecodeBatch:
    """Running requests as rows of one KV cache, left-padded to `width` tokens."""

    def __init__(self, params: DecodeParams) -> None:
        self.params = params
        self.width = 0
        self._rows: list[_BatchRow] = []
        self._cache: Any = None

    @property
    def requests(self) -> list[GenerationRequest]:
        """Requests that are not finished."""
        return [row.request for row in self._rows if not row.request.is_finished]

    @property
    def is_paddable(self) -> bool:
        """See `kv_cache.is_paddable`."""
        return is_paddable(self._cache, len(self._rows), self.width)

    def width_after_adding(self, requests: Sequence[GenerationRequest]) -> int:
        """Return the largest width this batch could reach with these requests added."""
        ends = [(len(r.prompt.input_ids), r.options.max_new_tokens) for r in requests]
        for row in self._rows:
            if not row.request.is_finished:
                num_left = row.request.options.max_new_tokens - len(row.output_ids)
                ends.append((row.num_cached, num_left))
        # Not the maximum of the sums: the longest row sets the width, and any row may outlive it.
        return max(length for length, _ in ends) + max(num_left for _, num_left in ends)

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        """Prefill requests, and decode them with the running ones. Raises what `prefill` raises."""
        self.extend(prefill(self.params, requests))

    @torch.no_grad()
    def extend(self, other: DecodeBatch) -> None:
        """Take over the rows of another batch."""
        other._drop_finished()
        self._drop_finished()
        if not other._rows:
            return
        if self._rows:
            width = max(self.width, other.width)
            # Before the rows are taken over: if it raises, this batch is unchanged.
            concat_rows(self._cache, other._cache, width)
            self._rows, self.width = [*self._rows, *other._rows], width
        else:
            self._rows, self._cache, self.width = other._rows, other._cache, other.width
        other.clear()

    @torch.no_grad()
    def decode_step(self) -> None:
        """Generate and emit one token of each running request. Raises what the model raises."""
        self._drop_finished()
        if not self._rows:
            return
        lengths = [row.num_cached for row in self._rows]
        # One copy without a wait: a step waits for the device once, to read its new tokens.
        on_host = torch.tensor([(row.output_ids[-1], row.num_cached) for row in self._rows])
        last_ids, positions = on_host.to(self.params.device, non_blocking=True).split(1, 1)
        attention_mask = None
        # Without padding no mask: attention kernels are faster then, and some refuse a mask.
        if min(lengths) < self.width:
            places = torch.arange(self.width + 1, device=positions.device)
            attention_mask = (places >= self.width - positions).long()
        output = self._forward(
            input_ids=last_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=self._cache,
        )
        self._cache = output.past_key_values
        self.width += 1
        for row in self._rows:
            row.num_cached += 1
        self._sample(output.logits)
        # Now rather than at the next step, which may come much later: the prefix cache gets the
        # rows, and their memory is free.
        if not self.requests:
            self._drop_finished()

    def clear(self) -> None:
        self._rows, self._cache, self.width = [], None, 0

    def _prefill(self, requests: Sequence[GenerationRequest]) -> None:
        embeds, input_ids, attention_mask = pad_prompts(self.params.model, requests)
        self._rows = [_BatchRow(request, len(request.prompt.input_ids)) for request in requests]
        self.width = embeds.shape[1]
        is_padded = min(row.num_cached for row in self._rows) < self.width
        first, cache = self._prefix_lookup(requests)
        output = self._forward(
            inputs_embeds=embeds[:, first:],
            attention_mask=attention_mask if is_padded else None,
            # Padding has no position; 0 keeps it within the rotary table.
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, first:],
            **({} if cache is None else {"past_key_values": cache}),
            **per_layer_inputs(self.params.model.language_model, input_ids[:, first:]),
        )
        self._cache = output.past_key_values
        self._sample(output.logits)
        self._store_prefixes(range(len(self._rows)))

    def _prefix_lookup(self, requests: Sequence[GenerationRequest]) -> tuple[int, Any]:
        """Return how many of `width` positions are cached, and a KV cache that holds them."""
        # All rows start prefill at the same position. A row that is shorter, or has a longer cached
        # prefix than the others, uses only the part of its prefix before that position.
        prefix_cache = self.params.prefix_cache
        if prefix_cache is None:
            return 0, None
        found = [prefix_cache.find(request.prompt) for request in requests]
        lengths = [len(request.prompt.input_ids) for request in requests]
        num_prefilled = max(length - num for length, (_, num) in zip(lengths, found, strict=True))
        prefixes = [
            (entry, max(0, length - num_prefilled))
            for length, (entry, _) in zip(lengths, found, strict=True)
        ]
        for request, length, (_, num) in zip(requests, lengths, prefixes, strict=True):
            if request.mark_prefilled(num):
                prefix_cache.stats.record(length, num)
        first = self.width - num_prefilled
        return first, prefix_cache.build_kv_cache(prefixes, first) if first else None

    def _store_prefixes(self, indices: Iterable[int]) -> None:
        prefix_cache = self.params.prefix_cache
        if prefix_cache is None:
            return
        for index in indices:
            row = self._rows[index]
            if not row.is_bad:
                prompt = row.request.prompt
                output_ids = row.output_ids[: row.num_cached - len(prompt.input_ids)]
                prefix_cache.add(prompt, output_ids, self._cache, index, row.num_cached)

    def _forward(self, *, position_ids: Tensor, **inputs: Any) -> Any:
        if self.params.accepts_position_ids:
            inputs["position_ids"] = position_ids
        return self.params.model.language_model(
            use_cache=True, return_dict=True, **self.params.forward_kwargs, **inputs
        )

    def _sample(self, logits: Tensor) -> None:
        """logits [rows, time, vocabulary] -> a token of each row from its last position."""
        # float32: a log-softmax over a large vocabulary in half precision is off by 0.1 and more.
        scores = logits[:, -1].float()
        processors = self.params.logits_processors
        if processors:
            # Row by row: rows differ in their number of new ids, so no tensor holds all of them.
            so_far = [torch.tensor([row.output_ids], dtype=torch.long) for row in self._rows]
            scores = torch.cat(
                [
                    processors(ids.to(scores.device, non_blocking=True), own)
                    for ids, own in zip(so_far, scores.split(1), strict=True)
                ]
            )
        ids, failed, _ = sample_batch([row.request for row in self._rows], scores)
        for row, token_id in zip(self._rows, ids, strict=True):
            row.output_ids.append(token_id)
            row.is_bad = row.request in failed

    @torch.no_grad()
    def _drop_finished(self) -> None:
        kept = [i for i, row in enumerate(self._rows) if not row.request.is_finished]
        if len(kept) == len(self._rows):
            return
        self._store_prefixes(set(range(len(self._rows))).difference(kept))
        if not kept:
            self.clear()
            return
        select_rows(self._cache, kept)
        self._rows = [self._rows[i] for i in kept]
        width = max(row.num_cached for row in self._rows)
        # A cache that is not paddable may keep a state of the complete width: leave it.
        if self.params.allow_add and width < self.width:
            trim_left(self._cache, width)
            self.width = width


@torch.no_grad()
def prefill(params: DecodeParams, requests: Sequence[GenerationRequest]) -> DecodeBatch:
    """Run prompts through the model, emit their first tokens, and return them as a new batch.

    Raises what the model raises; no other batch is touched.
    """
    batch = DecodeBatch(params)
    running = [request for request in requests if not request.is_finished]
    if running:
        for request in running:
            request.start_prefill()
        batch._prefill(running)
        batch._drop_finished()
    return batch


def logits_processors(language_model: Any) -> Any:
    """Return the logits processors that `generate` would apply before the greedy choice.

    They follow from the model's generation config (a repetition penalty, for example); often empty.
    Each takes new ids int64 [1, num_new] and scores float32 [1, vocabulary].
    """
    model = base_language_model(language_model)
    config = copy.deepcopy(model.generation_config)
    for name, value in {**GREEDY, "eos_token_id": None}.items():
        setattr(config, name, value)
    with warnings.catch_warnings():
        # transformers warns that prompts of embeddings have no ids to penalize.
        warnings.simplefilter("ignore")
        # Private in transformers 5.23, and the only way to the list that `generate` itself builds.
        model._prepare_special_tokens(config, device=model.device)
        return model._get_logits_processor(config, input_ids_seq_length=0, device=model.device)
