"""What the tasks beside this file read of a row: its pictures, or its whole message.

Border: imported by lmms-eval, in its own process, by the names in the `.yaml` files.
"""

from __future__ import annotations

from typing import Any

from PIL import Image


def pictures_of(row: dict[str, Any]) -> list[Image.Image]:
    """All pictures of a row."""
    return [picture.convert("RGB") for picture in row["pictures"]]


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The user's turn, each picture where the question says `<image>`."""
    first, *texts = row["question"].split("<image>")
    content: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for picture, text in zip(pictures_of(row), texts, strict=True):
        content += [{"type": "image", "url": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]
