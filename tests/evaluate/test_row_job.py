"""Jobs over rows: any number of processes, killed at any place, write one file in row order."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from rich.console import Console

from multi_token.errors import MultiTokenError, RowError
from multi_token.evaluate.row_job import RowJob, RowResult

ROWS = [{"id": f"row {i}", "text": "x" * i} for i in range(10)]
WINDOW = 2


def job(out: Path, share: int = 0, num_shares: int = 1, **changes: Any) -> RowJob:
    fields: dict[str, Any] = {"rows": ROWS, "settings": {"run": "a"}, **changes}
    return RowJob(out, columns=("answer",), share=share, num_shares=num_shares, **fields)


def write(job: RowJob, indices: Iterable[int]) -> None:
    with job.writing():
        job.write([RowResult(i, ROWS[i]["id"], {"answer": f"answer {i}"}) for i in indices])


@contextmanager
def locked(*paths: Path, seconds: float = 60.0) -> Iterator[None]:
    """Within, another process holds the locks of the files, for some seconds at most."""
    script = (
        "import fcntl, select, sys\n"
        "files = [open(path, 'a') for path in sys.argv[2:]]\n"
        "for file in files: fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print(flush=True)\n"
        "select.select([sys.stdin], [], [], float(sys.argv[1]))\n"
        # the last one first, as `join` does
        "for file in reversed(files): file.close()"
    )
    words = [sys.executable, "-S", "-c", script, str(seconds), *map(str, paths)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        yield


def answers(out: Path) -> list[tuple[str, str | None]]:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return [(line["id"], line.get("answer")) for line in lines]


EXPECTED = [(f"row {i}", f"answer {i}") for i in range(10)]


def test_the_last_process_to_finish_joins_all_shares_in_row_order(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    shares = [job(out, share, 3) for share in range(3)]
    todo = [one.todo(WINDOW).tolist() for one in shares]
    assert todo == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5]]
    for one, indices in zip(shares, todo, strict=True):
        assert not out.exists()
        # a process writes its rows in the order in which they are finished
        write(one, reversed(indices))
        report = one.join()
    assert report is not None and report.num_rows == 10 and report.num_bad == 0
    assert answers(out) == EXPECTED
    assert [path.name for path in (tmp_path / "out.jsonl.parts").iterdir()] == ["job.json"]
    assert job(out).is_joined and job(out).join() is None


def test_a_killed_job_continues_with_another_number_of_processes(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    write(job(out, 0, 2), [0, 1, 4])
    part = tmp_path / "out.jsonl.parts" / "part-0-of-2.jsonl"
    with part.open("a") as file:
        file.write('{"index": 5, "id": "row 5", "answ')
    # the half of a line is no result, and is removed before the next line is written
    write(job(out, 0, 2), [5])
    left = job(out)
    assert left.num_done == 4 and left.todo(WINDOW).tolist() == [2, 3, 6, 7, 8, 9]
    write(left, left.todo(WINDOW).tolist())
    assert left.join() is not None
    assert answers(out) == EXPECTED


def test_a_bad_row_is_tried_again_and_stays_an_error_if_it_is_still_bad(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first = job(out)
    with first.writing():
        for index in (0, 3):
            error = RowError("is cut off", kind="undecodable", row_id=ROWS[index]["id"])
            first.write([RowResult(index, ROWS[index]["id"], error)])
    again = job(out)
    assert len(again.todo(WINDOW)) == 10
    write(again, [i for i in range(10) if i != 3])
    report = again.join()
    assert report is not None and report.num_bad == 1
    assert report.examples == ["row row 3: is cut off"]
    assert answers(out) == [(id, None if id == "row 3" else text) for id, text in EXPECTED]


def test_a_process_that_still_does_bad_rows_again_joins_them(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first, second = job(out, 0, 2), job(out, 1, 2)
    with second.writing():
        second.write([RowResult(3, "row 3", RowError("is lost", kind="format", row_id="row 3"))])
    write(first, [i for i in range(10) if i != 3])
    with locked(tmp_path / "out.jsonl.parts" / "part-1-of-2.lock"):
        assert first.join() is None and not out.exists()
    write(second, [3])
    report = second.join()
    assert report is not None and report.num_bad == 0
    assert answers(out) == EXPECTED


def test_a_process_that_starts_while_another_joins_waits_and_finds_the_job_done(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.jsonl"
    write(job(out, 0, 2), [i for i in range(10) if i != 7])
    late = job(out, 1, 2)
    assert late.todo(WINDOW).tolist() == [7]
    write(job(out, 0, 2), [7])
    folder = tmp_path / "out.jsonl.parts"
    # who joins holds the locks of all parts
    with locked(folder / "join.lock", folder / "part-1-of-2.lock", seconds=0.1), late.writing():
        assert late.num_done == 10
    late = job(out, 1, 2)
    assert job(out).join() is not None
    with late.writing():
        assert late.is_joined and late.todo(WINDOW).size == 0
    assert not list(folder.glob("part-*.jsonl"))


def test_a_part_without_results_is_no_work_that_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    write(job(out), range(10))
    job(out).join()
    (tmp_path / "out.jsonl.parts" / "part-0-of-2.jsonl").touch()
    again = job(out)
    assert again.is_joined and again.num_done == 10 and again.todo(WINDOW).size == 0


def test_a_file_system_without_locks_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "No locks available (its file system)"
    monkeypatch.setattr("multi_token.evaluate.row_job.lock_file", lambda *_, **__: reason)
    one = job(tmp_path / "out.jsonl", console=Console(width=1000))
    write(one, range(10))
    assert one.join() is not None
    assert capsys.readouterr().out.count(f"is not locked: {reason}; start each shard once") == 1


def test_an_answer_counts_whatever_errors_other_parts_hold(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    write(job(out, 0, 2), range(10))
    later = job(out, 1, 2)
    with later.writing():
        later.write([RowResult(0, "row 0", RowError("is lost", kind="format", row_id="row 0"))])
    assert job(out).join() is not None and answers(out) == EXPECTED


def test_parquet_has_the_rows_of_jsonl(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    one = job(out)
    write(one, range(10))
    one.join()
    table = pyarrow.parquet.read_table(out).to_pylist()
    assert [(row["id"], row["answer"]) for row in table] == EXPECTED
    empty = job(tmp_path / "none.parquet", rows=[])
    empty.join()
    assert pyarrow.parquet.read_table(tmp_path / "none.parquet").column_names == [
        "id",
        "answer",
        "error",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"settings": {"run": "b"}}, "differs in run 'a' there, 'b' here"),
        ({"rows": ROWS[:9]}, "differs in num_rows 10 there, 9 here"),
        ({"rows": [{**ROWS[0], "text": "y"}, *ROWS[1:]]}, "belongs to other rows"),
    ],
)
def test_results_of_another_job_are_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    out = tmp_path / "out.jsonl"
    write(job(out), range(5))
    with pytest.raises(MultiTokenError, match=sentence):
        job(out, **changes)
    job(out)


def test_settings_may_change_before_the_first_result(tmp_path: Path) -> None:
    job(tmp_path / "out.jsonl")
    job(tmp_path / "out.jsonl", settings={"run": "b"})


def test_a_file_of_others_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("theirs")
    with pytest.raises(MultiTokenError, match="belongs to other rows"):
        job(out)
    with pytest.raises(MultiTokenError, match=r"writes .jsonl or .parquet files"):
        job(tmp_path / "out.csv")
    assert out.read_text() == "theirs"


def test_a_shard_that_is_started_twice_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.evaluate.test_row_job import job\n"
        "with job(Path(sys.argv[1]), 0, 2).writing(): pass"
    )
    with job(out, 0, 2).writing(), job(out, 1, 2).writing():
        done = subprocess.run(
            [sys.executable, "-c", script, str(out)], capture_output=True, text=True
        )
    assert "is being written by another process; start each shard once" in done.stderr


def test_a_full_disk_is_a_sentence_and_what_was_written_is_kept(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    one = job(tmp_path / "out.jsonl")
    with one.writing():
        one.write([RowResult(0, "row 0", {"answer": "kept"})])
        kept = one._file
        no_space = pytest.raises(MultiTokenError, match="free some space there")
        with full.open("ab", buffering=0) as one._file, no_space:
            one.write([RowResult(1, "row 1", {"answer": "lost"})])
        one._file = kept
    assert job(tmp_path / "out.jsonl").num_done == 1
