"""Shared tiny real parts: a language model, encoders, pictures and rows, built once a session."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 180, 60), "white": (250,) * 3}


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `language_model/` (Llama, ChatML) and `clip/`."""
    from multi_token.testing import tiny_image_encoder, tiny_language_model

    folder = tmp_path_factory.mktemp("parts")
    tiny_language_model(folder / "language_model")
    tiny_image_encoder(folder / "clip", "clip")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four pictures and `rows.jsonl`, one naming row for each."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
        rows.append(
            {
                "id": name,
                "images": [f"{name}.png"],
                "messages": [
                    {"role": "user", "content": "What is <image>?"},
                    {"role": "assistant", "content": name},
                ],
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def recipe_fields(parts: Path, data: Path) -> Callable[..., dict[str, Any]]:
    """Fields of a small recipe; keyword arguments change its `train` section."""

    def fields(output_dir: Path, **train: Any) -> dict[str, Any]:
        return {
            "model": {
                "language_model": str(parts / "language_model"),
                "modalities": {
                    "image": {
                        "type": "image",
                        "encoder": str(parts / "clip"),
                        "features": "pooled",
                        "projector": {"type": "expand", "factor": 3},
                    }
                },
            },
            "data": {"train": [{"rows": str(data / "rows.jsonl")}]},
            "train": {
                "output_dir": str(output_dir),
                "stages": [
                    {"name": "projector", "learn": {"projectors": 1e-2}, "args": {"max_steps": 4}}
                ],
                "args": {"per_device_train_batch_size": 2, "use_cpu": True, "logging_steps": 1},
                **train,
            },
        }

    return fields


@pytest.fixture(scope="session")
def model(recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> Any:
    """The recipe's model, untrained, with pooled pictures and plain vectors; do not change it."""
    import torch

    from multi_token.checkpoint import compose
    from multi_token.recipe import Recipe

    fields = recipe_fields(tmp_path_factory.mktemp("model"))
    fields["model"]["modalities"]["vector"] = {
        "type": "vector",
        "dim": 5,
        "projector": {"type": "expand", "factor": 2},
    }
    torch.manual_seed(0)
    return compose(Recipe.model_validate(fields).model)


@pytest.fixture(scope="session")
def families() -> ModuleType:
    """tests/language_models/families.py: tiny models of many families."""
    path = Path(__file__).resolve().parent / "language_models" / "families.py"
    spec = importlib.util.spec_from_file_location("tiny_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
