"""Rows in a file of a hub repository, with their media in an archive beside it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import close_session

from multi_token.data.files.hub_files import HubFiles, media_root_of
from multi_token.data.files.open import load_rows, media_root
from multi_token.data.row_source import open_rows
from multi_token.data.row_stream import open_stream
from multi_token.errors import MultiTokenError, RowError
from multi_token.media.fetch import Fetch
from multi_token.modalities.image import ImageModality
from multi_token.recipe.data import DataSource
from tests.data.test_archive_root import pack

ROWS = [{"image": "a/1.png", "text": "one"}, {"image": "b.bin", "text": "two"}]


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache without a network; its files are links to blobs, as the hub writes them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "hub"


def repository(hub: Path, name: str, files: Mapping[str, Any]) -> None:
    folder = hub / f"datasets--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for number, (path, content) in enumerate(files.items()):
        link = folder / "snapshots" / ("0" * 40) / path
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = folder / "blobs" / f"{number:040}"
        if isinstance(content, dict):
            Path(pack(folder / link.name, content)).rename(blob)
        else:
            blob.write_text(content)
        link.symlink_to(blob)


@pytest.mark.parametrize("name", ["images.zip", "images.tar", "images_1.tar.gz"])
def test_a_json_beside_an_archive_is_read_with_the_media_in_it(
    hub: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"a/1.png": b"A", "b.bin": b"B"}
    archives: dict[str, Any] = {name: files}
    if name.endswith(".gz"):  # two parts of one folder
        archives = {name: {"a/1.png": b"A"}, "images_2.tar.gz": {"b.bin": b"B"}}
    repository(hub, "ada/cap", {"cap.json": json.dumps(ROWS), "README.md": "", **archives})
    source = "hf://ada/cap/cap.json"
    rows, stream = load_rows(source), open_stream(source)
    assert list(rows) == ROWS == [stream.row(stream.num_lanes * i).row for i in range(2)]
    fetch = Fetch(root=media_root(source))
    assert [fetch.read(row["image"]) for row in rows] == [b"A", b"B"]
    said = " ".join(capsys.readouterr().err.split())
    assert f"media of hf://ada/cap/cap.json are read from {', '.join(archives)}" in said


def test_root_names_one_of_several_archives(hub: Path) -> None:
    archives = {"x/a.zip": {"a/1.png": b"A"}, "x/b.zip": {"a/1.png": b"B"}}
    repository(hub, "ada/two", {"x/rows.jsonl": json.dumps(ROWS[0]), **archives})
    with pytest.raises(MultiTokenError, match=r"has the archives x/a.zip, x/b.zip; name the one"):
        media_root("hf://ada/two/x/rows.jsonl")
    assert Fetch(root=media_root_of("hf://ada/two/x/b.zip")).read("a/1.png") == b"B"
    assert Fetch(root=media_root_of("hf://ada/two/x/b.zip/a")).read("1.png") == b"B"
    assert len(load_rows("hf://datasets/ada/two@main/x/*.jsonl")) == 1


def test_a_file_that_a_repository_lacks_is_refused_with_those_that_it_has(hub: Path) -> None:
    repository(hub, "ada/cap", {"a.json": "[]", "b.csv": "a\n1\n"})
    assert list(load_rows("hf://ada/cap/b.csv")) == [{"a": 1}]
    with pytest.raises(MultiTokenError, match="has no file c.json; its files are a.json, b.csv"):
        load_rows("hf://ada/cap/c.json")
    with pytest.raises(MultiTokenError, match="data set ada/none could not be fetched"):
        load_rows("hf://ada/none/c.json")


class _Refusing(BaseHTTPRequestHandler):
    """A hub that answers each request with 403."""

    def do_GET(self) -> None:
        self.send_error(403)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


def test_a_hub_that_refuses_is_not_answered_from_the_cache(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository(hub, "ada/cap", {"a.json": "[]", "old.zip": {"a.png": b"A"}})
    files = HubFiles.of("hf://ada/cap/a.json")
    assert files.names() == ["a.json", "old.zip"]
    said = " ".join(capsys.readouterr().err.split())
    assert "files of ada/cap are the 2 in this machine's cache" in said
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    close_session()  # a client of the time without a network
    try:
        with pytest.raises(MultiTokenError, match=r"ada/cap could not be fetched .*403"):
            files.names()
    finally:
        server.shutdown()
        server.server_close()
        close_session()


def read_item(folder: Path, args: Any, **keys: Any) -> Any:
    """Return the item of a row of the original multi_token that names a data set."""
    row = {
        "id": "r1",
        "images": [{"dataset_args": args, "idx": 1}],
        "messages": [
            {"role": "user", "content": "<image>"},
            {"role": "assistant", "content": "a"},
        ],
    }
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    source = DataSource(rows=str(path), **keys)
    return open_rows(source, {"image": ImageModality(encoder="x")}).rows[0]["images"][0]


def test_an_item_of_a_data_set_is_read_from_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"path": "ada/pix", "name": None, "split": "train", "revision": "v1"}
    with pytest.raises(MultiTokenError, match="cannot load the data set of .*Couldn't reach"):
        read_item(tmp_path, args)
    asked: list[dict[str, Any]] = []
    table = datasets.Dataset.from_dict({"n": [0, 1], "image": ["a.png", "b.png"]})
    monkeypatch.setattr("datasets.load_dataset", lambda **args: asked.append(args) or table)
    assert read_item(tmp_path, args) == "b.png"
    assert asked == [{"path": "ada/pix", "split": "train", "revision": "v1"}]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"path": "json", "data_files": "rows.jsonl", "split": "train"}, "`data_files: 'rows"),
        ({"path": "ada/pix", "split": "train", "data_dir": "/etc"}, "`data_dir: '/etc'`"),
        ({"path": "ada/pix", "split": ["train"]}, "expected texts under path, name, split, rev"),
        ({"path": "pandas", "split": "train"}, "`path` 'pandas', expected a data set on the hub"),
        ({"path": "../pix", "split": "train"}, "`path` '../pix'"),
        ({"path": "ada/..", "split": "train"}, "`path` 'ada/..'"),
        ({"path": "here/pix", "split": "train"}, "`path` 'here/pix'"),
        ({"split": "train"}, "`path` ''"),
    ],
)
def test_an_item_of_a_data_set_names_no_file_here(
    args: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "pix").mkdir(parents=True)
    with pytest.raises(RowError) as refused:
        read_item(tmp_path, args)
    assert sentence in str(refused.value) and refused.value.row_id == "r1"


def test_an_item_of_a_data_set_is_refused_where_media_are_inside_of_root(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="inside of `root`.*remove `root`, or write the item as a"):
        read_item(tmp_path, {"path": "ada/pix", "split": "train"}, root=str(tmp_path))
