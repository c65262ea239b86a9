"""Processor: one conversation becomes one Sample, in training, generation and serving alike.

    conversation -> load media -> prepare -> number of embeddings -> render, tokenize -> Sample

No weights: a processor runs in data workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from multi_token.chat.format import ChatFormat
from multi_token.errors import ChatTemplateError, MediaError, RowError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Modality
from multi_token.types import (
    IGNORE_INDEX,
    Conversation,
    Media,
    Message,
    Prepared,
    Sample,
    Text,
    TrainOnTurns,
)

if TYPE_CHECKING:
    from multi_token.recipe.recipe import Recipe


class FeatureLookup(Protocol):
    """Cached features in place of decoding and encoding (data/feature_cache/cache.py)."""

    def find(self, item: Media, modality: Modality, fetch: Fetch) -> Prepared | None:
        """Return the item with its features instead of encoder inputs, or None."""
        ...


@dataclass(frozen=True)
class MultiTokenProcessor:
    """Turns conversations into samples: `processor(conversation)`.

    The same object serves training, generation and the server, so all three see the same ids. It is
    picklable and holds no weights. `dataclasses.replace` makes variants, such as `lengths_only`.
    """

    chat: ChatFormat
    """Tokenizer and chat template of the language model."""
    modalities: Mapping[str, Modality]
    """Instance name -> modality."""
    fetch: Fetch
    """Reads the bytes of media."""
    max_tokens: int | None = None
    """Longest sample; a longer row is refused, never cut."""
    cache: FeatureLookup | None = None
    """Features of frozen encoders, if they are kept."""
    distillation: Literal["required", "optional"] | None = None
    """Tokenize each conversation also with texts in place of its media, for the teacher.
    `required`: a row without such texts is refused."""
    preference: Literal["required", "optional"] | None = None
    """Tokenize also the rejected answer of a row, with only the last answers supervised.
    `required`: a row without one is refused. None: a row is that of its chosen answer."""
    lengths_only: bool = False
    """Only lengths are needed: an item whose header has its length is not decoded."""
    row_id: str = ""
    """Row named by errors about single items, if the call names none."""

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer."""
        return self.chat.tokenizer

    def prepare(self, item: Media, *, row_id: str = "") -> Prepared:
        """Prepare one media item.

        Args:
            item: The item, with the name of its modality.
            row_id: Row named by errors.

        Returns:
            Inputs of its encoder, or its cached features.

        Raises:
            RowError: For an unknown modality, or media that cannot be read.
        """
        row_id = row_id or self.row_id
        modality = self.modalities.get(item.modality)
        if modality is None:
            raise RowError(
                f"has an item of modality {item.modality!r}, but the recipe has "
                f"{', '.join(self.modalities) or 'none'}",
                kind="format",
                row_id=row_id,
            )
        try:
            # A cached item has its length already, so a header need not be read for it.
            if self.cache is not None:
                cached = self.cache.find(item, modality, self.fetch)
                if cached is not None:
                    return cached
            elif self.lengths_only:
                num_features = modality.num_features_from_header(item.source, self.fetch)
                if num_features is not None:
                    return Prepared({}, num_features)
            return modality.prepare(modality.load(item.source, self.fetch))
        except MediaError as error:
            raise RowError(f"{item.modality}: {error}", kind=error.kind, row_id=row_id) from error

    def __call__(self, conversation: Conversation, *, prompt_only: bool = False) -> Sample:
        """Turn one conversation into one sample.

        Args:
            conversation: Messages with their media items.
            prompt_only: For generation: end where the assistant's answer begins, with nothing
                supervised.

        Returns:
            A sample with ids, labels, media spans and prepared media; with its rejected or its
            teacher's sample, if this processor makes these.

        Raises:
            RowError: With the row, the kind of the fault and what to change.
        """
        row_id = conversation.id
        rejected = None if self.preference is None or prompt_only else conversation.rejected
        if self.preference == "required" and not prompt_only and rejected is None:
            raise RowError(
                "has no `chosen` and `rejected` answers, which a stage with `dpo` trains on; "
                "give both, or set `dpo.missing` to skip",
                kind="format",
                row_id=row_id,
            )
        last: TrainOnTurns | None = "last" if rejected is not None else None
        answers = [m for m in conversation.messages if m.role == "assistant"]
        if (last or self.chat.train_on_turns) == "last":
            answers = answers[-1:]
        # Before media are decoded: a video of a row that cannot be trained on takes seconds.
        if rejected is not None and not _has_text(rejected.messages[-1]):
            raise RowError(
                "has an empty `rejected` answer, expected a text; write one, or remove the row",
                kind="no_target",
                row_id=row_id,
            )
        if not prompt_only and not any(_has_text(message) for message in answers):
            raise RowError(
                (
                    "has nothing to train on: its assistant turns are empty"
                    if answers
                    else "has no assistant turn, so there is nothing to train on"
                )
                + "; write the answer, or remove the row from the training data",
                kind="no_target",
                row_id=row_id,
            )
        media = [self.prepare(item, row_id=row_id) for item in conversation.media]
        num_tokens = [
            self.modalities[item.modality].num_tokens(prepared.num_features)
            for item, prepared in zip(conversation.media, media, strict=True)
        ]
        try:
            sample = self.chat.tokenize(
                conversation, num_tokens, prompt_only=prompt_only, train_on_turns=last
            )
            if rejected is not None:
                sample.rejected = self.chat.tokenize(rejected, num_tokens, train_on_turns=last)
                sample.rejected.media = media
        except ChatTemplateError as error:
            raise RowError(str(error), kind="chat_template", row_id=row_id) from error
        sample.media = media
        # Both answers of a pair go through the model, so the longer one counts.
        longest = max(len(s.input_ids) for s in (sample, sample.rejected) if s is not None)
        if self.max_tokens is not None and longest > self.max_tokens:
            raise RowError(
                f"is {longest} tokens long ({sum(num_tokens)} of them media), over "
                f"max_tokens = {self.max_tokens}; a row is never cut, so raise `data.max_tokens` "
                "or shorten the row",
                kind="too_long",
                row_id=row_id,
            )
        if self.distillation is not None and not prompt_only:
            sample.teacher = self._teacher_sample(conversation, sample, train_on_turns=last)
        return sample

    def _teacher_sample(
        self, conversation: Conversation, sample: Sample, *, train_on_turns: TrainOnTurns | None
    ) -> Sample | None:
        """Return the conversation with texts in place of its media, or None if some are missing.

        Raises RowError if they are required, or if the answers are tokenized differently.
        """
        missing = sorted({m.modality for m in conversation.media if m.media_text is None})
        if missing and self.distillation == "optional":
            return None
        if missing:
            raise RowError(
                f"has no text for a teacher in place of its {', '.join(missing)}; give one "
                f'for each item ("media_texts": {{"{missing[0]}": ["..."]}}), or set '
                "`distillation.missing` to cross_entropy",
                kind="format",
                row_id=conversation.id,
            )
        messages = tuple(
            replace(
                message,
                parts=tuple(
                    Text(part.media_text or "") if isinstance(part, Media) else part
                    for part in message.parts
                ),
            )
            for message in conversation.messages
        )
        as_text = replace(conversation, messages=messages)
        try:
            teacher = self.chat.tokenize(as_text, [], train_on_turns=train_on_turns)
        except ChatTemplateError as error:
            raise RowError(str(error), kind="chat_template", row_id=conversation.id) from error
        # Logits are compared token by token, and a tokenizer may merge an answer's first word with
        # the end of a text, but never with a media span.
        if _supervised_ids(teacher) != _supervised_ids(sample):
            raise RowError(
                "its answer is tokenized differently after `media_texts` than after its media, so "
                "teacher logits cannot be aligned; remove `media_texts` from this row",
                kind="chat_template",
                row_id=conversation.id,
            )
        return teacher


def _supervised_ids(sample: Sample) -> list[int]:
    # The first position is predicted by nothing, so its label never counts.
    labels = sample.labels[1:]
    return labels[labels != IGNORE_INDEX].tolist()


def _has_text(message: Message) -> bool:
    return any(isinstance(part, Text) and part.text.strip() for part in message.parts)


def build_processor(recipe: Recipe, *, root: str | None = None) -> MultiTokenProcessor:
    """Build the processor of a recipe; loads the tokenizer, no weights.

    Args:
        recipe: Model, data and stages of a run.
        root: Folder that relative media paths start from.

    Returns:
        A processor with the recipe's limits, and without a feature cache.

    Raises:
        LanguageModelError: If the tokenizer cannot be loaded.
        ChatTemplateError: If the tokenizer or the chat template cannot be used.
    """
    from multi_token.language_model.loading import load_tokenizer

    model = recipe.model
    return MultiTokenProcessor(
        chat=ChatFormat(
            load_tokenizer(model.language_model, model.revision),
            model.chat_template,
            model.train_on_turns,
        ),
        modalities=model.modalities,
        fetch=Fetch(root=root),
        max_tokens=recipe.data.max_tokens,
        preference=recipe.train.preference_mode,
    )
