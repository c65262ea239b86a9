"""Soft ids never stand for two contents, and the continuous engine answers by what lies there now.

Border: ids, the pool, and what is particular to the continuous engine; the rest of an engine's
contract is tested for both beside it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from multi_token.errors import LanguageModelError
from multi_token.generate import generate_ids
from multi_token.serve.engines.base import Prompt, SamplingParams
from multi_token.serve.engines.continuous import ContinuousEngine
from multi_token.serve.engines.soft_tokens import SoftEmbedding, SoftIds, soft_embedding
from multi_token.serve.errors import ServeError
from tests.serve.engine_parts import (
    VECTORS,
    Client,
    composed,
    engines,
    prompt_of,
    sample_of,
    together,
)

pytestmark = pytest.mark.slow

NUM_NEW = 8
NUM_IDS = 100


@pytest.fixture
def make(llama: Any) -> Iterator[Callable[..., ContinuousEngine]]:
    with engines(ContinuousEngine) as build:
        yield partial(build, llama)


def asked(engine: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    clients = [Client() for _ in prompts]
    together(engine, prompts, [SamplingParams(NUM_NEW)] * len(prompts), clients)
    return [client.ids for client in clients]


def test_ids_are_unique_and_pinned_rows_are_never_written_over() -> None:
    """Random use, with a model of the pool that says what lies in each row."""
    chance = random.Random(0)
    ids = SoftIds(NUM_IDS, 16)
    rows: dict[int, tuple[str, int]] = {}
    meaning: dict[int, tuple[str, int]] = {}
    running: list[list[tuple[str, int]]] = []
    lengths = {f"key{i}": 1 + i % 6 for i in range(12)}
    num_full = 0
    for _ in range(3000):
        if running and chance.random() < 0.5:
            ended = running.pop(chance.randrange(len(running)))
            ids.unpin([key for key, _ in ended])
            continue
        items = [(k, lengths[k]) for k in chance.choices(sorted(lengths), k=chance.randint(1, 3))]
        pinned = ids.pin(items)
        if pinned is None:
            num_full += 1
            assert running or sum(dict(items).values()) > 16
            continue
        firsts, new = pinned
        for index in new:
            key, length = items[index]
            for offset, row in enumerate(ids.rows(firsts[index], length).tolist()):
                rows[row] = (key, offset)
        running.append(items)
        for key, first in zip((key for key, _ in items), firsts, strict=True):
            for offset in range(lengths[key]):
                assert meaning.setdefault(first + offset, (key, offset)) == (key, offset)
        for prompt in running:
            for key, length in prompt:
                (first,), new = ids.pin([(key, length)]) or ((-1,), [0])
                assert not new
                ids.unpin([key])
                found = [rows[row] for row in ids.rows(first, length).tolist()]
                assert found == [(key, offset) for offset in range(length)]
    assert num_full > 100
    assert len(meaning) > 1000


def test_all_room_can_be_had_when_nobody_else_needs_it() -> None:
    ids = SoftIds(NUM_IDS, 10)
    for key, length in (("a", 2), ("x", 3), ("b", 2)):
        assert ids.pin([(key, length)]) is not None
    ids.unpin(["x"])
    assert ids.pin([("c", 6)]) is None, "six rows are free, but not one behind the other"
    ids.unpin(["a"])
    both = [("a", 2), ("b", 2), ("c", 6)]
    assert ids.pin(both) is None, "b is needed where it lies"
    ids.unpin(["b"])
    pinned = ids.pin(both)
    assert pinned is not None
    assert pinned[1] == [0, 1, 2], "all of them are written anew"
    rows = [ids.rows(first, n) for first, (_, n) in zip(pinned[0], both, strict=True)]
    assert sorted(torch.cat(rows).tolist()) == list(range(10))
    assert ids.pin([("e", 11)]) is None


def test_ids_end_before_int32_does() -> None:
    ids = SoftIds(NUM_IDS, 10, max_id=NUM_IDS + 11)
    assert ids.pin([("a", 6)]) == ([100], [0])
    ids.unpin(["a"])
    assert ids.pin([("b", 6)]) == ([106], [0])
    assert ids.pin([("c", 1)]) is None
    assert ids.is_worn_out
    ids.unpin(["b"])
    assert ids.pin([("b", 6)]) == ([106], []), "what is known stays known"
    ids.unpin(["b"])
    ids.reset()
    assert ids.pin([("c", 1)]) == ([100], [0])


def test_the_embedding_is_the_models_own_again_afterwards(llama: Any) -> None:
    language_model = llama.language_model
    own, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    text = torch.tensor([[5, 7, 11]])
    with soft_embedding(language_model, 4) as soft:
        assert language_model.get_input_embeddings() is soft
        assert language_model.get_output_embeddings() is head
        soft.pool[1] = 3.0
        mixed = soft(torch.tensor([[5, soft.num_ids + 1, 11, soft.num_ids + 5]]))
        assert torch.equal(mixed[0, [0, 2]], own(text)[0, [0, 2]])
        assert torch.equal(mixed[0, [1, 3]], torch.full((2, 32), 3.0))
        assert torch.equal(soft(text), own(text))
    assert language_model.get_input_embeddings() is own
    assert not any(isinstance(m, SoftEmbedding) for m in language_model.modules())


def test_no_answer_is_by_what_lay_there_before(llama: Any, make: Any) -> None:
    """The pool holds three rows, so the second content takes the place of the first."""
    samples = [sample_of(llama, "What is this?", vector) for vector in VECTORS[:2]]
    alone = [generate_ids(llama, [s], max_new_tokens=NUM_NEW)[0].tolist() for s in samples]
    assert alone[0] != alone[1]
    engine = make(num_soft_tokens=3, page_size=4)
    prompts = [prompt_of(llama, sample) for sample in samples]
    for _ in range(2):
        assert [asked(engine, [prompt])[0] for prompt in prompts] == alone
    # at once: the second waits for the rows
    assert asked(engine, prompts) == alone


def test_what_many_ask_at_once_fits_into_a_small_cache(llama: Any, make: Any) -> None:
    """Prompts are put back and read again while others are answered."""
    samples = [sample_of(llama, text, v) for v in VECTORS for text in ("yes or no", "What is it?")]
    alone = [generate_ids(llama, [s], max_new_tokens=40)[0].tolist() for s in samples]
    prompts = [prompt_of(llama, sample) for sample in samples]
    engine = make(num_cache_tokens=96, page_size=8, max_step_tokens=16)
    assert engine.max_tokens <= 96
    clients = [Client() for _ in prompts]
    together(engine, prompts, [SamplingParams(40)] * len(prompts), clients)
    assert [client.ids for client in clients] == alone
    with pytest.raises(ServeError, match="limit"):
        engine.submit("long", prompts[0], SamplingParams(96), Client())
    assert engine.is_alive


def test_a_tenant_finds_only_what_it_has_asked_itself(llama: Any, make: Any) -> None:
    engine = make(page_size=4)
    sample = sample_of(llama, "What is a fruit?")
    alone = generate_ids(llama, [sample], max_new_tokens=NUM_NEW)[0].tolist()
    prompt = prompt_of(llama, sample)
    num_cached = []
    for tenant in ("a", "b", "a", "", "b", ""):
        client = Client()
        engine.submit("one", replace(prompt, tenant=tenant), SamplingParams(NUM_NEW), client)
        assert client.ids == alone
        num_cached.append(client.events[0].num_cached)
    shared = (len(prompt.input_ids) - 1) // 4 * 4
    assert num_cached == [0, 0, shared, 0, shared, shared] and shared > 0


def test_ids_that_are_used_up_begin_anew_with_an_empty_cache(llama: Any, make: Any) -> None:
    samples = [sample_of(llama, "What is this?", vector) for vector in VECTORS]
    alone = [generate_ids(llama, [s], max_new_tokens=NUM_NEW)[0].tolist() for s in samples]
    engine = make(num_soft_tokens=3, page_size=4)
    engine._ids.max_id = engine._soft.num_ids + 7
    prompts = [prompt_of(llama, sample) for sample in samples]
    for _ in range(2):
        assert asked(engine, prompts) == alone
    assert engine.is_alive


def test_more_media_than_are_kept_are_refused(llama: Any, make: Any) -> None:
    engine = make(num_soft_tokens=5)
    two = prompt_of(llama, sample_of(llama, "Which?", *VECTORS[:2]))
    with pytest.raises(ServeError, match="send fewer items"):
        engine.submit("two", two, SamplingParams(NUM_NEW), Client())


def test_the_language_model_is_as_it_was_when_the_engine_has_stopped(llama: Any, make: Any) -> None:
    own = llama.language_model.get_input_embeddings()
    kind = llama.language_model.config._attn_implementation
    engine = make()
    assert llama.language_model.get_input_embeddings() is not own
    engine.stop()
    assert llama.language_model.get_input_embeddings() is own
    assert llama.language_model.config._attn_implementation == kind
    engine.start()
    prompt = prompt_of(llama, sample_of(llama, "yes or no"))
    assert asked(engine, [prompt])


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("Gemma3n", "looks ids up"),
        ("Mamba2", "linear_attention"),
        ("StableLM", "StableLmForCausalLM has no continuous batching"),
        ("BLOOM", "answers otherwise"),
    ],
)
def test_a_language_model_that_cannot_be_served_so_is_refused_at_the_start(
    families: ModuleType, tmp_path: Path, family: str, words: str
) -> None:
    model = composed(tmp_path, families, family)
    own = model.language_model.get_input_embeddings()
    engine = ContinuousEngine(model)
    with pytest.raises(LanguageModelError, match=words):
        engine.start()
    assert not engine.is_alive
    assert model.language_model.get_input_embeddings() is own


def test_a_penalty_of_repetition_is_refused_and_not_left_out(llama: Any) -> None:
    config = llama.language_model.generation_config
    config.repetition_penalty = 1.3
    try:
        with pytest.raises(LanguageModelError, match="RepetitionPenalty"):
            ContinuousEngine(llama).start()
    finally:
        config.repetition_penalty = None


def test_a_model_that_answers_otherwise_by_pages_is_refused(llama: Any) -> None:
    """The proof at the start looks at probabilities, not only at the likeliest ids."""

    def a_little_louder(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if "cache" in kwargs:
            output.logits = output.logits * 1.05
        return output

    hook = llama.language_model.register_forward_hook(a_little_louder, with_kwargs=True)
    try:
        engine = ContinuousEngine(llama)
        with pytest.raises(LanguageModelError, match="answers otherwise"):
            engine.start()
        assert not engine.is_alive
    finally:
        hook.remove()
