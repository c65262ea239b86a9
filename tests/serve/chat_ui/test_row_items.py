"""Rows as requests: the bytes of an item, and the end of a row's question."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.client_load import request_messages
from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.serve.chat_ui.examples import bytes_of, question_of
from multi_token.types import Conversation, Media, Message, Text
from tests.serve.running_server import b64, npy, png

HERE = Fetch(allow_urls=False)
NUMBERS = npy(1, 2, 3)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b"as it is", b"as it is"),
        ([1, 2, 3], NUMBERS),
        ((1.0, 2.0, 3.0), NUMBERS),
        (np.array([1, 2, 3], dtype=np.int64), NUMBERS),
        (torch.tensor([1.0, 2.0, 3.0]), NUMBERS),
        ({"bytes": b"pixels", "path": None}, b"pixels"),
        ({"bytes": b"pixels", "path": "a.png"}, b"pixels"),
        ({"text": "a red lamp"}, b"a red lamp"),
        ({"image": b"pixels"}, b"pixels"),
        ("data:image/png;base64," + b64(b"pixels"), b"pixels"),
    ],
)
def test_an_item_is_the_bytes_that_a_client_would_send(source: Any, expected: bytes) -> None:
    assert bytes_of(source, HERE) == expected


def test_a_path_is_read_and_a_text_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"inside")
    fetch = Fetch(root=str(tmp_path), allow_urls=False)
    assert bytes_of("a.txt", fetch) == b"inside"
    assert bytes_of({"path": "a.txt"}, fetch) == b"inside"
    assert bytes_of("a.txt", fetch, is_text=True) == b"a.txt"


def test_a_pil_image_becomes_a_png() -> None:
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    opened = Image.open(io.BytesIO(bytes_of(image, HERE)))
    assert opened.format == "PNG" and opened.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "source",
    [
        {"path": "a.wav", "start": 1.5},
        {"array": [0.0], "sampling_rate": 16000},
        {},
        [1, "two"],
        [[1, 2], [3]],
        "nowhere.png",
        "https://example.org/a.png",
    ],
)
def test_an_item_that_no_single_file_holds_is_refused(source: Any) -> None:
    with pytest.raises(MediaError):
        bytes_of(source, HERE)


def test_a_question_ends_before_the_last_answer() -> None:
    messages = [
        Message("system", (Text("Be short."),)),
        Message("user", (Media("image", png()), Text("What is it?"))),
        Message("assistant", (Text("red"),)),
        Message("user", (Text("And now?"),)),
        Message("assistant", (Text("st"), Text("ill"))),
    ]
    asked, answer = question_of(Conversation(tuple(messages)))
    assert asked == tuple(messages[:-1]) and answer == "still"
    assert question_of(Conversation(tuple(messages[:2]))) == (tuple(messages[:2]), "")
    sent = request_messages(asked, HERE)
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    assert sent[1]["content"] == [
        {"type": "media", "modality": "image", "data": b64(png())},
        {"type": "text", "text": "What is it?"},
    ]
    assert sent[2]["content"] == "red"
