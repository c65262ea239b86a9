"""The local engine: requests join and leave the batch between decode steps.

Tests of batches and their order; test_engines.py tests the tokens of all engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from multi_token.errors import LanguageModelError
from multi_token.generate import generate_ids
from multi_token.serve.engines.base import (
    EngineEvent,
    ErrorEvent,
    FinishEvent,
    Prompt,
    SamplingParams,
)
from multi_token.serve.engines.local.decode_loop import prefill
from multi_token.serve.engines.local.engine import LocalEngine
from multi_token.serve.engines.request import GenerationRequest
from tests.serve.engine_parts import (
    VECTORS,
    Client,
    at_token,
    composed,
    prompt_of,
    sample_of,
    together,
)

LONG = SamplingParams(60, ignore_eos=True)
TEXTS = ["What is a fruit?", "yes or no", "Which of these is a red square, and which is a fruit?"]


@contextmanager
def watched(model: Any) -> Iterator[list[tuple[int, int]]]:
    """For each forward: number of rows, and positions computed in each row."""
    seen: list[tuple[int, int]] = []

    def note(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        given = inputs.get("inputs_embeds")
        given = inputs["input_ids"] if given is None else given
        seen.append((given.shape[0], given.shape[1]))

    hook = model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def prompts_of(model: Any) -> list[Prompt]:
    media = [[], [VECTORS[0]], [VECTORS[1], VECTORS[2]]]
    return [
        prompt_of(model, sample_of(model, text, *vectors))
        for text, vectors in zip(TEXTS, media, strict=True)
    ]


def alone(engine: Any, prompt: Prompt, options: SamplingParams) -> list[int]:
    client = Client()
    engine.submit("alone", prompt, options, client)
    return client.ids


def test_a_new_request_is_decoded_beside_a_longer_one(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    prompts = prompts_of(llama)
    short = SamplingParams(5, ignore_eos=True)
    expected = [alone(engine, prompts[0], LONG), *(alone(engine, p, short) for p in prompts[1:])]
    num_emitted: list[int] = []
    joining = [Client(lambda event: counted(event)) for _ in prompts[1:]]

    def counted(event: EngineEvent) -> None:
        if isinstance(event, FinishEvent):
            num_emitted.append(len(first.events))

    def come() -> None:
        for number, (prompt, client) in enumerate(zip(prompts[1:], joining, strict=True)):
            engine.submit(f"new {number}", prompt, short, client)

    first = at_token(10, come)
    engine.submit("first", prompts[0], LONG, first)
    assert [client.ids for client in (first, *joining)] == expected
    assert all(number <= 20 for number in num_emitted), "both end soon after the tenth token"


def test_a_finished_row_is_not_computed_again(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    prompts = prompts_of(llama)
    lengths = [4, 30, 11]
    clients = [Client() for _ in prompts]
    options = [SamplingParams(length, ignore_eos=True) for length in lengths]
    with watched(llama) as seen:
        together(engine, prompts, options, clients)
        assert [len(client.ids) for client in clients] == lengths
    steps = [num_rows for num_rows, num_positions in seen if num_positions == 1]
    assert sum(steps) == sum(length - 1 for length in lengths), "prefill gives the first token"
    assert len(steps) == max(lengths) - 1, "all requests are decoded together"


def test_a_cancelled_row_leaves_before_the_next_step(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    prompts = prompts_of(llama)
    leaver = at_token(5, lambda: engine.cancel("r1"))
    clients = [Client(), leaver]
    with watched(llama) as seen:
        together(engine, prompts[:2], [LONG] * 2, clients)
        assert leaver.wait() == FinishEvent("cancelled")
        assert len(clients[0].ids) == 60
    steps = [num_rows for num_rows, num_positions in seen if num_positions == 1]
    assert steps == [2] * 4 + [1] * 55


def test_padding_that_no_row_needs_is_cut_off(llama: Any, start_local: Any) -> None:
    """Otherwise a row that joined a longer one would keep its padding to the end."""
    engine = start_local(llama)
    prompts = sorted(prompts_of(llama), key=lambda p: len(p.input_ids))
    widths: list[int] = []

    def note(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        widths.append(inputs["past_key_values"].get_seq_length() if "input_ids" in inputs else 0)

    hook = llama.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        options = [LONG, SamplingParams(3, ignore_eos=True)]
        clients = [Client(), Client()]
        together(engine, [prompts[0], prompts[-1]], options, clients)
        assert [len(client.ids) for client in clients] == [60, 3]
    finally:
        hook.remove()
    assert widths[-1] == len(prompts[0].input_ids) + 58


def test_a_seed_gives_the_same_tokens_to_a_request_that_joins(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    prompts = prompts_of(llama)
    warm = SamplingParams(12, temperature=1.5, seed=3, ignore_eos=True)
    expected = alone(engine, prompts[1], warm)
    joining = Client()
    first = at_token(4, lambda: engine.submit("new", prompts[1], warm, joining))
    engine.submit("first", prompts[2], replace(LONG, temperature=1.0, seed=4), first)
    assert joining.ids == expected
    assert len(first.ids) == 60


@pytest.mark.parametrize("fault", ["raises", "gives NaN"])
def test_a_joining_request_that_breaks_the_model_fails_alone_and_at_once(
    llama: Any, start_local: Any, fault: str
) -> None:
    # a cached prefix would skip the layer that breaks
    engine = start_local(llama, prefix_cache_tokens=0)
    prompts = prompts_of(llama)
    expected = [alone(engine, p, SamplingParams(12, ignore_eos=True)) for p in prompts]
    unlucky = prompts[1].media_embeds[0][0, 0]

    def break_on_it(_: Any, inputs: tuple[Tensor, ...]) -> Any:
        is_it = inputs[0][..., :1] == unlucky
        if fault == "raises" and bool(is_it.any()):
            raise RuntimeError("out of luck")
        return (inputs[0].masked_fill(is_it, torch.nan),)

    joining = [Client(), Client()]
    num_emitted: list[int] = []

    def come() -> None:
        for number, client in enumerate(joining):
            options = SamplingParams(12, ignore_eos=True)
            engine.submit(f"new {number}", prompts[1 + number], options, client)

    def failed(event: EngineEvent) -> None:
        assert isinstance(event, ErrorEvent)
        num_emitted.append(len(first.events))

    joining[0] = Client(failed)
    first = at_token(4, come)
    hook = llama.language_model.model.layers[0].register_forward_pre_hook(break_on_it)
    try:
        with watched(llama) as seen:
            engine.submit("first", prompts[0], LONG, first)
            assert isinstance(joining[0].wait(), ErrorEvent)
            assert joining[1].ids == expected[2]
            assert first.ids[:12] == expected[0]
    finally:
        hook.remove()
    assert num_emitted == [4]
    num_prefills = sum(
        num_positions == len(prompts[0].input_ids) and num_rows == 1
        for num_rows, num_positions in seen
    )
    assert num_prefills == 1, "a running request is not prefilled again"


def test_a_waiting_request_is_not_overtaken_by_smaller_ones(llama: Any, start_local: Any) -> None:
    prompts = sorted(prompts_of(llama), key=lambda p: len(p.input_ids))
    small, big = prompts[0], prompts[-1]
    # the budget is two small prompts, or the big one alone
    engine = start_local(llama, max_batch_tokens=2 * (len(small.input_ids) + 60))
    long = SamplingParams(engine.max_tokens - len(big.input_ids), ignore_eos=True)
    ended: list[str] = []

    def client(name: str) -> Client:
        return Client(lambda event: ended.append(name) if isinstance(event, FinishEvent) else None)

    waiting, later = client("big"), client("later")
    options = SamplingParams(3, ignore_eos=True)

    def come() -> None:
        engine.submit("big", big, long, waiting)
        engine.submit("later", small, options, later)

    first = at_token(2, come)
    engine.submit("first", small, LONG, first)
    assert len(later.ids) == 3 and len(first.ids) == 60
    assert ended == ["big", "later"]


def test_a_batch_never_holds_more_tokens_than_allowed(llama: Any, start_local: Any) -> None:
    prompts = prompts_of(llama) * 4
    limit = 2 * (max(len(p.input_ids) for p in prompts) + 60)
    engine = start_local(llama, max_batch_tokens=limit)
    held: list[int] = []

    def note(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if "input_ids" in inputs:
            ids = inputs["input_ids"]
            held.append(len(ids) * (inputs["past_key_values"].get_seq_length() + 1))

    hook = llama.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        options = [SamplingParams(10 + 4 * i, ignore_eos=True) for i in range(len(prompts))]
        clients = [Client() for _ in prompts]
        together(engine, prompts, options, clients)
        assert [len(client.ids) for client in clients] == [o.max_new_tokens for o in options]
    finally:
        hook.remove()
    assert limit // 2 < max(held) <= limit


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_the_models_own_logits_processors_apply_to_each_row(
    families: ModuleType, tmp_path_factory: Any, start_local: Any
) -> None:
    model = composed(tmp_path_factory.mktemp("lm"), families, "Llama")
    samples = [sample_of(model, text) for text in TEXTS]
    plain = [generate_ids(model, [s], max_new_tokens=12)[0].tolist() for s in samples]
    model.language_model.generation_config.repetition_penalty = 3.0
    expected = [generate_ids(model, [s], max_new_tokens=12)[0].tolist() for s in samples]
    assert expected != plain, "the setting must matter"
    engine = start_local(model)
    assert engine._mode == "continuous"
    clients = [Client() for _ in samples]
    prompts = [prompt_of(model, sample) for sample in samples]
    together(engine, prompts, [SamplingParams(12)] * 3, clients)
    assert [client.ids for client in clients] == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the family's own code
def test_rows_leave_a_batch_that_no_request_can_join(
    families: ModuleType, tmp_path_factory: Any, start_local: Any
) -> None:
    model = composed(tmp_path_factory.mktemp("lm"), families, "LFM2")
    engine = start_local(model)
    assert engine._mode == "shrinking"
    prompt = prompts_of(model)[1]
    expected = alone(engine, prompt, LONG)
    lengths = [4, 30, 11]
    clients = [Client() for _ in lengths]
    options = [SamplingParams(length, ignore_eos=True) for length in lengths]
    with watched(model) as seen:
        together(engine, [prompt] * 3, options, clients)
        assert [client.ids for client in clients] == [expected[:length] for length in lengths]
    steps = [num_rows for num_rows, num_positions in seen if num_positions == 1]
    assert steps == [3] * 3 + [2] * 7 + [1] * 19


SHRINKING = {"Falcon-H1", "LFM2", "Qwen3-Next"}
"""Families with a recurrent state beside the KV cache."""
STATIC = {"Mamba2", "RWKV", "xLSTM"}
"""Families without any KV cache."""


def staggered(engine: LocalEngine, prompts: Sequence[Prompt], num_new: int) -> list[list[int]]:
    """Submit the second at the third token of the first, and the third at that of the second."""
    third = Client()
    options = SamplingParams(num_new, ignore_eos=True)
    second = at_token(3, lambda: engine.submit("third", prompts[2], options, third))
    first = at_token(3, lambda: engine.submit("second", prompts[1], options, second))
    engine.submit("first", prompts[0], options, first)
    return [client.ids for client in (first, second, third)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of families' own code
def test_requests_that_join_get_the_tokens_of_generate_in_every_family(
    families: ModuleType, tmp_path_factory: Any, start_local: Any
) -> None:
    served = families.FAMILIES.keys() - {"BERT"}
    modes: dict[str, set[str]] = {"continuous": set(), "shrinking": set(), "static": set()}
    for family in sorted(served):
        model = composed(tmp_path_factory.mktemp("lm"), families, family)
        samples = [
            sample_of(model, "yes or no"),
            sample_of(model, "Which one of all these things?", VECTORS[1], VECTORS[2]),
            sample_of(model, "What is this?", VECTORS[0]),
        ]
        expected = [generate_ids(model, [s], max_new_tokens=14)[0].tolist() for s in samples]
        engine = start_local(model)
        prompts = [prompt_of(model, sample) for sample in samples]
        for ids, own in zip(staggered(engine, prompts, 14), expected, strict=True):
            assert ids[: len(own)] == own, family  # `generate` stops at the end of turn
        assert engine._mode is not None
        modes[engine._mode].add(family)
        engine.stop()
    assert modes == {
        "continuous": served - SHRINKING - STATIC,
        "shrinking": SHRINKING,
        "static": STATIC,
    }


def test_tenants_take_turns_in_the_queue(llama: Any, start_local: Any) -> None:
    engine = start_local(llama, max_batch=1)
    names = ["a1", "a2", "a3", "b1", "a4", "b2"]
    prompts = [replace(prompts_of(llama)[0], tenant=name[0]) for name in names]
    ended: list[str] = []

    def client_of(name: str) -> Client:
        def look(event: EngineEvent) -> None:
            if isinstance(event, FinishEvent):
                ended.append(name)

        return Client(look)

    clients = [client_of(name) for name in names]
    together(engine, prompts, [SamplingParams(1, ignore_eos=True)] * len(names), clients)
    for client in clients:
        client.wait()
    # the gate is of tenant a, so b is first
    assert ended == ["b1", "a1", "b2", "a2", "a3", "a4"]


def test_a_request_passes_through_its_states(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    states: list[str] = []
    (prompt, *_) = prompts_of(llama)
    client = Client(lambda _: states.append(request.state))
    request = GenerationRequest(
        "r", prompt, SamplingParams(2, ignore_eos=True), client, frozenset()
    )
    assert request.state == "waiting"
    batch = engine._new_batch()
    batch.add([request])
    assert states == ["decoding"]
    batch.decode_step()
    assert states == ["decoding", "decoding", "finished"]
    assert batch.requests == [] and batch.width == 0, "a finished request leaves at once"


def test_a_prefill_touches_no_running_batch(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    first, second = prompts_of(llama)[:2]
    expected = [
        alone(engine, prompt, SamplingParams(4, ignore_eos=True)) for prompt in (first, second)
    ]
    clients = [Client(), Client()]
    requests = [
        GenerationRequest(str(i), prompt, SamplingParams(4, ignore_eos=True), client, frozenset())
        for i, (prompt, client) in enumerate(zip((first, second), clients, strict=True))
    ]
    running = engine._new_batch()
    running.add(requests[:1])
    width = running.width
    other = prefill(running.params, requests[1:])
    assert (running.width, running.requests) == (width, requests[:1])
    assert other.requests == requests[1:]
    running.extend(other)
    assert running.requests == requests and other.requests == []
    while running.requests:
        running.decode_step()
    assert [client.ids for client in clients] == expected


def test_the_engine_uses_the_threads_of_torch_after_any_number_of_starts(
    llama: Any, start_local: Any
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        engine = start_local(llama)
        seen: list[int] = []
        prompt = prompts_of(llama)[0]
        for number in range(2):
            client = Client(lambda _: seen.append(torch.get_num_threads()))
            engine.submit(str(number), prompt, SamplingParams(2), client)
            client.wait()
            engine.stop()
            engine.start()
        assert set(seen) == {4}
    finally:
        torch.set_num_threads(before)


def test_an_engine_starts_only_if_the_model_generates_for_a_plain_prompt(
    llama: Any, start_local: Any
) -> None:
    def lost(*_: Any) -> None:
        raise RuntimeError("the device is lost")

    engine = start_local(llama)
    engine.stop()
    hook = llama.language_model.register_forward_pre_hook(lost)
    try:
        for _ in range(2):
            with pytest.raises(LanguageModelError, match="plain prompt.*the device is lost"):
                engine.start()
            assert not engine.is_alive
        with pytest.raises(LanguageModelError, match="the device is lost"):
            start_local(llama)
    finally:
        hook.remove()
    engine.start()
    assert engine.is_alive


@pytest.mark.parametrize("mode", ["continuous", "static"])
def test_each_step_is_progress(llama: Any, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of `generate`, which returns to the engine after the last one of a batch only."""
    now, stalled = [1000.0], list[float]()
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def take_a_minute(*_: Any, **__: Any) -> None:
        now[0] += 60
        stalled.append(engine.stalled_s)

    engine = LocalEngine(llama)
    engine._mode = mode
    engine.start()
    hook = llama.language_model.register_forward_pre_hook(take_a_minute, with_kwargs=True)
    client = Client()
    try:
        engine.submit("a", prompts_of(llama)[0], SamplingParams(5, ignore_eos=True), client)
        assert len(client.ids) == 5
    finally:
        hook.remove()
        engine.stop()
    assert stalled == [60.0] * 5 and engine.stalled_s == 0
