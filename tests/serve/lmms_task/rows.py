"""Functions by which the tasks of this folder read a row: its images, or its complete message."""

from __future__ import annotations

from typing import Any

from PIL import Image


def images_of(row: dict[str, Any]) -> list[Image.Image]:
    """All images of a row."""
    return [image.convert("RGB") for image in row["images"]]


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The user's turn, with each image at its `<image>` in the question."""
    first, *texts = row["question"].split("<image>")
    content: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for image, text in zip(images_of(row), texts, strict=True):
        content += [{"type": "image", "url": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]
