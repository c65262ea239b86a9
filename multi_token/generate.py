"""Generation: conversations -> batches -> the language model's own `generate` -> texts."""

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
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[str]:
    """Generate the assistant's answer to each conversation, greedily by default.

    A language model whose answers change with padding gets prompts of one length at a time.

    Args:
        model: The model, with its processor.
        conversations: `Conversation` objects, or rows of any accepted shape. A last assistant turn
            is left out.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Conversations generated together.
        root: Folder of relative media paths; default: the current one.
        streamer: A streamer of transformers, for a single conversation.
        on_batch: Called after each batch with the number of finished conversations.
        chat_template_kwargs: Values of the chat template's variables (`enable_thinking`), over
            those of the run.
        **options: Passed to transformers' `generate` (`do_sample`, `temperature`, ...).

    Returns:
        Texts without special tokens, in the order of `conversations`.

    Raises:
        RowError: If a row cannot be read, before its batch is generated.
        ChatTemplateError: For a variable that the chat template does not have.
    """
    processor = model.require_processor()
    chat = processor.chat.with_kwargs(chat_template_kwargs)
    processor = replace(processor, chat=chat, fetch=Fetch(root=root))
    # all rows are parsed before the first batch, so that a bad row costs no generation
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
    """The conversation of a row, without a last assistant turn."""
    if not isinstance(conversation, Conversation):
        conversation = to_conversation(conversation, model.modalities, row_id=f"[{index}]")
    return without_last_answer(conversation)


def without_last_answer(conversation: Conversation) -> Conversation:
    """The conversation without a last assistant turn."""
    if conversation.messages and conversation.messages[-1].role == "assistant":
        conversation = replace(conversation, messages=conversation.messages[:-1])
    return conversation


def single_question(
    text: str, media: Sequence[Media] = (), *, system: str | None = None
) -> Conversation:
    """Conversation of one question: the media items first, then the text.

    Args:
        text: The question.
        media: Items that it is about.
        system: A system message.

    Returns:
        A conversation of one user turn, for `generate`.
    """
    parts: list[Part] = [part for item in media for part in (item, Text("\n"))]
    messages = [Message("user", (*parts, Text(text)))]
    if system is not None:
        messages.insert(0, Message("system", (Text(system),)))
    return Conversation(tuple(messages), id="question")


def collate_prompts(processor: MultiTokenProcessor, conversations: Sequence[Conversation]) -> Batch:
    """Conversations -> a left-padded batch of prompts."""
    return _left_pad(processor, [processor(c, prompt_only=True) for c in conversations])


def _left_pad(processor: MultiTokenProcessor, samples: Sequence[Sample]) -> Batch:
    return Collator(processor.modalities, processor.chat.filler_id, padding_side="left")(samples)


def decode(processor: MultiTokenProcessor, ids: Tensor) -> list[str]:
    """New ids [batch, time] -> texts of the answers, without special tokens and header."""
    return [processor.chat.decode(row) for row in ids.tolist()]


def generate_ids(
    model: ComposedModel,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    streamer: Any = None,
    **options: Any,
) -> list[Tensor]:
    """New ids [num_new] of each prompt, in order, equal to those of each prompt alone."""
    processor = model.require_processor()
    # one batch, unless padding changes the answers of this model
    groups = [list(range(len(samples)))]
    longest = max(len(sample.input_ids) for sample in samples) + max_new_tokens
    if not model.capabilities.can_batch_lengths(longest):
        by_length: dict[int, list[int]] = {}
        for index, sample in enumerate(samples):
            by_length.setdefault(len(sample.input_ids), []).append(index)
        groups = list(by_length.values())
    if len(groups) > 1:
        warnings.warn(
            f"{model.capabilities.name} gives other answers when prompts of different lengths are "
            "padded to one batch, so each length is a batch of its own, which is slower",
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
    """New ids [batch, time]. The prompt is embedded once; the language model generates."""
    moved: Any = send_to_device(batch, model.device)
    embeds = model.embed(moved["input_ids"], moved["media"])
    # explicit None: the generation config of many chat models samples, and warns if greedy
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.get("do_sample") or options.get("temperature"):
        sampling = {"do_sample": True}
    start = model.capabilities.prefill_mode
    if start == "ids":
        check_text_is_last(model, batch)
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


def check_text_is_last(model: ComposedModel, batch: Batch) -> None:
    time = batch["input_ids"].shape[1]
    for name, media in batch["media"].items():
        # positions are in the flat [batch * time] view, and prompts are padded on the left
        if bool((media["positions"] % time == time - 1).any()):
            raise LanguageModelError(
                f"the prompt ends with an item of {name!r}, but {model.capabilities.name} decodes "
                "from ids, so a prompt must end with text; use a chat template with a generation "
                "prompt"
            )


def eos_token_ids(model: ComposedModel) -> list[int]:
    """Ids that end an answer: the language model's own, and the template's end of turn."""
    own = model.language_model.generation_config.eos_token_id
    ids = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({*ids, *model.require_processor().chat.end_of_turn_ids})
