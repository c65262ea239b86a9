"""Tiny material for golden runs: a language model, an encoder, images and rows, in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 180, 60)}
VECTORS = {"one": [1.0, -1.0, 0.5, 2.0, 0.0], "two": [-2.0, 0.3, 1.5, -0.7, 1.0]}


def asked(text: str, answer: str, *images: str, vector: str | None = None) -> dict[str, Any]:
    """A row with slots in its text."""
    row: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]
    }
    if images:
        row["images"] = [f"{name}.png" for name in images]
    if vector is not None:
        row["vector"] = VECTORS[vector]
    return row


def preferred(text: str, chosen: str, rejected: str, **media: Any) -> dict[str, Any]:
    """A row with two answers."""
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "chosen": chosen, "rejected": rejected, **media}


NAMING = [
    asked("What is this? <image>", "a red square", "red"),
    asked("What is this? <image>", "a blue square", "blue"),
    asked("Look at <image> and <image>, then say which is first.", "red first", "red", "blue"),
    asked("Which number is <vector>?", "one", vector="one"),
    asked("Which number is <vector>?", "number two", vector="two"),
    asked("Is <vector> in the picture <image>?", "no, it is green", "green", vector="one"),
    asked("Say yes.", "yes"),
    asked("What is a fruit that you like?", "the first of the two"),
]
"""Two modalities, several items and text alone, of several lengths."""

ONE_IMAGE = [
    asked(f"Here is <image>. {text}", answer, name)
    for name in ("red", "blue")
    for text, answer in (("Is it red?", "yes or no"), ("What is it?", name), ("Is it one?", "no"))
]
"""Several questions about one image."""

MEDIA_TEXTS = [
    {
        **asked(f"What is this?\n<image>\nSay it {'very ' * number}well.", f"a {name} one", name),
        "media_texts": {"image": [f"a picture of {name}"]},
    }
    for number, name in enumerate(COLOURS)
]
"""Rows whose images have a media text."""

PAIRS = [
    preferred("What is this? <image>", "red", "blue", images=["red.png"]),
    preferred("What is this? <image>", "blue, I see", "red", images=["blue.png"]),
    preferred("Which is <vector>?", "one, quite clearly", "two", vector=VECTORS["one"]),
    preferred("Which is <vector>?", "two", "one, quite clearly", vector=VECTORS["two"]),
    preferred("Say yes.", "yes", "no, no"),
]
"""Rows with two answers, one of which is preferred."""

ROWS = {"naming": NAMING, "one_image": ONE_IMAGE, "media_texts": MEDIA_TEXTS, "pairs": PAIRS}


def build(folder: Path) -> None:
    """Write `language_model/`, `clip/`, the images, and a .jsonl file of each of `ROWS`."""
    from multi_token.testing import tiny_image_encoder, tiny_language_model

    folder.mkdir(parents=True, exist_ok=True)
    tiny_language_model(folder / "language_model")
    tiny_image_encoder(folder / "clip", "clip")
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
    for name, rows in ROWS.items():
        lines = [json.dumps({"id": f"{name}-{i}", **row}) for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
