"""Media embeddings: equal in any batch, computed once for each content, isolated faults."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from multi_token.errors import MultiTokenError
from multi_token.generate import single_question
from multi_token.serve.errors import ServeError
from multi_token.serve.media.memory import MediaMemory, Stage
from multi_token.serve.media_embeddings import EmbeddedItem, MediaEmbedder, content_key
from multi_token.types import Media, Prepared, Sample

VECTORS = [[1.0, 2.0, 3.0, 4.0, 5.0], [-1.0, 0.5, 2.0, 0.0, 1.0], [0.2, 0.2, -3.0, 1.0, 0.0]]


@pytest.fixture
def make(model: Any) -> Iterator[Callable[..., MediaEmbedder]]:
    made: list[MediaEmbedder] = []

    def build(**options: Any) -> MediaEmbedder:
        made.append(MediaEmbedder(model, **{"cache_bytes": 1 << 20, **options}))
        return made[-1]

    yield build
    for embedder in made:
        embedder.stop()


@pytest.fixture
def batches(model: Any) -> Iterator[list[int]]:
    """Number of items in each batch of the vector projector."""
    seen: list[int] = []
    hook = model.projectors["vector"].register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0].values))
    )
    yield seen
    hook.remove()


def sample_of(model: Any, *vectors: Any) -> Sample:
    conversation = single_question("What is this?", [Media("vector", vector) for vector in vectors])
    return model.require_processor()(conversation, prompt_only=True)


def alone(model: Any, prepared: Prepared) -> Tensor:
    inputs = model.modalities["vector"].collate([prepared])
    with torch.no_grad():
        return model.projectors["vector"](model.encode("vector", inputs))


def held(embedder: MediaEmbedder, model: Any) -> Callable[[], None]:
    """Hold the thread at one item, so that the next ones queue; the result releases it."""
    go, is_at_it = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        hook.remove()
        is_at_it.set()
        assert go.wait(30)

    hook = model.projectors["vector"].register_forward_pre_hook(hold)
    (item,) = sample_of(model, [9.0] * 5).media
    embedder.embed("vector", item, "held")
    assert is_at_it.wait(30)
    return go.set


def test_items_get_the_embeddings_that_each_has_alone(model: Any, make: Any) -> None:
    items = [*sample_of(model, VECTORS[0], VECTORS[1:]).media, *sample_of(model, VECTORS[2]).media]

    async def all_at_once(embedder: MediaEmbedder) -> list[EmbeddedItem]:
        return await asyncio.gather(*(embedder.embed_item("vector", item) for item in items))

    embedded = asyncio.run(all_at_once(make()))
    assert len({found.key for found in embedded}) == len(items)
    for found, item in zip(embedded, items, strict=True):
        torch.testing.assert_close(found.embeds, alone(model, item))


def test_the_memory_of_an_item_is_released_when_it_is_embedded_even_if_its_client_left(
    model: Any, make: Any
) -> None:
    embedder, memory = make(), MediaMemory(8_000)
    leases = [memory.lease(Stage.PREPARED) for _ in range(3)]
    for lease in leases:
        lease.acquire(100)
    bad, *good = [sample_of(model, vector).media[0] for vector in VECTORS]

    async def leave() -> None:
        go = held(embedder, model)
        works = [
            asyncio.ensure_future(embedder.embed_item("vector", item, memory=lease))
            for item, lease in zip(good, leases, strict=False)
        ]
        while len(embedder._waiting) < 2:
            await asyncio.sleep(0)
        works[0].cancel()
        await asyncio.gather(works[0], return_exceptions=True)
        assert memory.num_bytes == 300
        go()
        await works[1]
        assert memory.num_bytes == 100
        embedder.stop()
        with pytest.raises(ServeError):
            await embedder.embed_item("vector", bad, memory=leases[2])

    asyncio.run(leave())
    assert memory.num_bytes == 0


def test_tenants_take_turns_in_the_queue(model: Any, make: Any) -> None:
    embedder = make(max_items=1)
    go = held(embedder, model)
    order: list[str] = []
    names = ["a1", "a2", "a3", "b1"]
    futures = []
    for number, name in enumerate(names):
        (item,) = sample_of(model, [float(number)] * 5).media
        futures.append(embedder.embed("vector", item, name, name[0]))
        futures[-1].add_done_callback(lambda _, name=name: order.append(name))
    go()
    for future in futures:
        future.result(30)
    assert order == ["a1", "b1", "a2", "a3"]


def test_queued_items_are_one_batch(model: Any, make: Any, batches: list[int]) -> None:
    embedder = make(max_items=3)
    go = held(embedder, model)
    items = [sample_of(model, [float(i)] * 5).media[0] for i in range(5)]
    asked = [embedder.embed("vector", item, str(i)) for i, item in enumerate(items)]
    go()
    results = [future.result(30) for future in asked]
    assert batches == [1, 3, 2]
    for item, result in zip(items, results, strict=True):
        torch.testing.assert_close(result, alone(model, item))


def test_a_batch_takes_no_more_features_than_its_limit(
    model: Any, make: Any, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [sample_of(model, [float(i)] * 5).media[0] for i in range(5)]
    limit = 2 * items[0].num_features
    monkeypatch.setattr("multi_token.serve.media_embeddings.MAX_BATCH_FEATURES", limit)
    items[3] = replace(items[3], num_features=limit + 1)
    embedder = make()
    go = held(embedder, model)
    asked = [embedder.embed("vector", item, str(i)) for i, item in enumerate(items)]
    go()
    for i in (0, 1, 2, 4):
        asked[i].result(30)
    assert batches == [1, 2, 1, 1, 1]


def test_a_batch_makes_progress_with_each_part_of_its_encoder(model: Any, make: Any) -> None:
    embedder = make()
    ages: list[float] = []

    def age(*_: Any) -> None:
        embedder._progressed_at = -1e9  # long ago
        ages.append(embedder.stalled_s)

    def look(*_: Any) -> None:
        ages.append(embedder.stalled_s)

    parts = list(model.projectors["vector"].modules())[1:]
    hooks = [
        model.encoders["vector"].register_forward_pre_hook(age),
        model.projectors["vector"].register_forward_pre_hook(look),
        parts[-1].register_forward_pre_hook(age),
        model.projectors["vector"].register_forward_hook(look),
    ]
    try:
        embedder.embed("vector", sample_of(model, VECTORS[0]).media[0], "0").result(30)
    finally:
        for hook in hooks:
            hook.remove()
    hung, after_encoder, hung_again, after_part = ages
    assert min(hung, hung_again) > 1e9, "a part that does not end makes no progress"
    assert max(after_encoder, after_part) < 60
    assert embedder.stalled_s == 0
    for module in (*model.encoders["vector"].modules(), *parts):
        assert not module._forward_hooks, "hooks are gone after the batch"


def test_a_content_requested_twice_is_computed_once(
    model: Any, make: Any, batches: list[int]
) -> None:
    embedder = make()
    go = held(embedder, model)
    item = sample_of(model, VECTORS[0]).media[0]
    first, second = (embedder.embed("vector", item, "key") for _ in range(2))
    go()
    assert torch.equal(first.result(30), second.result(30))
    assert torch.equal(embedder.embed("vector", item, "key").result(30), first.result(30))
    assert batches == [1, 1]
    assert (embedder.num_queries, embedder.num_hits) == (4, 2)


def test_the_least_recently_used_embeddings_are_dropped_first(model: Any, make: Any) -> None:
    items = [sample_of(model, vector).media[0] for vector in VECTORS]
    num_bytes = alone(model, items[0]).nbytes
    embedder = make(cache_bytes=2 * num_bytes)

    def is_here(index: int) -> bool:
        before = embedder.num_hits
        embedder.embed("vector", items[index], str(index)).result(30)
        assert embedder.num_bytes <= 2 * num_bytes
        return embedder.num_hits > before

    assert [is_here(i) for i in (0, 1, 0, 2)] == [False, False, True, False]
    assert [is_here(i) for i in (0, 2, 1)] == [True, True, False]
    none = make(cache_bytes=0)
    for _ in range(2):
        none.embed("vector", items[0], "0").result(30)
    assert none.num_hits == none.num_bytes == 0


@pytest.mark.parametrize("fault", ["NaN", "too many", "raises", "ours"])
def test_a_bad_item_fails_alone(model: Any, make: Any, fault: str) -> None:
    embedder = make()
    go = held(embedder, model)
    samples = [sample_of(model, vector) for vector in VECTORS]
    bad = samples[1].media[0].inputs["values"]

    def break_on_it(_: Any, inputs: Any, tokens: Tensor) -> Tensor:
        is_it = (inputs[0].values == bad).all(-1).any()
        if bool(is_it):
            if fault == "raises":
                raise RuntimeError("weights at /some/path are broken")
            if fault == "ours":
                raise MultiTokenError("needs a square number of features, got 7")
            if fault == "too many":
                return torch.cat([tokens, tokens])
        where = (inputs[0].values == bad).all(-1).flatten().repeat_interleave(2)
        return tokens.masked_fill(where[:, None], torch.nan) if fault == "NaN" else tokens

    hook = model.projectors["vector"].register_forward_hook(break_on_it)
    try:
        asked = [embedder.embed("vector", s.media[0], str(i)) for i, s in enumerate(samples)]
        go()
        with pytest.raises(ServeError) as failed:
            asked[1].result(30)
    finally:
        hook.remove()
    assert "path" not in str(failed.value)
    assert failed.value.status == {"raises": 500}.get(fault, 400)
    for i in (0, 2):
        torch.testing.assert_close(asked[i].result(30), alone(model, samples[i].media[0]))
    again = embedder.embed("vector", samples[1].media[0], "1").result(30)
    torch.testing.assert_close(again, alone(model, samples[1].media[0]))


def test_a_client_that_disconnects_takes_nothing_from_the_others(model: Any, make: Any) -> None:
    embedder = make()
    sample = sample_of(model, VECTORS[0])
    key = content_key("vector", sample.media[0], "")

    async def leave() -> Any:
        go = held(embedder, model)
        leaver = asyncio.ensure_future(embedder.embed_item("vector", sample.media[0]))
        stayer = asyncio.ensure_future(embedder.embed_item("vector", sample.media[0]))
        while key not in embedder._in_flight or embedder.num_hits == 0:
            await asyncio.sleep(0)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        go()
        return await stayer

    tokens = asyncio.run(leave()).embeds
    torch.testing.assert_close(tokens, alone(model, sample.media[0]))


def test_keys_are_equal_for_equal_content_of_one_tenant_only(model: Any) -> None:
    item = sample_of(model, VECTORS[0]).media[0]
    values = item.inputs["values"]
    same = Prepared({k: v.clone() for k, v in item.inputs.items()}, item.num_features)
    key = content_key("vector", item, "a")
    assert content_key("vector", same, "a") == key
    others = [
        content_key("vector", item, "b"),
        content_key("image", item, "a"),
        content_key("vector", Prepared({**item.inputs, "values": values + 1e-6}, 1), "a"),
        content_key("vector", Prepared({**item.inputs, "values": values.reshape(5, 1)}, 1), "a"),
        content_key("vector", Prepared({**item.inputs, "values": values.double()}, 1), "a"),
        content_key("vector", Prepared(dict(item.inputs), 2), "a"),
    ]
    assert len({key, *others}) == 7


def test_stop_refuses_queued_items(model: Any, make: Any) -> None:
    embedder = make()
    go = held(embedder, model)
    waiting = embedder.embed("vector", sample_of(model, VECTORS[0]).media[0], "waits")
    stopping = threading.Thread(target=embedder.stop)
    stopping.start()
    with pytest.raises(ServeError) as refused:
        waiting.result(30)
    assert refused.value.status == 503
    go()
    stopping.join(30)
    assert not stopping.is_alive()
