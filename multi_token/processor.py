"""Processor: one conversation becomes one Sample, in training, generation and serving alike.

    conversation -> load media -> prepare -> number of embeddings -> render, tokenize -> Sample

No weights: a processor runs in data workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from multi_token.chat.format import ChatFormat
from multi_token.errors import ChatTemplateError, MediaError, RowError
from multi_token.hub import DEFAULT_HUB, HubOptions, hub_options
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Modality
from multi_token.modalities.facts import Run, facts_in_answers, joined, with_texts
from multi_token.types import (
    IGNORE_INDEX,
    Conversation,
    Fact,
    Length,
    Media,
    Message,
    Prepared,
    Sample,
    Text,
    TrainOnTurns,
)

if TYPE_CHECKING:
    from multi_token.recipe.model import ModelSpec
    from multi_token.recipe.recipe import Recipe


_MAX_NAME = 1024
"""Characters of a source that is remembered; a longer one holds data."""
_MAX_SEEN = 1 << 16
"""Sources that are remembered."""


@dataclass(frozen=True)
class _Row:
    """A conversation with its prepared media and their facts, ready to be tokenized.

    `num_tokens`: media embeddings of each run of each item.
    """

    conversation: Conversation
    rejected: Conversation | None
    media: list[Prepared]
    runs: list[list[Run]]
    num_tokens: list[int]
    train_on_turns: TrainOnTurns | None


class Measured(NamedTuple):
    """Length of a row, and whether an item was decoded, or came from a feature cache."""

    length: Length
    is_decoded: bool

    @classmethod
    def of(cls, sample: Sample) -> Measured:
        """Measure a sample."""
        # an item with a header length has no inputs
        return cls(Length.of(sample), any(item.inputs for item in sample.media))


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
    once: bool = False
    """Only lengths are needed: an item whose source was prepared before is not prepared again."""
    hub: HubOptions = DEFAULT_HUB
    """Options of downloads: encoders' own processors are read with the first item."""
    row_id: str = ""
    """Row named by errors about single items, if the call names none."""
    _seen: dict[tuple[str, str], tuple[int, tuple[Fact, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Modality and source -> number of features and facts, with `once`."""

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
        key = (item.modality, item.source)
        is_name = self.once and isinstance(item.source, str) and len(item.source) <= _MAX_NAME
        if is_name and key in self._seen:
            return Prepared({}, *self._seen[key])
        try:
            with hub_options(self.hub):
                found = self._prepare(item, modality)
        except MediaError as error:
            raise RowError(f"{item.modality}: {error}", kind=error.kind, row_id=row_id) from error
        if is_name:
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            self._seen[key] = found.num_features, found.facts
        return found

    def _prepare(self, item: Media, modality: Modality) -> Prepared:
        # A cached item has its length already, so a header need not be read for it.
        if self.cache is not None:
            cached = self.cache.find(item, modality, self.fetch)
            if cached is not None:
                return cached
        elif self.lengths_only:
            known = modality.prepared_from_header(item.source, self.fetch)
            if known is not None:
                return known
        return modality.prepare(modality.load(item.source, self.fetch))

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
        (found,) = self.many([conversation], prompt_only=prompt_only)
        if isinstance(found, RowError):
            raise found
        return found

    def many(
        self, conversations: Sequence[Conversation], *, prompt_only: bool = False
    ) -> list[Sample | RowError]:
        """Turn conversations into their samples, or into the errors that a call would raise.

        All texts are tokenized together, which takes less time and gives the same ids.
        """
        rows = self._read_many(conversations, prompt_only)
        made = iter(self.chat.tokenize_many(*_tokenized(rows), prompt_only=prompt_only))
        return [
            row
            if isinstance(row, RowError)
            else self._finish(row, next(made), row.rejected and next(made), prompt_only=prompt_only)
            for row in rows
        ]

    def measure(self, conversations: Sequence[Conversation]) -> list[Measured | RowError]:
        """Return the lengths of the samples of `many`, or its errors, making no sample."""
        # a teacher's answer is compared with that of the sample, id by id
        if self.distillation is not None:
            samples = self.many(conversations)
            return [s if isinstance(s, RowError) else Measured.of(s) for s in samples]
        rows = self._read_many(conversations, prompt_only=False)
        counted = iter(self.chat.count_many(*_tokenized(rows)))
        return [
            row
            if isinstance(row, RowError)
            else self._length(row, next(counted), row.rejected and next(counted))
            for row in rows
        ]

    def _read_many(
        self, conversations: Sequence[Conversation], prompt_only: bool
    ) -> list[_Row | RowError]:
        rows: list[_Row | RowError] = []
        for conversation in conversations:
            try:
                rows.append(self._read(conversation, prompt_only))
            except RowError as error:
                rows.append(error)
        return rows

    def _read(self, conversation: Conversation, prompt_only: bool) -> _Row:
        """Check the answers of a conversation, and prepare its media."""
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
        runs = self.runs(conversation, media)
        if not prompt_only and (name := facts_in_answers(conversation, runs)):
            raise RowError(
                f"has an item of {name!r} in an assistant turn, where the text of its `facts` "
                "would be supervised; move it to a user turn, or leave `facts` out",
                kind="format",
                row_id=row_id,
            )
        conversation, num_tokens = with_texts(conversation, runs)
        rejected = None if rejected is None else with_texts(rejected, runs)[0]
        return _Row(conversation, rejected, media, runs, num_tokens, last)

    def runs(self, conversation: Conversation, media: Sequence[Prepared]) -> list[list[Run]]:
        """Return the media embeddings of each item in runs, with the texts of facts.

        Raises RowError for an item without a fact that its modality writes.
        """
        found = []
        for item, prepared in zip(conversation.media, media, strict=True):
            try:
                found.append(self.modalities[item.modality].runs(prepared))
            except MediaError as error:
                raise RowError(
                    f"{item.modality}: {error}", kind=error.kind, row_id=conversation.id
                ) from error
        return found

    def _finish(
        self,
        row: _Row,
        sample: Sample | ChatTemplateError,
        rejected: Sample | ChatTemplateError | None,
        *,
        prompt_only: bool,
    ) -> Sample | RowError:
        """Join the parts of a sample, and check its length."""
        for tokenized in (sample, rejected):
            if isinstance(tokenized, ChatTemplateError):
                return _chat_error(row, tokenized)
        assert isinstance(sample, Sample) and not isinstance(rejected, ChatTemplateError)
        for tokenized in filter(None, (sample, rejected)):
            tokenized.media = row.media
            tokenized.media_spans = joined(tokenized.media_spans, row.runs)
        sample.rejected = rejected
        # Both answers of a pair go through the model, so the longer one counts.
        error = self._too_long(
            row, max(len(s.input_ids) for s in (sample, rejected) if s is not None)
        )
        if error is not None:
            return error
        if self.distillation is not None and not prompt_only:
            try:
                sample.teacher = self._teacher_sample(
                    row.conversation, sample, train_on_turns=row.train_on_turns
                )
            except RowError as error:
                return error
        return sample

    def _length(
        self,
        row: _Row,
        counts: tuple[int, int] | ChatTemplateError,
        rejected: tuple[int, int] | ChatTemplateError | None,
    ) -> Measured | RowError:
        """Join the counts of a row as `_finish` joins its samples."""
        for counted in (counts, rejected):
            if isinstance(counted, ChatTemplateError):
                return _chat_error(row, counted)
        assert isinstance(counts, tuple) and not isinstance(rejected, ChatTemplateError)
        (num_tokens, num_supervised), (num_rejected, _) = counts, rejected or (0, 0)
        num_media, num_items = sum(row.num_tokens), len(row.media)
        length = Length(num_tokens, num_supervised, num_media, num_items, num_rejected)
        error = self._too_long(row, max(num_tokens, num_rejected))
        return error or Measured(length, any(item.inputs for item in row.media))

    def _too_long(self, row: _Row, num_tokens: int) -> RowError | None:
        if self.max_tokens is None or num_tokens <= self.max_tokens:
            return None
        return RowError(
            f"is {num_tokens} tokens long ({sum(row.num_tokens)} of them media), over "
            f"max_tokens = {self.max_tokens}; a row is never cut, so raise `data.max_tokens` "
            "or shorten the row",
            kind="too_long",
            row_id=row.conversation.id,
        )

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


def _tokenized(
    rows: Sequence[_Row | RowError],
) -> tuple[list[Conversation], list[list[int]], list[TrainOnTurns | None]]:
    """Return the conversations of good rows, each followed by its rejected one, and their facts."""
    conversations: list[Conversation] = []
    num_tokens: list[list[int]] = []
    turns: list[TrainOnTurns | None] = []
    for row in rows:
        if isinstance(row, RowError):
            continue
        for one in (row.conversation, row.rejected):
            if one is not None:
                conversations.append(one)
                num_tokens.append(row.num_tokens)
                turns.append(row.train_on_turns)
    return conversations, num_tokens, turns


def _chat_error(row: _Row, cause: ChatTemplateError) -> RowError:
    error = RowError(str(cause), kind="chat_template", row_id=row.conversation.id)
    error.__cause__ = cause
    return error


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
    return processor_of(
        recipe.model,
        fetch=Fetch(root=root),
        max_tokens=recipe.data.max_tokens,
        preference=recipe.train.preference_mode,
    )


def processor_of(
    spec: ModelSpec, *, fetch: Fetch | None = None, **fields: Any
) -> MultiTokenProcessor:
    """Build the processor of a recipe's `model` section, without a limit on a row's length.

    `fields`: others of `MultiTokenProcessor`. Raises as `build_processor` does.
    """
    from multi_token.language_model.loading import load_tokenizer

    chat = ChatFormat.from_spec(load_tokenizer(spec.language_model, spec.revision), spec)
    return MultiTokenProcessor(
        chat=chat, modalities=spec.modalities, fetch=fetch or Fetch(), **fields
    )
