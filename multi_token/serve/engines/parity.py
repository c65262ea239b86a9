"""Startup checks: a faster path must give the tokens and log-probabilities of `generate`.

    1. `generate` runs a few short prompts, each alone: the reference.
    2. The path under test runs the same prompts in batches, as it does for clients.
    3. `logprob_mismatch` compares each step until the ids differ.
    4. The first batching mode without a mismatch is used; `generate` itself always remains.

A check that raises counts as failed and is logged with its traceback, since a defect of ours would
otherwise only make the server slower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from multi_token.language_model.probe import MODEL_FAULTS
from multi_token.serve.engines.base import (
    EngineEvent,
    PrefixCacheStats,
    Prompt,
    SamplingParams,
    TokenEvent,
)
from multi_token.serve.engines.fallback import collect_tokens, generate_one, smoke_prompt
from multi_token.serve.engines.local.decode_loop import (
    DecodeBatch,
    DecodeParams,
    logits_processors,
)
from multi_token.serve.engines.local.prefix_cache import PrefixCache
from multi_token.serve.engines.request import GenerationRequest
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

BatchingMode = Literal["continuous", "shrinking", "static"]
"""`continuous`: requests join and leave between decode steps. `shrinking`: they only leave, and the
next batch starts when all have left. `static`: the batch runs to its end through `generate`."""
_LOG = logging.getLogger(__name__)
_NUM_TOP = 3


def logprob_tolerance(dtype: torch.dtype, *, is_remote: bool = False) -> float:
    """Return the allowed difference of log-probabilities for weights of a dtype."""
    # Within one process kernels and batch shapes differ; between two machines device and inference
    # library differ as well.
    if dtype in (torch.float32, torch.float64):
        return 0.02 if is_remote else 1e-3
    return 0.5 if is_remote else 0.2


def logprob_mismatch(
    tokens: Sequence[TokenEvent], expected: Sequence[TokenEvent], tolerance: float
) -> str | None:
    """Return how generated tokens differ from the expected ones, or None.

    Log-probabilities are compared up to the first step with another id. There the expected id must
    be as probable as the chosen one within the tolerance; later steps continue another text and are
    not compared.
    """
    # Ids alone are not enough: a model that differs a little, such as the one before an adapter was
    # merged, often starts with the same ids.
    if len(tokens) != len(expected):
        return f"got {len(tokens)} tokens, expected {len(expected)}"
    for token, other in zip(tokens, expected, strict=True):
        if token.logprob is None or other.logprob is None:
            return "got no log-probabilities"
        # `not <=` instead of `>`: NaN is a mismatch.
        for (_, value), (_, expected_value) in zip(token.top, other.top, strict=False):
            if not abs(value - expected_value) <= tolerance:
                return (
                    f"got log-probability {value:.3f} among the most probable ids, "
                    f"expected {expected_value:.3f}"
                )
        if token.id != other.id:
            runner_up = dict(token.top).get(other.id, -torch.inf)
            if token.logprob - runner_up <= tolerance:
                return None
            ids, expected_ids = [t.id for t in tokens], [t.id for t in expected]
            return f"got ids {ids}, expected {expected_ids}"
        if not abs(token.logprob - other.logprob) <= tolerance:
            return (
                f"got id {other.id} with log-probability {token.logprob:.3f}, "
                f"expected {other.logprob:.3f}"
            )
    return None


@dataclass
class ParityCase:
    """A prompt, the tokens of `generate`, and those of the path under test."""

    prompt: Prompt
    num_new: int
    events: list[EngineEvent] = field(default_factory=list)
    expected: list[TokenEvent] = field(default_factory=list)

    @property
    def options(self) -> SamplingParams:
        return SamplingParams(self.num_new, num_logprobs=_NUM_TOP, ignore_eos=True)

    def new_request(self) -> GenerationRequest:
        self.events = []
        return GenerationRequest(
            "startup check", self.prompt, self.options, self.events.append, frozenset()
        )


def find_batching_mode(model: MultiTokenForConditionalGeneration) -> BatchingMode:
    """Return the best batching mode that reproduces `generate` on three short prompts.

    The prompts have several lengths where the model supports left padding. Each mode runs as for
    clients: a request ends while others go on, a longer one joins, and a shorter one.
    """
    cases = _parity_cases(model)
    if not _passes("generate", lambda: _generate_expected(model, cases)):
        return "static"

    def check(what: str, *groups: Sequence[ParityCase], add: bool) -> bool:
        # The parameters are read inside of the check: that may raise a fault of the model too.
        return _passes(what, lambda: _mismatch(DecodeParams(model, allow_add=add), *groups))

    if model.capabilities.supports_left_padding and check(
        "continuous batches", *([case] for case in cases), add=True
    ):
        return "continuous"
    return "shrinking" if check("shrinking batches", cases, add=False) else "static"


def supports_prefix_cache(model: MultiTokenForConditionalGeneration) -> bool:
    """True if prompts with a cached prefix reproduce `generate`. For the mode `continuous`.

    Three batches: a prompt that fills the cache; one that extends it, beside a shorter one without
    a cached prefix; and the extended prompt again.
    """

    def mismatch() -> str | None:
        short, full = (ParityCase(case.prompt, 2) for case in _parity_cases(model)[:2])
        ids, prompt = full.prompt.input_ids, full.prompt
        extended = ParityCase(replace(prompt, input_ids=torch.cat([ids, ids[-4:].flip(0)])), 3)
        _generate_expected(model, [short, full, extended])
        stats = PrefixCacheStats()
        cache = PrefixCache(4 * len(ids), stats)
        params = DecodeParams(model, allow_add=True, prefix_cache=cache)
        for cases in ([full], [short, extended], [extended]):
            if (reason := _mismatch(params, cases)) is not None:
                return reason
        # The last prompt hits on all tokens but its last. Otherwise nothing was stored, and the
        # check has shown nothing.
        expected_hits = len(extended.prompt.input_ids) - 1
        if stats.num_hits < expected_hits:
            return f"{stats.num_hits} prompt tokens were cached, expected {expected_hits} or more"
        return None

    return _passes("the prefix cache", mismatch)


def _passes(what: str, check: Callable[[], str | None]) -> bool:
    """Run a check; a fault of the model counts as failed."""
    try:
        reason = check()
    except (*MODEL_FAULTS, ServeError):
        _LOG.warning("startup check of %s raised", what, exc_info=True)
        return False
    # A property of the language model, not a fault: a recurrent state, for example.
    if reason is not None:
        _LOG.info("startup check of %s: %s", what, reason)
    return reason is None


def _generate_expected(
    model: MultiTokenForConditionalGeneration, cases: Sequence[ParityCase]
) -> str | None:
    """Fill in the tokens of `generate`; return a reason why they are no reference."""
    for case in cases:
        case.expected = generate_one(model, case.prompt, case.options)
    # Started by ids, `generate` applies its processors to the prompt's ids too. The decode loop
    # has no ids of a prompt, only embeddings.
    if model.capabilities.prefill_mode == "ids" and logits_processors(model.language_model):
        return "the generation config looks at the prompt's ids"
    return None


def _mismatch(params: DecodeParams, *groups: Sequence[ParityCase]) -> str | None:
    """Run groups of prompts, each of which joins after a step of the previous ones.

    Returns the first difference from `generate`, or None.
    """
    batch = DecodeBatch(params)
    for cases in groups:
        batch.add([case.new_request() for case in cases])
        if params.allow_add and not batch.is_paddable:
            return "the KV cache has layers that cannot be padded"
        batch.decode_step()
    while batch.requests:
        batch.decode_step()
    weight: Tensor = params.model.get_input_embeddings().weight  # type: ignore[assignment]
    tolerance = logprob_tolerance(weight.dtype)
    for case in chain(*groups):
        reason = logprob_mismatch(collect_tokens(case.events), case.expected, tolerance)
        if reason is not None:
            return reason
    return None


def _parity_cases(model: MultiTokenForConditionalGeneration) -> list[ParityCase]:
    """A prompt with media, and two of text only: shorter ends of it, or of equal length."""
    full = smoke_prompt(model, num_media_tokens=3)
    ids = full.input_ids
    if model.capabilities.supports_left_padding:
        parts = [ids[-max(1, len(ids) // 3) :], ids[-max(1, len(ids) // 2) :]]
    else:
        parts = [ids.roll(1), ids.roll(2)]
    short, middle = (Prompt(part, (), (), ()) for part in parts)
    return [ParityCase(short, 5), ParityCase(full, 2), ParityCase(middle, 4)]
