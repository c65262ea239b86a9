"""data/scan.py: every problem is found, counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.data.files.open import load_rows
from multi_token.data.scan import Bin, first_relative_path, histogram, scan
from multi_token.modalities.base import Modality
from multi_token.modalities.document import DocumentModality
from multi_token.modalities.image import ImageModality
from multi_token.modalities.video import VideoModality
from multi_token.types import Length, Sample
from tests.data.letters import read, row


def test_a_scan_never_stops_and_names_every_problem_by_kind(
    tmp_path: Path, image_path: str
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"hello")
    lines = [
        json.dumps(row("<image>?", images=[image_path])),
        json.dumps(row("<image>?", images=[str(tmp_path / "none.png")], id="lost")),
        json.dumps(row("<image>?", images=[str(damaged)])),
        json.dumps(row("<image>?", images=[image_path, image_path])),
        "{broken",
        json.dumps({"text": "hello"}),
        json.dumps(row("{{", id="jinja")),
        json.dumps(row("hm?", "", id="mute")),
        json.dumps(row("hello")),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    report = scan(load_rows(str(file)), read, source=str(file), progress=False)
    assert (report.num_rows, [*report.good_indices]) == (9, [0, 8])
    found = {kind: [p.row_id for p in problems] for kind, problems in report.by_kind.items()}
    assert found == {
        "format": ["rows.jsonl[4]", "rows.jsonl[5]"],
        "item_count": ["rows.jsonl[3]"],
        "missing_file": ["lost"],
        "undecodable": ["rows.jsonl[2]"],
        "chat_template": ["jinja"],
        "no_target": ["mute"],
    }
    assert [p.index for p in report.problems] == [1, 2, 3, 4, 5, 6, 7]
    assert report.problems[3].message.startswith("line 5 of ")


def test_a_scan_measures_good_rows(image_path: str) -> None:
    report = scan([row("<image>ab", image=image_path), row("abc", "no")], read, progress=False)
    assert report.lengths == [Length(9, 3, 4, num_items=1), Length(5, 2, 0)]
    assert report.total == Length(14, 5, 4, num_items=1)


def test_a_scan_with_workers_finds_the_same() -> None:
    rows = [row("a" * i) if i % 3 else {"id": i} for i in range(9)]
    alone, shared = (scan(rows, read, num_workers=n, progress=False) for n in (0, 2))
    assert alone == shared
    assert list(alone.good_indices) == [1, 2, 4, 5, 7, 8]


def test_a_bug_in_the_reader_is_raised_and_not_counted_as_a_bad_row() -> None:
    def broken(row: Any, row_id: str) -> Sample:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        scan([row("a")], broken, progress=False)


def test_a_scan_leaves_the_random_numbers_of_training_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    scan([row("a")], read, progress=False)
    assert torch.equal(torch.rand(1), expected)


def test_a_scan_prints_nothing_where_there_is_no_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    scan([row("a"), {}], read)
    assert capfd.readouterr() == ("", "")


def test_a_scan_of_no_rows_is_an_empty_report() -> None:
    report = scan([], read, progress=False)
    assert (report.num_rows, [*report.good_indices], report.by_kind) == (0, [], {})


# --- histogram ---


def test_a_histogram_counts_every_length_once() -> None:
    lengths = [3, 17, 17, 90, 44, 3, 102]
    bins = histogram(lengths, num_bins=4)
    assert bins == [Bin(3, 27, 4), Bin(28, 52, 1), Bin(53, 77, 0), Bin(78, 102, 2)]
    assert sum(b.count for b in bins) == len(lengths)


def test_a_histogram_has_no_more_bins_than_there_are_lengths_between() -> None:
    assert histogram([]) == []
    assert histogram([5, 5]) == [Bin(5, 5, 2)]
    assert histogram([5, 7]) == [Bin(5, 5, 1), Bin(6, 6, 0), Bin(7, 7, 1)]
    assert len(histogram(list(range(1000)))) == 10


def test_a_relative_path_is_found_before_it_is_lost() -> None:
    image: dict[str, Modality] = {"image": ImageModality(encoder="an/encoder")}
    rows = [row("<image>", image="/a.png"), row("<image>", image="b.png")]
    assert first_relative_path(rows, [0, 1], modalities=image) == "b.png"
    assert first_relative_path(rows, [0], modalities=image) is None
    urls = [row("<image>", image=url) for url in ("https://a/b.png", "data:,a", "file:///a")]
    assert first_relative_path(urls, [0, 1, 2], modalities=image) is None


def test_a_relative_path_is_found_inside_a_mapping_and_not_in_a_text_of_the_row() -> None:
    part = [row("<clip>", clip={"path": "a.mp4", "start": 2})]
    clip: dict[str, Modality] = {"clip": VideoModality(encoder="an/encoder")}
    assert first_relative_path(part, [0], modalities=clip) == "a.mp4"
    text = [row("<page>", page="A text."), row("<page>", page={"text": "Another."})]
    for strings, found in (("path", "A text."), ("text", None)):
        page = DocumentModality(encoder="an/encoder", strings=strings)  # type: ignore[arg-type]
        assert first_relative_path(text, [0, 1], modalities={"page": page}) == found
