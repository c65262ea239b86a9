"""The prefix of prompts is prefilled once by the local engine, and the tokens stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from multi_token.generate import generate_ids
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
def prefills(model: Any) -> Iterator[list[int]]:
    """Number of positions of each prefill."""
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


def num_common(key: Tensor, other: Tensor) -> int:
    num = min(len(key), len(other))
    return int((key[:num] == other[:num]).long().cumprod(0).sum())


def about(model: Any, before: str, vector: Sequence[float], after: str) -> Any:
    parts = (Text(before), Media("vector", list(vector)), Text(after))
    return model.require_processor()(Conversation((Message("user", parts),)), prompt_only=True)


def test_only_the_new_part_of_a_prompt_is_prefilled(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    samples = [
        about(llama, "Here it is: ", VECTORS[0], "What is a fruit?"),
        about(llama, "Here it is: ", VECTORS[0], "What is a fruit? And what is a square?"),
        about(llama, "Here it is: ", VECTORS[1], "What is a fruit?"),
    ]
    prompts = [prompt_of(llama, sample) for sample in samples]
    keys = [prefix_key(prompt) for prompt in prompts]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    num_cached = [0, num_common(keys[0], keys[1]), prompts[2].media_spans[0].start]
    assert num_cached[1] > num_cached[2] + 3 and num_cached[2] >= 4
    assert num_common(keys[0], keys[2]) == num_cached[2], "other media, so all after it is new"
    with prefills(llama) as seen:
        found = [asked(engine, prompt) for prompt in prompts]
    assert seen == [length - num for length, num in zip(lengths, num_cached, strict=True)]
    assert (engine.prefix_stats.num_queries, engine.prefix_stats.num_hits) == (
        sum(lengths),
        sum(num_cached),
    )
    assert found == [by_generate(llama, sample) for sample in samples]


def test_a_longer_conversation_is_prefilled_after_the_cached_turns(
    llama: Any, start_local: Any
) -> None:
    engine = start_local(llama)
    processor = llama.require_processor()
    first = Message("user", (Media("vector", list(VECTORS[0])), Text("What is a fruit?")))
    begun = prompt_of(llama, processor(Conversation((first,)), prompt_only=True))
    ids = asked(engine, begun)
    said = Message("assistant", (Text(processor.tokenizer.decode(ids)),))
    more = Message("user", (Text("And what is a square?"),))
    sample = processor(Conversation((first, said, more)), prompt_only=True)
    prompt = prompt_of(llama, sample)
    cached = torch.cat([prefix_key(begun), torch.tensor(ids[:-1])])
    num_cached = num_common(cached, prefix_key(prompt))
    assert num_cached > begun.media_spans[0].start + begun.media_spans[0].length + 4
    with prefills(llama) as seen:
        found = asked(engine, prompt)
    assert seen == [len(prompt.input_ids) - num_cached]
    assert found == by_generate(llama, sample)


def test_a_repeated_prompt_is_prefilled_at_its_last_token_alone(
    llama: Any, start_local: Any
) -> None:
    engine = start_local(llama)
    prompt = of(llama, "What is a fruit?", VECTORS[0])
    client = Client()
    first = asked(engine, prompt)
    with prefills(llama) as seen:
        engine.submit("again", prompt, OPTIONS, client)
        assert client.ids == first
    assert seen == [1]
    assert client.events[0].num_cached == len(prompt.input_ids) - 1
    assert not any(event.num_cached for event in client.events[1:-1])


def test_tenants_share_nothing(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    prompt = of(llama, "What is a fruit?")
    asked(engine, replace(prompt, tenant="a"))
    with prefills(llama) as seen:
        asked(engine, replace(prompt, tenant="b"))
        asked(engine, replace(prompt, tenant="a"))
    assert seen == [len(prompt.input_ids), 1]


def test_prompts_with_prefixes_of_several_lengths_are_right_in_one_prefill(
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
    with prefills(llama) as seen:
        together(engine, prompts, [OPTIONS] * 4, clients)
        assert [client.ids for client in clients] == [by_generate(llama, s) for s in samples]
    longest = max(len(prompt.input_ids) for prompt in prompts)
    assert 1 < seen[-1] < longest


def test_no_more_tokens_are_cached_than_allowed_and_the_oldest_go_first(
    llama: Any, start_local: Any
) -> None:
    prompts = [replace(of(llama, "What is a fruit?"), tenant=str(i)) for i in range(3)]
    length = len(prompts[0].input_ids) + NUM_NEW - 1
    engine = start_local(llama, prefix_cache_tokens=2 * length)
    for prompt in prompts:
        asked(engine, prompt)
    with prefills(llama) as seen:
        for prompt in (prompts[2], prompts[1], prompts[0]):
            asked(engine, prompt)
    engine.stop()
    cache = engine._batch.params.prefix_cache
    assert cache.num_tokens == 2 * length == cache.max_tokens
    assert seen == [1, 1, len(prompts[0].input_ids)]


def test_without_a_prefix_cache_complete_prompts_are_prefilled(
    llama: Any, start_local: Any
) -> None:
    engine = start_local(llama, prefix_cache_tokens=0)
    prompt = of(llama, "What is a fruit?")
    with prefills(llama) as seen:
        assert asked(engine, prompt) == asked(engine, prompt)
    assert seen == [len(prompt.input_ids)] * 2
    assert engine.prefix_stats.num_hits == 0


def test_an_engine_that_starts_again_has_cached_nothing(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    prompt = of(llama, "What is a fruit?")
    asked(engine, prompt)
    engine.stop()
    engine.start()
    with prefills(llama) as seen:
        asked(engine, prompt)
    assert seen == [len(prompt.input_ids)]


def test_a_prefix_with_nan_is_not_cached(llama: Any, start_local: Any) -> None:
    engine = start_local(llama)
    prompt = of(llama, "What is a fruit?", VECTORS[0])
    unlucky = prompt.media_embeds[0][0, 0]

    def give_nan(_: Any, inputs: tuple[Tensor, ...]) -> Any:
        return (inputs[0].masked_fill(inputs[0][..., :1] == unlucky, torch.nan),)

    hook = llama.language_model.model.layers[0].register_forward_pre_hook(give_nan)
    client = Client()
    try:
        engine.submit("bad", prompt, OPTIONS, client)
        assert isinstance(client.wait(), ErrorEvent)
    finally:
        hook.remove()
    with prefills(llama) as seen:
        assert len(asked(engine, prompt)) == NUM_NEW
    assert seen == [len(prompt.input_ids)]


WITHOUT_CACHE = {"Falcon-H1", "LFM2", "Qwen3-Next", "Mamba2", "RWKV", "xLSTM"}
"""Requests cannot join a batch, so nothing is cached."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of families' own code
def test_prompts_with_a_common_prefix_get_the_tokens_of_generate_in_every_family(
    families: ModuleType, tmp_path_factory: Any, start_local: Any
) -> None:
    served = sorted(families.FAMILIES.keys() - {"BERT"})
    without: set[str] = set()
    for family in served:
        has_window = "sliding_window" in families.FAMILIES[family][1]
        changes = {"sliding_window": 256} if has_window else {}  # prompts stay within it
        model = composed(tmp_path_factory.mktemp("lm"), families, family, **changes)
        engine = start_local(model)
        if not engine._use_prefix_cache:
            without.add(family)
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
    assert without == WITHOUT_CACHE


def test_a_prefix_that_a_window_has_dropped_is_not_cached(
    families: ModuleType, tmp_path_factory: Any, start_local: Any
) -> None:
    window = 48
    model = composed(tmp_path_factory.mktemp("lm"), families, "Gemma3", sliding_window=window)
    engine = start_local(model)
    samples = [sample_of(model, "What is a fruit?" * num) for num in (1, 12)]
    short, long = (prompt_of(model, sample) for sample in samples)
    lengths = [len(prompt.input_ids) for prompt in (short, long)]
    num_cached = num_common(prefix_key(short), prefix_key(long))
    assert lengths[0] + NUM_NEW < window < lengths[1] and num_cached >= 4
    with prefills(model) as seen:
        found = [asked(engine, prompt) for prompt in (long, short, long, short)]
    assert seen == [lengths[1], lengths[0], lengths[1] - num_cached, 1]
    assert found == [by_generate(model, sample) for sample in (*reversed(samples),) * 2]
