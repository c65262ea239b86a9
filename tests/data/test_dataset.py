"""data/dataset.py and data/files/: sources of rows, row ids, rows as samples."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from multi_token.data.dataset import ConversationDataset
from multi_token.data.files.open import load_rows, media_root
from multi_token.data.rows import row_id_of
from multi_token.errors import MultiTokenError, RowError
from multi_token.types import Conversation, Sample

ROWS = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"Wörter {i}"}]} for i in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` copies tables into its cache: a temporary one, not the user's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def jsonl(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def num_letters(conversation: Conversation) -> Sample:
    """Processor with one token for each letter of the conversation."""
    text = str(conversation.messages[0].parts)
    ids = torch.arange(len(text))
    return Sample(ids, ids.clone(), id=conversation.id)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, format="PNG")
    return buffer.getvalue()


# --- files ---


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda r: {"data": r}, lambda r: {"rows": r}])
def test_a_json_file_holds_a_list_or_an_object_around_it(tmp_path: Path, wrap: Any) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(wrap(ROWS)), encoding="utf-8")
    rows = load_rows(str(file))
    assert (len(rows), rows[3]) == (5, ROWS[3])


def test_a_jsonl_file_is_read_in_any_order(tmp_path: Path) -> None:
    rows = load_rows(jsonl(tmp_path / "rows.jsonl", ROWS))
    assert len(rows) == 5
    assert [rows[i]["id"] for i in (4, 0, -1, 2)] == ["r4", "r0", "r4", "r2"]
    assert list(rows) == ROWS
    assert rows[1:3] == ROWS[1:3]
    with pytest.raises(IndexError):
        rows[5]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\r\n  \n{"id": 2}')
    assert list(load_rows(str(file))) == [{"id": 1}, {"id": 2}]


def test_a_broken_line_is_named_by_file_and_number_and_only_when_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n\n{"id": \n[3]\n', encoding="utf-8")
    rows = load_rows(str(file))
    assert rows[0] == {"id": 1}
    with pytest.raises(RowError, match=f"line 3 of {file} is not JSON") as caught:
        rows[1]
    assert (caught.value.kind, caught.value.row_id) == ("format", "rows.jsonl[1]")
    with pytest.raises(RowError, match=f"line 4 of {file} is a list"):
        rows[2]


def test_lines_in_a_json_file_are_recognised_in_the_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"id": 1}\n{"id": 2}\n', encoding="utf-8")
    with pytest.raises(RowError, match=r"name the file \.jsonl"):
        load_rows(str(file))


@pytest.mark.parametrize("content", ['{"a": 1}', "{}", '{"data": {}}'])
def test_a_json_file_without_a_list_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(MultiTokenError, match="a list of rows"):
        load_rows(str(tmp_path / "rows.json"))


def test_a_parquet_file_gives_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"))
    assert (len(rows), rows[3]) == (5, ROWS[3])


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"hello")
    with pytest.raises(MultiTokenError, match="cannot be read as parquet"):
        load_rows(str(tmp_path / "rows.parquet"))


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(MultiTokenError, match="no split 'test'"):
        load_rows(jsonl(tmp_path / "rows.jsonl", ROWS), split="test")


# --- folders ---


def test_a_saved_folder_gives_rows_with_splits_or_without(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "plain")
    assert load_rows(str(tmp_path / "plain"))[3] == ROWS[3]
    splits = datasets.DatasetDict({"train": table, "test": table.select([4])})
    splits.save_to_disk(tmp_path / "splits")
    assert len(load_rows(str(tmp_path / "splits"))) == 5
    assert load_rows(str(tmp_path / "splits"), split="test")[0]["id"] == "r4"
    with pytest.raises(MultiTokenError, match="no split 'dev'; its splits are train, test"):
        load_rows(str(tmp_path / "splits"), split="dev")


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MultiTokenError, match="save_to_disk"):
        load_rows(str(tmp_path))


def test_images_in_tables_stay_undecoded_however_nested(tmp_path: Path) -> None:
    damaged = b"not an image"
    columns = {
        "image": [{"bytes": damaged, "path": "a.png"}],
        "images": [[{"bytes": png(), "path": None}, {"bytes": damaged, "path": None}]],
        "messages": [[{"part": {"image": {"bytes": damaged, "path": None}}}]],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "messages": [{"part": {"image": datasets.Image()}}],
        }
    )
    table = datasets.Dataset.from_dict(columns, features=features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    for source in ("saved", "rows.parquet"):
        row = load_rows(str(tmp_path / source))[0]
        assert row["image"]["bytes"] == damaged
        assert [image["bytes"] for image in row["images"]] == [png(), damaged]
        assert row["messages"][0]["part"]["image"]["bytes"] == damaged


# --- names ---


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", "data/rows.json", "./owner/name", "../name", "a/b/c", "/x/y", "owner/", "", "."],
)
def test_a_name_that_looks_like_a_path_is_never_searched_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MultiTokenError) as caught:
        load_rows(name)
    assert str(Path(name).resolve()) in str(caught.value)


def test_a_name_below_a_folder_that_is_here_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(MultiTokenError, match=f"nothing at {tmp_path / 'data' / 'cats'}"):
        load_rows("data/cats")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("a,b")
    with pytest.raises(MultiTokenError, match=r"suffix '\.xlsx'; expected a \.json"):
        load_rows(str(tmp_path / "rows.xlsx"))


@pytest.mark.parametrize("name", ["no-owner/no-such-name", "hf://no-owner/nothing/config"])
def test_a_name_that_the_hub_does_not_have_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MultiTokenError) as caught:
        load_rows(name)
    assert str(caught.value).startswith(f"cannot load {name} (split 'train') from the hub: ")


@pytest.mark.parametrize("name", ["hf://", "hf://owner/", "hf://owner/name/config/more"])
def test_an_invalid_hub_name_is_refused(name: str) -> None:
    with pytest.raises(MultiTokenError, match="expected hf://owner/name"):
        load_rows(name)


def test_paths_in_a_file_of_rows_start_at_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert media_root("rows.jsonl") == str(tmp_path)
    assert media_root("hf://owner/name") is None
    assert media_root("owner/name") is None


def test_a_row_is_named_by_its_id_or_by_file_and_index() -> None:
    assert row_id_of(3, {"id": 17}, "data/rows.jsonl") == "17"
    assert row_id_of(3, {"id": None}, "data/rows.jsonl") == "rows.jsonl[3]"
    assert row_id_of(3, None, "hf://owner/name") == "name[3]"


# --- the torch dataset ---


def test_the_dataset_has_good_rows_only_and_names_them(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [{**row, "id": None} for row in ROWS])
    dataset = ConversationDataset(
        load_rows(source), num_letters, modalities=["image"], good_indices=[4, 1], source=source
    )
    assert len(dataset) == 2
    assert [dataset[i].id for i in range(2)] == ["rows.jsonl[4]", "rows.jsonl[1]"]
    assert len(ConversationDataset(ROWS, num_letters, modalities=())) == 5


def test_a_bad_row_raises_with_its_name_rather_than_being_replaced() -> None:
    rows = [ROWS[0], {"id": "bad"}]
    dataset = ConversationDataset(rows, num_letters, modalities=())
    with pytest.raises(RowError, match="row bad: "):
        dataset[1]


def test_the_dataset_is_read_in_data_workers(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS)
    dataset = ConversationDataset(load_rows(source), num_letters, modalities=(), source=source)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own
    assert copy[2].id == "r2"
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    assert [sample.id for sample in loader] == [row["id"] for row in ROWS]
