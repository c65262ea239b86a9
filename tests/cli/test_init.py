"""`init`: from data to a first answer in three commands, with nothing written by hand."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from multi_token.cli import app
from multi_token.data.files.open import load_rows
from multi_token.data.formats import to_conversation
from multi_token.data.row_source import open_rows
from multi_token.errors import MultiTokenError
from multi_token.recipe.recipe import load_recipe
from multi_token.testing.files import write_tone
from tests.recipes.data_sets import images_with_captions, ptbxl
from tests.recipes.stand_ins import ENCODERS, LANGUAGE_MODELS, StandIns

TINY = ("train.args.use_cpu=true", "train.args.max_steps=2", "train.stages.0.args={}")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    return StandIns(tmp_path_factory.mktemp("stand_ins"))


def command(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def next_commands(folder: str, *words: str) -> list[list[str]]:
    """Run `init` and return the commands that it prints, in words."""
    done = command("init", folder, *words)
    assert done.exit_code == 0, done.exception
    lines = [line.strip() for line in done.stderr.splitlines()]
    lines = lines[lines.index("next:") + 1 :]
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    assert [words[0] for words in commands[:2]] == ["train", "train"] and len(commands) == 3
    return commands


def embeddings(folder: Path) -> str:
    values = np.random.default_rng(0).normal(size=(20, 8)).tolist()
    columns = {"embedding": values, "label": [f"a cat {i}" for i in range(20)]}
    datasets.Dataset.from_dict(columns).to_parquet(str(folder / "embeddings.parquet"))
    return "embeddings.parquet"


def voices(folder: Path) -> str:
    rows = []
    for i in range(20):
        write_tone(folder / f"{i}.wav", 0.3)
        audio = {"bytes": (folder / f"{i}.wav").read_bytes(), "path": f"{i}.wav"}
        rows.append({"audio": audio, "sentence": f"the first {i}"})
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "voices"))
    return "voices"


def captioned(folder: Path) -> str:
    images_with_captions(folder / "images")
    return "images"


def records(folder: Path) -> str:
    ptbxl(folder / "ptbxl" / "database.csv")
    return "ptbxl/database.csv"


@pytest.mark.parametrize(
    ("write", "encoder", "words", "expected"),
    [
        (captioned, "google/siglip2-base", (), ("image", "captions", "ask")),
        (embeddings, None, (), ("vector", "turns", "predict")),
        (records, None, ("--answer", "report"), ("timeseries", "turns", "ask")),
        (voices, "openai/whisper-small", (), ("speech", "transcripts", "predict")),
    ],
)
def test_three_commands_lead_from_data_to_a_first_answer(
    write: Callable[[Path], str],
    encoder: str | None,
    words: tuple[str, ...],
    expected: tuple[str, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stand_ins: StandIns,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path)
    given = [*words, "--language-model", stand_ins("Qwen/Qwen3-0.6B", LANGUAGE_MODELS)]
    given += [] if encoder is None else ["--encoder", stand_ins(encoder, ENCODERS)]
    _, train, last = next_commands("job", "--data", data, *given)
    # what a terminal gets, and the two steps of a test in place of the epochs
    assert command(*train, *TINY).exit_code == 0
    answered = command(*last)
    assert answered.exit_code == 0, answered.exception
    kind, reading, third = expected
    assert last[0] == third
    recipe = yaml.safe_load(Path("job/recipe.yaml").read_text("utf-8"))
    assert [m["type"] for m in recipe["model"]["modalities"].values()] == [kind]
    source, held_out = recipe["data"]["train"][0], recipe["data"]["eval"][0]
    assert source.get("format", "turns") == reading
    num = {"ptbxl/database.csv": 3}.get(data, 20)
    assert (source["split"], held_out["split"]) == ("train[not ::23]", "train[::23]")
    assert f"({num} rows)" in Path("job/recipe.yaml").read_text("utf-8")
    if third == "predict":
        (line,) = Path("job/answers.jsonl").read_text("utf-8").splitlines()
        assert isinstance(json.loads(line)["answer"], str)
    else:
        assert answered.stdout


def test_flags_answer_every_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("name,first,second\na.png,x,y\nb.png,x,z\n")
    asked = command("init", "job", "--data", "rows.csv")
    assert "--answer COLUMN" in str(asked.exception)
    assert not Path("job").exists()
    flags = ("--answer", "second", "--question", "Q1?", "--question", "Q2?")
    done = command(
        "init", "job", "--data", "rows.csv", "--modality", "photo=image", "--media", "name", *flags
    )
    assert done.exit_code == 0, done.exception
    recipe = yaml.safe_load(Path("job/recipe.yaml").read_text("utf-8"))
    source = recipe["data"]["train"][0]
    assert source["media"] == {"photo": "name"} and source["question"] == ["Q1?", "Q2?"]
    assert source["turns"][1] == {"assistant": "{{ second }}"}
    assert list(recipe["model"]["modalities"]) == ["photo"]
    again = command("init", "job", "--data", "rows.csv")
    assert isinstance(again.exception, MultiTokenError) and "is there already" in str(
        again.exception
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--media", "nam"), r"no such column: did you mean 'name'"),
        (("--modality", "imag"), r"expected one of image, .*did you mean 'image'"),
        (("--answer", "secnd"), r"--answer COLUMN: did you mean 'second'"),
    ],
)
def test_a_wrong_flag_is_a_sentence(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("name,first,second\na.png,x,y\nb.png,x,z\n")
    done = command("init", "job", "--data", "rows.csv", *words)
    assert isinstance(done.exception, MultiTokenError)
    assert re.search(said, str(done.exception))


@pytest.mark.parametrize("order", [sorted, list], ids=["sorted by label", "in turns"])
def test_every_label_is_trained_and_held_out_in_any_order_of_the_rows(
    order: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = order([f"kind {'abcde'[i % 5]}" for i in range(250)])
    lines = [f"{i}.png,{label}\n" for i, label in enumerate(labels)]
    Path("rows.csv").write_text("image,label\n" + "".join(lines))
    done = command("init", "job", "--data", "rows.csv")
    assert done.exit_code == 0, done.exception
    data = yaml.safe_load(Path("job/recipe.yaml").read_text("utf-8"))["data"]
    parts = [load_rows(s["rows"], split=s["split"]) for s in (data["train"][0], data["eval"][0])]
    assert [len({row["label"] for row in part}) for part in parts] == [5, 5]
    ids = [{row["id"] for row in part} for part in parts]
    assert len(ids[0]) + len(ids[1]) == len(ids[0] | ids[1]) == 250


@pytest.mark.parametrize("column", ["diagnosis code", "label-name"])
def test_a_column_of_any_name_holds_the_answers(
    column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text(f"image,{column}\na.png,first\nb.png,second\n")
    done = command("init", "job", "--data", "rows.csv")
    assert done.exit_code == 0, done.exception
    recipe = load_recipe("job/recipe.yaml")
    modalities = recipe.model.modalities
    for source, answer in ((recipe.data.train[0], "second"), (recipe.data.eval[0], "first")):
        opened = open_rows(source, modalities)
        conversation = to_conversation(opened.rows[0], modalities, row_id="row")
        assert answer in str(conversation.messages[-1])


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ("image,caption\nc.png,third\n", r"held\.csv.*no column .*'label'"),
        ("origin,label\nc.png,third\n", r"held\.csv.*no column .*'image'"),
    ],
)
def test_no_recipe_is_written_that_cannot_read_its_rows(
    held_out: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("image,label\na.png,first\nb.png,second\n")
    Path("held.csv").write_text(held_out)
    done = command("init", "job", "--data", "rows.csv", "--eval", "held.csv")
    assert isinstance(done.exception, MultiTokenError) and re.search(said, str(done.exception))
    assert "next:" not in done.stderr and not Path("job").exists()
