"""Conversations in, text out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from multi_token.collate import Collator
from multi_token.data.formats import to_conversation
from multi_token.errors import LanguageModelError
from multi_token.language_model.forward import generate_from_embeds
from multi_token.media.fetch import Fetch
from multi_token.processor import MultiTokenProcessor
from multi_token.types import Batch, ComposedModel, Conversation, Media, Message, Part, Sample, Text


def generate(
    model: ComposedModel,
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
    one conversation. `on_batch`: told how many conversations have been answered. A language model
    that answers otherwise in a padded batch is given prompts of one length at a time.

    Raises RowError for a row that cannot be read, before anything is generated for its batch.
    """
    processor = replace(model.require_processor(), fetch=Fetch(root=root))
    prompts = [
        drop_last_answer(conversation, model, i) for i, conversation in enumerate(conversations)
    ]
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        new_ids = generate_ids(
            model,
            [processor(prompt, prompt_only=True) for prompt in chunk],
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **options,
        )
        answers += [decode(processor, ids[None])[0].strip() for ids in new_ids]
        if on_batch is not None:
            on_batch(len(answers))
    return answers


def drop_last_answer(
    conversation: Conversation | Mapping[str, Any],
    model: ComposedModel,
    index: int = 0,
) -> Conversation:
    """A conversation that ends where the assistant is to speak."""
    if not isinstance(conversation, Conversation):
        conversation = to_conversation(conversation, list(model.modalities), row_id=f"[{index}]")
    if conversation.messages and conversation.messages[-1].role == "assistant":
        conversation = replace(conversation, messages=conversation.messages[:-1])
    return conversation


def single_question(
    text: str, media: Sequence[Media] = (), *, system: str | None = None
) -> Conversation:
    """One question about some items: the items first, then the text."""
    parts: list[Part] = [part for item in media for part in (item, Text("\n"))]
    messages = [Message("user", (*parts, Text(text)))]
    if system is not None:
        messages.insert(0, Message("system", (Text(system),)))
    return Conversation(tuple(messages), id="question")


def collate_prompts(processor: MultiTokenProcessor, conversations: Sequence[Conversation]) -> Batch:
    """Conversations -> a left-padded batch, nothing learned."""
    return _left_pad(processor, [processor(c, prompt_only=True) for c in conversations])


def _left_pad(processor: MultiTokenProcessor, samples: Sequence[Sample]) -> Batch:
    return Collator(processor.modalities, processor.chat.filler_id, padding_side="left")(samples)


def decode(processor: MultiTokenProcessor, ids: Tensor) -> list[str]:
    """New ids [batch, time] -> what the assistant says: no special tokens, no header."""
    return [processor.chat.decode(row) for row in ids.tolist()]


def generate_ids(
    model: ComposedModel,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    streamer: Any = None,
    **options: Any,
) -> list[Tensor]:
    """Prompts, read -> the new ids of each [new], in their order, as if each were asked alone."""
    processor = model.require_processor()
    groups = [list(range(len(samples)))]
    longest = max(len(sample.input_ids) for sample in samples) + max_new_tokens
    if not model.capabilities.can_batch_lengths(longest):
        by_length: dict[int, list[int]] = {}
        for index, sample in enumerate(samples):
            by_length.setdefault(len(sample.input_ids), []).append(index)
        groups = list(by_length.values())
    if len(groups) > 1:
        warnings.warn(
            f"{model.capabilities.name} answers otherwise when prompts of different lengths are "
            "padded to one batch: they are answered one length after another, which is slower",
            stacklevel=2,
        )
    answers: dict[int, Tensor] = {}
    for group in groups:
        batch = _left_pad(processor, [samples[index] for index in group])
        new_ids = _generate_batch(
            model, batch, max_new_tokens=max_new_tokens, streamer=streamer, options=options
        )
        answers |= zip(group, new_ids, strict=True)
    return [answers[index] for index in range(len(samples))]


@torch.no_grad()
def _generate_batch(
    model: ComposedModel,
    batch: Batch,
    *,
    max_new_tokens: int,
    streamer: Any,
    options: Mapping[str, Any],
) -> Tensor:
    """New ids [batch, time]. The prompt is embedded once; the child generates by itself."""
    device = model.device
    moved: Any = send_to_device(batch, device)
    embeds = model.embed(moved["input_ids"], moved["media"])
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.get("do_sample") or options.get("temperature"):
        sampling = {"do_sample": True}
    start = model.capabilities.prefill_mode
    if start == "ids":
        _check_text_is_last(model, moved)
    return generate_from_embeds(
        model.language_model,
        inputs_embeds=embeds,
        input_ids=moved["input_ids"],
        attention_mask=moved["attention_mask"],
        prefill_mode=start,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_ids(model),
        pad_token_id=model.require_processor().chat.filler_id,
        streamer=streamer,
        **{**sampling, **options},
    )


def _check_text_is_last(model: ComposedModel, batch: Batch) -> None:
    time = batch["input_ids"].shape[1]
    for name, media in batch["media"].items():
        if bool((media["positions"] % time == time - 1).any()):
            raise LanguageModelError(
                f"the prompt ends with an item of {name!r}, but {model.capabilities.name} goes on "
                "by ids, so text must stand last; use a chat template with a generation prompt"
            )


def eos_token_ids(model: ComposedModel) -> list[int]:
    """The ids that end an answer: the language model's own, and the template's ends of turn."""
    own = model.language_model.generation_config.eos_token_id
    ids = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({*ids, *model.require_processor().chat.end_of_turn_ids})
