"""What is wrong with a prompt or its options by themselves, found before they are queued.

Border: looks at one prompt and at what the model can take; it queues and computes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from multi_token.serve.engines.base import Prompt, SamplingParams
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration


def context_length(model: MultiTokenForConditionalGeneration) -> int | None:
    """Tokens that the language model says it can hold; None if it does not say."""
    config = getattr(model.language_model, "config", None)
    text = config.get_text_config() if config is not None else None
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def min_limit(*limits: int | None) -> int | None:
    """The smallest of those that are limits."""
    return min((limit for limit in limits if limit is not None), default=None)


def check_prompt(
    model: MultiTokenForConditionalGeneration,
    prompt: Prompt,
    options: SamplingParams,
    max_tokens: int | None,
) -> None:
    """Raise ServeError for a prompt that cannot be answered, whatever else is asked.

    Too long, without room for an answer, media that disagree with their places or are no numbers.
    """
    num_ids = len(prompt.input_ids)
    if num_ids == 0:
        raise ServeError("the prompt is empty; send a message", param="messages")
    if options.max_new_tokens < 1:
        raise ServeError(
            f"expected max_tokens of at least 1, got {options.max_new_tokens}", param="max_tokens"
        )
    if max_tokens is not None and num_ids + options.max_new_tokens > max_tokens:
        raise ServeError(
            f"this prompt has {num_ids} tokens and asks for {options.max_new_tokens} more, over "
            f"the limit of {max_tokens} for both; shorten the messages or lower max_tokens",
            param="messages",
            code="context_length_exceeded",
        )
    if not len(prompt.media_spans) == len(prompt.media_embeds) == len(prompt.media_keys):
        raise ServeError(
            f"{len(prompt.media_spans)} places, {len(prompt.media_embeds)} items and "
            f"{len(prompt.media_keys)} keys "
            "of media were given; there must be as many of each",
            status=500,
        )
    dim = model.get_input_embeddings().weight.shape[1]  # type: ignore[index,union-attr]
    end = 0
    for place, tokens in zip(prompt.media_spans, prompt.media_embeds, strict=True):
        if tokens.shape != (place.length, dim) or place.start < end:
            raise ServeError(
                f"an item of {place.modality!r} has tokens of shape {tuple(tokens.shape)}, "
                f"expected {(place.length, dim)} behind the item before it",
                status=500,
            )
        end = place.start + place.length
        if not bool(tokens.isfinite().all()):
            raise ServeError(
                f"an item of {place.modality!r} gives tokens that are no numbers (NaN or "
                "infinite); send another item",
                param="messages",
            )
    if end > num_ids:
        raise ServeError("an item of media lies behind the end of the prompt", status=500)
    if end == num_ids and model.capabilities.prefill_mode == "ids":
        raise ServeError(
            "the prompt ends with an item of media, but this language model goes on by ids, so "
            "text must stand last; write a text behind it",
            param="messages",
        )
