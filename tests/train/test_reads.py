"""Reads of a start, counted: what the scan has found out of the rows is not read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from multi_token.data.files.jsonl import JsonLines
from multi_token.data.streaming import NUM_TRIED_ITEMS
from multi_token.recipe.recipe import Recipe
from multi_token.train.prepare import open_stages, prepare
from multi_token.train.stage import attach_adapters, build_trainer
from multi_token.train.stage_zero import find_items

Fields = Callable[..., dict[str, Any]]
COLOURS = ("red", "blue", "green", "white")
NUM, NUM_FIRST = 12, 8  # of each source the first rows are read before, to find its format


@pytest.fixture
def row_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the rows that were read."""
    reads: list[int] = []
    row = JsonLines.row

    def counted(self: JsonLines, index: int) -> Any:
        reads.append(index)
        return row(self, index)

    monkeypatch.setattr(JsonLines, "row", counted)
    return reads


def write_pairs(path: Path, data: Path) -> None:
    """Write rows with 0 to 3 images; every third has a single answer."""
    lines = []
    for number in range(NUM):
        shown = [str(data / f"{name}.png") for name in COLOURS[: number % 4]]
        question = f"What {'<image> ' * len(shown)}is it{' now' * number}?"
        messages = [{"role": "user", "content": question}]
        answers: dict[str, Any] = {"chosen": "yes", "rejected": "no" + " no" * number}
        if number % 3 == 0:
            answers = {}
            messages.append({"role": "assistant", "content": "yes"})
        media = {"images": shown} if shown else {}
        row = {"id": str(number), "messages": messages, **answers, **media}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


@pytest.mark.parametrize("kind", ["packed", "preferences"])
def test_a_stage_plans_its_batches_without_reading_a_row(
    recipe_fields: Fields, data: Path, tmp_path: Path, row_reads: list[int], kind: str
) -> None:
    write_pairs(tmp_path / "rows.jsonl", data)
    learn = {"projectors": 1e-2, "adapter": 1e-2}
    more: dict[str, Any] = {"packing": True, "pack_items": 4, "pack_tokens": 400}
    stage: dict[str, Any] = {"name": "one", "learn": learn, "args": {"max_steps": 1}}
    if kind == "preferences":
        more, stage["dpo"] = {}, {"missing": "skip"}
    fields = recipe_fields(tmp_path / "run", stages=[stage], **more)
    fields["data"] = {"train": [{"rows": str(tmp_path / "rows.jsonl")}]}
    recipe = Recipe.model_validate(fields)
    run = prepare(recipe, open_stages(recipe), Console(quiet=True))
    assert sorted(row_reads[NUM_FIRST:]) == list(range(NUM)), "the scan reads each row once"
    row_reads.clear()
    attach_adapters(run, run.stages[0])
    trainer: Any = build_trainer(run, run.stages[0])
    assert row_reads == []
    (source,) = run.sources
    samples = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    if kind == "packed":
        assert [*source.num_items] == [len(sample.media) for sample in samples]
    else:
        found = [(len(p.sample.input_ids), len(p.sample.rejected.input_ids)) for p in samples]
        assert trainer.train_dataset.lengths == found and len(found) == NUM - NUM // 3


def test_held_out_rows_are_read_once_before_they_are_evaluated(
    recipe_fields: Fields, data: Path, tmp_path: Path, row_reads: list[int]
) -> None:
    write_pairs(tmp_path / "rows.jsonl", data)
    fields = recipe_fields(tmp_path / "run", num_samples=3)
    held_out = [{"rows": str(path)} for path in (tmp_path / "rows.jsonl", data / "rows.jsonl")]
    fields["data"] = {"train": [{"rows": str(data / "rows.jsonl")}], "eval": held_out}
    recipe = Recipe.model_validate(fields)
    run = prepare(recipe, open_stages(recipe), Console(quiet=True))
    num_read = (4 + 4) + (NUM_FIRST + NUM) + (4 + 4)
    assert len(row_reads) == num_read
    # two sources of 12 and 4 rows
    shown = [conversation.id for conversation, _ in run.evaluation.some_rows(4)]
    assert shown == ["0", "4", "8", "red"] and len(row_reads) == num_read + 4


@pytest.mark.parametrize("kind", ["encoders", "share"])
def test_only_rows_with_an_item_are_read_after_the_scan(
    recipe_fields: Fields, data: Path, tmp_path: Path, row_reads: list[int], kind: str
) -> None:
    """Stage zero, the trial of a trained encoder, and the search for shared prefixes."""
    with_image = range(30, 30 + len(COLOURS))  # each another one, so that no rows share a prefix
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}]
    shown = [{**turns[0], "content": "Is it <image>?"}, turns[1]]
    rows: list[dict[str, Any]] = [{"id": str(i), "messages": turns} for i in range(30)]
    rows += [{"messages": shown, "images": [str(data / f"{name}.png")]} for name in COLOURS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learn: dict[str, Any] = {"projectors": 1e-2, "adapter": 1e-2}
    more: dict[str, Any] = {"packing": {"share": True}} if kind == "share" else {}
    if kind == "encoders":
        learn["encoders"] = {"image": 1e-4}
    stage = {"name": "one", "learn": learn, "args": {"max_steps": 1}}
    fields = recipe_fields(tmp_path / "run", stages=[stage], calibration_items=100, **more)
    fields["data"] = {"train": [{"rows": str(tmp_path / "rows.jsonl")}]}
    recipe = Recipe.model_validate(fields)
    run = prepare(recipe, open_stages(recipe), Console(quiet=True))
    every = list(range(len(rows)))
    assert sorted(row_reads[NUM_FIRST:]) == every, "the scan reads each row once"
    row_reads.clear()
    items = find_items(run, None, ["image"])["image"]
    assert len(items) == len(COLOURS) and sorted(row_reads) == list(with_image)
    row_reads.clear()
    attach_adapters(run, run.stages[0])
    build_trainer(run, run.stages[0])
    assert row_reads == (list(with_image)[:NUM_TRIED_ITEMS] if kind == "encoders" else [])
