"""Logits of one step -> a token for each row, by that row's own options and seed.

Border: tensors and options; which rows there are, and who is told, stands in running.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multi_token.serve.engines.base import SamplingParams, TokenEvent

MIN_TEMPERATURE = 1e-5
"""A temperature up to this is greedy: dividing by less leaves no numbers."""
_NUM_TOP_P_CANDIDATES = 1024
"""Ids that are looked at for top-p before the whole vocabulary is sorted."""


def greedy(scores: Tensor) -> tuple[list[int], list[bool]]:
    """scores [rows, vocabulary] -> the likeliest id of each row, and whether it is a number at all.

    One look at the scores and one transfer; ids are exact as float32 up to 2**24.
    """
    values, ids = scores.max(-1)
    both = torch.stack([values.float(), ids.float()]).tolist()
    return [int(i) for i in both[1]], [abs(value) < float("inf") for value in both[0]]


def sample(scores: Tensor, options: SamplingParams, generator: torch.Generator) -> int:
    """scores [vocabulary] -> an id, drawn with temperature, then top-k, then top-p.

    In the order and with the meaning of transformers' warpers. One uniform number of `generator`
    (on the CPU) is used for each token, so a seed says the same on every device.
    """
    probabilities = torch.softmax(scores.float() / options.temperature, -1)
    num_ids = len(probabilities)
    ids: Tensor | None = None
    if 0 < options.top_k < num_ids:
        probabilities, ids = probabilities.topk(options.top_k)
        probabilities = probabilities / probabilities.sum()
    if options.top_p < 1.0:
        if ids is None:
            first, ids = probabilities.topk(min(_NUM_TOP_P_CANDIDATES, num_ids))
            if float(first.sum()) < options.top_p:
                first, ids = probabilities.sort(descending=True)
            probabilities = first
        before = probabilities.cumsum(0) - probabilities
        num_kept = max(1, int((before < options.top_p).sum()))
        probabilities = probabilities[:num_kept]
    total = probabilities.cpu().double().cumsum(0)
    wanted = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    # rounding must not lead behind the last id that has a probability
    last = torch.searchsorted(total, total[-1])
    index = int(torch.searchsorted(total, wanted, right=True).minimum(last))
    return index if ids is None else int(ids[index])


def token_event(scores: Tensor, token_id: int, num_top: int) -> TokenEvent:
    """scores [vocabulary] and the chosen id -> Token with log-probabilities (natural)."""
    logprobs = torch.log_softmax(scores.float(), -1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        values, ids = logprobs.topk(min(num_top, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenEvent(token_id, float(logprobs[token_id]), top)
