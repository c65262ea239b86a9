"""Fixtures of the tests of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def image_path(tmp_path: Path) -> str:
    """Path of a small image."""
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path)
    return str(path)
