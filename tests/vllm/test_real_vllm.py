"""A real vLLM with our gateway gives the tokens of `generate`, for three modalities and text."""

from __future__ import annotations

import base64
import io
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.vllm.engine_process import PYTHON, Engine, engine, wait_until
from tests.vllm.gateway_process import body, command, environment, gateway, text_of
from tests.vllm.tiny_run import CONTEXT, embedded, greedy, media, question, tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None,
        reason="no vLLM: MULTI_TOKEN_VLLM names no Python that has it; make test-vllm",
    ),
]

NUM_NEW = 32
Parts = tuple[Any, ...]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run: Path) -> Any:
    from multi_token.model import MultiTokenForConditionalGeneration

    return MultiTokenForConditionalGeneration.from_pretrained(run)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from multi_token.convert.export import export

    out = tmp_path_factory.mktemp("exported")
    export(run, out, to="language-model")
    return out


@pytest.fixture(scope="module")
def real(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with engine(exported / "language_model", tmp_path_factory.mktemp("log") / "vllm.log") as found:
        yield found


@pytest.fixture(scope="module")
def front(exported: Path, real: Engine) -> Iterator[httpx.Client]:
    with gateway(exported, real.url) as client:
        yield client


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    """Each modality alone with each of its items, all of them in one message, and none."""
    items = media(tmp_path_factory.mktemp("media"))
    asked: dict[str, Parts] = {"text": ("What is this?",)}
    for modality, both in items.items():
        for number, item in enumerate(both):
            asked[f"{modality} {number}"] = ((modality, item), "\nWhat is this?")
    first = [(modality, both[0]) for modality, both in items.items()]
    asked["all"] = ("Look at ", first[0], " and ", first[1], first[2], ", then say what you see.")
    return asked


@pytest.fixture(scope="module")
def expected(model: Any, questions: dict[str, Parts]) -> dict[str, list[int]]:
    """Ids that `generate` gives for each question alone."""
    answers = greedy(model, [question(*parts) for parts in questions.values()], NUM_NEW)
    found = dict(zip(questions, answers, strict=True))
    assert len(set(map(tuple, answers))) == len(answers), "equal answers would show nothing"
    return found


def decoded(model: Any, ids: list[int]) -> str:
    from multi_token.generate import decode

    return decode(model.require_processor(), torch.tensor([ids]))[0]


def test_vllm_continues_our_embeddings_as_generate_does(
    real: Engine, model: Any, questions: dict[str, Parts], expected: dict[str, list[int]]
) -> None:
    """Without the gateway: the export and its embeddings are right by themselves."""
    from multi_token.generate import eos_token_ids

    name = real.http.get("/v1/models").json()["data"][0]["id"]
    for key, parts in questions.items():
        file = io.BytesIO()
        torch.save(embedded(model, question(*parts)), file)
        fields = {
            "model": name,
            "prompt_embeds": base64.b64encode(file.getvalue()).decode(),
            "max_tokens": NUM_NEW,
            "temperature": 0,
            "stop_token_ids": eos_token_ids(model),
            "return_token_ids": True,
        }
        answer = real.http.post("/v1/completions", json=fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == expected[key], key


def test_three_modalities_and_text_get_the_answers_of_generate(
    front: httpx.Client, model: Any, questions: dict[str, Parts], expected: dict[str, list[int]]
) -> None:
    for key, parts in questions.items():
        answer = front.post("/v1/chat/completions", json=body(*parts, max_tokens=NUM_NEW))
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert choice["message"]["content"] == decoded(model, expected[key]), key
        assert choice["finish_reason"] == ("length" if len(expected[key]) == NUM_NEW else "stop")
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == len(expected[key])
        assert usage["prompt_tokens"] == len(embedded(model, question(*parts)))


def test_concurrent_streams_give_the_same_answers(
    front: httpx.Client, model: Any, questions: dict[str, Parts], expected: dict[str, list[int]]
) -> None:
    def streamed(parts: Parts) -> str:
        fields = body(*parts, max_tokens=NUM_NEW, stream=True)
        with front.stream("POST", "/v1/chat/completions", json=fields) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert len(lines) > 4, "one event is no stream"
        return text_of(lines)

    with ThreadPoolExecutor(4) as clients:
        for key, text in zip(questions, clients.map(streamed, questions.values()), strict=True):
            assert text == decoded(model, expected[key]), key


def test_log_probabilities_are_those_of_the_model(
    front: httpx.Client, model: Any, questions: dict[str, Parts], expected: dict[str, list[int]]
) -> None:
    parts = questions["image 0"]
    fields = body(*parts, max_tokens=4, logprobs=True, top_logprobs=3)
    answer = front.post("/v1/chat/completions", json=fields)
    assert answer.status_code == 200, answer.text
    found_logprobs = answer.json()["choices"][0]["logprobs"]["content"]
    ids = torch.tensor([expected["image 0"][:4]])
    with torch.no_grad():
        rows = torch.cat(
            [embedded(model, question(*parts))[None], model.get_input_embeddings()(ids)], dim=1
        )
        logits = model.language_model(inputs_embeds=rows).logits[0, -5:-1].float()
    expected_values = logits.log_softmax(-1).topk(3).values
    for entry, values in zip(found_logprobs, expected_values, strict=True):
        found = [top["logprob"] for top in entry["top_logprobs"]]
        torch.testing.assert_close(torch.tensor(found), values, atol=1e-3, rtol=0)
        assert entry["logprob"] == pytest.approx(found[0])


def test_a_client_that_disconnects_ends_the_request_in_vllm(
    front: httpx.Client, real: Engine, questions: dict[str, Parts]
) -> None:
    before = real.metric("vllm:generation_tokens_total")
    long = CONTEXT - 200
    fields = body(*questions["sound 0"], max_tokens=long, ignore_eos=True, stream=True)
    with front.stream("POST", "/v1/chat/completions", json=fields) as answer:
        lines = (line for line in answer.iter_lines() if line)
        # no request for metrics meanwhile, so that nothing else keeps the server busy
        for _ in range(4):
            assert '"error"' not in next(lines)
    assert wait_until(lambda: real.metric("vllm:num_requests_running") == 0, 10)
    written = real.metric("vllm:generation_tokens_total") - before
    assert 0 < written < long, "it was generated to its end"


def test_a_server_with_another_model_is_refused_at_the_start(real: Engine, tmp_path: Path) -> None:
    from multi_token.convert.export import export

    export(tiny_run(tmp_path / "other", seed=1), tmp_path / "out", to="language-model")
    done = subprocess.run(
        command(tmp_path / "out", real.url),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=180,
    )
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert real.url in output and "golden request" in output, output
    assert "gives other tokens" in output, output
    assert "Traceback" not in output, output


def test_a_wrong_engine_key_is_refused_at_the_start(real: Engine, exported: Path) -> None:
    done = subprocess.run(
        command(exported, real.url),
        capture_output=True,
        text=True,
        env=environment(MULTI_TOKEN_ENGINE_KEY="sk-another-key"),
        timeout=180,
    )
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert real.url in output and "401" in output, output
    assert "sk-another-key" not in output and "Traceback" not in output, output


def test_requests_beyond_the_capacity_are_refused_with_a_status(
    front: httpx.Client, real: Engine, questions: dict[str, Parts]
) -> None:
    """vLLM takes eight requests here: none waits for ever, and none gets a 500."""
    fields = body(*questions["vector 0"], max_tokens=300, ignore_eos=True)

    def status(_: int) -> int:
        return front.post("/v1/chat/completions", json=fields).status_code

    with ThreadPoolExecutor(24) as clients:
        statuses = list(clients.map(status, range(24)))
    assert set(statuses) <= {200, 429, 503} and statuses.count(200) >= 4, statuses
    assert front.post("/v1/chat/completions", json={**fields, "max_tokens": 2}).status_code == 200
