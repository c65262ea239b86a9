"""Folders of media files as rows: metadata, pairs with texts, classes and splits."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pytest
from PIL import Image

from multi_token.data.files.open import load_rows, media_root
from multi_token.data.row_stream import open_stream
from multi_token.errors import MediaError, MultiTokenError, RowError
from multi_token.media.fetch import Fetch


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def folder(path: Path, files: Mapping[str, str | bytes | None]) -> str:
    """Write files into a folder; None writes an image."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (2, 2)).save(path / name)
        else:
            (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_images_with_a_text_beside_them_are_rows_and_those_without_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(
        tmp_path / "pics",
        {
            "b.jpg": None,
            "b.txt": "\ufeffA bär\n",
            "a.b.jpg": None,
            "a.b.caption": "A dot",
            "a.jpg": None,
            "a.txt": "A",
            "a.json": '{"tags": ["x"], "id": "own"}',
            "sub/c.png": None,
            "sub/z.txt": "no image",
            ".hidden.jpg": b"",
        },
    )
    rows = load_rows(source)
    assert list(rows) == [
        {"id": "own", "image": "a.jpg", "text": "A", "tags": ["x"]},
        {"id": "a.b.jpg", "image": "a.b.jpg", "caption": "A dot"},
        {"id": "b.jpg", "image": "b.jpg", "text": "A bär"},
    ]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 4 media files have no .txt, .caption or .json beside them and are left out" in said
    assert "such as sub/c.png; 1 texts have no media file, such as sub/z.txt" in said
    assert Fetch(root=media_root(source)).read(rows[1]["image"]).startswith(b"\xff\xd8")
    copy = pickle.loads(pickle.dumps(rows))  # noqa: S301 - a data worker's copy
    assert copy[2] == open_stream(source).row(2).row == rows[2]
    assert media_root(source) == str(tmp_path / "pics")


def test_a_text_or_metadata_that_cannot_be_read_is_a_bad_row_with_its_file(tmp_path: Path) -> None:
    bad = {"a.jpg": None, "a.txt": b"\xe9", "b.jpg": None, "b.json": '{"image": 1}'}
    rows = load_rows(folder(tmp_path, {**bad, "c.jpg": None, "c.json": "[]"}))
    with pytest.raises(RowError, match=r"row a.jpg: .*a.txt is not UTF-8"):
        rows[0]
    with pytest.raises(RowError, match=r"row b.jpg: .* field 'image', and that field in b.json as"):
        rows[1]
    with pytest.raises(RowError, match=r"c.json is a list, expected an object"):
        rows[2]


def test_files_of_one_stem_are_one_row_unless_they_are_of_one_kind(tmp_path: Path) -> None:
    source = folder(
        tmp_path, {"a.mp4": b"", "a.wav": b"", "a.txt": "A", "b.png": None, "b.jpg": b""}
    )
    folder(tmp_path, {"b.txt": "B"})
    assert [{k: v for k, v in row.items() if k != "id"} for row in load_rows(source)] == [
        {"video": "a.mp4", "audio": "a.wav", "text": "A"},
        {"image": "b.jpg", "text": "B"},
        {"image": "b.png", "text": "B"},
    ]


def test_folders_of_classes_are_labels_as_in_datasets(tmp_path: Path) -> None:
    names = ["train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "test/cat/3.png"]
    source = folder(tmp_path / "data", dict.fromkeys(names))
    theirs = datasets.load_dataset("imagefolder", data_dir=source, split="train")
    ours = load_rows(source)
    labels = theirs.features["label"]
    assert [row["label"] for row in ours] == [labels.int2str(n) for n in theirs["label"]]
    assert [row["image"] for row in ours] == names[:3]
    assert [row["image"] for row in load_rows(source, split="test")] == names[3:]
    with pytest.raises(MultiTokenError, match="no split 'dev'; its splits are test, train"):
        load_rows(source, split="dev")
    flat = folder(tmp_path / "flat", {"a.png": None, "b.png": None})
    assert list(load_rows(flat)) == [
        {"id": "a.png", "image": "a.png"},
        {"id": "b.png", "image": "b.png"},
    ]
    with pytest.raises(MultiTokenError, match="no split 'test'; it has no splits"):
        load_rows(flat, split="test")


def metadata(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        return "\n".join(lines).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_names_the_files_of_its_rows(tmp_path: Path, kind: str) -> None:
    given = [{"file_name": f"{n}.png", "text": n, "left_file_name": f"l/{n}.wav"} for n in "ba"]
    source = folder(tmp_path / "data", {"a.png": None, "b.png": None, "x.txt": "not of a row"})
    file = tmp_path / "data" / f"metadata.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(given).to_parquet(file)
    else:
        file.write_bytes(metadata(kind, given))
    rows = load_rows(source)
    assert list(rows) == [
        {"image": "b.png", "text": "b", "left": "l/b.wav"},
        {"image": "a.png", "text": "a", "left": "l/a.wav"},
    ]
    Fetch(root=media_root(source)).read(rows[0]["image"])


def test_metadata_below_is_relative_to_its_own_folder(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/c"):
        rows = metadata("jsonl", [{"file_names": ["1.png", "2.png"], "text": name}])
        folder(tmp_path, {f"{name}/metadata.jsonl": rows, f"{name}/1.png": None})
    assert list(load_rows(str(tmp_path))) == [
        {"images": ["train/a/1.png", "train/a/2.png"], "text": "train/a"},
        {"images": ["train/b/1.png", "train/b/2.png"], "text": "train/b"},
    ]


def test_metadata_without_files_with_two_files_or_out_of_the_folder_is_refused(
    tmp_path: Path,
) -> None:
    source = folder(tmp_path / "data", {"metadata.csv": "name,text\na.png,A\n", "a.png": None})
    with pytest.raises(MultiTokenError, match="has the columns name, text, expected `file_name`"):
        load_rows(source)
    names = ["a.png", "../b.png", "/etc/passwd", "file:///etc/passwd", "C:\\x.png", 3]
    folder(tmp_path / "data", {"metadata.csv": "file_name\n" + "\n".join(map(str, names))})
    rows = load_rows(source)
    assert rows[0] == {"image": "a.png"}
    for index in range(1, 5):
        with pytest.raises(
            RowError, match=rf"row {index} of .*metadata.csv has `file_name` .*, wh"
        ):
            rows[index]
    folder(tmp_path / "data", {"metadata.csv": "file_name\n1\n"})
    with pytest.raises(RowError, match=r"row 0 of .*metadata.csv has 1 as `file_name`, expected"):
        load_rows(source)[0]
    folder(tmp_path / "data", {"metadata.csv": "file_name\nnone.png\n"})
    with pytest.raises(MediaError, match=r"no file at .*data/none.png"):
        Fetch(root=media_root(source)).read(load_rows(source)[0]["image"])
    folder(tmp_path / "data", {"metadata.jsonl": "{}"})
    with pytest.raises(MultiTokenError, match="has metadata.csv and metadata.jsonl, expected one"):
        load_rows(source)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"file_name": ""}, "has '' as `file_name`, expected the name of a file"),
        ({"file_name": "."}, "has '.' as `file_name`, expected the name of a file"),
        ({"file_names": 5}, "has 5 as `file_names`, expected a list of names of files"),
        ({"file_names": "a.png"}, "has 'a.png' as `file_names`, expected a list of names"),
        ({"file_names": ["a.png", ""]}, "has '' as `file_names`, expected the name of a file"),
    ],
)
def test_a_row_of_metadata_that_names_no_file_is_one_bad_row(
    tmp_path: Path, row: dict[str, Any], sentence: str
) -> None:
    lines = [json.dumps({next(iter(row)): None}), json.dumps(row)]
    source = folder(tmp_path / "data", {"metadata.jsonl": "\n".join(lines)})
    with pytest.raises(RowError) as refused:
        load_rows(source)[1]
    assert sentence in str(refused.value) and refused.value.row_id == "metadata.jsonl[1]"


def test_a_link_to_a_folder_around_it_is_not_followed(tmp_path: Path) -> None:
    source = folder(tmp_path / "data", {"x/a.png": None, "y/b.png": None})
    (tmp_path / "data" / "x" / "again").symlink_to(tmp_path / "data" / "x")
    (tmp_path / "data" / "y" / "up").symlink_to("..")
    folder(tmp_path / "elsewhere", {"c.png": None})
    (tmp_path / "data" / "z").symlink_to(tmp_path / "elsewhere")
    assert [row["image"] for row in load_rows(source)] == ["x/a.png", "y/b.png", "z/c.png"]


def test_files_of_rows_beside_images_are_the_rows(tmp_path: Path) -> None:
    folder(tmp_path, {"rows.jsonl": '{"image": "images/a.png"}\n', "images/a.png": None})
    assert list(load_rows(str(tmp_path))) == [{"image": "images/a.png"}]
    folder(tmp_path / "flat", {"captions.csv": "image,text\na.png,A\n", "a.png": None})
    assert list(load_rows(str(tmp_path / "flat"))) == [{"image": "a.png", "text": "A"}]
