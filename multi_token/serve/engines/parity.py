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

from multi_token.serve.engines.base import Event, Prompt, SamplingOptions, Token
from multi_token.serve.engines.fallback import answer_alone, plain_prompt, tokens_of
from multi_token.serve.engines.local.decode_loop import Stepping, processors_of
from multi_token.serve.engines.local.prefix_cache import Beginnings
from multi_token.serve.engines.prefix_hits import PrefixHits
from multi_token.serve.engines.scheduler import Running

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

Way = Literal["join", "leave", "stay"]
"""join: rows leave when they have ended and others join. leave: rows leave, and the next batch
begins when all have left. stay: transformers' own `generate`, in which all stay until the last has
ended."""
_LOG = logging.getLogger(__name__)
_NUM_TOP = 3


@dataclass
class _Trial:
    """A prompt, and what `generate` answers alone."""

    prompt: Prompt
    num_new: int
    said: list[Event] = field(default_factory=list)
    expected: list[Token] = field(default_factory=list)

    @property
    def options(self) -> SamplingOptions:
        return SamplingOptions(self.num_new, num_logprobs=_NUM_TOP, ignore_end=True)

    def running(self) -> Running:
        self.said = []
        return Running("trial", self.prompt, self.options, self.said.append, frozenset())


def find_way(model: MultiTokenForConditionalGeneration, filler_id: int) -> Way:
    """The best way in which short prompts get the tokens and log-probabilities of `generate`.

    Of several lengths where the model can be padded: each way runs as it will for clients, with a
    row that ends while others go on, one that joins and is longer, and one that is shorter.
    """
    trials = _trials(model)
    if not _holds(lambda: _expect(model, trials)):
        return "stay"

    def holds(answer: Callable[[Stepping, Sequence[_Trial]], bool], *, joins: bool) -> bool:
        stepping = Stepping(model, filler_id, joins=joins)
        return answer(stepping, trials) and _are_right(model, trials)

    if model.capabilities.pads_left and _holds(lambda: holds(_join, joins=True)):
        return "join"
    return "leave" if _holds(lambda: holds(_leave, joins=False)) else "stay"


def may_begin_alike(model: MultiTokenForConditionalGeneration, filler_id: int) -> bool:
    """Whether prompts get the tokens and log-probabilities of `generate` also where what they begin
    with has been read before: one that goes on behind another's end, beside a shorter one that
    shares nothing, and one that comes again. For a model whose rows may join.
    """

    def holds() -> bool:
        short, whole = (_Trial(trial.prompt, 2) for trial in _trials(model)[:2])
        ids, prompt = whole.prompt.input_ids, whole.prompt
        longer = _Trial(replace(prompt, input_ids=torch.cat([ids, ids[-4:].flip(0)])), 3)
        _expect(model, [short, whole, longer])
        hits = PrefixHits()
        kept = Beginnings(4 * len(ids), hits)
        for trials in ([whole], [short, longer], [longer]):
            stepping = Stepping(model, filler_id, joins=True, beginnings=kept)
            stepping.join([trial.running() for trial in trials])
            _to_the_end(stepping)
            if not _are_right(model, trials):
                return False
        # of the longer one the second time all but the last
        return hits.num_hits >= len(longer.prompt.input_ids) - 1

    return _holds(holds)


def may_read_beside(model: MultiTokenForConditionalGeneration, filler_id: int) -> bool:
    """Whether prompts may be read while others are answered, in two threads: on a CPU of which
    torch has more than one core, and if no module of the language model keeps what it was given
    for its next forward pass, where another's would find it.
    """
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    if weight.device.type != "cpu" or torch.get_num_threads() == 1:
        return False

    def holds() -> bool:
        stepping = Stepping(model, filler_id, joins=True)
        states = [_state_of(model.language_model)]  # after a step
        stepping.join([trial.running() for trial in _trials(model)[:1]])
        states.append(_state_of(model.language_model))
        stepping.step()
        states.append(_state_of(model.language_model))
        return all(map(_is_same_state, states, states[1:]))

    return _holds(holds)


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


def _holds(trial: Callable[[], bool]) -> bool:
    """Whether a trial succeeds; a fault of the model's means that it does not."""
    try:
        return trial()
    except Exception as error:  # noqa: BLE001 - whatever it is, `generate` is left
        _LOG.info("rows are not answered step by step: %r", error)
        return False


def _expect(model: MultiTokenForConditionalGeneration, trials: Sequence[_Trial]) -> bool:
    """What `generate` answers. Without it when its own settings look at the ids of a prompt, which
    is embeddings here."""
    for trial in trials:
        trial.expected = answer_alone(model, trial.prompt, trial.options)
    return model.capabilities.starts_from == "embeddings" or not processors_of(model.language_model)


def _are_right(model: MultiTokenForConditionalGeneration, trials: Sequence[_Trial]) -> bool:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    tolerance = 1e-3 if weight.dtype == torch.float32 else 0.2
    return all(_are_same(tokens_of(t.said), t.expected, tolerance) for t in trials)


def _trials(model: MultiTokenForConditionalGeneration) -> list[_Trial]:
    """One of media and text, one of its end, one of a shorter end; or all of the same length."""
    whole = plain_prompt(model, num_media_tokens=3)
    ids = whole.input_ids
    if model.capabilities.pads_left:
        parts = [ids[-max(1, len(ids) // 3) :], ids[-max(1, len(ids) // 2) :]]
    else:
        parts = [ids.roll(1), ids.roll(2)]
    short, middle = (Prompt(part, (), (), ()) for part in parts)
    return [_Trial(short, 5), _Trial(whole, 2), _Trial(middle, 4)]


def _join(stepping: Stepping, trials: Sequence[_Trial]) -> bool:
    """Each of them joins when the one before is under way."""
    for trial in trials:
        stepping.join([trial.running()])
        if not stepping.can_be_padded:
            return False
        stepping.step()
    _to_the_end(stepping)
    return True


def _leave(stepping: Stepping, trials: Sequence[_Trial]) -> bool:
    """All of them from the start."""
    stepping.join([trial.running() for trial in trials])
    _to_the_end(stepping)
    return True


def _to_the_end(stepping: Stepping) -> None:
    while stepping.rows:
        stepping.step()


def _are_same(tokens: Sequence[Token], expected: Sequence[Token], tolerance: float) -> bool:
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
