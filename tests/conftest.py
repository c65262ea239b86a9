"""Shared tiny real parts: a language model, encoders, images and rows, built once a session."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import TrainerCallback

from multi_token.modalities.base import Encoder
from multi_token.modalities.vector import VectorModality
from multi_token.registry import register_modality
from multi_token.train import stage as stage_module
from multi_token.types import Features

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
    """A folder with four images and `rows.jsonl`, one naming row for each."""
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
    """The recipe's model, untrained, with pooled images and plain vectors; do not change it."""
    import torch

    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.recipe import Recipe

    fields = recipe_fields(tmp_path_factory.mktemp("model"))
    fields["model"]["modalities"]["vector"] = {
        "type": "vector",
        "dim": 5,
        "projector": {"type": "expand", "factor": 2},
    }
    torch.manual_seed(0)
    return MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)


@pytest.fixture(scope="session")
def families() -> ModuleType:
    """tests/language_models/families.py: tiny models of many families."""
    path = Path(__file__).resolve().parent / "language_models" / "families.py"
    spec = importlib.util.spec_from_file_location("tiny_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROWS = {
    "red": ["image"],
    "one": ["pulse"],
    "blue": ["image", "pulse", "image"],
    "yes": [],
    "two": ["pulse"],
    "green": ["image"],
}
"""Answer -> what its question shows."""


class PulseEncoder(Encoder):
    """Two layers and a BatchNorm, from random weights."""

    pretrained = False

    def __init__(self) -> None:
        super().__init__()
        self.dim = 8
        self.blocks = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 8)])
        self.norm = nn.BatchNorm1d(8)

    def forward(self, **inputs: Tensor) -> Features:
        """`values` [items, length, 5], `mask` [items, length]."""
        values = inputs["values"]
        for block in self.blocks:
            values = torch.tanh(block(values))
        return Features(self.norm(values.transpose(1, 2)).transpose(1, 2), inputs["mask"].bool())


class Pulse(VectorModality):
    """A vector whose encoder learns from the start."""

    type: Literal["pulse"] = "pulse"  # type: ignore[assignment]
    dim: int = 5

    def build_encoder(self) -> PulseEncoder:  # type: ignore[override]
        return PulseEncoder()


@pytest.fixture(scope="session")
def mixed_fields(
    recipe_fields: Callable[..., dict[str, Any]], data: Path, tmp_path_factory: Any
) -> Callable[..., dict[str, Any]]:
    """Fields of a recipe with `image` and `pulse`; keyword arguments change its `train` section."""
    register_modality("pulse", Pulse)
    folder = tmp_path_factory.mktemp("mixed")
    lines = []
    for number, (answer, shown) in enumerate(ROWS.items()):
        images = [str(data / f"{name}.png") for name in ("red", "blue")][: shown.count("image")]
        row: dict[str, Any] = {
            "id": answer,
            "images": images,
            "pulse": [float(number == i) for i in range(5)],
            "messages": [
                {"role": "user", "content": "What is " + " ".join(f"<{s}>" for s in shown) + "?"},
                {"role": "assistant", "content": answer},
            ],
        }
        for key, modality in (("images", "image"), ("pulse", "pulse")):
            if modality not in shown:
                del row[key]
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))

    def fields(output_dir: Path, **train: Any) -> dict[str, Any]:
        mixed = recipe_fields(output_dir, **train)
        mixed["model"]["modalities"]["pulse"] = {
            "type": "pulse",
            "projector": {"type": "expand", "factor": 2},
        }
        mixed["data"] = {"train": [{"rows": str(folder / "rows.jsonl")}]}
        return mixed

    return fields


@pytest.fixture(scope="session")
def tied_language_model(parts: Path, tmp_path_factory: Any) -> str:
    """The folder of the tiny language model with its head tied to its embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = parts / "language_model"
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    folder = tmp_path_factory.mktemp("tied")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def pair(name: str, shown: str, chosen: str, rejected: str, **media: Any) -> dict[str, Any]:
    """A row with two answers."""
    messages = [{"role": "user", "content": f"What is this? {shown}".strip()}]
    return {"id": name, "messages": messages, "chosen": chosen, "rejected": rejected, **media}


@pytest.fixture(scope="session")
def pair_rows(data: Path) -> list[dict[str, Any]]:
    """Two modalities and text; of two rows with one question, each prefers the other's answer."""

    def pulse(number: int) -> list[float]:
        return [float(number == i) for i in range(5)]

    red, blue = (str(data / f"{name}.png") for name in ("red", "blue"))
    return [
        pair("red", "<image>", "red", "blue", images=[red]),
        pair("blue", "<image>", "blue", "red", images=[blue]),
        pair("one", "<pulse>", "one, quite clearly", "two", pulse=pulse(0)),
        pair("two", "<pulse>", "two", "one, quite clearly", pulse=pulse(1)),
        pair("both", "<image> <pulse>", "red one", "two", images=[red], pulse=pulse(0)),
        pair("text", "", "nothing at all", "something"),
    ]


@pytest.fixture
def pair_fields(
    mixed_fields: Callable[..., dict[str, Any]], pair_rows: list[dict[str, Any]], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Fields of a run with a stage `prefer`; `args` and `stage` change it, the rest is `train`."""

    def fields(
        out: Path,
        *,
        stage: Any = None,
        args: Any = None,
        rows: list[dict[str, Any]] = pair_rows,
        before: Any = (),
        **more: Any,
    ) -> dict[str, Any]:
        prefer = {
            "name": "prefer",
            "learn": {"projectors": 1e-2, "adapter": 1e-2},
            "dpo": {},
            **(stage or {}),
        }
        common = {"use_cpu": True, "logging_steps": 1, "report_to": [], "max_steps": 3}
        made = mixed_fields(
            out,
            stages=[*before, prefer],
            args={**common, "train_sampling_strategy": "sequential", **(args or {})},
            adapter={"r": 4},
            **more,
        )
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made["data"] = {"train": [{"rows": str(path)}]}
        return made

    return fields


class At(TrainerCallback):
    """Does something at the beginning of one step."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.step = step
        self.act = act

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            self.act()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Have something done at a step of the next run."""
    bar = stage_module.ProgressBarCallback

    def at(step: int, act: Callable[[], Any]) -> None:
        def bar_and_more(trainer: Any, *args: Any) -> Any:
            trainer.add_callback(At(step, act))
            return bar(trainer, *args)

        monkeypatch.setattr(stage_module, "ProgressBarCallback", bar_and_more)

    return at
