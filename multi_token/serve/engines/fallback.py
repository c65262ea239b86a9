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

from multi_token.generate import reader_of, stop_ids
from multi_token.language_model.forward import continue_text
from multi_token.serve.engines.base import End, Event, Failure, Prompt, SamplingOptions, Token
from multi_token.serve.engines.scheduler import Running, choose, failed, forced
from multi_token.serve.errors import ServeError
from multi_token.splice import Piece, splice
from multi_token.types import Conversation, Message, Place, Text

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

_LOG = logging.getLogger(__name__)


@torch.no_grad()
def answer_together(
    model: MultiTokenForConditionalGeneration, rows: Sequence[Running], filler_id: int
) -> None:
    """Answer all rows until each has ended, by transformers' own `generate`.

    Every token is said the moment it is chosen. A row that has ended rests in the batch until the
    others have. Raises what the model raises; rows that have not ended are then left as they are.
    """
    rows = [row for row in rows if not row.is_done]
    if not rows:
        return
    embeds, input_ids, attention_mask = padded_inputs(model, rows, filler_id)

    def choose_all(_: Tensor, scores: Tensor) -> Tensor:
        ids, bad, all_likeliest = choose(rows, scores)
        for row in bad:
            row.fail(no_numbers())
        return scores if all_likeliest else forced(scores, ids)

    def have_ended(ids: Tensor, *_: Tensor, **__: object) -> Tensor:
        return torch.tensor([row.is_done for row in rows], device=ids.device)

    continue_text(
        model.language_model,
        inputs_embeds=embeds,
        input_ids=input_ids,
        attention_mask=attention_mask,
        start=model.capabilities.starts_from,
        max_new_tokens=max(row.options.max_new_tokens for row in rows),
        do_sample=False,
        num_beams=1,
        **dict.fromkeys(("temperature", "top_p", "top_k", "eos_token_id")),
        pad_token_id=filler_id,
        logits_processor=[choose_all],
        stopping_criteria=[have_ended],
    )
    for row in rows:
        row.fail(ServeError("the model ended the answer before it was complete", status=500))


def no_numbers() -> ServeError:
    """What is told to whose logits are NaN or infinite."""
    return ServeError(
        "the model makes no numbers of this prompt's media; send other media",
        status=400,
        retry=False,
    )


def padded_inputs(
    model: MultiTokenForConditionalGeneration, rows: Sequence[Running], filler_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [batch, time, dim] with media, ids and mask [batch, time], padded on the left."""
    embedding = model.get_input_embeddings()
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    time = max(len(row.prompt.input_ids) for row in rows)
    input_ids = torch.full((len(rows), time), filler_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    tokens: list[Tensor] = []
    positions: list[Tensor] = []
    for number, row in enumerate(rows):
        start = time - len(row.prompt.input_ids)
        input_ids[number, start:] = row.prompt.input_ids.cpu()
        attention_mask[number, start:] = 1
        for place, made in zip(row.prompt.places, row.prompt.tokens, strict=True):
            first = number * time + start + place.start
            positions.append(torch.arange(first, first + place.length))
            tokens.append(made.to(weight.device, weight.dtype))
    input_ids, attention_mask = input_ids.to(weight.device), attention_mask.to(weight.device)
    embeds = embedding(input_ids)
    if tokens:
        pieces = [Piece("media", torch.cat(tokens), torch.cat(positions).to(weight.device))]
        embeds = splice(embeds, pieces)
    return embeds, input_ids, attention_mask


def answer_alone(
    model: MultiTokenForConditionalGeneration, prompt: Prompt, options: SamplingOptions
) -> list[Token]:
    """The tokens of one answer. Raises what went wrong."""
    events: list[Event] = []
    row = Running("", prompt, options, events.append, frozenset(stop_ids(model)))
    answer_together(model, [row], reader_of(model).chat.filler_id)
    return tokens_of(events)


def tokens_of(events: Sequence[Event]) -> list[Token]:
    """The tokens of a complete answer. Raises the error of one that failed."""
    last = events[-1]
    if isinstance(last, Failure):
        raise last.error
    assert isinstance(last, End), last
    return [event for event in events if isinstance(event, Token)]


def plain_prompt(model: MultiTokenForConditionalGeneration, *, num_media_tokens: int = 0) -> Prompt:
    """A short question, and on request a media span that is no text: means of text embeddings."""
    chat = reader_of(model).chat
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
    place = Place("media", 1, num_media_tokens)
    return Prompt(torch.cat([ids[:1], filler, ids[1:]]), (place,), (tokens,), ("plain prompt",))


def answer_one_by_one(
    model: MultiTokenForConditionalGeneration,
    rows: Sequence[Running],
    filler_id: int,
    cause: Exception,
) -> None:
    """After `cause` broke a batch: each row alone, so that only those fail whose fault it is.

    A fault is a row's own if the model still answers a plain prompt; else `cause` is raised.
    """
    refuse_broken(model, cause)
    for row in rows:
        row.begin()
        try:
            answer_together(model, [row], filler_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            refuse_broken(model, error)
            failed(row, error)


def refuse_broken(model: MultiTokenForConditionalGeneration, cause: Exception) -> None:
    """Raise `cause` if it is no prompt's fault: the model does not even answer a plain one."""
    try:
        answer_alone(model, plain_prompt(model), SamplingOptions(max_new_tokens=1))
    except Exception as error:  # noqa: BLE001 - whatever it is, the model is broken
        _LOG.error("the language model does not answer a plain prompt", exc_info=error)
        raise cause from None
