"""Pieces of self-contained HTML pages: their style, and curves."""

from pathlib import Path


def style() -> str:
    """The style sheet of every page, to stand inside it."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")
