"""A part of a split: `train[:90%]` and `train[::20]` of any source, with the ids of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from multi_token.data.files.open import load_rows
from multi_token.errors import MultiTokenError


@pytest.mark.parametrize("kind", ["jsonl", "csv", "saved"])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("[:90%]", range(9)),
        ("[90%:]", [9]),
        ("[2:4]", [2, 3]),
        ("[-2:]", [8, 9]),
        ("[::4]", [0, 4, 8]),
        ("[not ::4]", [1, 2, 3, 5, 6, 7, 9]),
        ("[1:50%:2]", [1, 3]),
        ("[not 1:9]", [0, 9]),
    ],
)
def test_a_part_of_a_split_has_its_rows_and_their_ids(
    kind: str, split: str, expected: list[int], tmp_path: Path
) -> None:
    source = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        source.write_text("".join(json.dumps({"number": i}) + "\n" for i in range(10)))
    elif kind == "csv":
        source.write_text("number\n" + "".join(f"{i}\n" for i in range(10)))
    else:
        datasets.Dataset.from_dict({"number": range(10)}).save_to_disk(str(source))
    rows = load_rows(str(source), split=f"train{split}")
    assert [int(row["number"]) for row in rows] == [*expected]
    assert [row["id"] for row in rows] == [f"{source.name}[{i}]" for i in expected]


def test_an_empty_part_is_a_sentence_with_the_number_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n')
    with pytest.raises(MultiTokenError, match=r"has no rows: it has 1 in all"):
        load_rows(str(path), split="train[5:]")
