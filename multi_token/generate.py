"""Conversations in, text out.

Border: reads and batches prompts, drives the language model's `generate` by embeddings, decodes.
It knows nothing of terminals, files or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multi_token.collate import Collator
from multi_token.data.formats import to_conversation
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.reader import Reader
from multi_token.types import Batch, Conversation, Media, Message, Part, Text

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration


def generate(
    model: MultiTokenForConditionalGeneration,
    conversations: Sequence[Conversation | Mapping[str, Any]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    root: str | None = None,
    streamer: Any = None,
    on_batch: Callable[[int], None] | None = None,
    **options: Any,
) -> list[str]:
    """Answers, one a conversation, in their order.

    `conversations`: Conversation objects or rows of any accepted shape, each ending with a user
    turn (a last assistant turn is left out: it is what is asked for). Greedy unless `options`,
    which go to transformers' `generate`, say otherwise. `root`: the folder where relative media
    paths start (default: the current one). `streamer`: a transformers streamer, with
    one conversation. `on_batch`: told how many conversations have been answered.

    Raises RowError for a row that cannot be read, before anything is generated for its batch.
    """
    reader = replace(reader_of(model), fetch=Fetch(root=root))
    prompts = [as_prompt(conversation, model, i) for i, conversation in enumerate(conversations)]
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        batch = collate_prompts(reader, chunk)
        new_ids = _generate_ids(
            model, batch, max_new_tokens=max_new_tokens, streamer=streamer, options=options
        )
        answers += [text.strip() for text in decode(reader, new_ids)]
        if on_batch is not None:
            on_batch(len(answers))
    return answers


def reader_of(model: MultiTokenForConditionalGeneration) -> Reader:
    """The model's reader, without a length limit: a prompt is what somebody asked."""
    if model.reader is None:
        raise MultiTokenError("this model has no reader; load it with from_pretrained(RUN)")
    return replace(model.reader, max_tokens=None)


def as_prompt(
    conversation: Conversation | Mapping[str, Any],
    model: MultiTokenForConditionalGeneration,
    index: int = 0,
) -> Conversation:
    """A conversation that ends where the assistant is to speak."""
    if not isinstance(conversation, Conversation):
        conversation = to_conversation(conversation, list(model.modalities), row_id=f"[{index}]")
    if conversation.messages and conversation.messages[-1].role == "assistant":
        conversation = replace(conversation, messages=conversation.messages[:-1])
    return conversation


def ask(text: str, media: Sequence[Media] = (), *, system: str | None = None) -> Conversation:
    """One question about some items: the items first, then the text."""
    parts: list[Part] = [part for item in media for part in (item, Text("\n"))]
    messages = [Message("user", (*parts, Text(text)))]
    if system is not None:
        messages.insert(0, Message("system", (Text(system),)))
    return Conversation(tuple(messages), id="question")


def collate_prompts(reader: Reader, conversations: Sequence[Conversation]) -> Batch:
    """Conversations -> a left-padded batch, nothing learned."""
    collator = Collator(reader.modalities, reader.chat.filler_id, padding_side="left")
    return collator([reader(conversation, prompt_only=True) for conversation in conversations])


def decode(reader: Reader, ids: Tensor) -> list[str]:
    """New ids [batch, time] -> text without special tokens."""
    return reader.tokenizer.batch_decode(ids, skip_special_tokens=True)


@torch.no_grad()
def _generate_ids(
    model: MultiTokenForConditionalGeneration,
    batch: Batch,
    *,
    max_new_tokens: int,
    streamer: Any,
    options: Mapping[str, Any],
) -> Tensor:
    """New ids [batch, time]. The prompt is embedded once; the child generates by itself."""
    device = model.device
    batch = to_device(batch, device)
    embeds = model.embed(batch["input_ids"], batch["media"])
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.get("do_sample") or options.get("temperature"):
        sampling = {"do_sample": True}
    return model.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(model),
        pad_token_id=reader_of(model).chat.filler_id,
        streamer=streamer,
        **{**sampling, **options},
    )


def stop_ids(model: MultiTokenForConditionalGeneration) -> list[int]:
    """The ids that end an answer: the language model's own, and the template's end of turn."""
    own = model.language_model.generation_config.eos_token_id
    ids = [] if own is None else [own] if isinstance(own, int) else list(own)
    end_of_turn = reader_of(model).chat.end_of_turn_id
    return sorted({*ids, *([] if end_of_turn is None else [end_of_turn])})


def to_device(value: Any, device: torch.device) -> Any:
    """A nested batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(inner, device) for key, inner in value.items()}
    return value
