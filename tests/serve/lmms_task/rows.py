"""What the tasks beside this file read of a row: its images, or its whole message."""

from __future__ import annotations

from typing import Any

from PIL import Image


def pictures_of(row: dict[str, Any]) -> list[Image.Image]:
    """All images of a row."""
    return [picture.convert("RGB") for picture in row["pictures"]]


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The user's turn, each image where the question says `<image>`."""
    first, *texts = row["question"].split("<image>")
    content: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for picture, text in zip(pictures_of(row), texts, strict=True):
        content += [{"type": "image", "url": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]
