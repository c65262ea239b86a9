"""Feature statistics, and the closed-form start of a projector (no gradient step).

The closed form is this project's own: ridge regression from the standardized features x of each
captioned item to the language model's input embeddings y of its caption's tokens,

    W = (X'X - n mean(x) mean(x)' + penalty I)^-1 (X'Y - n mean(x) mean(y)')
    b = mean(y) - W' mean(x)

Only sums over items are kept, so memory does not grow with their number. Processes add up theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device

from multi_token.collate import Collator
from multi_token.distributed import all_gather, all_reduce_sum
from multi_token.errors import MultiTokenError
from multi_token.language_model.loading import embedding_rms
from multi_token.modalities.base import MAX_BATCH_FEATURES
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.projectors.base import Projector
from multi_token.recipe.train import ClosedFormSpec
from multi_token.train.item_sums import FitItem, ItemSums, exact, rows_of_block
from multi_token.types import Conversation, Features, Media, Prepared, Text


@dataclass(frozen=True)
class FitReport:
    """Numbers of what a projector was fitted to, over all processes."""

    num_features: int
    """Feature vectors of the statistics, as often as they count; 0: nothing was calibrated."""
    num_captioned: int
    """Rows of the closed form; 0: it was not fitted."""


def caption_of(conversation: Conversation) -> str | None:
    """Return the answer of a conversation with exactly one item and one assistant turn."""
    answers = [m for m in conversation.messages if m.role == "assistant"]
    if len(conversation.media) != 1 or len(answers) != 1:
        return None
    return "".join(p.text for p in answers[0].parts if isinstance(p, Text)).strip() or None


def target_ids(caption: str, processor: MultiTokenProcessor, spec: ClosedFormSpec) -> list[int]:
    """Return the ids whose embeddings are the target of an item with this caption."""
    # not str.format: a caption may contain braces
    text = spec.caption_format.replace("{caption}", caption)
    return processor.tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def fit_projector(
    model: MultiTokenForConditionalGeneration,
    name: str,
    items: Iterable[FitItem],
    *,
    spec: ClosedFormSpec | None,
    batch_size: int | None = None,
) -> FitReport:
    """Fit a projector's feature statistics, the scale of its output, and its closed form.

    Standardized features then have zero mean and unit variance, and media embeddings the root mean
    square of the language model's input embeddings.

    Where one feature becomes all media embeddings of an item, embedding j is fitted to the j-th
    token of `spec.caption_format` (cut, or padded with spaces). Where an item has many features,
    each is fitted to the mean of the caption's embeddings, or (`targets: by_position`) to the token
    at the same relative position.

    Args:
        model: The model, whose projector is changed.
        name: Instance name of the modality.
        items: Distinct items of this process, each once. Read again if `group` is not linear.
        spec: Settings of the closed form; None fits the statistics alone.
        batch_size: Items encoded together; default: 4 on a CPU, whose caches a larger batch
            exceeds, else 32.

    Returns:
        Numbers of features and captioned rows, the same in all processes.

    Raises:
        MultiTokenError: In all processes, if an item of any cannot be read.
    """
    projector = model.projector(name)
    if batch_size is None:
        batch_size = 4 if model.device.type == "cpu" else 32
    sums = _sum_items(ItemSums(model, name, spec), items, batch_size)
    if sums.num_features:
        _set_statistics(projector, sums)
        _scale_output(projector, sums.scaled, embedding_rms(model), sums.device)
    if spec is not None and sums.num_captioned:
        if not all(all_gather(sums.is_linear())):
            sums = _sum_items(ItemSums(model, name, spec, standardized=True), items, batch_size)
        _solve(projector, sums, spec.penalty)
    return FitReport(sums.num_features, sums.num_captioned)


def encode_items(
    model: MultiTokenForConditionalGeneration,
    name: str,
    items: Sequence[tuple[Media, MultiTokenProcessor]],
    *,
    batch_size: int,
) -> Iterator[Features]:
    """Yield the features of a few items in order, batch by batch; cached ones are not encoded."""
    for start in range(0, len(items), batch_size):
        pairs = items[start : start + batch_size]
        yield _encode(model, name, [processor.prepare(item) for item, processor in pairs])


def _encode(
    model: MultiTokenForConditionalGeneration, name: str, prepared: Sequence[Prepared]
) -> Features:
    inputs = Collator(model.modalities, pad_id=0).inputs(name, prepared)
    return model.encode(name, send_to_device(inputs, model.device))


def _batches(items: Iterable[FitItem], batch_size: int) -> Iterator[list[FitItem]]:
    batch: list[FitItem] = []
    num_features = 0
    for item in items:
        num_features += item.prepared.num_features
        if batch and (len(batch) == batch_size or num_features > MAX_BATCH_FEATURES):
            yield batch
            batch, num_features = [], item.prepared.num_features
        batch.append(item)
    if batch:
        yield batch


def _sum_items(sums: ItemSums, items: Iterable[FitItem], batch_size: int) -> ItemSums:
    """Encode all items into the sums, and add up those of all processes."""
    error: MultiTokenError | None = None
    try:
        for batch in _batches(items, batch_size):
            features = _encode(sums.model, sums.name, [item.prepared for item in batch])
            sums.add(features, batch)
    except MultiTokenError as problem:
        error = problem
    # exchanged: a process that raised alone would leave the others waiting in a collective
    for problem in all_gather(error):
        if problem is not None:
            raise problem
    sums.reduce()
    return sums


def _set_statistics(projector: Projector, sums: ItemSums) -> None:
    if not projector.spec.standardize:
        return
    assert sums.centre is not None
    mean, squares = sums.moments / sums.num_features
    variance = (squares - mean.square()).clamp(min=0)
    # a constant feature carries nothing: it is centred, and not scaled up to its rounding noise
    scale = torch.where(variance > 1e-10, variance.clamp(min=1e-10).rsqrt(), 1.0)
    projector.feature_mean.copy_((exact(sums.centre, sums.device) + mean).float())
    projector.feature_scale.copy_(scale.float())


def _scale_output(
    projector: Projector, items: Sequence[tuple[Features, int]], rms: float, device: torch.device
) -> None:
    """Scale the projector so that its embeddings of these items have a root mean square."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for features, count in items:
        embeds = exact(projector(features), device)
        total += count * torch.stack([embeds.square().sum(), embeds.new_tensor(embeds.numel())])
    all_reduce_sum(total)
    squares, num = total.tolist()
    projector.scale_output((squares / num) ** 0.5, rms)


def _solve(projector: Projector, sums: ItemSums, penalty: float) -> None:
    """Fit the closed form to the sums, which are used up."""
    if not sums.standardized:
        scale = exact(projector.feature_scale, sums.device)
        sums.standardize(sums.shift_from(projector.feature_mean), scale)
    dim = projector.group_dim
    gram, cross = sums.gram.total, sums.cross.total
    num = gram[-1, -1].clone()
    mean_x, mean_y = gram[:dim, -1] / num, cross[-1] / num
    # centred after the sum: the mean is not known before, and a second pass would encode again
    gram, cross = gram[:dim, :dim], cross[:dim]
    gram.addr_(mean_x, num * mean_x, alpha=-1)
    cross.addr_(mean_x, num * mean_y, alpha=-1)
    gram.diagonal().add_(penalty)
    factors = torch.linalg.lu_factor(gram)
    closed_form = projector.add_closed_form()
    # in blocks: the solution of all columns would take the memory of `cross` twice more
    step = rows_of_block(dim)
    for start in range(0, cross.shape[1], step):
        block = slice(start, start + step)
        weight = torch.linalg.lu_solve(*factors, cross[:, block])
        closed_form.weight[block] = weight.T.float().to(closed_form.weight.device)
        bias = mean_y[block] - mean_x @ weight
        closed_form.bias[block] = bias.float().to(closed_form.bias.device)
