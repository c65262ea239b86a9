"""What prompts begin with is read once by the static engine, and answers stay as they are.

Border: what is read again and what is not; the tensors of a cache are test_static.py's.
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

from multi_token.generate import generate_ids, require_processor
from multi_token.serve.engines.base import ErrorEvent, FinishEvent, Prompt, SamplingParams
from multi_token.serve.engines.local.engine import LocalEngine
from multi_token.serve.engines.local.prefix_cache import prefix_key
from multi_token.types import Conversation, Media, Message, Text
from tests.serve.engine_parts import (
    VECTORS,
    Client,
    composed,
    prompt_of,
    sample_of,
    together,
)

NUM_NEW = 6
OPTIONS = SamplingParams(NUM_NEW, ignore_eos=True)


@contextmanager
def reading(model: Any) -> Iterator[list[int]]:
    """Positions of each forward that reads prompts."""
    seen: list[int] = []

    def note(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if inputs.get("inputs_embeds") is not None:
            seen.append(inputs["inputs_embeds"].shape[1])

    hook = model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def asked(engine: LocalEngine, prompt: Prompt, options: SamplingParams = OPTIONS) -> list[int]:
    client = Client()
    engine.submit("one", prompt, options, client)
    return client.ids


def by_generate(model: Any, sample: Any) -> list[int]:
    return generate_ids(model, [sample], max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW)[0].tolist()


def of(model: Any, text: str, *vectors: Sequence[float]) -> Prompt:
    return prompt_of(model, sample_of(model, text, *vectors))


def num_alike(marks: Tensor, others: Tensor) -> int:
    num = min(len(marks), len(others))
    return int((marks[:num] == others[:num]).long().cumprod(0).sum())


def about(model: Any, before: str, vector: Sequence[float], behind: str) -> Any:
    parts = (Text(before), Media("vector", list(vector)), Text(behind))
    return require_processor(model)(Conversation((Message("user", parts),)), prompt_only=True)


def test_only_what_is_new_in_a_prompt_is_read(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    samples = [
        about(llama, "Here it is: ", VECTORS[0], "What is a fruit?"),
        about(llama, "Here it is: ", VECTORS[0], "What is a fruit? And what is a square?"),
        about(llama, "Here it is: ", VECTORS[1], "What is a fruit?"),
    ]
    prompts = [prompt_of(llama, sample) for sample in samples]
    marks = [prefix_key(prompt) for prompt in prompts]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    num_there = [0, num_alike(marks[0], marks[1]), prompts[2].media_spans[0].start]
    assert num_there[1] > num_there[2] + 3 and num_there[2] >= 4
    assert num_alike(marks[0], marks[2]) == num_there[2], "other media, so all behind it is new"
    with reading(llama) as seen:
        found = [asked(engine, prompt) for prompt in prompts]
    assert seen == [length - num for length, num in zip(lengths, num_there, strict=True)]
    assert (engine.prefix_stats.num_queries, engine.prefix_stats.num_hits) == (
        sum(lengths),
        sum(num_there),
    )
    assert found == [by_generate(llama, sample) for sample in samples]


def test_a_conversation_that_goes_on_is_read_behind_what_was_said(
    llama: Any, start_local: Any
) -> None:
    engine = start_local(llama)
    processor = require_processor(llama)
    first = Message("user", (Media("vector", list(VECTORS[0])), Text("What is a fruit?")))
    begun = prompt_of(llama, processor(Conversation((first,)), prompt_only=True))
    ids = asked(engine, begun)
    said = Message("assistant", (Text(processor.tokenizer.decode(ids)),))
    more = Message("user", (Text("And what is a square?"),))
    sample = processor(Conversation((first, said, more)), prompt_only=True)
    prompt = prompt_of(llama, sample)
    kept = torch.cat([prefix_key(begun), torch.tensor(ids[:-1])])
    num_there = num_alike(kept, prefix_key(prompt))
    assert num_there > begun.media_spans[0].start + begun.media_spans[0].length + 4
    with reading(llama) as seen:
        found = asked(engine, prompt)
    assert seen == [len(prompt.input_ids) - num_there]
    assert found == by_generate(llama, sample)


def test_a_prompt_that_comes_again_is_read_at_its_last_token_alone(
    llama: Any, start_local: Any
) -> None:
    engine = start_local(llama)
    prompt = of(llama, "What is a fruit?", VECTORS[0])
    client = Client()
    first = asked(engine, prompt)
    with reading(llama) as seen:
        engine.submit("again", prompt, OPTIONS, client)
        assert client.ids == first
    assert seen == [1]
    assert client.events[0].num_cached == len(prompt.input_ids) - 1
    assert not any(event.num_cached for event in client.events[1:-1])


def test_tenants_share_nothing(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    prompt = of(llama, "What is a fruit?")
    asked(engine, replace(prompt, tenant="a"))
    with reading(llama) as seen:
        asked(engine, replace(prompt, tenant="b"))
        asked(engine, replace(prompt, tenant="a"))
    assert seen == [len(prompt.input_ids), 1]


def test_prompts_that_share_unlike_much_are_right_when_they_are_read_at_once(
    llama: Any, start_local: Any
) -> None:
    engine = start_local(llama)
    asked(engine, of(llama, "What is a fruit? " * 4, VECTORS[0]))
    samples = [
        sample_of(llama, "What is a fruit? " * 4 + "Which?", VECTORS[0]),
        sample_of(llama, "yes or no"),
        sample_of(llama, "What is a fruit? And what is this?", VECTORS[0]),
        sample_of(llama, "What is it?", VECTORS[1], VECTORS[2]),
    ]
    clients = [Client() for _ in samples]
    prompts = [prompt_of(llama, sample) for sample in samples]
    with reading(llama) as seen:
        together(engine, prompts, [OPTIONS] * 4, clients)
        assert [client.ids for client in clients] == [by_generate(llama, s) for s in samples]
    longest = max(len(prompt.input_ids) for prompt in prompts)
    assert 1 < seen[-1] < longest


def test_no_more_tokens_are_kept_than_allowed_and_the_oldest_go_first(
    llama: Any, start_local: Any
) -> None:
    prompts = [replace(of(llama, "What is a fruit?"), tenant=str(i)) for i in range(3)]
    length = len(prompts[0].input_ids) + NUM_NEW - 1
    engine = start_local(llama, prefix_cache_tokens=2 * length)
    for prompt in prompts:
        asked(engine, prompt)
    with reading(llama) as seen:
        for prompt in (prompts[2], prompts[1], prompts[0]):
            asked(engine, prompt)
    engine.stop()
    kept = engine._batch.params.prefix_cache
    assert kept.num_tokens == 2 * length == kept.max_tokens
    assert seen == [1, 1, len(prompts[0].input_ids)]


def test_with_no_room_every_prompt_is_read_whole(llama: Any, start_local: Any) -> None:
    engine = start_local(llama, prefix_cache_tokens=0)
    prompt = of(llama, "What is a fruit?")
    with reading(llama) as seen:
        assert asked(engine, prompt) == asked(engine, prompt)
    assert seen == [len(prompt.input_ids)] * 2
    assert engine.prefix_stats.num_hits == 0


def test_an_engine_that_starts_anew_has_kept_nothing(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    prompt = of(llama, "What is a fruit?")
    asked(engine, prompt)
    engine.stop()
    engine.start()
    with reading(llama) as seen:
        asked(engine, prompt)
    assert seen == [len(prompt.input_ids)]


def test_what_no_numbers_came_of_is_not_kept(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    prompt = of(llama, "What is a fruit?", VECTORS[0])
    unlucky = prompt.media_embeds[0][0, 0]

    def no_numbers(_: Any, inputs: tuple[Tensor, ...]) -> Any:
        return (inputs[0].masked_fill(inputs[0][..., :1] == unlucky, torch.nan),)

    hook = llama.language_model.model.layers[0].register_forward_pre_hook(no_numbers)
    client = Client()
    try:
        engine.submit("bad", prompt, OPTIONS, client)
        assert isinstance(client.wait(), ErrorEvent)
    finally:
        hook.remove()
    with reading(llama) as seen:
        assert len(asked(engine, prompt)) == NUM_NEW
    assert seen == [len(prompt.input_ids)]


WHOLE = {"Falcon-H1", "LFM2", "Qwen3-Next", "Mamba2", "RWKV", "xLSTM"}
"""Rows do not join, so nothing is kept."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of families' own code
def test_prompts_that_begin_alike_are_answered_as_by_generate_in_every_family(
    families: ModuleType, tmp_path_factory: Any, start_local: Any
) -> None:
    served = sorted(families.FAMILIES.keys() - {"BERT"})
    whole: set[str] = set()
    for family in served:
        has_window = "sliding_window" in families.FAMILIES[family][1]
        changes = {"sliding_window": 256} if has_window else {}  # prompts stay within it
        model = composed(tmp_path_factory.mktemp("lm"), families, family, **changes)
        engine = start_local(model)
        if not engine._use_prefix_cache:
            whole.add(family)
        samples = [
            sample_of(model, "What is a fruit?", VECTORS[0]),
            sample_of(model, "What is a fruit? And this?", VECTORS[0], VECTORS[1]),
            sample_of(model, "yes or no"),
            sample_of(model, "What is a fruit?", VECTORS[0]),
        ]
        for sample in samples:
            client = Client()
            engine.submit("one", prompt_of(model, sample), OPTIONS, client)
            assert isinstance(client.wait(), FinishEvent)
            expected = generate_ids(model, [sample], max_new_tokens=NUM_NEW)[0].tolist()
            assert client.ids[: len(expected)] == expected, family
        assert (engine.prefix_stats.num_hits > 0) == engine._use_prefix_cache, family
        engine.stop()
    assert whole == WHOLE


def test_what_a_window_has_let_go_is_not_kept(
    families: ModuleType, tmp_path_factory: Any, start_local: Any
) -> None:
    window = 48
    model = composed(tmp_path_factory.mktemp("lm"), families, "Gemma3", sliding_window=window)
    engine = start_local(model)
    samples = [sample_of(model, "What is a fruit?" * num) for num in (1, 12)]
    short, long = (prompt_of(model, sample) for sample in samples)
    lengths = [len(prompt.input_ids) for prompt in (short, long)]
    num_there = num_alike(prefix_key(short), prefix_key(long))
    assert lengths[0] + NUM_NEW < window < lengths[1] and num_there >= 4
    with reading(model) as seen:
        found = [asked(engine, prompt) for prompt in (long, short, long, short)]
    assert seen == [lengths[1], lengths[0], lengths[1] - num_there, 1]
    assert found == [by_generate(model, sample) for sample in (*reversed(samples),) * 2]
