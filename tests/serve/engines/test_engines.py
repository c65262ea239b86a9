"""Every engine keeps the contract of serve/engines/engine.py, on tiny models of four families."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from multi_token.generate import generate_ids
from multi_token.serve.engines.base import (
    EngineEvent,
    ErrorEvent,
    FinishEvent,
    Prompt,
    SamplingParams,
    TokenEvent,
)
from multi_token.serve.engines.engine import Engine
from multi_token.serve.engines.local.engine import LocalEngine
from multi_token.serve.errors import ServeError
from multi_token.types import Sample
from tests.serve.engine_parts import (
    VECTORS,
    Client,
    composed,
    engines,
    prompt_of,
    sample_of,
    together,
)
from tests.serve.vllm_parts import VllmWithStandIn

pytestmark = pytest.mark.slow

FAMILIES = ["Llama", "Qwen2", "Gemma3", "Phi-3"]
HERE: dict[str, Callable[..., Any]] = {"local": LocalEngine}
ENGINES = {**HERE, "vllm": VllmWithStandIn}
"""In `vllm` the model runs in a stand-in, so the faults of a model are not the engine's."""
NUM_NEW = 10


@pytest.fixture(scope="session", params=FAMILIES)
def any_family(request: pytest.FixtureRequest, families: ModuleType, tmp_path_factory: Any) -> Any:
    return composed(tmp_path_factory.mktemp("lm"), families, request.param)


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Builds and starts engines with the given options; all are stopped at the end."""
    with engines(ENGINES[request.param]) as build:
        yield build


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, llama: Any) -> Iterator[Any]:
    """One engine for the tests that do not change it."""
    started = ENGINES[request.param](llama)
    started.start()
    yield started
    started.stop()


def submitted(
    engine: Engine, prompts: Sequence[Prompt], options: SamplingParams | None = None
) -> list[Client]:
    clients = [Client() for _ in prompts]
    together(engine, prompts, [options or SamplingParams(NUM_NEW)] * len(prompts), clients)
    return clients


def samples_of(model: Any) -> list[Sample]:
    """Text alone, one media item, and two, in several lengths."""
    return [
        sample_of(model, "What is a fruit?"),
        sample_of(model, "What is this?", VECTORS[0]),
        sample_of(model, "What is this?", VECTORS[1]),
        sample_of(model, "Which of these two is a red square?", VECTORS[0], VECTORS[2]),
        sample_of(model, "yes or no"),
    ]


def test_greedy_tokens_equal_those_of_generate(
    any_family: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    samples = samples_of(any_family)
    alone = [
        generate_ids(any_family, [sample], max_new_tokens=NUM_NEW)[0].tolist() for sample in samples
    ]
    assert alone[1] != alone[2], "the media must matter"
    engine = make(any_family)
    prompts = [prompt_of(any_family, sample) for sample in samples]
    assert [client.ids for client in submitted(engine, prompts)] == alone
    assert [submitted(engine, [prompt])[0].ids for prompt in prompts] == alone
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not warnings, "a failed batch is retried one by one, which would hide a fault"


def test_the_finish_event_has_the_reason(llama: Any, make: Any) -> None:
    engine = make(llama)
    prompt = prompt_of(llama, sample_of(llama, "What is a fruit?"))
    deaf, long = SamplingParams(30, ignore_eos=True), SamplingParams(30)
    (client,) = submitted(engine, [prompt], deaf)
    ids = client.ids
    assert len(ids) == 30 and client.wait() == FinishEvent("length")
    engine._end_ids = frozenset([ids[4]])  # this random model generates none of its own
    hears, is_deaf = Client(), Client()
    together(engine, [prompt, prompt], [long, deaf], [hears, is_deaf])
    assert hears.ids == ids[: ids.index(ids[4]) + 1] and hears.wait() == FinishEvent("stop")
    assert is_deaf.ids == ids and is_deaf.wait() == FinishEvent("length")


def test_a_seed_gives_the_same_tokens_in_any_batch(llama: Any, engine: Any) -> None:
    prompts = [prompt_of(llama, sample) for sample in samples_of(llama)]
    warm = SamplingParams(NUM_NEW, temperature=1.5, seed=7, ignore_eos=True)
    alone = submitted(engine, [prompts[1]], warm)[0].ids
    kinds = [
        replace(warm, temperature=0.0),
        warm,
        replace(warm, seed=8),
        replace(warm, top_k=2),
        replace(warm, top_p=0.3),
    ]
    clients = [Client() for _ in kinds]
    together(engine, [prompts[1]] * len(kinds), kinds, clients)
    answers = [client.ids for client in clients]
    assert answers[1] == alone
    greedy = generate_ids(llama, [samples_of(llama)[1]], max_new_tokens=NUM_NEW)[0].tolist()
    assert answers[0][: len(greedy)] == greedy
    assert len({tuple(answer) for answer in answers}) >= 4, answers


def test_logprobs_are_of_the_models_own_distribution(llama: Any, engine: Any) -> None:
    sample = sample_of(llama, "What is this?", VECTORS[0])
    prompt = prompt_of(llama, sample)
    options = SamplingParams(3, temperature=2.0, seed=1, num_logprobs=3, ignore_eos=True)
    (client,) = submitted(engine, [prompt], options)
    assert len(client.ids) == 3
    embeds = llama.get_input_embeddings()(torch.cat([prompt.input_ids, torch.tensor(client.ids)]))
    place = prompt.media_spans[0]
    with torch.no_grad():
        embeds[place.start : place.start + place.length] = prompt.media_embeds[0]
        logits = llama.language_model(inputs_embeds=embeds[None]).logits[0]
    for step, token in enumerate(e for e in client.events if isinstance(e, TokenEvent)):
        own = logits[len(prompt.input_ids) - 1 + step].log_softmax(-1)
        assert token.logprob == pytest.approx(float(own[token.id]), abs=1e-4)
        values, ids = own.topk(3)
        assert [i for i, _ in token.top] == ids.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_cancelling_ends_one_request_at_once_and_no_other(llama: Any, engine: Any) -> None:
    prompts = [prompt_of(llama, sample) for sample in samples_of(llama)]
    long = SamplingParams(100, ignore_eos=True)
    num_emitted: list[int] = []

    def cancel_at_third(event: EngineEvent) -> None:
        if len(leaver.events) == 3:
            engine.cancel("r1")
        elif isinstance(event, FinishEvent):
            num_emitted.append(len(other.events))

    leaver, other = Client(cancel_at_third), Client()
    together(engine, prompts[:2], [long, long], [other, leaver])
    assert leaver.wait() == FinishEvent("cancelled")
    assert len(leaver.events) == 4
    assert num_emitted[0] < 10, "the other request goes on"
    assert len(other.ids) == 100
    engine.cancel("r1")
    engine.cancel("unknown")
    assert engine.num_running == 0
    (again,) = submitted(engine, [prompts[1]])
    assert len(again.ids) > 0


def test_a_waiting_request_can_be_cancelled(llama: Any, make: Any) -> None:
    engine = make(llama, max_batch=1)
    prompt = prompt_of(llama, sample_of(llama, "yes"))
    waiting = Client()

    def cancel_the_other(event: EngineEvent) -> None:
        if len(first.events) == 2:
            engine.submit("waiting", prompt, SamplingParams(5), waiting)
            counts.append((engine.num_running, engine.num_waiting))
            engine.cancel("waiting")

    counts: list[tuple[int, int]] = []
    first = Client(cancel_the_other)
    engine.submit("first", prompt, SamplingParams(100, ignore_eos=True), first)
    assert waiting.wait() == FinishEvent("cancelled")
    assert not first.has_ended.is_set()
    assert counts == [(1, 1)]
    assert len(first.ids) == 100


def test_an_invalid_prompt_is_refused_before_it_is_queued(llama: Any, make: Any) -> None:
    engine = make(llama, max_tokens=48)
    good = prompt_of(llama, sample_of(llama, "What is this?", VECTORS[0]))
    narrow = replace(good, media_embeds=(good.media_embeds[0][:, :-1],))
    ok = SamplingParams(NUM_NEW)
    long = SamplingParams(engine.max_tokens)
    cases = [(narrow, ok, "shape"), (good, long, "lower max_tokens")]
    for prompt, options, words in cases:
        with pytest.raises(ServeError, match=words):
            engine.submit("bad", prompt, options, Client())
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    just = SamplingParams(engine.max_tokens - len(good.input_ids), ignore_eos=True)
    (client,) = submitted(engine, [good], just)
    assert len(client.ids) == just.max_new_tokens


@pytest.mark.parametrize("engine", HERE, indirect=True)
@pytest.mark.parametrize("fault", ["raises", "gives NaN"])
def test_a_prompt_that_breaks_the_model_fails_alone(llama: Any, engine: Any, fault: str) -> None:
    samples = samples_of(llama)[:4]
    # a new tenant: a cached prefix would skip the layer that breaks
    prompts = [replace(prompt_of(llama, sample), tenant=fault) for sample in samples]
    alone = [generate_ids(llama, [s], max_new_tokens=NUM_NEW)[0].tolist() for s in samples]
    unlucky = prompts[2].media_embeds[0][0, 0]

    def break_on_it(module: Any, inputs: tuple[Tensor, ...]) -> Any:
        (hidden,) = inputs
        is_it = hidden[..., :1] == unlucky
        if fault == "raises" and bool(is_it.any()):
            raise RuntimeError("out of luck at /some/path")
        return (hidden.masked_fill(is_it, torch.nan),)

    hook = llama.language_model.model.layers[0].register_forward_pre_hook(break_on_it)
    try:
        clients = submitted(engine, prompts)
        end = clients[2].wait()
        assert [clients[i].ids for i in (0, 1, 3)] == [alone[i] for i in (0, 1, 3)]
    finally:
        hook.remove()
    assert isinstance(end, ErrorEvent) and isinstance(end.error, ServeError)
    assert "path" not in str(end.error)
    assert engine.is_alive
    (again,) = submitted(engine, [prompts[2]])
    assert again.ids == alone[2]


@pytest.mark.parametrize("make", HERE, indirect=True)
def test_a_broken_model_ends_the_thread_and_start_runs_it_again(llama: Any, make: Any) -> None:
    engine = make(llama)
    prompts = [prompt_of(llama, sample) for sample in samples_of(llama)[:2]]
    expected = [client.ids for client in submitted(engine, prompts)]
    hooks: list[Any] = []

    def broken(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    def break_it() -> None:
        hooks.append(llama.language_model.register_forward_pre_hook(broken))

    clients = [Client(), Client()]
    together(engine, prompts, [SamplingParams(NUM_NEW)] * 2, clients, meanwhile=break_it)
    try:
        ends = [client.wait() for client in clients]
    finally:
        hooks[0].remove()
    assert all(isinstance(end, ErrorEvent) for end in ends)
    assert not engine.is_alive
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    with pytest.raises(ServeError) as refused:
        engine.submit("late", prompts[0], SamplingParams(3), Client())
    assert refused.value.status == 503
    engine.start()
    assert engine.is_alive
    assert [client.ids for client in submitted(engine, prompts)] == expected


def test_stop_cancels_all_requests(llama: Any, make: Any) -> None:
    engine = make(llama, max_batch=1)
    prompts = [prompt_of(llama, sample) for sample in samples_of(llama)[:2]]
    clients = submitted(engine, prompts, SamplingParams(200, ignore_eos=True))
    engine.stop()
    assert [client.wait() for client in clients] == [FinishEvent("cancelled")] * 2
    assert not engine.is_alive
    assert all(len(client.events) < 200 for client in clients)
