"""data/shared_prefix.py: rows with the same first media are found without decoding, once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from multi_token.chat.format import ChatFormat
from multi_token.collate import shared_prefix
from multi_token.data.dataset import RowReader
from multi_token.data.lengths import LengthStore
from multi_token.data.scan import scan
from multi_token.data.shared_prefix import FILE, SharedPrefixGroup, shared_prefix_groups
from multi_token.data.sources import TrainingSource
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.types import Sample

QUIET = Console(quiet=True)


def row(question: str, *images: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
    return {"messages": turns, **({"images": list(images)} if images else {}), **more}


ROWS = [
    row("Look: <image> is it red?", "red.png"),
    row("Tell me, <image> is it blue?", "red.png"),  # another text before it
    row("Look: <image> what is it?", "blue.png"),
    row("No image."),
    row("Look: <image> is it one?", "blue.png"),
    row("<image> and <image> are what?", "green.png", "white.png"),
    row("<image> and <image> are one?", "green.png", "white.png"),
    row("Look: <image> what is it?", "white.png"),  # the first item of no other row
    row("What is <vector>?", vector=[[1.0] * 5]),
    row("What is <vector>?", vector=[[2.0] * 5]),
    row("What is <vector>, then?", vector=[[1.0] * 5]),
]


def source_of(model: Any, folder: Path, rows: list[Any]) -> tuple[TrainingSource, list[Sample]]:
    processor = replace(model.processor, fetch=Fetch(root=str(folder)))
    source = TrainingSource(rows, processor, "rows.jsonl")
    samples = [processor(conversation) for conversation, _ in source.conversations()]
    reader = RowReader(processor, tuple(processor.modalities))
    known = LengthStore(folder / "lengths", processor)
    report = scan(rows, reader, known=known, references=True)
    lengths = report.lengths.column("num_tokens")
    return replace(source, lengths=lengths, references=report.reference_table), samples


def found(source: TrainingSource, folder: Path, num_workers: int = 0) -> list[SharedPrefixGroup]:
    return shared_prefix_groups([source], folder, num_workers=num_workers, console=QUIET)


@pytest.fixture
def images(data: Path, tmp_path: Path) -> Path:
    for file in data.glob("*.png"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_with_the_same_first_media_are_found_without_reading_a_file(
    model: Any, images: Path, num_workers: int
) -> None:
    source, samples = source_of(model, images, ROWS)
    for file in images.glob("*.png"):
        file.write_bytes(b"no image")
    groups = found(source, images, num_workers)
    expected = [(2, 4), (5, 6), (8, 10)]
    assert [group.rows for group in groups] == expected
    assert [group.num_items for group in groups] == [1, 2, 1]
    for group in groups:
        assert (group.num_tokens, group.num_items) == shared_prefix(
            [samples[number] for number in group.rows]
        )


def test_rows_that_all_go_on_with_further_media_are_measured_by_header(
    model: Any, images: Path
) -> None:
    rows = [row(f"<image> {text}, and <image>?", "red.png", "blue.png") for text in ("a", "b")]
    source, samples = source_of(model, images, rows)
    (group,) = found(source, images)
    assert (group.num_tokens, group.num_items) == shared_prefix(samples) and group.num_items == 1


def test_the_next_start_tokenizes_only_groups_whose_rows_or_files_changed(
    model: Any, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = source_of(model, images, ROWS)
    tokenized = 0  # rows, beside those of the scan
    tokenize = ChatFormat.tokenize_many

    def counted(self: ChatFormat, rows: Any, *args: Any, **options: Any) -> Any:
        nonlocal tokenized
        tokenized += len(rows)
        return tokenize(self, rows, *args, **options)

    monkeypatch.setattr(ChatFormat, "tokenize_many", counted)
    first = found(source, images)
    # (0, 1), (2, 4), (5, 6), (8, 10): rows without company are not tokenized
    assert tokenized == 8
    assert found(source, images) == first and tokenized == 8
    changed = [*ROWS]
    changed[4] = row("Look: <image> is it two?", "blue.png")
    source, _ = source_of(model, images, changed)
    tokenized = 0
    assert len(found(source, images)) == 3 and tokenized == 2
    shutil.copy(images / "red.png", images / "blue.png")
    source, _ = source_of(model, images, ROWS)
    tokenized = 0
    assert len(found(source, images)) == 3 and tokenized == 2


def test_a_group_of_any_size_is_read_in_parts_whose_rows_share_what_all_share(
    model: Any, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(f"Look: <image> is it {number}?", "red.png") for number in range(200)]
    rows[150] = row("Look: <image> and <image>?", "red.png", "blue.png")
    rows[199] = row("Look: <image>", "red.png")  # its prefix is the shortest
    source, samples = source_of(model, images, rows)
    sizes: list[int] = []
    tokenize = ChatFormat.tokenize_many

    def counted(self: ChatFormat, rows: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(rows))
        return tokenize(self, rows, *args, **options)

    monkeypatch.setattr(ChatFormat, "tokenize_many", counted)
    (group,) = found(source, images)
    assert (group.num_tokens, group.num_items) == shared_prefix(samples)
    assert sum(sizes) == len(rows) and max(sizes) == 64


def test_rows_without_media_need_nothing(model: Any, tmp_path: Path) -> None:
    source, _ = source_of(model, tmp_path, [row("No image.")] * 3)
    assert found(source, tmp_path) == [] and not (tmp_path / FILE).exists()


def test_a_damaged_file_is_one_sentence(model: Any, images: Path) -> None:
    source, _ = source_of(model, images, ROWS)
    (images / FILE).write_bytes(b"cut")
    with pytest.raises(MultiTokenError, match=f"{FILE} is damaged .*; remove it"):
        found(source, images)
