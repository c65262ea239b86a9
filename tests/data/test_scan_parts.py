"""data/scan.py at size: rows in parts, each file once, no object for each row."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from multi_token.data.dataset import RowReader
from multi_token.data.files.open import load_rows
from multi_token.data.lengths import LengthStore
from multi_token.data.scan import ScanReport, merge_reports, scan
from multi_token.data.sources import num_readers
from multi_token.media.fetch import Fetch
from multi_token.processor import MultiTokenProcessor, build_processor
from multi_token.recipe.recipe import Recipe
from multi_token.types import Length
from tests.data.scanning import Counting

Fields = Callable[..., dict[str, Any]]
NUM, COLORS = 150, ("red", "blue", "green")


@pytest.fixture
def processor(recipe_fields: Fields, data: Path, tmp_path: Path) -> MultiTokenProcessor:
    """Processor, and 150 rows about three images; every tenth row is bad."""
    lines: list[dict[str, Any]] = []
    # of rows 100 to 149, every fifth has no image
    for number in range(NUM):
        slot = "it" if number >= 100 and number % 5 == 0 else "<image>"
        turns = [
            {"role": "user", "content": f"What is {slot}?" + " so" * (number % 7)},
            {"role": "assistant", "content": "red" if number % 10 else ""},
        ]
        image = str(data / f"{COLORS[number % 3]}.png")
        images = {"images": [image]} if slot == "<image>" else {}
        lines.append({"id": str(number), **images, "messages": turns})
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    return build_processor(Recipe.model_validate(recipe_fields(tmp_path / "run")))


def look(processor: MultiTokenProcessor, folder: Path, **options: Any) -> ScanReport:
    reader = RowReader(processor, tuple(processor.modalities))
    return scan(load_rows(str(folder / "rows.json")), reader, progress=False, **options)


def test_a_scan_in_parts_finds_what_a_scan_of_single_rows_finds(
    processor: MultiTokenProcessor, tmp_path: Path
) -> None:
    reader = RowReader(processor, tuple(processor.modalities))
    rows = load_rows(str(tmp_path / "rows.json"))
    one_by_one = scan(rows, lambda row, row_id: reader(row, row_id), progress=False)
    assert one_by_one.num_rows == NUM and len(one_by_one.problems) == NUM // 10
    assert look(processor, tmp_path) == one_by_one
    assert look(replace(processor, once=True), tmp_path, num_workers=2) == one_by_one
    shares = [look(processor, tmp_path, indices=range(i, NUM, 2)) for i in (1, 0)]
    assert merge_reports(shares) == one_by_one


def test_a_scan_knows_what_media_rows_have_and_which_begin_with_the_same(
    processor: MultiTokenProcessor, tmp_path: Path
) -> None:
    def report(folder: str, **options: Any) -> ScanReport:
        known = LengthStore(tmp_path / folder, processor)
        return look(processor, tmp_path, known=known, references=True, **options)

    first = report("one")
    bit = 1 << list(processor.modalities).index("image")
    good = [*first.good_indices]
    assert [*first.modalities] == [0 if i >= 100 and i % 5 == 0 else bit for i in good]
    table = [bytes(first.references[i * 32 :][:32]) for i in range(len(good))]
    colors = {table[at][:16]: index % 3 for at, index in enumerate(good) if first.modalities[at]}
    assert sorted(colors.values()) == [0, 1, 2]
    for at, index in enumerate(good):
        assert colors.get(table[at][:16]) == (index % 3 if first.modalities[at] else None)
        assert any(table[at]) == bool(first.modalities[at])
    rows = {row[16:] for row in table}
    assert (
        len(rows)
        == len({(i % 3, i % 7) for i, m in zip(good, first.modalities, strict=True) if m}) + 1
    )
    shares = [report("two", indices=range(i, NUM, 2)) for i in (1, 0)]
    # lengths that were stored change nothing
    for again in (merge_reports(shares), report("one"), report("three", num_workers=2)):
        assert (again.modalities, again.references) == (first.modalities, first.references)
    assert merge_reports([look(processor, tmp_path)]).references == b""


@pytest.mark.parametrize("lengths_only", [False, True])
def test_a_file_that_many_rows_name_is_read_once(
    processor: MultiTokenProcessor, tmp_path: Path, lengths_only: bool
) -> None:
    fetch = Counting(root=".")
    # a header is read by the decoder itself, so what is read in full counts
    counted = replace(processor, fetch=fetch, once=True, lengths_only=lengths_only)
    look(counted, tmp_path)
    assert len(fetch.opened) == (0 if lengths_only else 3)
    assert len(counted._seen) == 3
    repeated = Counting(root=".")
    look(replace(processor, fetch=repeated), tmp_path)
    assert len(repeated.opened) == NUM - NUM // 10 - 5  # of the good rows, five have no image


def test_the_lengths_of_a_changed_file_are_found_by_the_next_scan(
    processor: MultiTokenProcessor, tmp_path: Path
) -> None:
    keep = tmp_path / "lengths"
    processor = replace(processor, once=True)
    first = look(processor, tmp_path, known=LengthStore(keep, processor))
    again = look(processor, tmp_path, known=LengthStore(keep, processor))
    assert again == first and again.num_known_before == NUM - NUM // 10
    assert len(list(keep.iterdir())) == 1, "a second scan has nothing to store"


def test_a_report_has_no_object_for_each_row() -> None:
    report = ScanReport(10_000)
    for index in range(10_000):
        report.good_indices.append(index)
        report.lengths.append(Length(index, 2, 3))
    assert len(pickle.dumps(report)) < 10_000 * 40
    assert report.lengths[-1] == Length(9999, 2, 3) and report.total.num_media == 30_000


def test_many_rows_are_read_on_all_cores_unless_the_recipe_says_otherwise(
    recipe_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = recipe_fields(tmp_path / "run")
    fields["train"].setdefault("args", {}).pop("dataloader_num_workers", None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    everything = num_readers(Recipe.model_validate(fields), 1_000_000)
    assert everything >= 1 and num_readers(Recipe.model_validate(fields), 10) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(everything))
    assert num_readers(Recipe.model_validate(fields), 1_000_000) == 1
    fields["train"]["args"]["dataloader_num_workers"] = 0
    assert num_readers(Recipe.model_validate(fields), 1_000_000) == 0


def test_a_row_of_another_machine_s_file_is_a_bad_row_with_its_name(
    processor: MultiTokenProcessor, tmp_path: Path
) -> None:
    rows = load_rows(str(tmp_path / "rows.json"))
    far = {**rows[1], "id": "far", "images": ["file://elsewhere/image.png"]}
    (tmp_path / "rows.json").write_text(json.dumps([far, *(rows[i] for i in range(2, 6))]))
    known = LengthStore(tmp_path / "lengths", processor)
    report = look(processor, tmp_path, known=known, num_workers=2)
    (problem,) = report.problems
    assert problem.row_id == "far" and "names the machine 'elsewhere'" in problem.message
    assert len(report.good_indices) == 4


def test_an_item_is_never_remembered_across_folders(
    processor: MultiTokenProcessor, data: Path, tmp_path: Path
) -> None:
    from multi_token.types import Media

    here = replace(processor, once=True, fetch=Fetch(root=str(data)))
    here.prepare(Media("image", "red.png"))
    assert replace(here, fetch=Fetch(root=str(tmp_path)))._seen == {}
