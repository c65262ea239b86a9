"""Results for many rows: the flow from rows to batches, and answers that do not depend on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from multi_token.errors import RowError
from multi_token.evaluate.predict import PromptRow, answers, run_work, window_rows
from multi_token.evaluate.row_job import RowJob, RowResult

QUIET = Console(quiet=True)
QUESTIONS = ["What is it?", "Which?", "Say in many words what you see here, and why you think so."]


def row(i: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"<vector> {QUESTIONS[i % 3]} {'x ' * (i % 5)}"}
    answer = {"role": "assistant", "content": "left out"}
    return {
        "id": str(i),
        "vector": [float(i % 7), 1, -1, 0.5, i / 9],
        "messages": [question, answer],
    }


class Counted(Sequence[Any]):
    """Rows that count how often each is read."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        self.num_reads += 1
        return self.rows[index]


def run(model: Any, out: Path, rows: Sequence[Any], work: Any, **options: Any) -> RowJob:
    share = {key: options.pop(key) for key in ("share", "num_shares") if key in options}
    job = RowJob(out, rows, columns=("answer",), settings={}, **share)
    fields: dict[str, Any] = {"batch_size": 4, "source": "rows", **options}
    run_work(job, work, model.require_processor(), console=QUIET, description="Answering", **fields)
    return job


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def lengths(batches: list[list[PromptRow]]) -> list[list[int]]:
    return [[len(row.sample.input_ids) for row in batch] for batch in batches]


class Watched:
    """A work that keeps the batches, and answers each row with its id."""

    def __init__(self) -> None:
        self.batches: list[list[PromptRow]] = []

    def __call__(self, batches: Iterator[list[PromptRow]]) -> Iterator[list[RowResult]]:
        for batch in batches:
            self.batches.append(batch)
            yield [row.result({"answer": row.row_id}) for row in batch]


def test_answers_are_those_of_generate_whatever_the_number_of_processes(
    model: Any, tmp_path: Path
) -> None:
    rows = [row(i) for i in range(11)]
    expected = model.generate(rows, max_new_tokens=6)
    work = answers(model, max_new_tokens=6)
    for num_shares in (1, 3):
        out = tmp_path / f"{num_shares}.jsonl"
        for share in range(num_shares):
            job = run(model, out, rows, work, share=share, num_shares=num_shares)
        job.join()
        assert [(line["id"], line["answer"]) for line in read(out)] == [
            (str(i), answer) for i, answer in enumerate(expected)
        ]


def test_sampled_answers_do_not_depend_on_the_number_of_processes(
    model: Any, tmp_path: Path
) -> None:
    rows = [row(i) for i in range(9)]
    found = []
    for num_shares, seed in ((1, 0), (2, 0), (1, 1)):
        out = tmp_path / f"{num_shares} {seed}.jsonl"
        for share in range(num_shares):
            work = answers(model, max_new_tokens=8, temperature=2.0, seed=seed)
            job = run(model, out, rows, work, share=share, num_shares=num_shares)
        job.join()
        found.append([line["answer"] for line in read(out)])
    assert found[0] == found[1] != found[2]


def test_batches_hold_rows_of_similar_length_and_are_the_same_for_all_processes(
    model: Any, tmp_path: Path
) -> None:
    rows = [row(i) for i in range(1024)]
    # windows of four batches
    assert window_rows(len(rows), 4) == 16
    one, many = Watched(), [Watched(), Watched()]
    run(model, tmp_path / "one.jsonl", rows, one)
    for share, work in enumerate(many):
        run(model, tmp_path / "many.jsonl", rows, work, share=share, num_shares=2)

    def indices(watched: Watched) -> set[tuple[int, ...]]:
        return {tuple(row.index for row in batch) for batch in watched.batches}

    assert indices(one) == indices(many[0]) | indices(many[1])
    assert not indices(many[0]) & indices(many[1])
    found = lengths(one.batches)
    assert all(batch == sorted(batch, reverse=True) for batch in found)
    padded = sum(max(batch) * len(batch) - sum(batch) for batch in found)
    by_row = {r.index: len(r.sample.input_ids) for batch in one.batches for r in batch}
    unsorted = [[by_row[i + k] for k in range(4)] for i in range(0, 1024, 4)]
    assert padded < 0.5 * sum(max(batch) * len(batch) - sum(batch) for batch in unsorted)


def test_the_first_batch_is_answered_after_one_window_of_rows_is_read(
    model: Any, tmp_path: Path
) -> None:
    rows = Counted([row(i) for i in range(1024)])

    def first(batches: Iterator[list[PromptRow]]) -> Iterator[list[RowResult]]:
        batch = next(batches)
        # a window, and the part that shows its end
        assert rows.num_reads <= 16 + 4
        yield [row.result({"answer": ""}) for row in batch]

    run(model, tmp_path / "out.jsonl", rows, first)


def test_data_workers_change_no_batch(model: Any, tmp_path: Path) -> None:
    rows = [row(i) for i in range(40)]
    here, there = Watched(), Watched()
    run(model, tmp_path / "0.jsonl", rows, here)
    run(model, tmp_path / "2.jsonl", rows, there, num_workers=2)
    assert lengths(here.batches) == lengths(there.batches)
    assert [[r.row_id for r in b] for b in here.batches] == [
        [r.row_id for r in b] for b in there.batches
    ]


def test_a_bad_row_is_raised_or_written_as_its_result(model: Any, tmp_path: Path) -> None:
    rows = [row(i) for i in range(12)]
    rows[5] = {**rows[5], "vector": [1.0]}
    rows[9] = {"id": "9", "text": "no messages"}
    with pytest.raises(RowError, match=r"row 5: .*the same command continues"):
        run(model, tmp_path / "raised.jsonl", rows, Watched())
    # the rows before it are kept, and the fixed row continues
    rows[5] = row(5)
    job = RowJob(tmp_path / "raised.jsonl", rows, columns=("answer",), settings={})
    assert job.num_done == 4

    rows[5] = {**rows[5], "vector": [1.0]}
    job = run(model, tmp_path / "skipped.jsonl", rows, Watched(), on_bad_row="skip")
    report = job.join()
    assert report is not None and report.num_bad == 2
    found = read(tmp_path / "skipped.jsonl")
    assert [line["id"] for line in found] == [str(i) for i in range(12)]
    assert ["error" in line for line in found] == [i in (5, 9) for i in range(12)]


def test_a_killed_share_computes_only_the_rows_that_are_left(model: Any, tmp_path: Path) -> None:
    rows = [row(i) for i in range(20)]

    def killed(batches: Iterator[list[PromptRow]]) -> Iterator[list[RowResult]]:
        for number, batch in enumerate(batches):
            if number == 2:
                raise KeyboardInterrupt
            yield [row.result({"answer": row.row_id}) for row in batch]

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out.jsonl", rows, killed)
    rest = Watched()
    job = run(model, tmp_path / "out.jsonl", rows, rest)
    assert sorted(r.index for batch in rest.batches for r in batch) == list(range(8, 20))
    job.join()
    assert [line["answer"] for line in read(tmp_path / "out.jsonl")] == [str(i) for i in range(20)]


def test_a_share_that_is_done_calls_no_work_and_leaves_no_part(model: Any, tmp_path: Path) -> None:
    rows, out = [row(i) for i in range(3)], tmp_path / "out.jsonl"
    run(model, out, rows, Watched(), num_shares=2).join()
    watched = Watched()
    # after the join, and a share of no rows before it
    run(model, out, rows, watched, share=0, num_shares=2)
    run(model, tmp_path / "other.jsonl", rows, watched, share=1, num_shares=2)
    assert not watched.batches and not list(tmp_path.glob("*.parts/part-*"))


def test_a_job_that_was_joined_meanwhile_is_not_done_again(model: Any, tmp_path: Path) -> None:
    rows, out, watched = [row(i) for i in range(3)], tmp_path / "out.jsonl", Watched()
    late = RowJob(out, rows, columns=("answer",), settings={})
    run(model, out, rows, Watched()).join()
    run_work(
        late,
        watched,
        model.require_processor(),
        source="rows",
        batch_size=4,
        console=QUIET,
        description="Answering",
    )
    assert not watched.batches and late.is_joined
