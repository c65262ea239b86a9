"""The command line: what a user types does what it says, and a fault is a sentence and a code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from multi_token.cli import REMOVED_COMMANDS, RENAMED_OPTIONS, CommandGroup
from multi_token.recipe.recipe import Recipe
from multi_token.train.run import train


def command(*words: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "multi_token", *map(str, words)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "300", "NO_COLOR": "1"},
    )


@pytest.fixture(scope="module")
def recipe_file(recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    stages = [
        {
            "name": "adapter",
            "learn": {"projectors": 1e-2, "adapter": 2e-2},
            "args": {"max_steps": 25, "per_device_train_batch_size": 4},
        }
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_fields(folder / "run", stages=stages)))
    return path


@pytest.fixture(scope="module")
def run(recipe_file: Path) -> Path:
    """A run that has learned its four rows by heart."""
    fields = yaml.safe_load(recipe_file.read_text())
    train(Recipe.model_validate(fields))
    return Path(fields["train"]["output_dir"])


def test_train_and_ask_from_the_command_line(recipe_file: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = command(
        "train", recipe_file, f"train.output_dir={out}", "train.stages.0.args.max_steps=2"
    )
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stderr and "tok/s" in done.stderr and "supervised" in done.stderr
    again = command(
        "train", recipe_file, f"train.output_dir={out}", "train.stages.0.args.max_steps=2"
    )
    assert "trained already" in again.stderr
    asked = command("ask", out, "What is it?", "--image", data / "red.png", "--max-new-tokens", "3")
    assert asked.returncode == 0, asked.stderr


@pytest.mark.slow
def test_chat_takes_images_streams_answers_and_survives_a_wrong_path(run: Path, data: Path) -> None:
    typed = (
        f"/image {data / 'none.png'}\n/photo x\n/image {data / 'red.png'}\nWhat is this?\n/exit\n"
    )
    done = command("chat", run, "--max-new-tokens", "4", stdin=typed)
    assert done.returncode == 0, done.stderr
    assert "no file at" in done.stdout
    assert "unknown command /photo" in done.stdout
    assert "1 item(s) go with the next message" in done.stdout


@pytest.mark.slow
def test_chat_answers_what_generate_answers(run: Path, data: Path) -> None:
    typed = f"/image {data / 'red.png'}\nWhat is this?\n"
    done = command("chat", run, "--max-new-tokens", "6", stdin=typed)
    asked = command(
        "ask", run, "What is this?", "--image", data / "red.png", "--max-new-tokens", "6"
    )
    assert asked.stdout.strip() and asked.stdout.strip() in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("ask", "{parts}/language_model", "?"), "expected one of type"),
        (("ask", "{data}/nowhere", "?"), "found nothing at"),
        (("ask", "{run}", "?", "--image", "{data}/none.png"), "no file at"),
        (("ask", "{run}", "?", "--image", "{data}/rows.jsonl"), "; expected one of"),
        (("ask", "{run}", "?", "--media", "vector"), "expected --media NAME=SOURCE"),
        (("ask", "{run}", "?", "--media", "smell=x"), "'smell', but the recipe has image"),
        (("train", "{data}/none.yaml"), "expected a recipe file"),
        (("train", "{recipe}", "train.sed=1"), "did you mean 'seed'"),
        (("train", "{recipe}", "train.args.max_step=1"), "did you mean 'max_steps'"),
        (("train", "{recipe}", "model.language_model={data}/no"), "no language model"),
        (("data", "check", "{data}/none.jsonl", "--recipe", "{recipe}"), "no file at"),
    ],
)
def test_bad_input_is_a_sentence_and_a_code(
    run: Path, recipe_file: Path, parts: Path, data: Path, tmp_path: Path, words: Any, sentence: str
) -> None:
    places = {"run": run, "recipe": recipe_file, "parts": parts, "data": data}
    extra = (f"train.output_dir={tmp_path / 'new'}",) if words[0] == "train" else ()
    done = command(*(word.format(**places) for word in words), *extra)
    assert done.returncode == 1
    assert sentence in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_data_check_counts_problems_by_kind_and_writes_the_clean_rows(
    recipe_file: Path, data: Path, tmp_path: Path
) -> None:
    good = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    for row in good:
        row["images"] = [str(data / row["images"][0])]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    bad = [
        {**good[0], "id": "lost", "images": ["lost.png"]},
        {**good[0], "id": "cut", "images": ["cut.png"]},
        {**good[0], "id": "many", "images": ["whole.png", "whole.png"]},
        {**good[0], "id": "silent", "messages": good[0]["messages"][:1]},
        {
            "id": "long",
            "messages": [{"role": "user", "content": "a b " * 3000}, good[0]["messages"][1]],
        },
    ]
    path, clean = tmp_path / "rows.jsonl", tmp_path / "clean.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, *bad]))
    done = command("data", "check", path, "--recipe", recipe_file, "--clean", clean)
    assert done.returncode == 1, done.stderr
    for kind in ("missing_file", "undecodable", "item_count", "no_target", "too_long"):
        assert kind in done.stdout
    for row in bad:
        assert row["id"] in done.stdout
    assert [json.loads(line) for line in clean.read_text().splitlines()] == good
    assert command("data", "check", clean, "--recipe", recipe_file).returncode == 0


def test_data_show_marks_what_is_learned_and_where_media_stand(
    recipe_file: Path, data: Path
) -> None:
    done = command("data", "show", data / "rows.jsonl", "green", "--recipe", recipe_file)
    assert done.returncode == 0, done.stderr
    assert "⟦green<|im_end|>⟧" in done.stdout
    assert "[image x 3]" in done.stdout
    assert "What is " in done.stdout


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [
        *(sys.executable, "-m", "multi_token", "train", str(recipe_file)),
        *(f"train.output_dir={out}", "train.stages.0.args.max_steps=100"),
    ]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "adapter 3/100" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "saved; the same command continues from there" in " ".join(rest.split())
    again = command(*words[3:-1], "train.stages.0.args.max_steps=100")
    assert again.returncode == 0 and "resuming from" in again.stderr


@pytest.mark.parametrize(("name", "option"), sorted(RENAMED_OPTIONS))
def test_an_option_of_an_earlier_version_is_answered_with_the_new_one(
    name: str, option: str
) -> None:
    app = typer.Typer(cls=CommandGroup, rich_markup_mode=None)

    @app.command(name)
    def command(run: str, port: int = 8000) -> None: ...

    @app.callback()
    def root() -> None: ...

    for words in ([option, "1"], [f"{option}=1"]):
        result = CliRunner().invoke(app, [name, "RUN", *words])
        assert result.exit_code == 2
        assert RENAMED_OPTIONS[name, option] in " ".join(result.output.split())
    unknown = CliRunner().invoke(app, [name, "RUN", "--prot", "1"])
    assert "No such option" in unknown.output


@pytest.mark.parametrize("name", sorted(REMOVED_COMMANDS))
def test_a_command_of_an_earlier_version_is_answered_with_what_to_run(name: str) -> None:
    app = typer.Typer(cls=CommandGroup, rich_markup_mode=None)

    @app.command("serve")
    def command() -> None: ...

    @app.callback()
    def root() -> None: ...

    result = CliRunner().invoke(app, [name, "serve"])
    assert result.exit_code == 2
    assert REMOVED_COMMANDS[name] in " ".join(result.output.split())
