"""Tokens are sampled as in transformers, and depend on the seed alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from multi_token.serve.engines.base import SamplingParams
from multi_token.serve.engines.sampler import greedy, sample, token_event


def scores(num_ids: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_ids, generator=torch.Generator().manual_seed(seed))


def by_transformers(logits: Tensor, options: SamplingParams) -> Tensor:
    """Probabilities [vocabulary] after transformers' warpers."""
    rows = TemperatureLogitsWarper(options.temperature)(None, logits[None])  # type: ignore[arg-type]
    if options.top_k:
        rows = TopKLogitsWarper(options.top_k)(None, rows)  # type: ignore[arg-type]
    if options.top_p < 1:
        rows = TopPLogitsWarper(options.top_p)(None, rows)  # type: ignore[arg-type]
    return rows[0].softmax(-1)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [(0, 1.0, 1.0), (5, 1.0, 0.7), (0, 0.8, 1.3), (7, 0.6, 1.0), (0, 0.01, 1.0), (1, 1.0, 2.0)],
)
def test_frequencies_of_tokens_are_those_of_transformers(
    top_k: int, top_p: float, temperature: float
) -> None:
    options = SamplingParams(1, temperature, top_p, top_k)
    logits = scores(40)
    expected = by_transformers(logits, options)
    generator = torch.Generator().manual_seed(0)
    num_draws = 4000
    drawn = torch.tensor([sample(logits, options, generator) for _ in range(num_draws)])
    often = torch.bincount(drawn, minlength=40) / num_draws
    assert bool((often[expected == 0] == 0).all())
    assert float((often - expected).abs().max()) < 0.03


def test_a_flat_distribution_is_sorted_completely_for_top_p() -> None:
    """Top-p needs more ids here than the first candidates."""
    logits = torch.zeros(5000)
    logits[:10] = -20.0
    generator = torch.Generator().manual_seed(0)
    options = SamplingParams(1, 1.0, top_p=0.99)
    drawn = {sample(logits, options, generator) for _ in range(2000)}
    assert len(drawn) > 1500
    assert min(drawn) >= 10


def test_the_seed_alone_decides_the_tokens() -> None:
    options = SamplingParams(1, 1.0)
    first, second = (
        [sample(scores(300, i), options, generator) for i in range(20)]
        for generator in (torch.Generator().manual_seed(5), torch.Generator().manual_seed(5))
    )
    assert first == second
    other = torch.Generator().manual_seed(6)
    assert [sample(scores(300, i), options, other) for i in range(20)] != first


def test_greedy_gives_the_most_probable_id_and_marks_nan() -> None:
    rows = torch.stack([scores(50), scores(50, 1), scores(50, 2), torch.full((50,), -torch.inf)])
    rows[1, 7] = torch.nan
    rows[2, 3] = -torch.inf
    ids, finite = greedy(rows)
    assert finite == [True, False, True, False]
    assert [ids[0], ids[2]] == [int(rows[0].argmax()), int(rows[2].argmax())]


def test_logprobs_are_over_all_ids() -> None:
    logits = scores(50)
    token = token_event(logits, 9, 2)
    expected = logits.log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[9]))
    assert [i for i, _ in token.top] == logits.topk(2).indices.tolist()
    assert token_event(logits, 9, 0).top == ()
