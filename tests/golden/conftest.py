"""One workbench for all golden tests of a session: each run is trained once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.golden.bench import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: Any) -> Bench:
    """The tiny material, and golden runs on demand."""
    folder: Path = tmp_path_factory.mktemp("golden")
    return Bench(folder)
