"""Held-out rows are evaluated and reported during training (train/evaluation.py)."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from multi_token.data.sources import open_source
from multi_token.errors import CheckpointError, Interrupted, MultiTokenError
from multi_token.recipe.recipe import Recipe
from multi_token.report.chart import Curve
from multi_token.train.evaluation import EvaluationCallback
from multi_token.train.run import train
from multi_token.train.run_report import HISTORY, HTML, JSON, RunReport, render_page

Fields = Callable[..., dict[str, Any]]
_VOID = {"meta", "line", "polyline", "circle", "path", "br", "img"}


class Tags(HTMLParser):
    """Refuses a tag that is not closed, and collects what a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.num: dict[str, int] = {}
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.num[tag] = self.num.get(tag, 0) + 1
        self.loads += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag, f"</{tag}>"


@pytest.fixture(scope="module")
def watched(
    recipe_fields: Fields, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of a run with held-out rows, and what it said."""
    out = tmp_path_factory.mktemp("watched") / "run"
    learn = {"projectors": 1e-2, "adapter": 2e-2}
    args = {"max_steps": 25, "per_device_train_batch_size": 4, "eval_steps": 10}
    fields = recipe_fields(
        out, stages=[{"name": "both", "learn": learn, "args": args}], closed_form=None
    )
    fields["data"]["eval"] = [{"rows": str(data / "rows.jsonl")}]
    console = Console(record=True, width=300, file=io.StringIO())
    train(Recipe.model_validate(fields), console=console)
    return out, console.export_text()


def test_held_out_rows_are_evaluated_every_eval_steps_and_at_the_end(
    watched: tuple[Path, str],
) -> None:
    out, _ = watched
    log = json.loads((out / "stages/1-both/done.json").read_text())["log_history"]
    losses = {e["step"]: e["eval_loss"] for e in log if "eval_loss" in e}
    assert list(losses) == [10, 20, 25] and losses[25] < losses[10]
    use = {
        e["step"]: e["eval_shuffled_loss_increase"]
        for e in log
        if "eval_shuffled_loss_increase" in e
    }
    assert list(use) == [10, 20, 25] and use[25] > 1.0
    assert [e["eval_exact_answers"] for e in log if "eval_exact_answers" in e][-1] == 1.0


class CountedRows(list[Any]):
    """Rows that remember which of them were read."""

    def __init__(self, rows: Any) -> None:
        super().__init__(rows)
        self.seen: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.seen.append(index)
        return super().__getitem__(index)


def test_of_many_held_out_rows_only_those_shown_are_read(
    model: Any, recipe_fields: Fields, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(recipe_fields(tmp_path))
    source = open_source(recipe.data.train[0], model.processor, recipe, None)
    rows = CountedRows([source.rows[0]] * 100_000)
    held_out = [replace(source, rows=rows, good_indices=range(100_000))] * 2
    report = RunReport(tmp_path, recipe, [])
    callback = EvaluationCallback(model, held_out, recipe.train, report, Console(quiet=True))
    assert callback.num_rows == 200_000 and rows.seen == []
    assert len(callback.some_rows(4)) == 4
    assert rows.seen == [0, 50_000, 0, 50_000]


def test_sample_answers_and_the_blind_test_are_printed_and_reported(
    watched: tuple[Path, str],
) -> None:
    out, said = watched
    report = json.loads((out / JSON).read_text())
    (stage,) = report["stages"]
    assert [s["step"] for s in stage["samples"]] == [10, 20, 25]
    last = stage["samples"][-1]["answers"]
    assert [a["truth"] for a in last] == ["red", "blue", "green", "white"]
    assert all(a["answer"] == a["truth"] for a in last)
    assert last[0]["question"] == "What is <image>?"
    assert "'What is <image>?' -> 'red' (truth: 'red')" in said
    assert "blind test, 4 held-out rows:" in said and "warning" not in said
    assert report["blind"]["conditions"][0]["accuracy"] == 1.0
    assert report["recipe"]["train"]["stages"][0]["name"] == "both"
    assert report["hardware"]["cores"] and any("adapter" in line for line in stage["learns"])


def test_the_report_is_one_page_that_loads_nothing(watched: tuple[Path, str]) -> None:
    out, _ = watched
    page = (out / HTML).read_text(encoding="utf-8")
    tags = Tags(page)
    assert tags.loads == [] and "@import" not in page and "url(" not in page
    # at least loss, held-out loss, exact answers, use, speed, rate, wait, encoder; three norms
    assert tags.num["svg"] >= 11
    media = "Does the model use its media?"
    for words in ("Loss on held-out rows", "Gradient norm of adapter", media):
        assert words in page
    assert page.count("Answers at step") == 3


def test_a_run_without_held_out_rows_has_its_curves_too(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    train(Recipe.model_validate(recipe_fields(tmp_path / "run")), console=Console(quiet=True))
    report = json.loads((tmp_path / "run" / JSON).read_text())
    assert "blind" not in report and report["stages"][0]["samples"] == []
    assert Tags((tmp_path / "run" / HTML).read_text(encoding="utf-8")).num["svg"] >= 5


def test_a_resumed_report_keeps_earlier_steps_and_drops_repeated_ones(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(recipe_fields(tmp_path))
    answer = [{"id": "a", "question": "<b>?", "answer": "x", "truth": "y"}]
    folders = {name: tmp_path / "stages" / name for name in ("one", "two")}
    first = RunReport(tmp_path, recipe, ["language model X: float32"])
    first.start_stage("one", folders["one"], ["projectors"])
    first.log([{"step": 2, "loss": 1.0}], 4)
    first.start_stage("two", folders["two"], ["adapter"])
    for step in (2, 4):
        first.log([{"step": s, "loss": float("nan")} for s in range(1, step + 1)], 4)
        first.add_samples(step, answer)
        first.write(at_once=True)
    assert [entry["loss"] for entry in entries(folders["two"])] == [None] * 4

    again = RunReport(tmp_path, recipe, [])
    again.start_stage("two", folders["two"], ["adapter"])
    again.log([{"step": 3, "loss": 1.0}], 4)  # from a checkpoint at step 3
    one, two = again.facts["stages"]
    assert one["curves"] == {"loss": [[2, 1.0]]} and two["curves"] == {"loss": [(3, 1.0)]}
    assert entries(folders["one"]) == [{"step": 2, "loss": 1.0}]
    assert entries(folders["two"]) == [{"step": 3, "loss": 1.0}]
    assert [s["step"] for s in two["samples"]] == [2], "that of step 4 will be made again"
    page = render_page(again.facts)
    assert "&lt;b&gt;?" in page and "<b>?" not in page
    again.start_stage("one", folders["one"], ["projectors"])
    assert [stage["name"] for stage in again.facts["stages"]] == ["one"]


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / HISTORY).read_text().splitlines()]


_KEYS = ("loss", "grad_norm", "tokens_per_second")


def test_the_report_of_a_hundred_thousand_steps_costs_less_than_a_hundredth(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    num_entries, seconds = 20_000, 0.0  # logging_steps is 5

    def clock() -> float:
        nonlocal seconds
        seconds += 0.25  # a write reads it twice, so it takes a quarter of a second
        return seconds

    recipe = Recipe.model_validate(recipe_fields(tmp_path))
    report = RunReport(tmp_path, recipe, [], clock=clock)
    report.start_stage("one", tmp_path / "one", [])
    history: list[dict[str, Any]] = []
    writes, inodes, sizes = set(), set(), []
    for number in range(num_entries):
        history.append(dict.fromkeys(_KEYS, 1.0 + number % 7) | {"step": 5 * number})
        if number == 5000:
            history[-1]["loss"] = 1e6
        report.log(history, 5 * num_entries)
        page, plain = (tmp_path / HTML).stat(), (tmp_path / JSON).stat()
        if (page.st_ino, page.st_mtime_ns) not in writes:
            writes.add((page.st_ino, page.st_mtime_ns))
            sizes.append(page.st_size + plain.st_size)
            inodes.add((tmp_path / "one" / HISTORY).stat().st_ino)
    assert len(inodes) == 1, "the history is only appended to"
    # each write takes 0.25 s of the clock
    assert 10 < len(writes) < 0.01 * seconds / 0.25
    assert max(sizes) < 1.2 * max(sizes[: len(sizes) // 4]), "no growth once curves are thinned"
    report.write(at_once=True)
    assert len(entries(tmp_path / "one")) == num_entries
    curve = report.facts["stages"][0]["curves"]["loss"]
    assert 1000 <= len(curve) <= Curve.MOST_POINTS
    assert curve[0] == (0, 1.0) and curve[-1][0] == 5 * (num_entries - 1)
    assert (25_000, 1e6) in curve, "a single spike stays visible"


def test_answers_of_earlier_evaluations_are_thinned(recipe_fields: Fields, tmp_path: Path) -> None:
    report = RunReport(tmp_path, Recipe.model_validate(recipe_fields(tmp_path)), [])
    report.start_stage("one", tmp_path / "one", [])
    for step in range(500):
        report.add_samples(step, [{"id": "a", "question": "q", "answer": "x", "truth": "y"}])
    steps = [sample["step"] for sample in report.facts["stages"][0]["samples"]]
    assert steps[0] == 0 and steps[-1] == 499 and 25 <= len(steps) <= 51


def test_a_full_disk_stops_the_report_and_not_the_run_until_the_end(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    said: list[Any] = []
    recipe = Recipe.model_validate(recipe_fields(tmp_path))
    report = RunReport(tmp_path, recipe, [], print_fn=said.append)
    report.start_stage("one", tmp_path / "one", [])
    history = [{"step": step, "loss": 1.0} for step in range(1, 5001)]
    report.log(history, 9000)
    size = (tmp_path / "one" / HISTORY).stat().st_size
    assert size > (tmp_path / HTML).stat().st_size
    # the largest file that this process may write: first no report fits, then only the history not
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit, reached in ((10, 5000), (size + 10, 5002)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            history.append({"step": len(history) + 1, "loss": 1.0})
            report.log(history, 9000)
            report.write(at_once=True)
            report.write(at_once=True)
            with pytest.raises(CheckpointError, match=r"could not be written: .*; free some space"):
                report.raise_if_unwritten()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        # the last complete state
        assert json.loads((tmp_path / JSON).read_text())["stages"][0]["step"] == reached
        assert len(entries(tmp_path / "one")) == 5000
    signal.signal(signal.SIGXFSZ, before)
    assert len(said) == 1 and "training goes on" in said[0]
    report.write(at_once=True)
    report.raise_if_unwritten()
    assert [entry["step"] for entry in entries(tmp_path / "one")] == [*range(1, 5003)]


@pytest.mark.parametrize(("error", "reached"), [(Interrupted, 3), (MultiTokenError, 2)])
def test_the_last_state_is_written_at_an_interrupt_and_after_a_fault(
    recipe_fields: Fields, tmp_path: Path, at: Any, error: type[Exception], reached: int
) -> None:
    def act() -> None:
        if error is MultiTokenError:
            raise error("the device is gone")
        os.kill(os.getpid(), signal.SIGTERM)  # this step is taken, and then the run stops

    at(3, act)
    with pytest.raises(error):
        train(Recipe.model_validate(recipe_fields(tmp_path)), console=Console(quiet=True))
    assert json.loads((tmp_path / JSON).read_text())["stages"][0]["step"] == reached
    folder = tmp_path / "stages" / "1-projector"
    assert [entry["step"] for entry in entries(folder) if "loss" in entry] == [
        *range(1, reached + 1)
    ]


def test_a_damaged_report_is_one_sentence(recipe_fields: Fields, tmp_path: Path) -> None:
    (tmp_path / JSON).write_text('{"stages": [')
    with pytest.raises(CheckpointError, match="report.json is damaged .*; remove it"):
        RunReport(tmp_path, Recipe.model_validate(recipe_fields(tmp_path)), [])


def test_a_model_that_ignores_its_media_is_warned_of_at_the_end(
    recipe_fields: Fields, tmp_path: Path, data: Path
) -> None:
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    for row in rows:  # the answer does not depend on the image
        row["images"] = [str(data / row["images"][0])]
        row["messages"][1]["content"] = "red"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = recipe_fields(tmp_path / "run")
    fields["data"] = {key: [{"rows": str(tmp_path / "rows.jsonl")}] for key in ("train", "eval")}
    fields["train"]["stages"][0]["args"]["max_steps"] = 20
    console = Console(record=True, width=300, file=io.StringIO())
    train(Recipe.model_validate(fields), console=console)
    assert "warning: the model scores as well without its media" in console.export_text()
