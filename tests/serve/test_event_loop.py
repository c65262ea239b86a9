"""The event loop of a server is not held up by one request, nor by the garbage collector."""

from __future__ import annotations

import asyncio
import copy
import gc
from typing import Any

import httpx
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from multi_token.serve.server import DrainingServer
from multi_token.serve.service import Service
from multi_token.serve.settings import ServeSettings
from tests.serve.asking import asked, content_of, post
from tests.serve.running_server import running

pytestmark = pytest.mark.slow

NUM_ITEMS, NUM_CHOICES = 64, 8


class OpsOfThisThread(TorchDispatchMode):
    """Names of torch's operations on the thread that enters it; the mode is thread-local."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_many_items_and_choices_run_no_operation_of_torch_on_the_event_loop(
    served_model: Any,
) -> None:
    ops = OpsOfThisThread()
    items = [
        {"type": "media", "modality": "vector", "data": [i, 1, 2, 3, 4]} for i in range(NUM_ITEMS)
    ]
    question = asked(*items, {"type": "text", "text": "What are these?"})
    with (
        running(served_model, max_batch=NUM_CHOICES) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        loop = server.server._loop
        assert loop is not None
        loop.call_soon_threadsafe(ops.__enter__)
        try:
            # twice: the second request finds its items in the cache
            options = {"n": NUM_CHOICES, "max_tokens": 2, "temperature": 1.0}
            answers = [post(client, question, **options) for _ in range(2)]
        finally:
            loop.call_soon_threadsafe(ops.__exit__, None, None, None)
        for answer in answers:
            content_of(answer)
            usage = answer.json()["usage"]["prompt_tokens_details"]["media_tokens"]
            assert usage == {"vector": 2 * NUM_ITEMS}
    assert ops.names == []


def test_the_garbage_collector_looks_at_no_object_of_the_start(served_model: Any) -> None:
    num_frozen: list[int] = []

    def started() -> None:
        num_frozen.append(gc.get_freeze_count())
        server.should_exit = True

    text_model = copy.copy(served_model)
    text_model.modalities = {}
    server = DrainingServer(Service(text_model, ServeSettings(port=0)), on_started=started)
    try:
        asyncio.run(server.serve())
    finally:
        gc.unfreeze()
    assert num_frozen[0] > 100_000
