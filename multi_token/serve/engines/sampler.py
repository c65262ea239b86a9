"""Sampler: logits of one decode step -> one token per request, with its parameters and seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multi_token.serve.engines.base import SamplingParams, TokenEvent

MIN_TEMPERATURE = 1e-5
"""Temperatures up to this value are greedy: division by a smaller one overflows float32."""
_NUM_TOP_P_CANDIDATES = 1024
"""Ids considered for top-p before the complete vocabulary is sorted."""


def greedy(scores: Tensor) -> tuple[list[int], list[bool]]:
    """scores [rows, vocabulary] -> most probable id of each row, and True where it is finite."""
    # `max` propagates NaN, so a finite maximum means that the row holds no NaN.
    values, ids = scores.max(-1)
    # One transfer for both: each `tolist` waits for the device. float32 holds ids up to 2**24.
    both = torch.stack([values.float(), ids.float()]).tolist()
    return [int(i) for i in both[1]], [abs(value) < float("inf") for value in both[0]]


def sample(scores: Tensor, options: SamplingParams, generator: torch.Generator) -> int:
    """scores [vocabulary] -> an id, sampled with temperature, then top-k, then top-p.

    Order and meaning are those of transformers' logits warpers. Each token takes one uniform number
    from `generator` on the CPU, so a seed gives the same tokens on every device.
    """
    probabilities = torch.softmax(scores.float() / options.temperature, -1)
    num_ids = len(probabilities)
    ids: Tensor | None = None
    if 0 < options.top_k < num_ids:
        probabilities, ids = _read(*probabilities.topk(options.top_k))
        probabilities = probabilities / probabilities.sum()
    if options.top_p < 1.0:
        if ids is None:
            # A sort of 150,000 ids costs more than a decode step of a small model; top-p rarely
            # needs more than the first candidates.
            first, ids = _read(*probabilities.topk(min(_NUM_TOP_P_CANDIDATES, num_ids)))
            if float(first.sum()) < options.top_p:
                first, ids = _read(*probabilities.sort(descending=True))
            probabilities = first
        before = probabilities.cumsum(0) - probabilities
        num_kept = max(1, int((before < options.top_p).sum()))
        probabilities = probabilities[:num_kept]
    # float64: in float32 the sum over a large vocabulary loses the least probable ids.
    total = probabilities.cpu().double().cumsum(0)
    wanted = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    # Rounding must not select an id of probability 0 after the last possible one.
    last = torch.searchsorted(total, total[-1])
    index = int(torch.searchsorted(total, wanted, right=True).minimum(last))
    return index if ids is None else int(ids[index])


def _read(probabilities: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return both on the CPU, by one transfer; float32 holds ids up to 2**24."""
    both = torch.stack([probabilities, ids.float()]).cpu()
    return both[0], both[1].long()


def token_event(scores: Tensor, token_id: int, num_top: int) -> TokenEvent:
    """scores [vocabulary] and the chosen id -> TokenEvent with natural log-probabilities."""
    logprobs = torch.log_softmax(scores.float(), -1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        values, ids = logprobs.topk(min(num_top, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenEvent(token_id, float(logprobs[token_id]), top)


def force_tokens(scores: Tensor, ids: Sequence[int]) -> Tensor:
    """scores [rows, vocabulary] -> scores whose greedy choice is `ids`."""
    chosen = torch.tensor(ids, device=scores.device)[:, None]
    return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
