"""Example of the kit for `vector`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def vector_example(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """One vector as a row holds it, and a file with a sequence of them."""
    path = folder / "five.npy"
    np.save(path, np.sin(np.arange(20.0)).reshape(5, 4))
    return {"type": "vector", "dim": 4}, [[0.5, -1.0, 2.0, 0.0], str(path)]
