"""Opens an example as a module, so that its parts can be asked."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def load_example() -> Callable[[str], Any]:
    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def needs() -> Callable[..., None]:
    """Skips the test unless all packages are there; some of them cannot be imported."""

    def check(*packages: str) -> None:
        for package in packages:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"the package {package} is not installed")

    return check
