"""Golden answers: `generate`, engines and the HTTP server give the ids and texts recorded.

Border: greedy answers of a tiny model that has learned its rows by heart.
"""

from __future__ import annotations

from tests.golden import answers
from tests.golden.bench import Bench
from tests.golden.record import generated, model_of, read, served

SAFE_MARGIN = 0.2
"""By which every token must be the likeliest (in log-probability), or another CPU's rounding could
choose another one."""


def test_generate_answers_with_the_ids_and_texts_recorded(bench: Bench) -> None:
    assert generated(bench) == read("answers")


def test_a_padded_batch_answers_as_each_alone(bench: Bench) -> None:
    alone = {name: answer["text"] for name, answer in generated(bench).items()}
    assert answers.generated_together(model_of(bench), bench.material) == alone


def test_the_local_engine_answers_with_the_ids_recorded(bench: Bench) -> None:
    recorded = {name: answer["ids"] for name, answer in read("answers").items()}
    assert answers.engine_answers(model_of(bench), bench.material) == recorded


def test_the_server_answers_with_the_texts_and_lengths_recorded(bench: Bench) -> None:
    found = {
        name: {"text": answer["text"].strip(), "num_ids": answer["num_new"]}
        for name, answer in served(bench)["answers"].items()
    }
    assert found == {
        name: {"text": answer["text"], "num_ids": len(answer["ids"])}
        for name, answer in read("answers").items()
    }


def test_no_recorded_token_is_chosen_by_rounding(bench: Bench) -> None:
    margins = {name: answer["margin"] for name, answer in served(bench)["answers"].items()}
    assert {name: margin for name, margin in margins.items() if margin < SAFE_MARGIN} == {}
