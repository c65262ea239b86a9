"""row_stream.py and files/: rows by number without end, of tables and of WebDataset."""

from __future__ import annotations

import copy
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from multi_token.data.files.open import load_rows, media_root
from multi_token.data.files.parquet import ParquetRows
from multi_token.data.files.webdataset import TarRows
from multi_token.data.formats import to_conversation
from multi_token.data.row_stream import RowStream, SequentialRows, ShardedRows, open_stream
from multi_token.errors import MultiTokenError, RowError

SIZES = (3, 5, 0, 2)


def row_of(number: int) -> dict[str, Any]:
    return {
        "number": number,
        "messages": [
            {"role": "user", "content": "What is <image>?"},
            {"role": "assistant", "content": str(number)},
        ],
        "image": {"bytes": b"image %d" % number, "path": None},
    }


def write_jsonl(path: Path, numbers: range) -> None:
    rows = [{k: v for k, v in row_of(n).items() if k != "image"} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, numbers: range) -> None:
    schema = pyarrow.Table.from_pylist([row_of(0)]).schema
    table = pyarrow.Table.from_pylist([row_of(n) for n in numbers], schema=schema)
    parquet.write_table(table, path, row_group_size=2)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_tar_of(path: Path, numbers: range) -> None:
    files: dict[str, bytes] = {}
    for n in numbers:
        row = row_of(n) | {"image": ".png"}
        files |= {f"{n:03}.json": json.dumps(row).encode(), f"{n:03}.png": b"image %d" % n}
    write_tar(path, files)


WRITE = {"jsonl": write_jsonl, "parquet": write_parquet, "tar": write_tar_of}


@pytest.fixture(params=list(WRITE))
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Pattern of four files with ten rows; one file is empty."""
    start = 0
    for i, size in enumerate(SIZES):
        WRITE[request.param](tmp_path / f"{i}.{request.param}", range(start, start + size))
        start += size
    return str(tmp_path / f"*.{request.param}")


def numbers(stream: RowStream, wanted: range) -> list[int]:
    return [stream.row(number).row["number"] for number in wanted]


def test_each_epoch_has_every_row_once_and_goes_through_the_files_in_another_order(
    shards: str,
) -> None:
    stream = open_stream(shards, seed=1)
    epochs = [numbers(stream, range(10 * e, 10 * e + 10)) for e in range(6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2
    # within a file the order stays, so that it is read from front to back
    assert all(epoch.index(3) + 4 == epoch.index(7) for epoch in epochs)
    assert [stream.row(n).epoch for n in (0, 9, 10, 59)] == [0, 0, 1, 5]


def test_the_same_files_are_rows_by_index_where_nothing_is_streamed(shards: str) -> None:
    rows = load_rows(shards)
    assert len(rows) == 10 and [row["number"] for row in rows] == list(range(10))
    assert len(load_rows(str(Path(shards).parent))) == 10
    assert media_root(shards) == str(Path(shards).parent.resolve())
    with pytest.raises(MultiTokenError, match="no split 'test'"):
        load_rows(shards, split="test")


def test_a_number_far_ahead_is_the_same_row_as_on_the_way_there(shards: str) -> None:
    walked = numbers(open_stream(shards, seed=1), range(47))
    jumping = open_stream(shards, seed=1)
    assert [jumping.row(n).row["number"] for n in (46, 3, 20)] == [walked[n] for n in (46, 3, 20)]


def test_the_folder_is_the_pattern_and_rows_are_named_by_file_and_index(shards: str) -> None:
    pattern, folder = Path(shards), str(Path(shards).parent)
    assert numbers(open_stream(folder), range(20)) == numbers(open_stream(shards), range(20))
    names = {open_stream(folder).row(n).row_id for n in range(10)}
    file = f"1{pattern.suffix}"
    assert (f"{file}/003" if pattern.suffix == ".tar" else f"{file}[0]") in names
    assert media_root(folder) == str(Path(folder).resolve())


def test_a_stream_is_pickled_into_a_worker_in_the_middle(shards: str) -> None:
    stream = open_stream(shards)
    stream.row(4)
    assert numbers(copy.deepcopy(stream), range(30)) == numbers(stream, range(30))


def test_a_parquet_file_gives_what_datasets_reads_of_it(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows.parquet", range(7))
    ours, theirs = ParquetRows(tmp_path / "rows.parquet"), load_rows(str(tmp_path / "rows.parquet"))
    assert len(ours) == 7 and ours.starts == [0, 2, 4, 6, 7]
    assert [ours[i] for i in (6, 0, 3, -1)] == [theirs[i] for i in (6, 0, 3, 6)]
    assert ours[2:4] == [theirs[2], theirs[3]]
    with pytest.raises(IndexError):
        ours[7]


def test_a_saved_folder_is_a_stream(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"number": n} for n in range(3)]).save_to_disk(tmp_path / "saved")
    stream = open_stream(str(tmp_path / "saved"))
    assert numbers(stream, range(7)) == [0, 1, 2, 0, 1, 2, 0]
    assert media_root(str(tmp_path / "saved")) is None


class Counting:
    """Rows in their order, with the number of times that reading began."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_begun = 0

    def __call__(self) -> Iterator[dict[str, Any]]:
        self.num_begun += 1
        return iter([{"number": n} for n in range(self.size)])


def test_sequential_rows_are_kept_for_a_window_and_restart_for_older_ones() -> None:
    rows = Counting(10)
    stream = SequentialRows("stream", rows, keep=4)
    assert [stream.row(n).row["number"] for n in (5, 2, 4, 7, 4)] == [5, 2, 4, 7, 4]
    assert rows.num_begun == 1
    assert stream.row(12).row["number"] == 2 and stream.row(12).epoch == 1
    assert stream.row(9).row_id == "stream[9]" and rows.num_begun == 2
    assert stream.row(0).row["number"] == 0 and rows.num_begun == 3
    there = copy.deepcopy(stream)
    assert numbers(there, range(5)) == [0, 1, 2, 3, 4]


def test_a_stream_of_datasets_is_read_as_sequential_rows() -> None:
    import datasets

    def generate() -> Iterator[dict[str, Any]]:
        yield from ({"number": n} for n in range(3))

    found: Any = datasets.IterableDataset.from_generator(generate)
    assert numbers(SequentialRows("hub", lambda: found, keep=2), range(7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("open_rows", [Counting(0)])
def test_sources_without_rows_are_refused(open_rows: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    for stream in (open_stream(str(tmp_path)), SequentialRows(str(tmp_path), open_rows, keep=1)):
        with pytest.raises(MultiTokenError, match="has no rows, expected at least one"):
            stream.row(0)


def test_names_without_files_are_refused_with_the_expected_ones(tmp_path: Path) -> None:
    with pytest.raises(
        MultiTokenError, match="and there are no files of rows or media in it; expected"
    ):
        open_stream(str(tmp_path)).row(0)
    with pytest.raises(MultiTokenError, match="names no files of rows; expected files that end in"):
        open_stream(str(tmp_path / "*.parquet"))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(MultiTokenError, match=r"no files of rows, but files that end in \.txt;"):
        open_stream(str(tmp_path / "*"))
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.tar").write_bytes(b"no tar")
    with pytest.raises(MultiTokenError, match=r"several kinds \(\.jsonl, \.tar\).*/\*\.jsonl$"):
        open_stream(str(tmp_path))
    with pytest.raises(MultiTokenError, match="no split 'test'"):
        open_stream(str(tmp_path / "a.jsonl"), split="test")
    with pytest.raises(MultiTokenError, match="cannot be read as an uncompressed .tar"):
        open_stream(str(tmp_path / "b.tar")).row(0)
    (tmp_path / "c.parquet").write_bytes(b"no table")
    with pytest.raises(MultiTokenError, match="cannot be read as parquet"):
        open_stream(str(tmp_path / "c.parquet")).row(0)
    with pytest.raises(MultiTokenError, match="no file at .*none.jsonl; check the name"):
        open_stream(str(tmp_path / "none.jsonl"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jsonl").write_text("{}\n")
    with pytest.raises(MultiTokenError, match="lie in 2 folders"):
        media_root(str(tmp_path / "**" / "*.jsonl"))


@pytest.mark.parametrize("where", ["header", "content", "between"])
def test_a_tar_that_is_cut_short_is_refused_and_not_taken_for_fewer_rows(
    tmp_path: Path, where: str
) -> None:
    path = tmp_path / "s.tar"
    write_tar(path, {f"{i}.json": b"{}" for i in range(3)})
    assert len(TarRows(path)) == 3
    # each member is a header and a block of content, 512 bytes each
    os.truncate(path, {"header": 2 * 1024 + 100, "content": 1024 + 600, "between": 1024}[where])
    with pytest.raises(MultiTokenError, match=r"s\.tar cannot be read .*(cut short|end of data)"):
        TarRows(path)


def test_a_hub_name_without_a_hub_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        MultiTokenError, match=r"cannot load no-owner/none \(split 'train'\) from the"
    ):
        open_stream("no-owner/none").row(0)


def sample(tmp_path: Path, files: dict[str, Any]) -> Any:
    contents = {
        name: value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, value in files.items()
    }
    write_tar(tmp_path / "s.tar", contents)
    return TarRows(tmp_path / "s.tar")


def medium(name: str, content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": name}


def test_a_row_names_the_files_of_its_sample_in_fields_lists_and_parts(tmp_path: Path) -> None:
    parts = [{"type": "image", "image": ".c.png"}, {"type": "text", "text": ".c.png"}]
    row = {
        "images": ["a/7.a.png", ".b.png"],
        "image": "7.a.png",
        "other": "somewhere.png",
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": ".b.png"},
        ],
    }
    files = {"a/7.a.png": b"A", "a/7.b.png": b"B", "a/7.c.png": b"C", "a/7.json": row}
    (found,) = sample(tmp_path, files)
    assert found["id"] == "s.tar/a/7"
    assert found["image"] == medium("7.a.png", b"A")
    assert found["images"] == ["a/7.a.png", medium("7.b.png", b"B")]
    assert found["other"] == "somewhere.png"
    assert found["messages"][0]["content"] == [
        {"type": "image", "image": medium("7.c.png", b"C")},
        parts[1],
    ]
    assert found["messages"][1]["content"] == ".b.png"


def test_files_that_a_row_does_not_name_are_fields(tmp_path: Path) -> None:
    messages = row_of(0)["messages"]
    files = {
        "7.image.png": b"A",
        "7.json": {"messages": messages},
        "7.txt": b"B",
        "8.json": {"id": 5},
    }
    found, other = sample(tmp_path, files)
    assert found["image"] == medium("7.image.png", b"A") and found["txt"] == medium("7.txt", b"B")
    (item,) = to_conversation(found, ["image"], row_id="").media
    assert item.source == b"A"
    assert other["id"] == 5


def test_samples_whose_json_is_no_row_are_bad_rows_with_the_reason(tmp_path: Path) -> None:
    rows = sample(
        tmp_path,
        {
            "2.json": b"{",
            "3.json": [1],
            "4.json": {"image": "elsewhere.png"},
            "4.image.png": b"A",
            ".hidden": b"",
            "README": b"",
        },
    )
    reasons = [
        "2: 2.json is not JSON",
        "3: 3.json is a list, expected an object",
        "4: has the file 4.image.png, which is the field 'image', and that field as well",
    ]
    assert len(rows) == len(reasons)
    for index, reason in enumerate(reasons):
        with pytest.raises(RowError, match=f"row s.tar/{reason}"):
            rows[index]


def test_samples_of_img2dataset_have_an_image_a_text_and_the_fields_of_their_metadata(
    tmp_path: Path,
) -> None:
    metadata = {"url": "http://a/b.jpg", "width": 2, "key": "0001", "caption": "A cat"}
    files = {
        "0001.jpg": b"A",
        "0001.txt": "\ufeffA cät\n".encode(),
        "0001.json": metadata,
        "0002.png": b"B",
        "0002.left.png": b"C",
        "0003.wav": b"D",
        "0003.txt": b"\xe9",
    }
    rows = sample(tmp_path, files)
    image = medium("0001.jpg", b"A")
    assert rows[0] == {"id": "s.tar/0001", **metadata, "image": image, "text": "A cät"}
    assert rows[1] == {
        "id": "s.tar/0002",
        "image": medium("0002.png", b"B"),
        "left": medium("0002.left.png", b"C"),
    }
    with pytest.raises(RowError, match=r"row s.tar/0003: 0003.txt is not UTF-8"):
        rows[2]


def num_headers_read(path: Path) -> int:
    """Open a tar; return the number of headers that were read for it."""
    found = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal found
        found += event == "call" and frame.f_code is tarfile.TarInfo.fromtarfile.__func__.__code__

    sys.setprofile(count)
    try:
        TarRows(path)
    finally:
        sys.setprofile(None)
    return found


def test_headers_of_a_tar_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_tar_of(path, range(3))
    first = TarRows(path)
    assert num_headers_read(path) == 0
    again = TarRows(path)
    assert list(again) == list(first) and len(again) == 3
    assert load_rows(str(tmp_path / "*"))[2]["number"] == 2, "an index is no file of rows"
    write_tar_of(path, range(5))
    assert num_headers_read(path) > 5 and len(TarRows(path)) == 5


def test_an_index_is_in_the_cache_where_the_folder_of_the_tar_cannot_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tar_of(tmp_path / "s.tar", range(3))
    (tmp_path / ".s.tar.index").mkdir()
    TarRows(tmp_path / "s.tar")
    assert num_headers_read(tmp_path / "s.tar") == 0


def test_a_damaged_index_is_written_again(tmp_path: Path) -> None:
    write_tar_of(tmp_path / "s.tar", range(3))
    (tmp_path / ".s.tar.index").write_bytes(b"cut short")
    assert [row["number"] for row in TarRows(tmp_path / "s.tar")] == [0, 1, 2]
    assert num_headers_read(tmp_path / "s.tar") == 0


def test_shards_in_memory_stay_few(tmp_path: Path) -> None:
    for i in range(9):
        write_jsonl(tmp_path / f"{i}.jsonl", range(i, i + 1))
    stream = open_stream(str(tmp_path))
    assert isinstance(stream, ShardedRows)
    assert sorted(numbers(stream, range(9))) == list(range(9))
    assert len(stream._opened) == 4
