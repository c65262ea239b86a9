"""Rows, processor and tokenizer with one token for each letter, for tests without a model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from multi_token.data.dataset import row_to_sample
from multi_token.errors import MediaError, RowError
from multi_token.media.fetch import Fetch
from multi_token.media.image import decode_image
from multi_token.types import IGNORE_INDEX, Conversation, Media, MediaSpan, Sample

FETCH = Fetch()


def processor(conversation: Conversation, *, fetch: Fetch = FETCH) -> Sample:
    """Return a token for each letter, four for each image; answers are supervised."""
    row_id = conversation.id
    ids: list[int] = []
    labels: list[int] = []
    spans: list[MediaSpan] = []
    for message in conversation.messages:
        for part in message.parts:
            if isinstance(part, Media):
                try:
                    decode_image(fetch.read(part.source))
                except MediaError as error:
                    raise RowError(str(error), kind=error.kind, row_id=row_id) from error
                spans.append(MediaSpan(part.modality, len(ids), 4))
                new = [0] * 4
            else:
                new = [ord(letter) for letter in part.text]
            ids += new
            labels += new if message.role == "assistant" else [IGNORE_INDEX] * len(new)
    if "{{" in str(conversation):
        raise RowError("the template stumbles", kind="chat_template", row_id=row_id)
    if not any(label != IGNORE_INDEX for label in labels):
        raise RowError("nothing to learn", kind="no_target", row_id=row_id)
    return Sample(torch.tensor(ids), torch.tensor(labels), spans, id=conversation.id)


read = partial(row_to_sample, processor=processor, modalities=("image",))


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, token_ids: list[int], /) -> str:
        return "".join(map(chr, token_ids))


def row(question: str, answer: str = "yes", **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**fields, "messages": turns}
