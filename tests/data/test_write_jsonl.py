"""files/jsonl.py: rows are written so that they read like the originals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multi_token.data.files.jsonl import write_jsonl
from multi_token.data.files.open import load_rows
from multi_token.data.formats import to_conversation
from multi_token.data.scan import scan
from multi_token.errors import RowError
from tests.data.letters import FETCH, read, row


def test_the_clean_file_holds_the_good_rows_and_reads_like_them(
    tmp_path: Path, image_path: str
) -> None:
    content = Path(image_path).read_bytes()
    rows: list[Any] = [
        row("<image>?", image={"bytes": content, "path": None}, id="ä"),
        {"id": "bad"},
        row("<image>?", images=[Image.open(image_path)]),
        row("<image>?", images=[Path(image_path)], weights=np.array([1.5, 2.0])),
    ]
    out = tmp_path / "clean.jsonl"
    write_jsonl(rows, [0, 2, 3], out)
    assert '"ä"' in out.read_text(encoding="utf-8")
    written = load_rows(str(out))
    assert [r.get("id") for r in written] == ["ä", None, None]
    assert written[2]["weights"] == [1.5, 2.0]
    assert list(scan(written, read, progress=False).good_indices) == [0, 1, 2]
    source = to_conversation(written[0], ["image"], row_id="").media[0].source
    assert FETCH.read(source) == content


def test_the_clean_file_may_replace_the_one_it_is_made_from(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row("a" * i)) for i in range(4)))
    rows = load_rows(str(file))
    write_jsonl(rows, [1, 3], file)
    assert [len(r["messages"][0]["content"]) for r in load_rows(str(file))] == [1, 3]
    assert list(tmp_path.iterdir()) == [file]


def test_a_row_that_json_cannot_hold_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="row x: holds a object"):
        write_jsonl([row("a", id="x", thing=object())], [0], tmp_path / "clean.jsonl")
    assert list(tmp_path.iterdir()) == []
