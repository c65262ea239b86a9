"""Startup checks: the differences from `generate` that count, and the result of a failed check."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from multi_token.generate import generate_ids
from multi_token.serve.engines.base import SamplingParams, TokenEvent
from multi_token.serve.engines.parity import (
    find_batching_mode,
    logprob_mismatch,
    logprob_tolerance,
    supports_prefix_cache,
)
from tests.serve.engine_parts import Client, composed, prompt_of, sample_of


def tokens(*pairs: tuple[int, float | None], top: Sequence[float] = ()) -> list[TokenEvent]:
    most_probable = tuple((100 + rank, value) for rank, value in enumerate(top))
    return [TokenEvent(id, logprob, most_probable) for id, logprob in pairs]


def test_tokens_within_the_tolerance_are_equal() -> None:
    expected = tokens((5, -0.1), (6, -0.2))
    assert logprob_mismatch(tokens((5, -0.1005), (6, -0.2)), expected, 1e-3) is None
    assert "id 6 with log-probability -0.300, expected -0.200" in str(
        logprob_mismatch(tokens((5, -0.1), (6, -0.3)), expected, 1e-3)
    )
    assert "got 1 tokens, expected 2" in str(logprob_mismatch(expected[:1], expected, 1e-3))
    assert "no log-probabilities" in str(logprob_mismatch(tokens((5, None)), expected[:1], 1e-3))


def test_nan_is_never_within_the_tolerance() -> None:
    expected = tokens((5, -0.1))
    assert logprob_mismatch(tokens((5, float("nan"))), expected, 1e9) is not None
    ranked = tokens((5, -0.1), top=[-0.1, float("nan")])
    assert logprob_mismatch(ranked, tokens((5, -0.1), top=[-0.1, -2.0]), 1e9) is not None


def test_another_id_is_equal_only_in_a_tie_and_ends_the_comparison() -> None:
    expected = tokens((5, -0.7), (6, -0.2))
    tie = [TokenEvent(9, -0.7, ((9, -0.7), (5, -0.7001))), TokenEvent(3, -4.0)]
    assert logprob_mismatch(tie, expected, 1e-3) is None
    parted = [TokenEvent(9, -0.6, ((9, -0.6), (5, -0.7))), TokenEvent(3, -4.0)]
    assert "got ids [9, 3], expected [5, 6]" in str(logprob_mismatch(parted, expected, 1e-3))
    absent = [TokenEvent(9, -0.7, ((9, -0.7),)), TokenEvent(3, -4.0)]
    assert "expected [5, 6]" in str(logprob_mismatch(absent, expected, 1e-3))


def test_the_most_probable_ids_are_compared_where_both_have_them() -> None:
    expected = tokens((5, -0.1), top=[-0.1, -2.5, -3.0])
    assert logprob_mismatch(tokens((5, -0.1), top=[-0.1, -2.5]), expected, 1e-3) is None
    wrong = logprob_mismatch(tokens((5, -0.1), top=[-0.1, -2.7]), expected, 1e-3)
    assert "-2.700 among the most probable ids, expected -2.500" in str(wrong)


def test_tolerances_grow_with_rounding_and_distance() -> None:
    near, far = (logprob_tolerance(torch.float32, is_remote=r) for r in (False, True))
    half = logprob_tolerance(torch.bfloat16)
    assert near < far < half < logprob_tolerance(torch.float16, is_remote=True)
    assert near == logprob_tolerance(torch.float64)


@pytest.fixture
def own_llama(families: ModuleType, tmp_path_factory: Any) -> Any:
    """A tiny Llama that a test may change, its capabilities probed before that."""
    model = composed(tmp_path_factory.mktemp("lm"), families, "Llama")
    assert model.capabilities.supports_left_padding
    return model


def test_a_model_whose_rows_see_each_other_is_not_batched_continuously(
    own_llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Each row gets a part of the batch's mean: right alone, wrong in a batch."""

    def mix(_: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
        return (inputs[0] + 0.5 * (inputs[0].mean(0, keepdim=True) - inputs[0]),)

    hook = own_llama.language_model.model.norm.register_forward_pre_hook(mix)
    try:
        with caplog.at_level(logging.INFO, "multi_token.serve"):
            assert find_batching_mode(own_llama) == "static"
    finally:
        hook.remove()
    messages = [record.getMessage() for record in caplog.records]
    assert [m for m in messages if "continuous batches" in m and "expected" in m]
    assert find_batching_mode(own_llama) == "continuous"


def test_a_check_that_raises_is_logged_with_its_traceback(
    own_llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that cannot be continued: the first prefill works, each step raises."""

    def refuse(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        past = inputs.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise RuntimeError("no cache here")

    hook = own_llama.language_model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        with caplog.at_level(logging.WARNING, "multi_token.serve"):
            assert find_batching_mode(own_llama) == "static"
            assert not supports_prefix_cache(own_llama)
    finally:
        hook.remove()
    raised = [record for record in caplog.records if record.exc_info]
    assert raised and all("raised" in record.getMessage() for record in raised)


def test_a_defect_of_ours_is_not_swallowed(own_llama: Any, monkeypatch: Any) -> None:
    class Defect(Exception):
        pass

    def broken(*_: Any, **__: Any) -> None:
        raise Defect

    monkeypatch.setattr(own_llama.language_model, "forward", broken)
    with pytest.raises(Defect):
        find_batching_mode(own_llama)


def test_a_static_batch_gives_the_tokens_of_generate(
    own_llama: Any, start_local: Any, monkeypatch: Any
) -> None:
    sample = sample_of(own_llama, "What is a fruit?")
    expected = generate_ids(own_llama, [sample], max_new_tokens=6)[0].tolist()
    engine = start_local(own_llama)
    engine.stop()
    engine._mode = "static"
    engine.start()
    client = Client()
    engine.submit("one", prompt_of(own_llama, sample), SamplingParams(6), client)
    assert client.ids == expected
    assert engine.cache_usage == 0.0
