"""Attention of packed rows, segment by segment: scaled dot products that never leave a segment.

Border: one attention function and its mask for transformers' interfaces, and the switch between it
and the model's own. What stands in a pack is decided by collate.py; where it is used, by train/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from multi_token.errors import LanguageModelError
from multi_token.language_model.forward import base_language_model

SEGMENT_ATTENTION = "multi_token_segments"
"""The name under which transformers knows it."""
_BASE_IMPLEMENTATION = "sdpa"
"""What it takes the place of. A model that runs on something else was asked to, or has to."""
_FAR = 1 << 30
_recordings: list[list[bool]] = []


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment, and to what it stands behind -> [1, time, heads, dim].

    query [1, heads, time, dim], key and value [1, key_heads, time, dim]. `attention_mask` is what
    `segment_mask` made: a table of segments, or a mask as transformers' sdpa takes it, which then
    does the work alone. Nothing of size time x time is made, and nothing outside of a segment is
    multiplied.
    """
    if not _is_segment_table(attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    assert attention_mask is not None
    options["is_causal"] = True
    rows = attention_mask[0, 0].tolist()
    # split, not sliced: the gradient of a slice is as long as the pack, and each segment has some
    lengths = [stop - start for start, stop, _, _ in rows]
    number = {(start, stop): i for i, (start, stop, _, _) in enumerate(rows)}
    queries, keys, values = (x.split(lengths, 2) for x in (query, key, value))
    pieces = []
    for i, (start, stop, first, past) in enumerate(rows):
        path = [i]  # from the root of the tree to this segment
        while past > first:
            path.insert(0, number[first, past])
            _, _, first, past = rows[path[0]]
        seen, told, mask = keys[i], values[i], None
        if len(path) > 1:
            seen = torch.cat([keys[j] for j in path], 2)
            told = torch.cat([values[j] for j in path], 2)
            sees_all = torch.ones(stop - start, seen.shape[2], dtype=torch.bool, device=key.device)
            mask = sees_all.tril(seen.shape[2] - (stop - start))[None, None]
        pieces.append(
            sdpa_attention_forward(
                module, queries[i], seen, told, mask, dropout, scaling, **options
            )[0]
        )
    return torch.cat(pieces, 1), None


def segment_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """A table of segments int64 [1, 1, num_segments, 4], on the CPU, for a packed row; everywhere
    else, transformers' own mask.

    A segment goes from `start` to `stop` and stands behind what goes from `first` to `past`, which
    is nothing here: segments that share a start are told by their table, as the attention mask.

    Which positions see each other is asked of the model's own mask function. Where that is no
    causal attention inside of segments (a sliding window shorter than a segment, say), the whole
    mask is made, as it would be without this.
    """
    for found in _recordings:
        far, zero = (
            torch.tensor([_FAR], device=device),
            torch.zeros(1, dtype=torch.long, device=device),
        )
        found.append(not use_vmap and bool(mask_function(zero, zero, far, zero).all()))
    packed = batch_size == 1 and attention_mask is None and q_length == kv_length
    if packed and not use_vmap:
        table = _find_segments(mask_function, q_length, device)
        if table is not None:
            return table
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
        **options,
    )


def _is_segment_table(mask: Tensor | None) -> bool:
    """A mask of transformers is bool or floating."""
    return mask is not None and mask.dtype == torch.int64


def _find_segments(sees: Callable[..., Tensor], time: int, device: Any) -> Tensor | None:
    """The segments in which all see all before them, or None if it is not so simple.

    Looks at neighbours and at the two ends of each segment: what a window or a chunk leaves out is
    left out there first.
    """
    index = torch.arange(time, device=device)

    def seen(of: Tensor, at: Tensor) -> Tensor:
        zero = torch.zeros_like(of)
        return sees(zero, zero, of, at).expand(of.shape)

    begins = torch.ones(time, dtype=torch.bool, device=device)
    begins[1:] = ~seen(index[1:], index[:-1])
    starts = index[begins]
    stops = torch.cat([starts[1:], starts.new_tensor([time])])
    simple = torch.cat(
        [
            seen(stops - 1, starts),
            ~seen(index[:-1], index[1:]),
            ~seen(stops[1:] - 1, starts[1:] - 1),
        ]
    )
    nothing = torch.zeros_like(starts)
    table = torch.stack([starts, stops, nothing, nothing], 1)[None, None].cpu()
    return table if bool(simple.all()) else None


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
AttentionMaskInterface.register(SEGMENT_ATTENTION, segment_mask)


@contextmanager
def segment_attention_enabled(language_model: Any) -> Iterator[bool]:
    """Inside, a model that runs on `sdpa` attends by segment; yields whether it does.

    Stays on through the backward pass as well: activation checkpointing runs layers again there.
    Rows that are not packed, and going on from a cache, are what they are without it.
    """
    model = base_language_model(language_model)
    previous = model.config._attn_implementation
    try:
        if previous == _BASE_IMPLEMENTATION:
            model.set_attn_implementation(SEGMENT_ATTENTION)
        yield model.config._attn_implementation == SEGMENT_ATTENTION
    finally:
        if previous == _BASE_IMPLEMENTATION:
            model.set_attn_implementation(previous)


def segments_to_mask(language_model: Any, segments: Tensor) -> Tensor:
    """`PackedBatch`'s segments [num_segments, 4] as an attention mask of this implementation.

    Raises LanguageModelError outside of `segment_attention_enabled`: no other one understands it.
    """
    if base_language_model(language_model).config._attn_implementation != SEGMENT_ATTENTION:
        raise LanguageModelError(
            "a pack whose rows share a start was given to a language model that does not attend by "
            "segment; run it inside of `segment_attention_enabled`, or pack without `share`"
        )
    return segments[None, None].cpu()


@contextmanager
def recording_mask_reach() -> Iterator[list[bool]]:
    """Inside, of each mask that is made for rows: whether it lets a position see any distance back.

    So a sliding window is found, of whatever length, where a model attends by segment.
    """
    found: list[bool] = []
    _recordings.append(found)
    try:
        yield found
    finally:
        _recordings.remove(found)
