"""Stage zero: feature statistics, and the closed-form start of a projector (no gradient step).

The closed form is this project's own: ridge regression from the standardized features x of each
captioned item to the language model's input embeddings y of its caption's tokens,

    W = (X'X - n mean(x) mean(x)' + penalty I)^-1 (X'Y - n mean(x) mean(y)')
    b = mean(y) - W' mean(x)

Only sums over items are kept, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from multi_token.collate import Collator
from multi_token.language_model.loading import embedding_rms
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.projectors.base import mask_without_newlines
from multi_token.recipe.train import ClosedFormSpec
from multi_token.types import Conversation, Features, Media, Text


@dataclass(frozen=True)
class CaptionedItem:
    """A media item, its caption, and the processor that loads it."""

    item: Media
    caption: str
    processor: MultiTokenProcessor


def captioned_items(
    conversations: Iterable[tuple[Conversation, MultiTokenProcessor]],
) -> Iterator[CaptionedItem]:
    """Yield the item and answer of conversations with exactly one item and one assistant turn."""
    for conversation, processor in conversations:
        answers = [m for m in conversation.messages if m.role == "assistant"]
        if len(conversation.media) == 1 and len(answers) == 1:
            text = "".join(p.text for p in answers[0].parts if isinstance(p, Text)).strip()
            if text:
                yield CaptionedItem(conversation.media[0], text, processor)


@torch.no_grad()
def calibrate(
    model: MultiTokenForConditionalGeneration,
    name: str,
    items: Sequence[tuple[Media, MultiTokenProcessor]],
    *,
    batch_size: int = 32,
) -> int:
    """Fit a projector's feature statistics, and scale its output to the embeddings' size.

    Standardized features then have zero mean and unit variance over these items, and media
    embeddings the root mean square of the language model's input embeddings. Returns the number of
    feature vectors.
    """
    projector = model.projector(name)
    # float64: a variance from sums loses the digits that mean and values have in common
    total = torch.zeros_like(projector.feature_mean, dtype=torch.float64)
    squares = torch.zeros_like(total)
    count = 0
    first: Features | None = None
    for features in encode_items(model, name, items, batch_size=batch_size):
        first = first or features
        values = features.values.double()
        mask = mask_without_newlines(features)
        values = values.flatten(0, 1) if mask is None else values[mask]
        total += values.sum(0)
        squares += values.square().sum(0)
        count += len(values)
    if first is None:
        return 0
    if projector.spec.standardize:
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        # a constant feature carries nothing: it is centred, and not scaled up to its rounding noise
        scale = torch.where(variance > 1e-10, variance.clamp(min=1e-10).rsqrt(), 1.0)
        projector.feature_mean.copy_(mean)
        projector.feature_scale.copy_(scale)
    projector.scale_output(first, embedding_rms(model))
    return count


@torch.no_grad()
def fit_closed_form(
    model: MultiTokenForConditionalGeneration,
    name: str,
    items: Sequence[CaptionedItem],
    *,
    spec: ClosedFormSpec,
    batch_size: int = 32,
) -> int:
    """Fit the closed-form part of a projector; returns the number of items it was fitted on.

    Where one feature becomes all media embeddings of an item, embedding j is fitted to the j-th
    token of `spec.caption_format` (cut, or padded with spaces). Where an item has many features,
    each is fitted to the mean of the caption's embeddings, or (`targets: by_position`) to the token
    at the same relative position.

    Gram matrices: [group_dim, group_dim] and [group_dim, tokens * dim].
    """
    if not items:
        return 0
    projector = model.projector(name)
    targets = _Targets(model, items[0].processor, projector.tokens_per_group, spec)
    num_in, num_out = projector.group_dim, projector.tokens_per_group * projector.out_dim
    device = projector.feature_mean.device
    exact: dict[str, Any] = {"dtype": torch.float64, "device": device}
    gram, cross = torch.zeros(num_in, num_in, **exact), torch.zeros(num_in, num_out, **exact)
    sum_x, sum_y, count = torch.zeros(num_in, **exact), torch.zeros(num_out, **exact), 0
    start = 0
    pairs = [(i.item, i.processor) for i in items]
    for features in encode_items(model, name, pairs, batch_size=batch_size):
        batch = items[start : start + len(features.values)]
        start += len(batch)
        # a newline has no feature to fit: its embedding is the projector's own parameter
        groups, mask = projector.arrange(Features(features.values, mask_without_newlines(features)))
        nums = mask.sum(1).tolist()
        y = torch.cat(
            [targets(i.caption, num_groups=n) for i, n in zip(batch, nums, strict=True)]
        ).double()  # [groups, tokens * dim]
        x = groups[mask].double()
        gram += x.T @ x
        cross += x.T @ y
        sum_x += x.sum(0)
        sum_y += y.sum(0)
        count += len(x)
    # centred after the sum: the mean is not known before, and a second pass would encode again
    mean_x, mean_y = sum_x / count, sum_y / count
    gram -= count * torch.outer(mean_x, mean_x)
    cross -= count * torch.outer(mean_x, mean_y)
    gram.diagonal().add_(spec.penalty)
    weight = torch.linalg.solve(gram, cross)
    closed_form = projector.add_closed_form()
    closed_form.weight.copy_(weight.T)
    closed_form.bias.copy_(mean_y - mean_x @ weight)
    return start


class _Targets:
    """Target media embeddings of a caption, cached by caption."""

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        processor: MultiTokenProcessor,
        num_tokens: int,
        spec: ClosedFormSpec,
    ) -> None:
        self.spec = spec
        self.tokenizer = processor.tokenizer
        self.embedding = model.get_input_embeddings()
        self.num_tokens = num_tokens
        self.space = self._embed(" ")[-1:]
        self.known: dict[tuple[str, int], Tensor] = {}

    def _embed(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        weight: Any = self.embedding.weight
        return self.embedding(torch.tensor(ids, device=weight.device)).float()

    def __call__(self, caption: str, *, num_groups: int) -> Tensor:
        """[num_groups, num_tokens * dim]"""
        if (caption, num_groups) not in self.known:
            # not str.format: a caption may contain braces
            embeddings = self._embed(self.spec.caption_format.replace("{caption}", caption))
            num_all = num_groups * self.num_tokens
            if num_groups == 1:
                filled = torch.cat([embeddings, self.space.expand(self.num_tokens, -1)])
                target = filled[: self.num_tokens]
            elif self.spec.targets == "by_position":
                # the token in the middle of the part of the caption that belongs to an embedding
                middles = 2 * torch.arange(num_all) + 1
                target = embeddings[middles * len(embeddings) // (2 * num_all)]
            else:
                target = embeddings.mean(0, keepdim=True).expand(num_all, -1)
            self.known[caption, num_groups] = target.reshape(num_groups, -1)
        return self.known[caption, num_groups]


def encode_items(
    model: MultiTokenForConditionalGeneration,
    name: str,
    items: Sequence[tuple[Media, MultiTokenProcessor]],
    *,
    batch_size: int,
) -> Iterator[Features]:
    """Yield the features of items in order, batch by batch; cached ones are not encoded."""
    collator = Collator(model.modalities, pad_id=0)
    for start in range(0, len(items), batch_size):
        prepared = [
            processor.prepare(item) for item, processor in items[start : start + batch_size]
        ]
        inputs = send_to_device(collator.inputs(name, prepared), model.device)
        yield model.encode(name, inputs)
