"""A real vLLM behind our gateway says what `generate` says, for three modalities and for text."""

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
    """Each modality alone with either of its items, all of them in one message, and none."""
    items = media(tmp_path_factory.mktemp("media"))
    asked: dict[str, Parts] = {"text": ("What is this?",)}
    for sense, both in items.items():
        for number, item in enumerate(both):
            asked[f"{sense} {number}"] = ((sense, item), "\nWhat is this?")
    first = [(sense, both[0]) for sense, both in items.items()]
    asked["all"] = ("Look at ", first[0], " and ", first[1], first[2], ", then say what you see.")
    return asked


@pytest.fixture(scope="module")
def expected(model: Any, questions: dict[str, Parts]) -> dict[str, list[int]]:
    """What `generate` answers to each question, alone."""
    answers = greedy(model, [question(*parts) for parts in questions.values()], NUM_NEW)
    found = dict(zip(questions, answers, strict=True))
    assert len(set(map(tuple, answers))) == len(answers), "answers that do not differ show nothing"
    return found


def said(model: Any, ids: list[int]) -> str:
    from multi_token.generate import decode

    return decode(model.require_processor(), torch.tensor([ids]))[0]


def test_the_engine_continues_our_embeddings_as_generate_does(
    real: Engine, model: Any, questions: dict[str, Parts], expected: dict[str, list[int]]
) -> None:
    """Without the gateway: what is exported, and how it is embedded, is right by itself."""
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


def test_three_senses_and_text_are_answered_as_generate_does(
    front: httpx.Client, model: Any, questions: dict[str, Parts], expected: dict[str, list[int]]
) -> None:
    for key, parts in questions.items():
        answer = front.post("/v1/chat/completions", json=body(*parts, max_tokens=NUM_NEW))
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert choice["message"]["content"] == said(model, expected[key]), key
        assert choice["finish_reason"] == ("length" if len(expected[key]) == NUM_NEW else "stop")
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == len(expected[key])
        assert usage["prompt_tokens"] == len(embedded(model, question(*parts)))


def test_they_stay_right_when_all_are_asked_at_once_and_streamed(
    front: httpx.Client, model: Any, questions: dict[str, Parts], expected: dict[str, list[int]]
) -> None:
    def streamed(parts: Parts) -> str:
        fields = body(*parts, max_tokens=NUM_NEW, stream=True)
        with front.stream("POST", "/v1/chat/completions", json=fields) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert len(lines) > 4, "one piece is no stream"
        return text_of(lines)

    with ThreadPoolExecutor(4) as clients:
        for key, text in zip(questions, clients.map(streamed, questions.values()), strict=True):
            assert text == said(model, expected[key]), key


def test_log_probabilities_are_those_of_the_model(
    front: httpx.Client, model: Any, questions: dict[str, Parts], expected: dict[str, list[int]]
) -> None:
    parts = questions["image 0"]
    fields = body(*parts, max_tokens=4, logprobs=True, top_logprobs=3)
    answer = front.post("/v1/chat/completions", json=fields)
    assert answer.status_code == 200, answer.text
    told = answer.json()["choices"][0]["logprobs"]["content"]
    ids = torch.tensor([expected["image 0"][:4]])
    with torch.no_grad():
        rows = torch.cat(
            [embedded(model, question(*parts))[None], model.get_input_embeddings()(ids)], dim=1
        )
        logits = model.language_model(inputs_embeds=rows).logits[0, -5:-1].float()
    likely = logits.log_softmax(-1).topk(3).values
    for entry, values in zip(told, likely, strict=True):
        found = [top["logprob"] for top in entry["top_logprobs"]]
        torch.testing.assert_close(torch.tensor(found), values, atol=1e-3, rtol=0)
        assert entry["logprob"] == pytest.approx(found[0])


def test_a_client_that_leaves_frees_the_engine_s_place(
    front: httpx.Client, real: Engine, questions: dict[str, Parts]
) -> None:
    before = real.metric("vllm:generation_tokens_total")
    long = CONTEXT - 200
    fields = body(*questions["sound 0"], max_tokens=long, ignore_eos=True, stream=True)
    with front.stream("POST", "/v1/chat/completions", json=fields) as answer:
        lines = (line for line in answer.iter_lines() if line)
        # the engine's metrics are not asked for meanwhile, so that nothing else keeps it busy
        for _ in range(4):
            assert '"error"' not in next(lines)
    assert wait_until(lambda: real.metric("vllm:num_requests_running") == 0, 10)
    written = real.metric("vllm:generation_tokens_total") - before
    assert 0 < written < long, "it was written to its end"


def test_another_model_s_engine_is_refused_at_the_start(real: Engine, tmp_path: Path) -> None:
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
    said_so = done.stdout + done.stderr
    assert real.url in said_so and "golden request" in said_so, said_so
    assert "gives another answer" in said_so, said_so
    assert "Traceback" not in said_so, said_so


def test_a_wrong_engine_key_is_refused_at_the_start(real: Engine, exported: Path) -> None:
    done = subprocess.run(
        command(exported, real.url),
        capture_output=True,
        text=True,
        env=environment(MULTI_TOKEN_ENGINE_KEY="sk-another-key"),
        timeout=180,
    )
    assert done.returncode != 0
    said_so = done.stdout + done.stderr
    assert real.url in said_so and "401" in said_so, said_so
    assert "sk-another-key" not in said_so and "Traceback" not in said_so, said_so


def test_more_than_the_engine_takes_are_told_to_come_again(
    front: httpx.Client, real: Engine, questions: dict[str, Parts]
) -> None:
    """The engine takes eight at once here; nobody waits for ever, and nobody is told of a 500."""
    fields = body(*questions["vector 0"], max_tokens=300, ignore_eos=True)

    def status(_: int) -> int:
        return front.post("/v1/chat/completions", json=fields).status_code

    with ThreadPoolExecutor(24) as clients:
        statuses = list(clients.map(status, range(24)))
    assert set(statuses) <= {200, 429, 503} and statuses.count(200) >= 4, statuses
    assert front.post("/v1/chat/completions", json={**fields, "max_tokens": 2}).status_code == 200
