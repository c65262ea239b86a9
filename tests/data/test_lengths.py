"""data/lengths.py: stored rows are not read again, and changed rows are."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from multi_token.data.dataset import row_to_sample
from multi_token.data.files.open import load_rows
from multi_token.data.lengths import LengthStore, processor_fingerprint
from multi_token.data.scan import ScanReport, merge_reports, scan
from multi_token.errors import MultiTokenError
from multi_token.processor import MultiTokenProcessor, build_processor
from multi_token.recipe.recipe import Recipe
from multi_token.types import Length

Fields = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """Images and seven rows; the third and the fifth are bad."""
    for name in ("red", "blue", "green"):
        (tmp_path / f"{name}.png").write_bytes((data / f"{name}.png").read_bytes())
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()
    ][:3]
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            f"{line}\n"
            for line in [
                json.dumps(rows[0]),
                json.dumps(rows[1]),
                json.dumps({**rows[0], "id": "lost", "images": ["lost.png"]}),
                json.dumps(rows[2]),
                "{no JSON",
                json.dumps({"id": "text", "messages": [{"role": "user", "content": "a"}]}),
                json.dumps({**rows[2], "id": "again", "images": ["red.png"]}),
            ]
        )
    )
    return tmp_path


@pytest.fixture
def processor(recipe_fields: Fields, folder: Path) -> MultiTokenProcessor:
    recipe = Recipe.model_validate(recipe_fields(folder / "run"))
    return build_processor(recipe, root=str(folder))


def look(
    folder: Path, processor: MultiTokenProcessor, *, known: bool = True, **options: Any
) -> tuple[ScanReport, list[str]]:
    """Return the report, and the rows that were read for it."""
    opened: list[str] = []

    def read(row: Any, row_id: str) -> Any:
        opened.append(row_id)
        return row_to_sample(
            row, row_id, processor=processor, modalities=list(processor.modalities)
        )

    rows = load_rows(str(folder / "rows.jsonl"))
    lengths = LengthStore(folder / "lengths", processor) if known else None
    return scan(rows, read, source="rows.jsonl", progress=False, known=lengths, **options), opened


BAD = ["lost", "text"]


def test_a_second_scan_reads_bad_rows_alone_and_reports_the_same(
    folder: Path, processor: MultiTokenProcessor
) -> None:
    plain, _ = look(folder, processor, known=False)
    assert list(plain.good_indices) == [0, 1, 3, 6] and [p.index for p in plain.problems] == [
        2,
        4,
        5,
    ]
    first, opened = look(folder, processor)
    assert first == plain and len(opened) == 6
    second, opened = look(folder, processor)
    assert second == plain and opened == BAD
    with_workers, _ = look(folder, processor, num_workers=2)
    assert with_workers == plain


def test_changed_rows_are_read_again(folder: Path, processor: MultiTokenProcessor) -> None:
    look(folder, processor)
    image = folder / "blue.png"
    before = image.stat()
    Image.new("RGB", (60, 60)).save(image)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert look(folder, processor)[1] == ["blue", *BAD], "no other"
    (folder / "red.png").rename(folder / "lost.png")
    report, opened = look(folder, processor)
    assert opened == ["red", *BAD, "again"], "a file that is gone, and the row that was fixed"
    assert [p.row_id for p in report.problems] == ["red", "rows.jsonl[4]", "text", "again"]
    rows = folder / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"content": "green"', '"content": "greener"', 1))
    assert look(folder, processor)[1] == ["red", "green", "text", "again"]


def test_a_processor_with_other_settings_reads_all_rows(
    recipe_fields: Fields, folder: Path, processor: MultiTokenProcessor
) -> None:
    look(folder, processor)
    others = [replace(processor, max_tokens=7), replace(processor, distillation="optional")]
    for change in (
        {"model": {"train_on_turns": "last"}},
        {"model": {"chat_template": "{% for m in messages %}{{ m.content }}\n{% endfor %}"}},
        {"factor": 4},
    ):
        fields = recipe_fields(folder / "run")
        fields["model"] |= change.get("model", {})  # type: ignore[operator]
        projector = fields["model"]["modalities"]["image"]["projector"]
        projector["factor"] = change.get("factor", 3)
        others.append(build_processor(Recipe.model_validate(fields), root=str(folder)))
    identities = {processor_fingerprint(one) for one in [processor, *others]}
    assert len(identities) == 1 + len(others)
    assert look(folder, others[-1])[1][:2] == ["red", "blue"]
    # what a call leaves in the tokenizer is no other tokenizer
    before = processor_fingerprint(processor)
    processor.tokenizer(["a b", "c"], padding=True, truncation=True, max_length=1)
    assert processor_fingerprint(processor) == before


@pytest.mark.parametrize("num_shares", [2, 3, 9])
def test_shares_make_the_report_of_one(
    folder: Path, processor: MultiTokenProcessor, num_shares: int
) -> None:
    plain, _ = look(folder, processor, known=False)
    parts = [
        look(folder, processor, indices=range(share, 7, num_shares)) for share in range(num_shares)
    ]
    opened = sorted(row for _, rows in parts for row in rows)
    assert opened == ["again", "blue", "green", "lost", "red", "text"], "each row once"
    assert merge_reports([report for report, _ in parts[::-1]]) == plain
    assert look(folder, processor)[1] == BAD


def test_an_interrupted_scan_continues(folder: Path, processor: MultiTokenProcessor) -> None:
    rows = load_rows(str(folder / "rows.jsonl"))

    def read(row: Any, row_id: str) -> Any:
        if row_id == "green":
            raise KeyboardInterrupt
        return row_to_sample(row, row_id, processor=processor, modalities=["image"])

    with pytest.raises(KeyboardInterrupt):
        scan(rows, read, known=LengthStore(folder / "lengths", processor), progress=False)
    assert look(folder, processor)[1] == ["lost", "green", "text", "again"]


def row_with(source: Any) -> dict[str, Any]:
    return {
        "image": source,
        "messages": [
            {"role": "user", "content": "<image>"},
            {"role": "assistant", "content": "a"},
        ],
    }


def test_sources_of_all_kinds_are_distinguished_by_their_content(
    folder: Path, processor: MultiTokenProcessor
) -> None:
    known = LengthStore(folder / "lengths", processor)
    images = [Image.new("RGB", (3, 3), c) for c in ("red", "blue")]
    sources: list[Any] = [
        "red.png",
        "./red.png",
        pathlib.PurePath("blue.png"),
        "https://example.org/red.png",
        b"one",
        b"two",
        *images,
        np.zeros(3),
        np.ones(3),
        torch.ones(4),
        {"array": [0.0, 1.0]},
        {"array": [0.0, 2.0]},
        {"path": "red.png", "start": 1.0},
        {"path": "red.png", "start": 2.0},
        {"bytes": b"one", "start": 1.0},
        {"frames": ["red.png", "blue.png"]},
        {"frames": ["blue.png", "red.png"]},
    ]
    keys = [known.key(row_with(source), "row") for source in sources]
    assert None not in keys and len(set(keys)) == len(keys)
    again = [known.key(row_with(source), "other") for source in sources]
    assert again == keys
    assert known.key(row_with(object()), "row") is None
    assert known.key({"messages": 3}, "row") is None


def test_lengths_of_other_processes_are_known_after_a_refresh_and_a_damaged_file_is_named(
    folder: Path, processor: MultiTokenProcessor
) -> None:
    one, two = (LengthStore(folder / "lengths", processor) for _ in range(2))
    key = one.key(row_with("red.png"), "row")
    assert key is not None and one.get(key) is None
    one.add(key, Length(9, 2, 3))
    one.save()
    assert two.get(key) is None
    two.refresh()
    assert two.get(key) == Length(9, 2, 3) and len(two) == 1
    two.save()
    (file,) = (folder / "lengths").iterdir()
    # a version that counted less: its rows are read again
    stored = load_file(file)
    save_file({**stored, "lengths": stored["lengths"][:, :3].copy()}, file)
    assert len(LengthStore(folder / "lengths", processor)) == 0
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(MultiTokenError, match=f"{file.name} is damaged .*; remove it"):
        LengthStore(folder / "lengths", processor)


def test_a_full_disk_is_one_sentence(tmp_path: Path, processor: MultiTokenProcessor) -> None:
    store = LengthStore(tmp_path / "lengths", processor)
    store.add("0" * 32, Length(3, 2, 1))
    # the largest file that this process may write
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(MultiTokenError, match="could not be written.*free some"):
            store.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list((tmp_path / "lengths").iterdir()) == []
