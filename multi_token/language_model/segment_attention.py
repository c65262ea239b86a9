"""Segment attention: packed rows attend inside their own segment, without a mask.

A pack [a a a | b b | c c c c] needs no mask of 9 x 9: three causal calls of 3, 2 and 4 positions
give the same result. On CUDA one kernel of torch (`varlen_attn`) computes all of them. Elsewhere,
and where segments share a prefix, each segment is a call of `sdpa`. Segments come as a table int64
[1, 1, num_segments, 4] in place of a mask:

    start, stop     positions of the segment
    first, past     positions of the prefix that it continues; empty (0, 0) for a plain segment

Which positions see each other is asked of the model's own mask function, so that sliding windows
and chunks are respected: where a pack is not causal attention per segment, the full mask is made.
`collate.py` lays packs out; `train/` turns segment attention on.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from multi_token.errors import LanguageModelError
from multi_token.language_model.capabilities import UNLIMITED_REACH, Capabilities
from multi_token.language_model.forward import base_language_model
from multi_token.types import BatchCounts

SEGMENT_ATTENTION = "multi_token_segments"
"""Name of the attention implementation in transformers' registry."""
_BASE_IMPLEMENTATION = "sdpa"
"""The implementation to replace. Another one was asked for, or the model needs it (soft caps)."""


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
    """Causal attention inside each segment and to its prefixes -> [1, time, heads, dim].

    query [1, heads, time, dim], keys, values [1, key_heads, time, dim]. `attention_mask`: a segment
    table, or a mask of transformers, which then does the work alone.
    """
    # transformers' own masks are bool or floating
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    rows = attention_mask[0, 0].tolist()
    if not dropout and not any(past for _, _, _, past in rows):
        output = _one_kernel(query, key, value, scaling, options)
        if output is not None:
            return output, None
    options["is_causal"] = True
    # split, not slices: autograd fills the gradient of a slice up to the length of the pack, once
    # per segment, which makes the backward pass quadratic in the number of segments.
    lengths = [stop - start for start, stop, _, _ in rows]
    number = {(start, stop): i for i, (start, stop, _, _) in enumerate(rows)}
    queries, keys, values = (x.split(lengths, 2) for x in (query, key, value))
    outputs = []
    for i, (start, stop, first, past) in enumerate(rows):
        path = [i]  # from the root of the tree to this segment
        while past > first:
            path.insert(0, number[first, past])
            _, _, first, past = rows[path[0]]
        segment_keys, segment_values, mask = keys[i], values[i], None
        if len(path) > 1:
            segment_keys = torch.cat([keys[j] for j in path], 2)
            segment_values = torch.cat([values[j] for j in path], 2)
            # `is_causal` aligns the diagonal with the first key; after a prefix, the diagonal
            # starts at the prefix's end, which only a mask can say.
            length, total = stop - start, segment_keys.shape[2]
            sees_all = torch.ones(length, total, dtype=torch.bool, device=key.device)
            mask = sees_all.tril(total - length)[None, None]
        outputs.append(
            sdpa_attention_forward(
                module, queries[i], segment_keys, segment_values, mask, dropout, scaling, **options
            )[0]
        )
    return torch.cat(outputs, 1), None


def _one_kernel(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, options: Mapping[str, Any]
) -> Tensor | None:
    """Return attention by `varlen_attn` [1, time, heads, dim], or None where it does not run."""
    # transformers hands these on to each layer; they are on the device already
    borders, longest = options.get("cu_seq_lens_q"), options.get("max_length_q")
    if borders is None or longest is None or options.get("position_bias") is not None:
        return None
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        # as autocast does for sdpa: norms of queries and keys may have left them in float32
        dtype = torch.get_autocast_dtype(query.device.type)
    if not has_varlen_kernel(query.device, dtype, query.shape[-1], value.shape[-1]):
        return None
    queries, keys, values = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    return varlen_attention(queries, keys, values, borders, longest, scaling)[None]


def has_varlen_kernel(
    device: torch.device, dtype: torch.dtype, width: int, value_width: int | None = None
) -> bool:
    """Return True if `varlen_attn` runs on this device for heads of this width and precision."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.float16, torch.bfloat16)
        and _varlen_parameters() >= {"window_size", "scale"}
        # the limits of its flash attention
        and width % 8 == 0
        and width <= 256
        and value_width in (None, width)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    longest: int,
    scaling: float | None = None,
) -> Tensor:
    """Causal attention inside each segment, by torch's kernel -> [time, heads, dim].

    query [time, heads, dim], keys, values [time, key_heads, dim] in half precision; borders int32
    [num_segments + 1], on their device; `longest`: length of the longest segment.
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1 and "enable_gqa" in _varlen_parameters():
        options["enable_gqa"] = True
    elif num_groups > 1:
        key, value = (x.repeat_interleave(num_groups, 1) for x in (key, value))
    output: Any = varlen_attn(query, key, value, borders, borders, longest, longest, **options)
    return output


@cache
def _varlen_parameters() -> frozenset[str]:
    """Return the parameters of `varlen_attn`: none in a torch without it (before 2.10)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def describe_pack_attention(
    language_model: Any, capabilities: Capabilities, device: torch.device, dtype: torch.dtype
) -> str:
    """Return a line on how packs are attended to; `dtype`: that of the run's autocast.

    A dense mask takes memory by the square of a pack's tokens, which nothing else would tell.
    """
    config = base_language_model(language_model).config
    implementation = config._attn_implementation
    if implementation.startswith("flash_attention"):
        return "packs: one kernel a layer (flash attention)"
    if implementation == "flex_attention":
        return "packs: flex attention"
    if not capabilities.supports_segment_attention:
        return (
            f"packs: a dense mask in each layer, since {capabilities.name} does not attend by "
            f"segment (it runs on {implementation}); memory and time grow with the square of "
            "train.pack_tokens"
        )
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kernel = has_varlen_kernel(device, dtype, width)
    how = "one kernel a layer (varlen_attn)" if kernel else "a call for each segment and layer"
    if capabilities.segment_reach < UNLIMITED_REACH:
        how += (
            f"; with a row of more than {capabilities.segment_reach} tokens, the reach of its "
            "layers, a dense mask"
        )
    return f"packs: {how}"


def segment_mask(*, mask_function: Callable[..., Tensor], **options: Any) -> Tensor | None:
    """Return a segment table for a packed row, on the CPU; else transformers' own mask.

    The table has no prefixes: rows that share one come with a table of their own, which
    transformers passes on as it is.
    """
    time = options["q_length"]
    is_whole = time == options["kv_length"] and options.get("attention_mask") is None
    # With `use_vmap`, a mask function takes single positions, not the tensors that we pass.
    if options["batch_size"] == 1 and is_whole and not options.get("use_vmap"):
        table = _find_segments(mask_function, time, options.get("device", "cpu"))
        if table is not None:
            return table
    return sdpa_mask(mask_function=mask_function, **options)


def _find_segments(sees: Callable[..., Tensor], time: int, device: Any) -> Tensor | None:
    """Return the table of causal segments, or None if the mask function allows less or more.

    `sees(batch, head, query, key)` is transformers' mask function.
    """
    # Three comparisons per segment instead of time x time: windows and chunks cut the farthest
    # pair of a segment first, and a leak between neighbours starts at the pair that touches.
    index = torch.arange(time, device=device)

    def seen(query: Tensor, key: Tensor) -> Tensor:
        zero = torch.zeros_like(query)
        return sees(zero, zero, query, key).expand(query.shape)

    begins = torch.ones(time, dtype=torch.bool, device=device)
    begins[1:] = ~seen(index[1:], index[:-1])
    starts = index[begins]
    stops = torch.cat([starts[1:], starts.new_tensor([time])])
    is_causal = torch.cat(
        [
            seen(stops - 1, starts),  # a segment's last position sees its first
            ~seen(index[:-1], index[1:]),  # no position sees the next one
            ~seen(stops[1:] - 1, starts[1:] - 1),  # a segment's last position: not the one before
        ]
    )
    nothing = torch.zeros_like(starts)
    # Copied to the CPU once per forward, so that no layer has to wait for the device.
    table = torch.stack([starts, stops, nothing, nothing], 1)[None, None].cpu()
    return table if bool(is_causal.all()) else None


def _register() -> None:
    """Register attention and mask with transformers, unless a variant of ours is there already."""
    # `train/compile.py` registers an attention that torch.compile skips, maybe before this.
    if SEGMENT_ATTENTION not in AttentionInterface():
        AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    if SEGMENT_ATTENTION not in AttentionMaskInterface():
        AttentionMaskInterface.register(SEGMENT_ATTENTION, segment_mask)


@contextmanager
def segment_attention_enabled(language_model: Any) -> Iterator[bool]:
    """Within, a model that runs on `sdpa` uses segment attention; yields True if it does.

    Must stay on through the backward pass: activation checkpointing runs layers again there.
    Padded rows, and generation from a KV cache, are computed as without it.
    """
    model = base_language_model(language_model)
    previous = model.config._attn_implementation
    try:
        if previous == _BASE_IMPLEMENTATION:
            _register()
            model.set_attn_implementation(SEGMENT_ATTENTION)
        yield model.config._attn_implementation == SEGMENT_ATTENTION
    finally:
        if previous == _BASE_IMPLEMENTATION:
            model.set_attn_implementation(previous)


def segments_to_mask(
    language_model: Any, counts: BatchCounts, find_reach: Callable[[], int]
) -> Tensor | None:
    """Return the segment table of a pack, or None if the model has to make its mask itself.

    `find_reach`: `Capabilities.segment_reach`. The table is made on the CPU of what the collator
    counted, so that neither we nor transformers look for segments on the device. Raises
    LanguageModelError for shared prefixes outside of `segment_attention_enabled`: every other
    implementation would take the table for a mask.
    """
    if base_language_model(language_model).config._attn_implementation != SEGMENT_ATTENTION:
        if not counts.shares_prefix:
            return None
        raise LanguageModelError(
            "a pack whose rows share a prefix was given to a language model without segment "
            "attention; run it inside of `segment_attention_enabled`, or pack without `share`"
        )
    if not counts.shares_prefix and max(counts.lengths) > find_reach():
        return None
    return torch.tensor(counts.segments, device="cpu")[None, None]


@contextmanager
def recording_mask_reach() -> Iterator[list[int]]:
    """Within, list the reach of each mask made under segment attention.

    The reach is the largest length at which a causal segment sees all of itself, wherever it lies:
    `UNLIMITED_REACH`, or that of a sliding window. It is 1 for chunks, whose borders cut segments.
    """
    reach: list[int] = []

    def recording_mask(*, mask_function: Callable[..., Tensor], **options: Any) -> Tensor | None:
        reach.append(0 if options.get("use_vmap") else _reach(mask_function, options.get("device")))
        return segment_mask(mask_function=mask_function, **options)

    _register()
    AttentionMaskInterface.register(SEGMENT_ATTENTION, recording_mask)
    try:
        yield reach
    finally:
        AttentionMaskInterface.register(SEGMENT_ATTENTION, segment_mask)


def _reach(mask_function: Callable[..., Tensor], device: Any) -> int:
    zero = torch.zeros(1, dtype=torch.long, device=device)

    def sees(query: int, key: int) -> bool:
        return bool(mask_function(zero, zero, zero + query, zero + key).all())

    if sees(UNLIMITED_REACH, 0):
        return UNLIMITED_REACH
    # one more than the last position that sees the first one
    length = bisect_left(range(UNLIMITED_REACH), True, key=lambda query: not sees(query, 0))
    return length if sees(length, 1) else min(length, 1)
