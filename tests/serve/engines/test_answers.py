"""`predict --engine-url`: vLLM engines are kept busy, and every row is answered whatever fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from multi_token.cli import app
from multi_token.errors import LanguageModelError, MultiTokenError, RowError
from multi_token.evaluate.predict import PromptRow, batches_of, read_rows
from multi_token.evaluate.row_job import RowResult
from multi_token.serve.engines.base import ErrorEvent
from multi_token.serve.engines.vllm.answers import EngineAnswers
from multi_token.serve.errors import ServeError
from tests.serve.vllm_parts import started
from tests.serve.vllm_stand_in import StandIn

pytestmark = pytest.mark.slow
NUM_NEW = 6
ROWS: list[dict[str, Any]] = [
    {
        "id": str(i),
        "vector": [float(i % 3), 1.0, -1.0, 0.5, 0.0],
        "messages": [{"role": "user", "content": f"What is <vector>? {'x ' * (i % 4)}"}],
    }
    for i in range(24)
]


@pytest.fixture(scope="module")
def expected(served_model: Any) -> list[str]:
    return served_model.generate(ROWS, max_new_tokens=NUM_NEW)


def rows_of(model: Any, rows: Sequence[Any] = ROWS) -> list[PromptRow | RowResult]:
    processor = model.require_processor()
    return read_rows(rows, range(len(rows)), processor, source="rows", prompt_only=True)


def answers(
    engine: Any, rows: Sequence[PromptRow | RowResult], **options: Any
) -> Iterator[list[RowResult]]:
    batches = batches_of(iter(rows), batch_size=4, window=len(rows), on_bad=print)
    fields: dict[str, Any] = {"max_new_tokens": NUM_NEW, "backoff_s": 0.01, **options}
    return EngineAnswers(engine, **fields)(batches)


def in_order(results: list[RowResult]) -> list[str]:
    assert sorted(result.index for result in results) == list(range(len(ROWS)))
    return [dict(r.found)["answer"] for r in sorted(results, key=lambda r: r.index)]


def test_engines_are_kept_full_and_never_get_more(served_model: Any, expected: list[str]) -> None:
    engines = [StandIn(served_model.language_model) for _ in range(2)]
    first: list[list[RowResult]] = []
    with started(served_model, *engines) as engine:
        working = answers(engine, rows_of(served_model), max_in_flight=3)
        # while they are held, nothing ends, and `next` waits
        waiting = threading.Thread(target=lambda: first.append(next(working)))
        with engines[0].held(), engines[1].held():
            waiting.start()
            assert engines[0].wait_until(lambda: [e.num_waiting for e in engines] == [3, 3])
            assert engine.num_running + engine.num_waiting == 6
        waiting.join()
        found = first[0] + [result for results in working for result in results]
        assert engine.retries == {}
    assert in_order(found) == expected
    assert all(len(stand_in.bodies) > 3 for stand_in in engines)


def test_a_full_engine_gets_the_prompt_again_later(served_model: Any, expected: list[str]) -> None:
    stand_in = StandIn(served_model.language_model, max_inside=2)
    with started(served_model, stand_in) as engine:
        rows = rows_of(served_model)
        found = [r for some in answers(engine, rows, max_in_flight=6) for r in some]
    assert stand_in.num_asked > len(ROWS) + 2
    assert in_order(found) == expected


def test_an_engine_that_dies_is_left_out_and_nothing_is_lost(
    served_model: Any, expected: list[str]
) -> None:
    engines = [StandIn(served_model.language_model, max_num_seqs=2) for _ in range(2)]
    found: list[RowResult] = []
    with started(served_model, *engines) as engine:
        for results in answers(engine, rows_of(served_model), max_in_flight=8):
            if not found:
                engines[0].die()
            found += results
        assert engine.num_replicas == 1
    assert in_order(found) == expected


def test_an_answer_that_broke_off_begins_again_on_another_engine(
    served_model: Any, expected: list[str]
) -> None:
    engines = [StandIn(served_model.language_model, max_num_seqs=2) for _ in range(2)]
    with started(served_model, *engines) as engine:
        # after its golden request
        engines[0].breaks_at = 2
        rows = rows_of(served_model)
        found = [r for some in answers(engine, rows, max_in_flight=4) for r in some]
        assert engines[0].bodies and engine.num_replicas == 1
    assert in_order(found) == expected


def test_without_an_engine_the_work_ends_and_an_engine_that_returns_continues_it(
    served_model: Any, expected: list[str]
) -> None:
    stand_in = StandIn(served_model.language_model, max_num_seqs=2)
    found: list[RowResult] = []
    with started(served_model, stand_in) as engine:
        with pytest.raises(LanguageModelError, match=r"no engine is left \(http://127"):
            for results in answers(engine, rows_of(served_model), timeout_s=0.3):
                found += results
                stand_in.die()
        assert 0 < len(found) < len(ROWS)
        # within the timeout, the work waits for it
        done = {result.index for result in found}
        left = [row for row in rows_of(served_model) if row.index not in done]
        working = answers(engine, left, timeout_s=60.0)
        stand_in.start()
        found += [result for results in working for result in results]
    assert in_order(found) == expected


def test_a_row_that_no_engine_takes_is_a_bad_row(served_model: Any) -> None:
    stand_in = StandIn(served_model.language_model, max_model_len=48)
    long = {"id": "long", "messages": [{"role": "user", "content": "x " * 60}]}
    with started(served_model, stand_in) as engine:
        rows = rows_of(served_model, [ROWS[0], long])
        found = {r.row_id: r.found for some in answers(engine, rows) for r in some}
    assert isinstance(found["long"], RowError) and found["long"].kind == "too_long"
    assert "over the limit of 48" in str(found["long"])
    assert not isinstance(found["0"], RowError)


class Failing:
    """An engine that answers each prompt with an error."""

    def __init__(self, model: Any, error: Exception) -> None:
        self.model = model
        self.error = error
        self.num_replicas = 1
        self.num_asked = 0

    def submit(self, name: str, prompt: Any, sampling: Any, emit: Any) -> None:
        self.num_asked += 1
        emit(ErrorEvent(self.error))


@pytest.mark.parametrize(
    ("error", "num_asked"),
    [
        (ServeError("the engine failed", status=503, code="engine_lost"), 5),
        (ServeError("a media span ends after the prompt", status=500), 1),
        (RuntimeError("the engine has a bug"), 1),
    ],
)
def test_a_fault_of_the_engine_ends_the_work_and_is_no_bad_row(
    served_model: Any, error: Exception, num_asked: int
) -> None:
    engine = Failing(served_model, error)
    with pytest.raises(LanguageModelError, match=rf"row 0: {error}.* Results so far are kept"):
        list(answers(engine, rows_of(served_model, ROWS[:1])))
    assert engine.num_asked == num_asked


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("CUDA error: an illegal memory access"), "the media encoder has failed"),
        (TypeError("a bug"), "cannot be encoded"),
    ],
)
def test_a_fault_of_an_encoder_ends_the_work_and_is_no_bad_row(
    served_model: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def failing(name: str, inputs: Any) -> Any:
        raise error

    monkeypatch.setattr(served_model, "encode", failing)
    engine = Failing(served_model, error)
    with pytest.raises(LanguageModelError, match=rf"row 3: .*{sentence}"):
        list(answers(engine, rows_of(served_model, ROWS[:8])))
    assert engine.num_asked == 0


def test_media_of_several_rows_are_embedded_once(
    served_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_items = 0
    encode = served_model.encode

    def counting(name: str, inputs: Any) -> Any:
        nonlocal num_items
        num_items += len(next(iter(inputs.values())))
        return encode(name, inputs)

    monkeypatch.setattr(served_model, "encode", counting)
    stand_in = StandIn(served_model.language_model)
    with started(served_model, stand_in) as engine:
        assert sum(len(some) for some in answers(engine, rows_of(served_model))) == len(ROWS)
    assert num_items == 3


def test_predict_with_engines_from_the_command_line(
    served_run: Path, served_model: Any, tmp_path: Path, expected: list[str]
) -> None:
    exported, rows, out = tmp_path / "exported", tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def invoke(*words: Any) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})

    done = invoke("export", served_run, "--to", "language-model", "--out", exported)
    assert done.exit_code == 0, done.output
    engines = [StandIn(served_model.language_model) for _ in range(2)]
    urls = [word for engine in engines for word in ("--engine-url", engine.url)]
    command = ("predict", exported, rows, "--out", out, "--max-new-tokens", NUM_NEW, *urls)
    done = invoke(*command)
    assert done.exit_code == 0, (done.output, done.exception)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["id"], line["answer"]) for line in lines] == [
        (row["id"], answer) for row, answer in zip(ROWS, expected, strict=True)
    ]
    assert sum(len(engine.bodies) for engine in engines) == len(ROWS)
    for engine in engines:
        engine.die()
    again = (*command[:4], tmp_path / "again.jsonl", *command[5:], "--engine-timeout", "0")
    done = invoke(*again)
    assert isinstance(done.exception, MultiTokenError)
    assert "no engine can be used" in str(done.exception)
