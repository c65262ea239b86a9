"""Fallback: a complete batch through transformers' own `generate`, and isolation of faults.

`generate` runs greedily. A logits processor samples the token of each row and leaves `generate` no
other choice, so sampling, log-probabilities and streaming are those of the other modes. A finished
row stays in the batch until the last one ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multi_token.generate import eos_token_ids
from multi_token.language_model.forward import GREEDY, generate_from_embeds
from multi_token.serve.engines.base import (
    EngineEvent,
    ErrorEvent,
    FinishEvent,
    Prompt,
    SamplingParams,
    TokenEvent,
)
from multi_token.serve.engines.request import GenerationRequest, fail_request, sample_batch
from multi_token.serve.engines.sampler import force_tokens
from multi_token.serve.errors import ServeError
from multi_token.splice import MediaEmbeds, splice
from multi_token.types import Conversation, MediaSpan, Message, Text

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

_LOG = logging.getLogger(__name__)


@torch.no_grad()
def generate_batch(
    model: MultiTokenForConditionalGeneration,
    requests: Sequence[GenerationRequest],
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Run requests to their end through `generate`; each token is emitted when it is chosen.

    `on_step` is called after each forward. Raises what the model raises; unfinished requests are
    then unchanged.
    """
    requests = [request for request in requests if not request.is_finished]
    if not requests:
        return
    for request in requests:
        request.start_prefill()
    embeds, input_ids, attention_mask = pad_prompts(model, requests)

    def choose_all(input_ids: Tensor, scores: Tensor) -> Tensor:
        on_step()
        ids, _, all_greedy = sample_batch(requests, scores)
        return scores if all_greedy else force_tokens(scores, ids)

    def all_finished(ids: Tensor, *_: Tensor, **__: object) -> Tensor:
        return torch.tensor([request.is_finished for request in requests], device=ids.device)

    generate_from_embeds(
        model.language_model,
        inputs_embeds=embeds,
        input_ids=input_ids,
        attention_mask=attention_mask,
        prefill_mode=model.capabilities.prefill_mode,
        max_new_tokens=max(request.options.max_new_tokens for request in requests),
        **GREEDY,
        # The requests' own end ids decide (`ignore_eos`), so `generate` must know none.
        eos_token_id=None,
        pad_token_id=model.require_processor().chat.filler_id,
        logits_processor=[choose_all],
        stopping_criteria=[all_finished],
    )
    for request in requests:
        request.fail(ServeError("the model ended the response before it was complete", status=500))


def pad_prompts(
    model: MultiTokenForConditionalGeneration, requests: Sequence[GenerationRequest]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings [batch, time, dim] with media, ids and mask [batch, time], left-padded."""
    embedding = model.get_input_embeddings()
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    filler_id = model.require_processor().chat.filler_id
    time = max(len(request.prompt.input_ids) for request in requests)
    input_ids = torch.full((len(requests), time), filler_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    values: list[Tensor] = []
    positions: list[Tensor] = []
    for row, request in enumerate(requests):
        prompt = request.prompt
        start = time - len(prompt.input_ids)
        input_ids[row, start:] = prompt.input_ids.cpu()
        attention_mask[row, start:] = 1
        for span, media_embeds in zip(prompt.media_spans, prompt.media_embeds, strict=True):
            positions.append(span.positions(row * time + start))
            values.append(media_embeds.to(weight.device, weight.dtype))
    input_ids, attention_mask = (
        x.to(weight.device, non_blocking=True) for x in (input_ids, attention_mask)
    )
    embeds = embedding(input_ids)
    if values:
        places = torch.cat(positions).to(weight.device, non_blocking=True)
        embeds = splice(embeds, [MediaEmbeds("media", torch.cat(values), places)])
    return embeds, input_ids, attention_mask


def generate_one(
    model: MultiTokenForConditionalGeneration, prompt: Prompt, options: SamplingParams
) -> list[TokenEvent]:
    """Return the tokens that `generate` gives for one prompt. Raises the error of a failure."""
    events: list[EngineEvent] = []
    request = GenerationRequest("", prompt, options, events.append, frozenset(eos_token_ids(model)))
    generate_batch(model, [request])
    return collect_tokens(events)


def collect_tokens(events: Sequence[EngineEvent]) -> list[TokenEvent]:
    """Return the tokens of a finished request. Raises the error of a failed one."""
    last = events[-1]
    if isinstance(last, ErrorEvent):
        raise last.error
    assert isinstance(last, FinishEvent), last
    return [event for event in events if isinstance(event, TokenEvent)]


def smoke_prompt(model: MultiTokenForConditionalGeneration, *, num_media_tokens: int = 0) -> Prompt:
    """Return a short question, optionally with one media span of `num_media_tokens`."""
    chat = model.require_processor().chat
    conversation = Conversation((Message("user", (Text("Hello! Who are you?"),)),))
    ids = chat.tokenize(conversation, [], prompt_only=True).input_ids
    if not num_media_tokens:
        return Prompt(ids, (), (), ())
    filler = torch.full((num_media_tokens,), chat.filler_id)
    with torch.no_grad():
        embedding = model.get_input_embeddings()
        weight: Tensor = embedding.weight  # type: ignore[assignment]
        spread = torch.linspace(1, weight.shape[0] // 2, 2 * num_media_tokens).long()
        text_embeds = embedding(spread.to(weight.device))
    # Means of two text embeddings: in the model's usual range, and equal to no token. A path that
    # looks ids up instead gives other logits.
    media_embeds = (text_embeds[::2] + text_embeds[1::2]) / 2
    span = MediaSpan("media", 1, num_media_tokens)
    return Prompt(
        torch.cat([ids[:1], filler, ids[1:]]), (span,), (media_embeds,), ("smoke prompt",)
    )


def check_plain_prompt(model: MultiTokenForConditionalGeneration) -> None:
    """Generate one token for a plain prompt. Raises what the model raises."""
    generate_one(model, smoke_prompt(model), SamplingParams(max_new_tokens=1))


def retry_individually(
    model: MultiTokenForConditionalGeneration,
    requests: Sequence[GenerationRequest],
    run: Callable[[Sequence[GenerationRequest]], None],
    cause: Exception,
) -> None:
    """Restart each request and `run` it alone, after `cause` broke their batch.

    A request fails by its own fault if the model still generates for a plain prompt; otherwise
    `cause` is raised.
    """
    _LOG.error("a batch of %d requests failed; each runs alone", len(requests), exc_info=cause)
    check_model_alive(model, cause)
    for request in requests:
        request.restart()
        try:
            run([request])
        # Any fault of one request, even an unknown one, must leave the others running.
        except Exception as error:  # noqa: BLE001
            check_model_alive(model, error)
            fail_request(request, error)


def check_model_alive(model: MultiTokenForConditionalGeneration, cause: Exception) -> None:
    """Raise `cause` if the model generates nothing for a plain prompt either."""
    try:
        check_plain_prompt(model)
    # Whatever it raises, the model is broken, and `cause` is the first symptom.
    except Exception as error:  # noqa: BLE001
        _LOG.error("the language model fails on a plain prompt", exc_info=error)
        raise cause from None
