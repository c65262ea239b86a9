"""One precision for all that a run does with its model: attention that takes 16 bits alone works.

The stand-in has flash attention's contract and transformers' cast before it, none of its kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from multi_token.errors import LanguageModelError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.train.plan.run_plan import plan_run
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
COLOURS = ("red", "blue", "green", "white")
LEARN = {
    "projector": {"projectors": 1e-2},
    "adapter": {"projectors": 1e-3, "adapter": 1e-3},
    "full": {"projectors": 1e-3, "language_model": 1e-3},
}


def _half_only(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> Any:
    target = get_target_dtype(query, module)
    if target is not None and query.dtype == torch.float32:
        query, key, value = query.to(target), key.to(target), value.to(target)
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return sdpa_attention_forward(module, query, key, value, mask, **options)


@pytest.fixture(scope="module", autouse=True)
def half_only() -> Iterator[None]:
    """An attention of transformers, `half_only`, that refuses float32."""
    AttentionInterface.register("half_only", _half_only)
    AttentionMaskInterface.register("half_only", sdpa_mask)
    yield


@pytest.fixture
def half_fields(recipe_fields: Fields, data: Path, tmp_path: Path) -> Fields:
    """Fields of a run on `half_only`; `more` goes into its stage."""

    def fields(
        learn: str,
        *,
        dtype: str = "bfloat16",
        rows: list[dict[str, Any]] | None = None,
        bf16: bool = True,
        packing: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        source = {"rows": str(data / "rows.jsonl")}
        if rows is not None:
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            source = {"rows": str(path)}
        stage = {"name": learn, "learn": LEARN[learn], "args": {"max_steps": 2}, **more}
        made = recipe_fields(tmp_path / "run", stages=[stage], packing=packing, num_samples=2)
        made["train"]["args"]["bf16"] = bf16
        made["model"] |= {"attn_implementation": "half_only", "dtype": dtype}
        made["data"] = {"train": [source], "eval": [source]}
        return made

    return fields


def trained(fields: dict[str, Any]) -> dict[str, Any]:
    """Train; return the run's report."""
    train(Recipe.model_validate(fields), console=Console(quiet=True))
    return json.loads((Path(fields["train"]["output_dir"]) / "report.json").read_text())


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_whole_language_model_trains_answers_and_is_scored_on_attention_in_16_bits(
    half_fields: Fields, packing: bool
) -> None:
    fields = half_fields("full", packing=packing)
    report = trained(fields)
    out = Path(fields["train"]["output_dir"])
    weights = load_file(out / "language_model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    (samples,) = report["stages"][0]["samples"]
    assert len(samples["answers"]) == 2
    assert report["blind"]["num_rows"] == 4
    # and it is used in the precision that it was trained to compute in
    model = MultiTokenForConditionalGeneration.from_pretrained(out)
    assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
    assert len(model.generate([{"messages": [{"role": "user", "content": "red"}]}])) == 1


@pytest.mark.parametrize("learn", ["projector", "adapter"])
def test_float32_weights_train_on_attention_in_16_bits(half_fields: Fields, learn: str) -> None:
    report = trained(half_fields(learn, dtype="float32"))
    assert report["blind"]["num_rows"] == 4


def test_the_reference_and_the_teacher_run_on_attention_in_16_bits(
    half_fields: Fields, data: Path, tmp_path: Path
) -> None:
    question = {"role": "user", "content": "What is <image>?"}
    rows = [{"id": n, "images": [str(data / f"{n}.png")], "messages": [question]} for n in COLOURS]
    pairs = [{**row, "chosen": row["id"], "rejected": "no"} for row in rows]
    trained(half_fields("full", rows=pairs, dpo={"beta": 0.1}))
    texts = [
        {
            **row,
            "media_texts": {"image": [row["id"]]},
            "messages": [question, {"role": "assistant", "content": row["id"]}],
        }
        for row in rows
    ]
    taught = half_fields("adapter", dtype="float32", rows=texts, distillation={})
    taught["train"]["output_dir"] = str(tmp_path / "taught")
    trained(taught)


def test_trial_steps_of_a_plan_run_on_attention_in_16_bits(half_fields: Fields) -> None:
    plan_run(Recipe.model_validate(half_fields("full")), console=Console(quiet=True))


def test_without_bf16_attention_in_16_bits_is_refused_before_a_step(half_fields: Fields) -> None:
    with pytest.raises(LanguageModelError, match="cannot be trained through: FlashAttention only"):
        trained(half_fields("full", bf16=False))
