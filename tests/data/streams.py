"""Rows to stream, for the tests of streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ("red", "blue", "green", "white")
BAD = {"id": "bad", "messages": []}


def row_of(number: int, data: Path) -> dict[str, Any]:
    """Return a row that names itself; one in four has no image, and lengths differ."""
    colour = WORDS[number % 4]
    shown = "" if number % 4 == 3 else "<image>"
    row: dict[str, Any] = {
        "id": f"{number:02}",
        "messages": [
            {"role": "user", "content": f"What is {shown}{' really' * (number % 5)}?"},
            {"role": "assistant", "content": colour},
        ],
    }
    if shown:
        row["image"] = {"bytes": (data / f"{colour}.png").read_bytes(), "path": None}
    return row
