"""types.py: what a row says stays as it was read, and what is left out is empty."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from multi_token.types import (
    IGNORE_INDEX,
    Conversation,
    Features,
    Media,
    MediaSpan,
    Message,
    Sample,
    Text,
)

MESSAGE = Message("user", (Media("image", "a"), Text("or"), Media("sound", "b")))


@pytest.mark.parametrize(
    ("one", "same", "field"),
    [
        (Text("a"), Text("a"), "text"),
        (Media("image", "a"), Media("image", "a"), "source"),
        (MESSAGE, Message("user", MESSAGE.parts), "parts"),
        (Conversation((MESSAGE,)), Conversation((MESSAGE,)), "messages"),
        (MediaSpan("image", 0, 1), MediaSpan("image", 0, 1), "start"),
    ],
)
def test_conversations_are_equal_by_content_and_immutable(one: Any, same: Any, field: str) -> None:
    assert one == same and hash(one) == hash(same)
    with pytest.raises(FrozenInstanceError):
        setattr(one, field, None)


def test_media_are_listed_in_reading_order_over_all_turns() -> None:
    later = Message("user", (Text("and"), Media("image", "c")))
    conversation = Conversation((MESSAGE, Message("assistant", (Text("yes"),)), later))
    assert [item.source for item in conversation.media] == ["a", "b", "c"]


def test_defaults_are_empty_and_not_shared_between_samples() -> None:
    one, other = (Sample(torch.tensor([1]), torch.tensor([1])) for _ in range(2))
    assert one.media_spans == [] and one.media == [] and one.id == ""
    assert one.teacher is one.rejected is one.error is None
    assert one.media_spans is not other.media_spans and one.media is not other.media
    features = Features(torch.ones(1, 2, 3))
    assert features.mask is features.newlines is None
    assert Media("image", "a").media_text is None
    assert Conversation(()).id == "" and Conversation(()).rejected is None


def test_unsupervised_positions_have_the_ignore_index_of_torch() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE_INDEX
