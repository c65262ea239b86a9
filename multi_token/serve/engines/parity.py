"""Whether rows may leave a batch, and join one, while it is answered: found by answering a few.

Border: the trial only. stepping.py answers so, static.py asks which way it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from multi_token.serve.engines.base import EngineEvent, Prompt, SamplingParams, TokenEvent
from multi_token.serve.engines.fallback import collect_tokens, generate_one, smoke_prompt
from multi_token.serve.engines.local.decode_loop import DecodeBatch, logits_processors
from multi_token.serve.engines.local.prefix_cache import PrefixCache
from multi_token.serve.engines.prefix_hits import PrefixCacheStats
from multi_token.serve.engines.scheduler import GenerationRequest

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

BatchingMode = Literal["join", "leave", "stay"]
"""join: rows leave when they have ended and others join. leave: rows leave, and the next batch
begins when all have left. stay: transformers' own `generate`, in which all stay until the last has
ended."""
_LOG = logging.getLogger(__name__)
_NUM_TOP = 3


@dataclass
class ParityCase:
    """A prompt, and what `generate` answers alone."""

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
            "trial", self.prompt, self.options, self.events.append, frozenset()
        )


def find_batching_mode(model: MultiTokenForConditionalGeneration, filler_id: int) -> BatchingMode:
    """The best way in which short prompts get the tokens and log-probabilities of `generate`.

    Of several lengths where the model can be padded: each way runs as it will for clients, with a
    row that ends while others go on, one that joins and is longer, and one that is shorter.
    """
    cases = _parity_cases(model)
    if not _passes(lambda: _generate_expected(model, cases)):
        return "stay"

    def holds(answer: Callable[[DecodeBatch, Sequence[ParityCase]], bool], *, joins: bool) -> bool:
        decode_batch = DecodeBatch(model, filler_id, allow_add=joins)
        return answer(decode_batch, cases) and _match_expected(model, cases)

    if model.capabilities.supports_left_padding and _passes(
        lambda: holds(_run_joining, joins=True)
    ):
        return "join"
    return "leave" if _passes(lambda: holds(_run_leaving, joins=False)) else "stay"


def supports_prefix_cache(model: MultiTokenForConditionalGeneration, filler_id: int) -> bool:
    """Whether prompts get the tokens and log-probabilities of `generate` also where what they begin
    with has been read before: one that goes on behind another's end, beside a shorter one that
    shares nothing, and one that comes again. For a model whose rows may join.
    """

    def holds() -> bool:
        short, whole = (ParityCase(case.prompt, 2) for case in _parity_cases(model)[:2])
        ids, prompt = whole.prompt.input_ids, whole.prompt
        longer = ParityCase(replace(prompt, input_ids=torch.cat([ids, ids[-4:].flip(0)])), 3)
        _generate_expected(model, [short, whole, longer])
        hits = PrefixCacheStats()
        kept = PrefixCache(4 * len(ids), hits)
        for cases in ([whole], [short, longer], [longer]):
            decode_batch = DecodeBatch(model, filler_id, allow_add=True, prefix_cache=kept)
            decode_batch.add([case.new_request() for case in cases])
            _run_to_end(decode_batch)
            if not _match_expected(model, cases):
                return False
        # of the longer one the second time all but the last
        return hits.num_hits >= len(longer.prompt.input_ids) - 1

    return _passes(holds)


def may_read_beside(model: MultiTokenForConditionalGeneration, filler_id: int) -> bool:
    """Whether prompts may be read while others are answered, in two threads: on a CPU of which
    torch has more than one core, and if no module of the language model keeps what it was given
    for its next forward pass, where another's would find it.
    """
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    if weight.device.type != "cpu" or torch.get_num_threads() == 1:
        return False

    def holds() -> bool:
        decode_batch = DecodeBatch(model, filler_id, allow_add=True)
        states = [_state_of(model.language_model)]  # after a step
        decode_batch.add([case.new_request() for case in _parity_cases(model)[:1]])
        states.append(_state_of(model.language_model))
        decode_batch.decode_step()
        states.append(_state_of(model.language_model))
        return all(map(_is_same_state, states, states[1:]))

    return _passes(holds)


def _state_of(module: torch.nn.Module) -> dict[str, tuple[Any, int]]:
    """All that its modules hold, by name: itself, and what tells that it was written into."""
    state: dict[str, tuple[Any, int]] = {}
    for name, each in module.named_modules():
        held = {**vars(each), **each._buffers}
        for key, value in held.items():
            changes = value._version if isinstance(value, Tensor) else 0
            if isinstance(value, (dict, list, set)):
                changes = len(value)
            state[f"{name}.{key}"] = (value, changes)
    return state


def _is_same_state(a: dict[str, tuple[Any, int]], b: dict[str, tuple[Any, int]]) -> bool:
    return a.keys() == b.keys() and all(
        a[name][0] is b[name][0] and a[name][1] == b[name][1] for name in a
    )


def _passes(case: Callable[[], bool]) -> bool:
    """Whether a trial succeeds; a fault of the model's means that it does not."""
    try:
        return case()
    except Exception as error:  # noqa: BLE001 - whatever it is, `generate` is left
        _LOG.info("rows are not answered step by step: %r", error)
        return False


def _generate_expected(
    model: MultiTokenForConditionalGeneration, cases: Sequence[ParityCase]
) -> bool:
    """What `generate` answers. Without it when its own settings look at the ids of a prompt, which
    is embeddings here."""
    for case in cases:
        case.expected = generate_one(model, case.prompt, case.options)
    return model.capabilities.prefill_mode == "embeds" or not logits_processors(
        model.language_model
    )


def _match_expected(model: MultiTokenForConditionalGeneration, cases: Sequence[ParityCase]) -> bool:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    tolerance = 1e-3 if weight.dtype == torch.float32 else 0.2
    return all(_same_tokens(collect_tokens(t.events), t.expected, tolerance) for t in cases)


def _parity_cases(model: MultiTokenForConditionalGeneration) -> list[ParityCase]:
    """One of media and text, one of its end, one of a shorter end; or all of the same length."""
    whole = smoke_prompt(model, num_media_tokens=3)
    ids = whole.input_ids
    if model.capabilities.supports_left_padding:
        parts = [ids[-max(1, len(ids) // 3) :], ids[-max(1, len(ids) // 2) :]]
    else:
        parts = [ids.roll(1), ids.roll(2)]
    short, middle = (Prompt(part, (), (), ()) for part in parts)
    return [ParityCase(short, 5), ParityCase(whole, 2), ParityCase(middle, 4)]


def _run_joining(decode_batch: DecodeBatch, cases: Sequence[ParityCase]) -> bool:
    """Each of them joins when the one before is under way."""
    for case in cases:
        decode_batch.add([case.new_request()])
        if not decode_batch.is_paddable:
            return False
        decode_batch.decode_step()
    _run_to_end(decode_batch)
    return True


def _run_leaving(decode_batch: DecodeBatch, cases: Sequence[ParityCase]) -> bool:
    """All of them from the start."""
    decode_batch.add([case.new_request() for case in cases])
    _run_to_end(decode_batch)
    return True


def _run_to_end(decode_batch: DecodeBatch) -> None:
    while decode_batch.requests:
        decode_batch.decode_step()


def _same_tokens(
    tokens: Sequence[TokenEvent], expected: Sequence[TokenEvent], tolerance: float
) -> bool:
    if len(tokens) != len(expected):
        return False
    for token, other in zip(tokens, expected, strict=True):
        mine = [token.logprob, *(value for _, value in token.top)]
        theirs = [other.logprob, *(value for _, value in other.top)]
        for a, b in zip(mine, theirs, strict=True):
            if a is None or b is None or not abs(a - b) <= tolerance:
                return False
        if token.id != other.id:  # so near that it is rounding; what follows is another answer
            break
    return True
