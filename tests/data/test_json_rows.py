"""data/files/json.py: elements of a .json file by offset, without an object for each row."""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from multi_token.data.files.json import JsonRows
from multi_token.data.files.jsonl import JsonLines
from multi_token.errors import MultiTokenError, RowError

PIECES = ['"', "\\", "\\\\", "[", "]", "{", "}", ",", ":", "\n", "é", "😀", " a ", "\ud83d"]
MIB = 1 << 20


def random_rows(num_rows: int, *, seed: int = 0) -> list[Any]:
    """Rows whose texts consist of the characters that give JSON its structure."""
    draw = random.Random(seed)

    def text() -> str:
        return "".join(draw.choices(PIECES, k=draw.randrange(30)))

    return [
        {"id": i, text(): {"deep": [[text()], {"data": [1, text()]}, []]}, "text": text()}
        for i in range(num_rows)
    ]


@pytest.mark.parametrize("shift", range(8))
def test_strings_of_brackets_and_escapes_are_read_across_the_blocks(
    tmp_path: Path, shift: int
) -> None:
    rows, file = random_rows(6000, seed=shift), tmp_path / "rows.json"
    content: Any = [rows, {"data": rows}, {"rows": rows}][shift % 3]
    # blanks in front move the border between two blocks over the characters of a row
    text = " " * shift + json.dumps(content, indent=shift % 2 or None)
    file.write_bytes(text.encode("utf-8-sig" if shift > 4 else "utf-8"))
    assert file.stat().st_size > MIB
    assert list(JsonRows(file)) == rows


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ("[]", []),
        (" [ \n ] ", []),
        ('{"rows": []}', []),
        ('{"info": {"data": [{"id": 0}]}, "list": [[1]], "rows": [{"id": 1}], "x": "rows"}', [1]),
        ('{"rows": [{"id": 1}], "data": [{"id": 2}]}', [2]),
        ('{"data": {"rows": [{"id": 1}]}, "rows": [{"id": 2}]}', [2]),
        ('{"d\\u0061ta": [{"id": 1}]}', [1]),
    ],
)
def test_the_list_of_rows_is_found_among_other_values(
    tmp_path: Path, content: str, ids: list[int]
) -> None:
    (tmp_path / "rows.json").write_text(content)
    assert [row["id"] for row in JsonRows(tmp_path / "rows.json")] == ids


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'[{"id": 1}, {"id": "a', "line 1 of .* is not JSON .Unterminated string"),
        (b'[{"id": 1},\n{"id": "say "hi"}]', "line 2 of .* is not JSON"),
        (b'[{"id": 1},\n{"id": 2', "line 2 of .* is not JSON"),
        (b'[{"id": 1}\n', "cut short, or a string or bracket in it has no end .line 2"),
        (b'[{"id": 1}}\n', "a bracket is closed by one of another kind .line 1"),
        (b'{"rows": [{"id": 1}}\n', "a bracket is closed by one of another kind"),
        (b'[{"id": 1}]\n\n[]', r"more follows after its value; .*name the file \.jsonl .line 3"),
        (b"\xff\xfe[\x00", "begins with neither . nor ."),
        (b"", "it is empty"),
        (b"  \n", "it is empty"),
    ],
)
def test_a_file_that_is_not_json_is_refused_with_the_line_of_its_first_fault(
    tmp_path: Path, content: bytes, fault: str
) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(RowError, match=fault) as caught:
        JsonRows(tmp_path / "rows.json")
    assert caught.value.kind == "format" and str(tmp_path) in str(caught.value)


def test_an_object_without_a_list_of_rows_is_refused_with_its_fields(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"a": 1, "data": {"b": []}}')
    with pytest.raises(MultiTokenError, match="with the fields a, data; expected a list of rows"):
        JsonRows(tmp_path / "rows.json")


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_bad_row_is_named_when_it_is_read_and_the_others_stay_good(
    tmp_path: Path, kind: str
) -> None:
    rows = [b'{"id": 1}', b'{"id": "caf\xe9"}', b'{"id" 2}', b"[3]", b'{"id": 4}']
    file = tmp_path / f"rows.{kind}"
    file.write_bytes(b"[\n" + b",\n".join(rows) + b"]" if kind == "json" else b"\n".join(rows))
    found, first = (JsonRows, JsonLines)[kind == "jsonl"](file), 2 if kind == "json" else 1
    assert [found[i]["id"] for i in (0, 4, -5)] == [1, 4, 1]
    faults = {
        1: r"is not UTF-8 \(byte 0xe9\); save the file as UTF-8",
        2: r"is not JSON \(Expecting ':' delimiter, column \d+\)",
        3: "is a list, expected an object",
    }
    for index, fault in faults.items():
        with pytest.raises(RowError, match=f"line {first + index} of {file} {fault}") as caught:
            found[index]
        assert caught.value.row_id == f"rows.{kind}[{index}]"


def test_opening_takes_the_same_memory_for_a_longer_file(tmp_path: Path) -> None:
    def peak(size: int) -> int:
        text = "a" * 1000
        (tmp_path / "rows.json").write_text(json.dumps([{"id": i, "t": text} for i in range(size)]))
        tracemalloc.start()
        try:
            assert len(JsonRows(tmp_path / "rows.json")) == size
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    short = peak(3000)
    # 8 bytes for each row, and an array grows in steps
    assert peak(12_000) < short + 12_000 * 16 < 12 * MIB


def private_growth(rows: JsonRows | JsonLines, found: Any) -> None:
    def private() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

    before = private()
    for row in rows:
        assert row
    found.put(private() - before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_forked_worker_that_reads_all_rows_copies_no_memory(tmp_path: Path, kind: str) -> None:
    texts = [json.dumps({"id": i, "t": [{"a": "b"}] * 10}) for i in range(20_000)]
    file = tmp_path / f"rows.{kind}"
    file.write_text("[" + ",".join(texts) + "]" if kind == "json" else "\n".join(texts))
    rows = (JsonRows, JsonLines)[kind == "jsonl"](file)
    fork = multiprocessing.get_context("fork")
    found = fork.SimpleQueue()
    worker = fork.Process(target=private_growth, args=(rows, found))
    worker.start()
    worker.join()
    assert found.get() < 4096, "KiB"
