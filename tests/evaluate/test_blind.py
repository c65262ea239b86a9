"""evaluate/: the blind test separates models that use media from those that do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from multi_token.checkpoint.save import save
from multi_token.cli import app
from multi_token.data.row_source import RowSource, open_rows
from multi_token.errors import MultiTokenError
from multi_token.evaluate.blind import MediaShuffle, ablated, blind
from multi_token.evaluate.scores import (
    _by_row,
    _score_tokens,
    evenly_spaced,
    score_rows,
    with_processor,
)
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.data import DataSource
from multi_token.recipe.recipe import Recipe
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]


def rows_of(model: Any, path: Path) -> list[Any]:
    source = open_rows(DataSource(rows=str(path)), model.modalities)
    return with_processor(source, model, range(len(source.rows)))


@pytest.fixture(scope="module")
def seeing(recipe_fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model that was trained to name the four colours, and its folder."""
    out = tmp_path_factory.mktemp("seeing") / "run"
    learn = {"projectors": 1e-2, "adapter": 2e-2}
    args = {"max_steps": 25, "per_device_train_batch_size": 4}
    stages = [{"name": "adapter", "learn": learn, "args": args}]
    fields = recipe_fields(out, stages=stages, closed_form=None)
    return train(Recipe.model_validate(fields), console=Console(quiet=True)), out


def test_a_model_that_looks_is_worse_with_the_images_of_others_and_with_none(
    seeing: tuple[Any, Path], data: Path
) -> None:
    model, _ = seeing
    report = blind(model, rows_of(model, data / "rows.jsonl"))
    assert report["original"].accuracy == 1.0
    assert report["shuffled"].accuracy == 0.0, "an image of another colour names that colour"
    assert report["shuffled"].differs and report["shuffled"].loss > 1.0
    assert report["ablated"].accuracy <= 0.25 and report["ablated"].differs
    assert report.warnings == [] and report.num_left_out == 0


def test_a_model_that_does_not_look_is_warned_of(model: Any, data: Path) -> None:
    rows = rows_of(model, data / "rows.jsonl")
    with ablated(model, ["image"]):
        report = blind(model, rows)
    assert report["shuffled"].loss_increase == pytest.approx(0.0, abs=1e-5)
    (warning,) = report.warnings
    assert warning.startswith("the model scores as well without its media")


def test_exact_answers_are_those_that_greedy_decoding_writes(
    seeing: tuple[Any, Path], data: Path
) -> None:
    model, _ = seeing
    rows = rows_of(model, data / "rows.jsonl")
    exchanged = MediaShuffle(rows, seed=0)
    samples = [r(c) for c, r in rows[:2]] + [exchanged.sample(i, ["image"]) for i in (2, 3)]
    scores = score_rows(model, samples, batch_size=3)
    answers = model.generate([c for c, _ in rows], root=str(data), max_new_tokens=8)
    truths = [json.loads(line)["id"] for line in (data / "rows.jsonl").read_text().splitlines()]
    written = [a == t for a, t in zip(answers, truths, strict=True)]
    assert scores.accuracy.tolist() == [*map(float, written[:2]), 0.0, 0.0]
    alone = torch.cat([score_rows(model, [s]).loss for s in samples])
    torch.testing.assert_close(scores.loss, alone, atol=1e-5, rtol=1e-4)


def test_each_turn_is_an_answer_of_its_own() -> None:
    shift_labels = torch.tensor([[-100, 3, 4, -100, 5], [1, 2, -100, -100, -100]])
    supervised = shift_labels[shift_labels != -100]
    logits = torch.nn.functional.one_hot(supervised, 6).float()
    logits[1] = logits[1].flip(0)  # the second token of the first turn is another
    scores = _score_tokens(supervised, logits, slice(None))
    loss, accuracy = _by_row(scores, shift_labels, ["two turns", "one turn"])
    assert accuracy.tolist() == [0.5, 1.0]
    known = torch.nn.functional.cross_entropy(logits[3:], supervised[3:])
    assert loss[1] == pytest.approx(float(known))
    with pytest.raises(MultiTokenError, match="row silent: expected an answer"):
        _by_row(scores, torch.full((2, 5), -100), ["silent", "too"])


def test_rows_exchange_items_of_one_modality_and_count_that_are_not_equal(
    model: Any, data: Path
) -> None:
    shown: dict[str, dict[str, Any]] = {
        "red": {"images": ["red.png"]},
        "red again": {"images": ["red.png"]},
        "both": {"images": ["red.png", "blue.png"], "vector": [1.0] * 5},
        "one": {"vector": [1.0] * 5},
        "two": {"vector": [2.0] * 5},
        "nothing": {},
    }
    rows = []
    for answer, media in shown.items():
        slots = "<image>" * len(media.get("images", ())) + "<vector>" * ("vector" in media)
        question = {"role": "user", "content": f"What is {slots}?"}
        messages = [question, {"role": "assistant", "content": answer}]
        rows.append({"id": answer, "messages": messages, **media})
    source = RowSource(rows, Fetch(root=str(data)), str(data / "rows.jsonl"))
    read = with_processor(source, model, range(len(rows)))
    exchanged = MediaShuffle(read, seed=0)
    red, both, one, two = (list(shown).index(n) for n in ("red", "both", "one", "two"))
    assert exchanged.donors(red, ["image"]) == {0: (both, 1)}, "the only other image"
    assert exchanged.donors(one, ["vector"]) == {0: (two, 0)}, "the same vector is no other"
    assert exchanged.donors(both, ["vector"]) == {2: (two, 0)}
    assert exchanged.donors(both, ["image"]) == {}, "nothing differs from its second image"
    sample = exchanged.sample(red, ["image"])
    torch.testing.assert_close(
        sample.media[0].inputs, read[0][1].prepare(read[both][0].media[1]).inputs
    )
    report = blind(model, read)
    assert [c.media for c in report.conditions[:3]] == ["original", "shuffled", "ablated"]
    assert [c.media for c in report.conditions[3:]] == ["image shuffled", "vector shuffled"]
    assert (report.num_rows, report.num_left_out) == (4, 2), "of nothing, and of both"


def test_rows_that_all_show_the_same_are_refused(model: Any, tmp_path: Path, data: Path) -> None:
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["images"] = [str(data / "red.png")]
    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(MultiTokenError, match="at least 2 rows .* got 0 of 4"):
        blind(model, rows_of(model, path))


def test_the_command_prints_a_table_or_json(seeing: tuple[Any, Path], data: Path) -> None:
    _, out = seeing
    command = ["evaluate", "blind", str(out), "--rows", str(data / "rows.jsonl"), "--device", "cpu"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    assert "original" in said.output and "100%" in said.output
    report = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert [c["media"] for c in report["conditions"]] == ["original", "shuffled", "ablated"]
    assert report["num_rows"] == 4


def test_the_command_warns_of_a_model_that_does_not_look(
    recipe_fields: Fields, tmp_path: Path, data: Path
) -> None:
    model = MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(recipe_fields(tmp_path / "run")).model
    )
    for layer in model.projector("image").final_layers():
        torch.nn.init.zeros_(layer.weight)
    save(model, tmp_path / "run")
    command = ["evaluate", "blind", str(tmp_path / "run"), "--rows", str(data / "rows.jsonl")]
    said = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert said.exit_code == 0, said.output
    assert "warning: the model scores as well without its media" in said.output


def test_rows_are_taken_evenly() -> None:
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 256) == [0, 1, 2]
