"""Several replicas of one gateway: choice, failure, full replicas, and their return."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import httpx
import pytest

from multi_token.errors import LanguageModelError
from multi_token.generate import generate_ids
from multi_token.serve.engines.base import ErrorEvent, FinishEvent, SamplingParams
from multi_token.serve.engines.vllm.engine import VllmEngine
from multi_token.serve.errors import ServeError
from tests.serve.asking import asked, fault_of, post
from tests.serve.engine_parts import VECTORS, Client, prompt_of, sample_of
from tests.serve.running_server import running
from tests.serve.vllm_parts import HEALTH_INTERVAL_S, golden_of, started
from tests.serve.vllm_stand_in import StandIn

pytestmark = pytest.mark.slow
LONG = SamplingParams(150, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts(llama: Any) -> list[Any]:
    return [prompt_of(llama, sample_of(llama, "What is this?", vector)) for vector in VECTORS]


@pytest.fixture
def two(llama: Any) -> Iterator[tuple[VllmEngine, StandIn, StandIn]]:
    """A gateway with two replicas."""
    first, second = StandIn(llama.language_model), StandIn(llama.language_model)
    with started(llama, first, second) as engine:
        assert first.wait_until(lambda: engine.num_replicas == 2)
        yield engine, first, second


def submitted(engine: VllmEngine, prompt: Any, options: Any = None, id: str = "r") -> Client:
    client = Client()
    engine.submit(id, prompt, options or SamplingParams(8), client)
    return client


def error_of(client: Client) -> ServeError:
    end = client.wait()
    assert isinstance(end, ErrorEvent) and isinstance(end.error, ServeError), end
    return end.error


def test_prompts_go_to_the_replica_with_the_fewest_in_flight(two: Any, prompts: list[Any]) -> None:
    engine, first, second = two
    with first.held(), second.held():
        clients = [submitted(engine, prompts[0], LONG, f"r{i}") for i in range(6)]
        assert first.wait_until(lambda: (first.num_waiting, second.num_waiting) == (3, 3))
        assert (engine.num_running, engine.num_waiting) == (0, 6)
    assert len({tuple(client.ids) for client in clients}) == 1


def test_a_replica_that_dies_before_the_first_token_loses_no_request(
    two: Any, llama: Any, prompts: list[Any]
) -> None:
    engine, first, second = two
    expected = [
        generate_ids(llama, [sample_of(llama, "What is this?", vector)], max_new_tokens=8)[
            0
        ].tolist()
        for vector in VECTORS
    ]
    with first.held():
        with second.held():
            clients = [submitted(engine, prompts[i % 3], id=f"r{i}") for i in range(6)]
            assert first.wait_until(lambda: first.num_waiting == second.num_waiting == 3)
        first.die()
    assert [client.ids for client in clients] == expected * 2
    assert engine.retries["lost"] == 3
    assert first.wait_until(lambda: engine.num_replicas == 1)
    assert submitted(engine, prompts[0]).ids == expected[0]


def test_a_replica_that_dies_after_the_first_token_ends_the_request_with_an_error(
    llama: Any, prompts: list[Any]
) -> None:
    dying = StandIn(llama.language_model)
    with started(llama, dying) as engine:
        has_begun = threading.Event()
        client = Client(lambda _: has_begun.set())
        engine.submit("r", prompts[0], LONG, client)
        assert has_begun.wait(30)
        dying.die()
        error = error_of(client)
        assert (error.status, error.code, error.retry) == (503, "engine_lost", True)
        assert dying.wait_until(lambda: not engine.is_alive)
        with pytest.raises(ServeError) as refused:
            submitted(engine, prompts[0])
        assert (refused.value.status, refused.value.code) == (503, "no_engine")


def test_a_failure_within_a_stream_reaches_the_client_as_an_error_event(
    llama: Any, prompts: list[Any]
) -> None:
    breaking = StandIn(llama.language_model)
    engine = VllmEngine(
        llama, golden_of(llama), [breaking.url], health_interval_s=HEALTH_INTERVAL_S
    )
    with (
        running(llama, engine=engine) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        breaking.breaks_at = 3
        answer = post(http, asked("What is a cat?"), stream=True, ignore_eos=True)
        events = answer.text.split("\n\n")
        assert answer.status_code == 200 and events[-2:] == ["data: [DONE]", ""]
        error = json.loads(events[-3].removeprefix("data: "))["error"]
        assert error["code"] == "engine_lost" and "EngineCore" not in error["message"]
    breaking.die()


def test_a_replica_that_returns_is_verified_and_used_again(
    two: Any, llama: Any, families: ModuleType, prompts: list[Any]
) -> None:
    engine, first, second = two
    second.die()
    first.die()
    assert first.wait_until(lambda: not engine.is_alive)
    came = threading.Thread(target=engine.start, daemon=True)
    came.start()
    second.language_model = families.tiny_model("Llama", seed=1)
    num_asked = second.num_asked
    second.start()
    # it runs, but has other weights now
    assert second.wait_until(lambda: second.num_asked > num_asked)
    assert not engine.is_alive and came.is_alive()
    first.start()
    came.join(30)
    assert not came.is_alive() and engine.is_alive
    assert submitted(engine, prompts[0]).wait() == FinishEvent("length")
    assert engine.num_replicas == 1 and second.num_asked == num_asked + 1
    second.die()
    assert second.wait_until(lambda: engine._router.replicas[1].state == "down")
    second.language_model = llama.language_model
    second.start()
    assert second.wait_until(lambda: engine.num_replicas == 2)


def test_a_replica_that_hangs_is_given_up_and_another_one_generates(
    two: Any, prompts: list[Any]
) -> None:
    engine, first, second = two
    with first.held():
        with second.held():
            clients = [submitted(engine, prompts[0], id=f"r{i}") for i in range(2)]
            assert first.wait_until(lambda: first.num_waiting == second.num_waiting == 1)
            first.is_healthy = False
            assert second.wait_until(lambda: second.num_waiting == 2)
        assert [client.wait() for client in clients] == [FinishEvent("length")] * 2
        assert first.wait_until(lambda: first.num_waiting == 0)


def test_a_full_replica_passes_prompts_on_and_full_replicas_are_a_429_with_retry_after(
    llama: Any, prompts: list[Any]
) -> None:
    one, other = (StandIn(llama.language_model, max_num_seqs=1, max_inside=1) for _ in range(2))
    engine = VllmEngine(
        llama, golden_of(llama), [one.url, other.url], health_interval_s=HEALTH_INTERVAL_S
    )
    with (
        running(llama, engine=engine) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        assert one.wait_until(lambda: engine.num_replicas == 2)
        with one.held(), other.held():
            clients = [submitted(engine, prompts[0], id=f"r{i}") for i in range(2)]
            assert one.wait_until(lambda: one.num_waiting == other.num_waiting == 1)
            answer = post(http, asked("What is a cat?"))
            assert answer.status_code == 429 and fault_of(answer)["code"] == "queue_full"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            stream = post(http, asked("What is a cat?"), stream=True)
            assert (stream.status_code, "retry-after" in stream.headers) == (429, True)
        assert [client.wait() for client in clients] == [FinishEvent("length")] * 2
        # free capacity is used at once
        assert one.wait_until(lambda: not any(e.num_in_flight for e in engine._router.replicas))
        with one.held():
            waiting = submitted(engine, prompts[1], id="a")
            assert one.wait_until(lambda: one.num_waiting == 1)
            assert post(http, asked("What is a cat?")).status_code == 200
        waiting.wait()
        text = http.get("/metrics").text
        assert 'multi_token_engine_retries_total{reason="full"}' in text
    one.die()
    other.die()


def test_a_replica_with_errors_is_down_until_it_is_verified_again(
    two: Any, prompts: list[Any]
) -> None:
    engine, first, _ = two
    first.fails_with = 500  # as while vLLM shuts down, when its /health still says 200
    clients = [submitted(engine, prompts[0], id=f"r{i}") for i in range(4)]
    assert [client.wait() for client in clients] == [FinishEvent("length")] * 4
    assert first.wait_until(lambda: engine.num_replicas == 1)
    first.fails_with = None
    assert first.wait_until(lambda: engine.num_replicas == 2)


def test_a_prompt_that_fails_twice_is_not_sent_to_every_replica(
    llama: Any, prompts: list[Any]
) -> None:
    engines = [StandIn(llama.language_model) for _ in range(3)]
    with started(llama, *engines) as engine:
        assert engines[0].wait_until(lambda: engine.num_replicas == 3)
        for stand_in in engines:
            stand_in.breaks_at = 0
        assert error_of(submitted(engine, prompts[0])).status == 503
        assert sum(len(stand_in.bodies) for stand_in in engines) == 2


def test_a_prompt_that_a_replica_rejects_is_a_400(llama: Any, prompts: list[Any]) -> None:
    short = StandIn(llama.language_model)
    with started(llama, short) as engine:
        short.max_model_len = 20
        error = error_of(submitted(engine, prompts[0]))
        assert error.status == 400 and "maximum context length is 20" in error.message
        assert engine.is_alive


def test_the_shortest_context_of_all_replicas_limits_prompts(
    llama: Any, prompts: list[Any]
) -> None:
    long, short = StandIn(llama.language_model), StandIn(llama.language_model, max_model_len=48)
    with started(llama, long, short) as engine:
        assert long.wait_until(lambda: engine.num_replicas == 2)
        assert engine.max_tokens == 48
        with pytest.raises(ServeError, match="lower max_tokens"):
            submitted(engine, prompts[0], SamplingParams(48))


def test_the_start_waits_for_the_first_replica_up_to_its_timeout(llama: Any) -> None:
    late = StandIn(llama.language_model)
    late.die()
    engine = VllmEngine(
        llama,
        golden_of(llama),
        [late.url],
        health_interval_s=HEALTH_INTERVAL_S,
        startup_timeout_s=0.2,
    )
    with pytest.raises(LanguageModelError, match="does not answer /health"):
        engine.start()
    assert not engine.is_alive
    engine = VllmEngine(
        llama,
        golden_of(llama),
        [late.url],
        health_interval_s=HEALTH_INTERVAL_S,
        startup_timeout_s=60,
    )
    starting = threading.Thread(target=engine.start)
    starting.start()
    assert late.wait_until(lambda: engine._router is not None and engine._router.all_checked)
    assert starting.is_alive() and not engine.is_alive
    late.start()
    starting.join(30)
    assert engine.is_alive
    engine.stop()
    late.die()
