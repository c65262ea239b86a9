"""Prompts that the static engine reads in a second thread, while others are being answered.

Border: where torch has two threads; what the engine computes with one stands in test_static.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from multi_token.generate import generate_ids
from multi_token.serve.engines.base import (
    ErrorEvent,
    FinishEvent,
    Prompt,
    SamplingParams,
    TokenEvent,
)
from multi_token.serve.engines.local.engine import LocalEngine
from multi_token.serve.engines.parity import find_batching_mode, may_read_beside
from tests.serve.engine_parts import (
    VECTORS,
    Client,
    at_token,
    composed,
    prompt_of,
    sample_of,
)

LONG = SamplingParams(60, ignore_eos=True)
SHORT = SamplingParams(5, ignore_eos=True)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def prompts(llama: Any) -> list[Prompt]:
    return [
        prompt_of(llama, sample_of(llama, "yes or no")),
        prompt_of(llama, sample_of(llama, "Which of these is a fruit?", VECTORS[0])),
    ]


@contextmanager
def reading(model: Any, act: Callable[[], object]) -> Iterator[None]:
    """Do `act` in the thread that reads, before each prompt that is read beside others."""

    def look(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if "reads" in threading.current_thread().name:
            assert "inputs_embeds" in inputs, "only prompts are read there"
            act()

    hook = model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def alone(engine: LocalEngine, prompt: Prompt, options: SamplingParams) -> list[int]:
    client = Client()
    engine.submit("alone", prompt, options, client)
    return client.ids


def test_answers_go_on_while_a_prompt_is_read(
    llama: Any, start_static: Any, prompts: list[Prompt]
) -> None:
    engine = start_static(llama)
    expected = [alone(engine, prompts[0], LONG), alone(engine, prompts[1], SHORT)]
    newcomer = Client()
    has_gone_on = threading.Event()

    def submit() -> None:
        engine.submit("new", prompts[1], SHORT, newcomer)

    def look(number: int) -> None:
        if number == 4:
            submit()
        if number == 30:
            has_gone_on.set()

    first = Client(lambda _: look(len(first.events)))
    with reading(llama, lambda: waited_for(has_gone_on)):
        engine.submit("first", prompts[0], LONG, first)
        assert newcomer.ids == expected[1]
    assert first.ids == expected[0]


def waited_for(event: threading.Event) -> None:
    if not event.wait(30):
        raise TimeoutError("nobody was answered meanwhile")


def test_a_prompt_is_answered_though_all_others_end_while_it_is_read(
    llama: Any, start_static: Any, prompts: list[Prompt]
) -> None:
    engine = start_static(llama)
    expected = alone(engine, prompts[1], SHORT)
    newcomer = Client()
    first = at_token(4, lambda: engine.submit("new", prompts[1], SHORT, newcomer))
    with reading(llama, lambda: waited_for(first.has_ended)):
        engine.submit("first", prompts[0], SamplingParams(8, ignore_eos=True), first)
        assert newcomer.ids == expected
    assert alone(engine, prompts[0], SHORT) == first.ids[:5]


def test_who_leaves_while_his_prompt_is_read_is_not_answered(
    llama: Any, start_static: Any, prompts: list[Prompt]
) -> None:
    engine = start_static(llama)
    expected = alone(engine, prompts[0], LONG)
    newcomer = Client()
    first = at_token(4, lambda: engine.submit("new", prompts[1], SHORT, newcomer))
    with reading(llama, lambda: engine.cancel("new")):
        engine.submit("first", prompts[0], LONG, first)
        assert newcomer.wait() == FinishEvent("cancelled")
        assert first.ids == expected
    assert not [event for event in newcomer.events if isinstance(event, TokenEvent)]
    assert engine.num_running == 0


def test_a_prompt_that_breaks_the_model_beside_others_fails_alone(
    llama: Any, start_static: Any, prompts: list[Prompt]
) -> None:
    engine = start_static(llama, num_cache_tokens=0)
    expected = [alone(engine, prompts[0], LONG), alone(engine, prompts[1], SHORT)]
    unlucky = prompts[1].media_embeds[0][0, 0]

    def break_on_it(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if bool((inputs[0][..., :1] == unlucky).any()):
            raise RuntimeError("out of luck")

    newcomer = Client()
    first = at_token(4, lambda: engine.submit("new", prompts[1], SHORT, newcomer))
    hook = llama.language_model.model.layers[0].register_forward_pre_hook(break_on_it)
    try:
        engine.submit("first", prompts[0], LONG, first)
        assert isinstance(newcomer.wait(), ErrorEvent)
        assert first.ids == expected[0]
    finally:
        hook.remove()
    assert alone(engine, prompts[1], SHORT) == expected[1], "the engine goes on"


def test_an_engine_stops_while_a_prompt_is_read(
    llama: Any, start_static: Any, prompts: list[Prompt]
) -> None:
    engine = start_static(llama)
    newcomer = Client()
    first = at_token(4, lambda: engine.submit("new", prompts[1], SHORT, newcomer))
    is_read = threading.Event()

    def stands() -> None:
        is_read.set()
        waited_for(newcomer.has_ended)

    with reading(llama, stands):
        engine.submit("first", prompts[0], LONG, first)
        assert is_read.wait(30)
        engine.stop()
    assert newcomer.wait() == FinishEvent("cancelled")
    assert not engine.is_alive


def test_a_model_that_keeps_what_it_was_given_reads_in_turn(
    families: ModuleType, tmp_path_factory: Any
) -> None:
    model = composed(tmp_path_factory.mktemp("lm"), families, "Llama")
    filler_id = model.require_processor().chat.filler_id
    assert find_batching_mode(model, filler_id) == "join"
    assert may_read_beside(model, filler_id)
    norm = model.language_model.model.norm

    def keep(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        module.last_length = inputs[0].shape[1]

    hook = norm.register_forward_pre_hook(keep)
    find_batching_mode(model, filler_id)
    assert not may_read_beside(model, filler_id)
    hook.remove()
    norm.register_buffer("total", torch.zeros(()))
    norm.register_forward_pre_hook(lambda module, inputs: module.total.add_(1) and None)
    assert find_batching_mode(model, filler_id) == "join"
    assert not may_read_beside(model, filler_id)


def test_with_one_thread_prompts_are_read_in_turn(llama: Any) -> None:
    torch.set_num_threads(1)
    assert not may_read_beside(llama, llama.require_processor().chat.filler_id)


def one_by_one(engine: LocalEngine, prompts: list[Prompt], options: SamplingParams) -> list[Client]:
    """Each comes at the third token of the one before."""
    clients: list[Client] = []

    def come(number: int) -> None:
        if number < len(prompts):
            engine.submit(str(number), prompts[number], options, clients[number])

    for number in range(len(prompts)):
        clients.append(at_token(3, partial(come, number + 1)))
    come(0)
    return clients


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of families' own code
def test_who_is_read_beside_others_is_answered_as_by_generate_in_every_family(
    families: ModuleType, tmp_path_factory: Any, start_static: Any
) -> None:
    """Twelve come while others are answered, so reading and steps overlap in many places."""
    beside: set[str] = set()
    joining: set[str] = set()
    for family in sorted(families.FAMILIES.keys() - {"BERT"}):
        model = composed(tmp_path_factory.mktemp("lm"), families, family)
        samples = [
            sample_of(model, "yes or no " * (1 + i % 3), *VECTORS[: i % 4]) for i in range(12)
        ]
        expected = [generate_ids(model, [s], max_new_tokens=14)[0].tolist() for s in samples]
        engine = start_static(model)
        if engine._mode == "join":
            joining.add(family)
        if not engine._reads_beside:
            engine.stop()
            continue
        beside.add(family)
        prompts = [prompt_of(model, sample) for sample in samples]
        clients = one_by_one(engine, prompts, SamplingParams(14, ignore_eos=True))
        for client, own in zip(clients, expected, strict=True):
            assert client.ids[: len(own)] == own, family
        engine.stop()
    assert beside == joining
