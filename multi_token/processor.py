"""Reader: load, prepare, render, tokenize. One conversation becomes one Sample.

Border: the one list of steps above `Batch`, the same for training and asking. It loads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from multi_token.chat.format import ChatFormat
from multi_token.errors import ChatTemplateError, MediaError, RowError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Modality, header_length
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
    """What may stand in for decoding and encoding an item (data/feature_cache/cache.py)."""

    def find(self, item: Media, modality: Modality, fetch: Fetch) -> Prepared | None:
        """The item with its features instead of encoder inputs, if they are there."""
        ...


@dataclass(frozen=True)
class MultiTokenProcessor:
    """Callable and picklable; goes into data workers and servers alike."""

    chat: ChatFormat
    modalities: Mapping[str, Modality]
    fetch: Fetch
    max_tokens: int | None = None
    cache: FeatureLookup | None = None
    distillation: Literal["required", "optional"] | None = None
    """Also read each conversation with texts in place of its media; `required`: a row without them
    is refused."""
    preference: Literal["required", "optional"] | None = None
    """Also read the rejected answer of rows that have two, and learn the last answers alone;
    `required`: a row without one is refused. Else such a row is that of its chosen answer."""
    lengths_only: bool = False
    """For lengths alone: an item whose header tells its length stays undecoded, without inputs."""
    row_id: str = ""
    """What errors about single items call their row, where nobody says it."""

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer."""
        return self.chat.tokenizer

    def prepare(self, item: Media, *, row_id: str = "") -> Prepared:
        """One media item -> what its encoder takes, or its cached features. Raises RowError."""
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
            if self.cache is not None:
                cached = self.cache.find(item, modality, self.fetch)
                if cached is not None:
                    return cached
            elif self.lengths_only:
                num_features = header_length(modality, item.source, self.fetch)
                if num_features is not None:
                    return Prepared({}, num_features)
            return modality.prepare(modality.load(item.source, self.fetch))
        except MediaError as error:
            raise RowError(f"{item.modality}: {error}", kind=error.kind, row_id=row_id) from error

    def __call__(self, conversation: Conversation, *, prompt_only: bool = False) -> Sample:
        """One conversation -> one Sample, or a RowError that says what is wrong with it.

        `prompt_only`: for asking; the sample ends where the assistant begins, nothing is learned.
        """
        row_id = conversation.id
        rejected = None if self.preference is None or prompt_only else conversation.rejected
        if self.preference == "required" and not prompt_only and rejected is None:
            raise RowError(
                "has no `chosen` and `rejected` answers, from which a stage with `dpo` learns; "
                "give both, or set `dpo.missing` to skip",
                kind="format",
                row_id=row_id,
            )
        last: TrainOnTurns | None = "last" if rejected is not None else None
        answers = [m for m in conversation.messages if m.role == "assistant"]
        if (last or self.chat.train_on_turns) == "last":
            answers = answers[-1:]
        if rejected is not None and not _has_text(rejected.messages[-1]):
            raise RowError(
                "has an empty `rejected` answer, expected a text; write one, or leave the row out",
                kind="no_target",
                row_id=row_id,
            )
        if not prompt_only and not any(_has_text(message) for message in answers):
            raise RowError(
                (
                    "has nothing to learn: its assistant turns are empty"
                    if answers
                    else "has no assistant turn, so there is nothing to learn from it"
                )
                + "; write the answer, or leave the row out of the training data",
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
        """The conversation with texts in place of its media, or None where some are missing.

        Raises RowError if they are required, or if the answers read otherwise behind them.
        """
        missing = sorted({m.modality for m in conversation.media if m.media_text is None})
        if missing and self.distillation == "optional":
            return None
        if missing:
            raise RowError(
                f"has no text for a teacher to read in place of its {', '.join(missing)}; give one "
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
        if _supervised_ids(teacher) != _supervised_ids(sample):
            raise RowError(
                "has answers whose tokens are others behind its `media_texts` than behind its "
                "media, so the teacher's cannot be compared; leave the media_texts out",
                kind="chat_template",
                row_id=conversation.id,
            )
        return teacher


def _supervised_ids(sample: Sample) -> list[int]:
    """The ids that are predicted and learned; the first of all is predicted by nothing."""
    labels = sample.labels[1:]
    return labels[labels != IGNORE_INDEX].tolist()


def _has_text(message: Message) -> bool:
    return any(isinstance(part, Text) and part.text.strip() for part in message.parts)


def build_processor(recipe: Recipe, *, root: str | None = None) -> MultiTokenProcessor:
    """The reader of a recipe; `root` is the folder that relative media paths start from.

    Loads the tokenizer, no weights.
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
