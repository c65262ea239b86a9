"""Lines before and after a stage: parts, trainable groups, wait for data (train/progress.py)."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from multi_token.errors import LanguageModelError
from multi_token.language_model.lora import adapter_parameters
from multi_token.recipe.recipe import Recipe
from multi_token.train.progress import data_wait_line
from multi_token.train.run import train


def save_tiny_model(family: str, folder: Path) -> None:
    path = Path(__file__).resolve().parent.parent / "language_models" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None and spec.loader is not None
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    families.save_tiny_model(family, folder)


STAGES = [
    {
        "name": "both",
        "learn": {"projectors": 1e-2, "projector_biases": 1e-1, "adapter": 2e-4},
        "args": {"max_steps": 2},
    }
]


def test_a_run_prints_its_parts_trainable_groups_and_supervised_tokens(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path / "run", stages=STAGES)
    console = Console(record=True, width=200, file=io.StringIO())
    model = train(Recipe.model_validate(fields), console=console)
    said = console.export_text().splitlines()

    assert "language model LlamaForCausalLM: float32, 0.2 MB" in said
    assert any(line.startswith("encoder of image: float32, ") for line in said)
    biases = sum(layer.bias.numel() for layer in model.projector("image").final_layers())
    assert f"  projector_biases: {biases} parameters in float32, learning rate 0.1" in said, (
        "three perceptrons of 32"
    )
    lora = sum(p.numel() for p in adapter_parameters(model.language_model))
    assert f"  adapter: {lora:,} parameters in float32, learning rate 0.0002" in said
    (first,) = [line for line in said if line.startswith("first batch: ")]
    num_tokens, num_supervised = int(first.split()[2]), int(first.split()[4])
    assert 0 < num_supervised < num_tokens
    assert f"({num_supervised / num_tokens:.0%}) supervised" in first
    order = [
        next(i for i, line in enumerate(said) if line.startswith(start))
        for start in ("language model", "rows of", "stage both", "first batch")
    ]
    assert order == sorted(order)
    assert any(
        line.lstrip()[:1].isdigit() and "of the time was waiting for data" in line for line in said
    )


def test_a_long_wait_for_data_is_printed_with_the_remedy() -> None:
    little, none = (data_wait_line(s, num_workers=0, streamed=False) for s in (0.049, None))
    assert little == "  4.9% of the time was waiting for data"
    assert none == "  no step was taken"
    alone, beside = (data_wait_line(0.3, num_workers=num, streamed=False) for num in (0, 3))
    assert "feature_cache: true" not in data_wait_line(0.3, num_workers=0, streamed=True)
    assert "feature_cache" not in data_wait_line(
        0.3, num_workers=0, streamed=False, can_cache=False
    )
    assert "by the process that trains; set train.args.dataloader_num_workers: 2" in alone
    assert "by 3 data workers; set train.args.dataloader_num_workers: 6" in beside
    assert "train.feature_cache: true" in alone


def test_capabilities_are_printed_or_refused_before_a_row_is_read(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    save_tiny_model("RWKV", tmp_path / "language_model")
    fields = recipe_fields(tmp_path / "run", packing={"share": True})
    fields["model"]["language_model"] = str(tmp_path / "language_model")
    fields["data"]["train"] = [{"rows": str(tmp_path / "rows that are not there.jsonl")}]
    console = Console(record=True, width=300, file=io.StringIO())
    with pytest.raises(LanguageModelError, match="cannot take packed rows"):
        train(Recipe.model_validate(fields), console=console)
    assert "RwkvForCausalLM gives other answers when its rows are padded on the left" in (
        console.export_text()
    )
