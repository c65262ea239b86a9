"""Several prompts through the language model as one padded batch, each row by its own options.

Border: one batch from first to last token, and what is done when it fails. Who is in it is the
engines' to say.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multi_token.generate import eos_token_ids
from multi_token.language_model.forward import generate_from_embeds
from multi_token.serve.engines.base import (
    EngineEvent,
    ErrorEvent,
    FinishEvent,
    Prompt,
    SamplingParams,
    TokenEvent,
)
from multi_token.serve.engines.scheduler import (
    GenerationRequest,
    fail_request,
    force_tokens,
    sample_batch,
)
from multi_token.serve.errors import ServeError
from multi_token.splice import MediaEmbeds, splice
from multi_token.types import Conversation, MediaSpan, Message, Text

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

_LOG = logging.getLogger(__name__)


@torch.no_grad()
def generate_batch(
    model: MultiTokenForConditionalGeneration, requests: Sequence[GenerationRequest], filler_id: int
) -> None:
    """Answer all rows until each has ended, by transformers' own `generate`.

    Every token is said the moment it is chosen. A row that has ended rests in the batch until the
    others have. Raises what the model raises; rows that have not ended are then left as they are.
    """
    requests = [request for request in requests if not request.is_finished]
    if not requests:
        return
    embeds, input_ids, attention_mask = pad_prompts(model, requests, filler_id)

    def choose_all(_: Tensor, scores: Tensor) -> Tensor:
        ids, bad, all_likeliest = sample_batch(requests, scores)
        for request in bad:
            request.fail(nan_error())
        return scores if all_likeliest else force_tokens(scores, ids)

    def have_ended(ids: Tensor, *_: Tensor, **__: object) -> Tensor:
        return torch.tensor([request.is_finished for request in requests], device=ids.device)

    generate_from_embeds(
        model.language_model,
        inputs_embeds=embeds,
        input_ids=input_ids,
        attention_mask=attention_mask,
        prefill_mode=model.capabilities.prefill_mode,
        max_new_tokens=max(request.options.max_new_tokens for request in requests),
        do_sample=False,
        num_beams=1,
        **dict.fromkeys(("temperature", "top_p", "top_k", "eos_token_id")),
        pad_token_id=filler_id,
        logits_processor=[choose_all],
        stopping_criteria=[have_ended],
    )
    for request in requests:
        request.fail(ServeError("the model ended the answer before it was complete", status=500))


def nan_error() -> ServeError:
    """What is told to whose logits are NaN or infinite."""
    return ServeError(
        "the model makes no numbers of this prompt's media; send other media",
        status=400,
        retry=False,
    )


def pad_prompts(
    model: MultiTokenForConditionalGeneration, requests: Sequence[GenerationRequest], filler_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [batch, time, dim] with media, ids and mask [batch, time], padded on the left."""
    embedding = model.get_input_embeddings()
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    time = max(len(request.prompt.input_ids) for request in requests)
    input_ids = torch.full((len(requests), time), filler_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    tokens: list[Tensor] = []
    positions: list[Tensor] = []
    for number, request in enumerate(requests):
        start = time - len(request.prompt.input_ids)
        input_ids[number, start:] = request.prompt.input_ids.cpu()
        attention_mask[number, start:] = 1
        for place, made in zip(
            request.prompt.media_spans, request.prompt.media_embeds, strict=True
        ):
            first = number * time + start + place.start
            positions.append(torch.arange(first, first + place.length))
            tokens.append(made.to(weight.device, weight.dtype))
    input_ids, attention_mask = input_ids.to(weight.device), attention_mask.to(weight.device)
    embeds = embedding(input_ids)
    if tokens:
        pieces = [MediaEmbeds("media", torch.cat(tokens), torch.cat(positions).to(weight.device))]
        embeds = splice(embeds, pieces)
    return embeds, input_ids, attention_mask


def generate_one(
    model: MultiTokenForConditionalGeneration, prompt: Prompt, options: SamplingParams
) -> list[TokenEvent]:
    """The tokens of one answer. Raises what went wrong."""
    events: list[EngineEvent] = []
    request = GenerationRequest("", prompt, options, events.append, frozenset(eos_token_ids(model)))
    generate_batch(model, [request], model.require_processor().chat.filler_id)
    return collect_tokens(events)


def collect_tokens(events: Sequence[EngineEvent]) -> list[TokenEvent]:
    """The tokens of a complete answer. Raises the error of one that failed."""
    last = events[-1]
    if isinstance(last, ErrorEvent):
        raise last.error
    assert isinstance(last, FinishEvent), last
    return [event for event in events if isinstance(event, TokenEvent)]


def smoke_prompt(model: MultiTokenForConditionalGeneration, *, num_media_tokens: int = 0) -> Prompt:
    """A short question, and on request a media span that is no text: means of text embeddings."""
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
        rows = embedding(spread.to(weight.device))
    tokens = (rows[::2] + rows[1::2]) / 2
    place = MediaSpan("media", 1, num_media_tokens)
    return Prompt(torch.cat([ids[:1], filler, ids[1:]]), (place,), (tokens,), ("plain prompt",))


def retry_individually(
    model: MultiTokenForConditionalGeneration,
    requests: Sequence[GenerationRequest],
    filler_id: int,
    cause: Exception,
) -> None:
    """After `cause` broke a batch: each row alone, so that only those fail whose fault it is.

    A fault is a row's own if the model still answers a plain prompt; else `cause` is raised.
    """
    check_model_alive(model, cause)
    for request in requests:
        request.restart()
        try:
            generate_batch(model, [request], filler_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            check_model_alive(model, error)
            fail_request(request, error)


def check_model_alive(model: MultiTokenForConditionalGeneration, cause: Exception) -> None:
    """Raise `cause` if it is no prompt's fault: the model does not even answer a plain one."""
    try:
        generate_one(model, smoke_prompt(model), SamplingParams(max_new_tokens=1))
    except Exception as error:  # noqa: BLE001 - whatever it is, the model is broken
        _LOG.error("the language model does not answer a plain prompt", exc_info=error)
        raise cause from None
