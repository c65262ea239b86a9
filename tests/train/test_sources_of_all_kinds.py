"""A run on rows as people have them: tables, folders of images, tars, and media in an archive."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multi_token import Recipe, train

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The same four captioned images in seven forms."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = {}
    for colour in COLOURS:
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), colour).save(buffer, format="PNG")
        images[colour] = buffer.getvalue()
    for name in ("pairs", "metadata", "csv", "classes", "plain"):
        (tmp_path / name).mkdir()
    lines = "".join(f"images/{c}.png,{c}\n" for c in COLOURS)
    (tmp_path / "plain" / "rows.csv").write_text("image,text\n" + lines)
    (tmp_path / "metadata" / "metadata.csv").write_text(
        "file_name,text\n" + lines.replace("images/", "")
    )
    with (
        zipfile.ZipFile(tmp_path / "images.zip", "w") as archive,
        tarfile.open(tmp_path / "images.tar.gz", "w:gz") as packed,
        tarfile.open(tmp_path / "shard.tar", "w") as shard,
    ):
        for colour, data in images.items():
            (tmp_path / "pairs" / f"{colour}.png").write_bytes(data)
            (tmp_path / "pairs" / f"{colour}.txt").write_text(colour)
            (tmp_path / "metadata" / f"{colour}.png").write_bytes(data)
            (tmp_path / "classes" / colour).mkdir()
            (tmp_path / "classes" / colour / "1.png").write_bytes(data)
            archive.writestr(f"images/{colour}.png", data)
            files = [(f"{colour}.png", data), (f"{colour}.txt", colour.encode())]
            members = [(shard, *file) for file in (*files, (f"{colour}.json", b'{"width": 40}'))]
            for tar, name, content in [*members, (packed, f"images/{colour}.png", data)]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    table = str(tmp_path / "plain" / "rows.csv")
    turns = [{"user": "<image> Which colour?"}, {"assistant": "{{ label }}"}]
    return [
        {"rows": str(tmp_path / "pairs")},
        {"rows": str(tmp_path / "metadata")},
        {"rows": str(tmp_path / "classes"), "turns": turns},
        {"rows": str(tmp_path / "shard.tar")},
        {"rows": table, "root": str(tmp_path / "images.zip")},
        {"rows": table, "root": str(tmp_path / "images.tar.gz")},
        {"rows": table, "root": str(tmp_path / "images.zip"), "where": "text != 'red'"},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_trains_on_every_kind_of_source(
    recipe_fields: Callable[..., dict[str, Any]],
    tmp_path: Path,
    sources: list[dict[str, Any]],
    stream: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = recipe_fields(tmp_path / "run")
    # a condition needs rows that can be counted
    fields["data"] = {"train": sources[:6] if stream else sources, "lengths": "headers"}
    fields["data"]["stream"] = {"window": 4} if stream else None
    if stream:
        del fields["data"]["lengths"]
    train(Recipe.model_validate(fields))
    assert any((tmp_path / "run").rglob("*.safetensors"))
    if not stream:
        said = " ".join("".join(capsys.readouterr()).split())
        assert "27 good, 0 skipped" in said
