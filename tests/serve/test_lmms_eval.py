"""lmms-eval evaluates a server through its OpenAI adapter, with the command of docs/serving.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from multi_token.types import Conversation, Media, Message, Part, Text
from tests.serve.asking import BLUE, NUM_TOKENS, RED
from tests.serve.running_server import png, running

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "serve"
ASIDE = Path(sys.prefix) / "lmms-eval"
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
LINES = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S) if not kind]
GREEN = png((20, 180, 60), 30)
FIRST = [
    ([RED], "What is this?"),
    ([BLUE], "What is this?"),
    ([BLUE, RED], "Are they the same?"),
    ([RED, BLUE], "Are they the same?"),
]
WITHIN = [
    ([GREEN], "Is <image> a leaf?"),
    ([GREEN, RED], "<image> is green. Is <image>?"),
    ([], "Is grass green?"),
]


def within(images: list[bytes], question: str) -> tuple[Part, ...]:
    first, *texts = question.split("<image>")
    parts: list[Part] = [Text(first)]
    for image, text in zip(images, texts, strict=True):
        parts += [Media("image", image), Text(text)]
    return tuple(part for part in parts if part != Text(""))


def write_rows(path: Path, rows: list[tuple[list[bytes], str]], answers: list[str]) -> None:
    """Rows with the images inside them."""
    from datasets import Dataset, Features, Image, List, Value

    columns = {
        "images": [[{"bytes": data, "path": None} for data in images] for images, _ in rows],
        "question": [question for _, question in rows],
        "answer": answers,
    }
    text = Value("string")
    features = Features({"images": List(Image()), "question": text, "answer": text})
    Dataset.from_dict(columns, features=features).to_parquet(path)


def run_lmms_eval(url: str, folder: Path, tasks: str) -> None:
    """Run the command of the page with this server, these tasks and few tokens."""
    (line,) = [block for block in LINES if "lmms_eval" in block]
    for old, new in (
        ("python -m", f"{sys.executable} -m"),
        ("http://127.0.0.1:8000", url),
        ("model_version=siglip", "model_version=tiny-run"),
        ("--tasks pope", f"--tasks {tasks} --include_path {HERE / 'lmms_task'}"),
        ("max_new_tokens=256", f"max_new_tokens={NUM_TOKENS}"),
    ):
        assert line.count(old) == 1, f"{old} in {line}"
        line = line.replace(old, new)
    of_its_own = {"PYTHONPATH": str(ASIDE), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euc", line],
        cwd=folder,
        env={**os.environ, **of_its_own},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def logged(folder: Path, task: str) -> tuple[list[str], float]:
    """The answers that lmms-eval wrote down, in the order of the rows, and its score."""
    (samples,) = folder.glob(f"**/*_samples_{task}.jsonl")
    rows = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    (results,) = folder.glob("**/*_results.json")
    score = json.loads(results.read_text("utf-8"))["results"][task]["exact_match,none"]
    return [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])], score


@pytest.mark.slow
def test_lmms_evals_openai_adapter_gets_the_answers_that_generate_gives(
    served_model: Any, tmp_path: Path
) -> None:
    if not ASIDE.is_dir():
        pytest.skip("lmms-eval is not installed: make test-slow puts it aside")

    def generated(*parts: Part) -> str:
        conversation = Conversation((Message("user", parts),))
        (answer,) = served_model.generate([conversation], max_new_tokens=NUM_TOKENS)
        return answer

    first = [generated(*(Media("image", p) for p in ps), Text(q)) for ps, q in FIRST]
    inside = [generated(*within(ps, q)) for ps, q in WITHIN]
    assert len({*first, *inside}) == len(first) + len(inside), "images make no difference"
    write_rows(tmp_path / "first.parquet", FIRST, first)
    write_rows(tmp_path / "within.parquet", WITHIN, [*inside[:-1], "no such answer"])
    with running(served_model) as server:
        run_lmms_eval(server.url, tmp_path, "images_first,images_within")
    answers, score = logged(tmp_path, "images_first")
    assert [answer.strip() for answer in answers] == first
    assert score == 1.0
    answers, score = logged(tmp_path, "images_within")
    assert [answer.strip() for answer in answers] == inside
    assert score == pytest.approx(2 / 3)


def test_all_requirements_of_lmms_eval_are_pinned() -> None:
    names = (HERE / "lmms_requirements.txt").read_text("utf-8").splitlines()
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    for name in [name for name in names if not name.startswith("#")]:
        assert re.search(rf"^{re.escape(name)}==", pins, re.M), name
